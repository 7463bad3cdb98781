"""Score matching and Langevin dynamics: learning the gradient of log p, and sampling with it."""

from ddpm.score.ladder import eps_from_score, noise_level, score_at_sigma, score_from_eps
from ddpm.score.langevin import adjusted, log_acceptance, unadjusted
from ddpm.score.objectives import (
    PROJECTIONS,
    Score,
    denoising,
    denoising_ladder,
    explicit,
    finite_difference_sliced,
    finite_difference_sliced_vr,
    implicit,
    sliced,
    sliced_vr,
)

__all__ = [
    "PROJECTIONS",
    "Score",
    "adjusted",
    "denoising",
    "denoising_ladder",
    "eps_from_score",
    "explicit",
    "finite_difference_sliced",
    "finite_difference_sliced_vr",
    "implicit",
    "log_acceptance",
    "noise_level",
    "score_at_sigma",
    "score_from_eps",
    "sliced",
    "sliced_vr",
    "unadjusted",
]
