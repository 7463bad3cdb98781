"""Error of a learned score against that of the data, where their density is known."""

import math
from collections.abc import Callable
from typing import Any

import torch

from ddpm.data.dataset import Dataset
from ddpm.forward import q_sample
from ddpm.metrics.intervals import half_width
from ddpm.oracle import JointMixture
from ddpm.randomness import SampleNoise, generator
from ddpm.schedules import NoiseSchedule
from ddpm.score import noise_level, score_from_eps
from ddpm.sources.trained import TrainedSampler

MOST_LEVELS = 10  # noise levels of a schedule that are measured by default


def score_levels(schedule: NoiseSchedule, sigma: list[float] | None = None) -> list[float]:
    """Return the times at which a score is measured: of the levels sigma, or at most 10 of the whole schedule.

    Default levels are evenly spaced in log sigma, from t = 1 to T (T - 1 where beta_T = 1).

    Raises: ValueError for a level that the schedule does not reach, or one that is not > 0.
    """
    last = schedule.T - (schedule.alpha_bar[-1].item() == 0)
    if last < 1:
        raise ValueError("beta_T = 1 at the only step: there is no level of noise with a score")
    low, high = (noise_level(schedule, t).item() for t in (1, last))
    if sigma is None:
        if last <= MOST_LEVELS:
            return [float(t) for t in range(1, last + 1)]
        middle = torch.linspace(-math.log(low), -math.log(high), MOST_LEVELS, dtype=torch.float64)[1:-1]
        return [1.0, *NoiseSchedule(schedule.beta[1 : last + 1]).t_at(middle).tolist(), float(last)]
    for value in sigma:
        if not low * (1 - 1e-9) <= value <= high * (1 + 1e-9):
            raise ValueError(f"sigma = {value:g}: the network was trained on noise levels from {low:.4g} to {high:.4g}")
    at = NoiseSchedule(schedule.beta[1 : last + 1]).t_at(-torch.tensor(sigma, dtype=torch.float64).log())
    return [min(max(t, 1.0), float(last)) for t in at.tolist()]


@torch.no_grad()
def measure_score_error(
    source: TrainedSampler,
    data: Dataset,
    n: int,
    levels: list[float],
    batch: int,
    callback: Callable[[int], None] | None = None,
) -> tuple[str, str, dict[str, Any]]:
    r"""Return protocol name, summary and record of the relative error of the score, on fresh samples of the density.

    .. math:: \frac{E_{q(x_t)} \| s_\theta(x_t) - \nabla \log q(x_t) \|^2}{E_{q(x_t)} \| \nabla \log q(x_t) \|^2}
        \qquad \text{[Score (relative error)]}

    at each level; the value is their mean. It does not depend on the scale of x.

    Args:
        source: the network, never clipped; its seed keys the samples.
        data: with a known density.
        n: samples at each level.
        levels: times t, integers as floats or real ones.
        batch: samples at a time; does not change the result.
        callback: called with the number of samples after each evaluation of the network.
    Raises: ValueError for data whose density is not known, and where an error is not finite.
    """
    schedule, truth = source.diffusion.schedule, JointMixture.of(source.diffusion.schedule, data)
    x_0 = truth.sample(n, generator(source.seed, "score error")).float()
    errors, variances = [], []
    for i, t in enumerate(levels):
        t = int(t) if t == int(t) else t
        off, size = [], []
        for rows in torch.arange(n).split(batch):
            noise = SampleNoise(source.seed, rows.tolist(), "score error")
            x_t = q_sample(schedule, x_0[rows], t, noise(i, data.shape))
            predict = source.predictor(source.condition(rows.tolist()))
            s = score_from_eps(schedule, predict(x_t.to(source.device), t).eps.cpu().double(), t)
            exact = truth.score(x_t, t).double()
            off.append((s - exact).square().sum(1))
            size.append(exact.square().sum(1))
            if callback is not None:
                callback(len(rows))
        away, whole = torch.cat(off), torch.cat(size)
        ratio = (away.mean() / whole.mean()).item()
        errors.append(ratio)
        variances.append(((away - ratio * whole).var() / whole.mean().square() / n).item() if n > 1 else math.nan)
    value, half = sum(errors) / len(levels), half_width(math.sqrt(sum(variances)) / len(levels))
    if not math.isfinite(value):
        raise ValueError("the score that was learned is not finite")
    sigma = [noise_level(schedule, t).item() for t in levels]
    each = ", ".join(f"{error:.3%} at {level:.3g}" for error, level in zip(errors, sigma, strict=True))
    spread = (value - half, value + half) if n > 1 else (None, None)
    values: dict[str, Any] = {"value": value, "low": spread[0], "high": spread[1], "real_vs_real": 0.0, "n": n}
    values |= {"interval": "draws", "sigma": sigma, "errors": errors}
    summary = f"{value:.3%} relative squared error of the score\nby noise level sigma: {each}"
    return f"score_error_{len(levels)}levels_{n}_density", summary, values
