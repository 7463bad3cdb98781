"""Annealed Langevin dynamics (Song & Ermon, arXiv 1907.05600), and predictor-corrector sampling."""

from collections.abc import Sequence

from torch import Tensor

from ddpm.checks import is_whole
from ddpm.forward import q_sample
from ddpm.samplers.base import Sampler, Step, alpha_bars
from ddpm.schedules import NoiseSchedule
from ddpm.score import score_from_eps, unadjusted

MOST_MOVES = 100_000  # more are slips, and take too long


class AnnealedLangevin(Sampler):
    r"""Annealed Langevin dynamics: at one noise level after another, x moves along its score, and noise is added.

    In x = x_t / sqrt(alpha_bar_t) = x_0 + sigma eps, whose score at the level sigma = sqrt((1 - alpha_bar) / alpha_bar)
    is -eps_theta / sigma, a move is

    .. math:: x' = x + \frac h2 s_\theta(x, \sigma) + \sqrt h\, z, \quad h = r \sigma^2
        \qquad \text{[NCSN (Algorithm 1)]}

    After the moves at a level x goes on to the next one as it is, or by a step of DDIM: a predictor, whose x Langevin
    dynamics then corrects. The last step is D(x_t, t), the mean, as for every sampler.

    Where x goes on as it is, neighbouring levels have to be close, as those of a geometric ladder of noise are; a
    schedule of diffusion takes the predictor. A level's own distribution is met up to a bias of first order in r: of
    data N(0, c^2) the variance is v / (1 - r sigma^2 / (4 v)) in place of v = c^2 + sigma^2.

    Args:
        steps, spacing, grid, times: the levels, as in `Sampler`; None for all T.
        moves: at each level, 1 to 100,000; each evaluates the network once.
        r: of the step size, in (0, 4); the paper has 0.2.
        predictor: whether x goes on to the next level by DDIM, which takes one more evaluation a level.
    Raises:
        ValueError: an argument out of range; on use, a schedule with beta_T = 1, whose sigma_T is infinite.
    Source: Generative Modeling by Estimating Gradients of the Data Distribution (arXiv 1907.05600), where r is
        epsilon / sigma_L^2; the predictor: Score SDE (arXiv 2011.13456), section 4.2; the mean at the end:
        Jolicoeur-Martineau et al. (arXiv 2009.05475).
    """

    stochastic = True

    def __init__(
        self,
        steps: int | None = None,
        moves: int = 100,
        r: float = 0.2,
        predictor: bool = False,
        spacing: str = "uniform",
        grid: str = "integer",
        times: Sequence[int | float] | None = None,
    ):
        super().__init__(steps, spacing, grid, times)
        if not is_whole(moves, 1, MOST_MOVES):
            raise ValueError(f"moves = {moves!r}: the moves at a level must be an integer >= 1, at most {MOST_MOVES:,}")
        if isinstance(r, bool) or not isinstance(r, int | float) or not 0 < r < 4:
            raise ValueError(f"r = {r!r} must lie in (0, 4): from 4 on the moves do not converge")
        if not isinstance(predictor, bool):
            raise ValueError(f"predictor = {predictor!r} must be true or false")
        self.moves, self.r, self.predictor = moves, r, predictor

    def times(self, schedule: NoiseSchedule) -> list[int] | list[float]:
        """Return the times of `Sampler.times`, repeated per evaluation: a repeated time is a Langevin move."""
        if alpha_bars(schedule, schedule.T)[0] == 0:
            raise ValueError("Langevin dynamics needs a finite noise level at T, but beta_T = 1 here")
        levels = super().times(schedule)
        visits = [self.moves + self.predictor] * (len(levels) - 2) + [self.moves + 1]
        return [t for t, often in zip(levels, visits, strict=False) for _ in range(often)] + [levels[-1]]

    def step(self, step: Step) -> Tensor:
        """Take a move at t where s = t; else go on to s, by the predictor or, after a move, unchanged."""
        schedule, _, x_t, t, s, pred, _, noise = step
        if s < t and self.predictor:
            return q_sample(schedule, pred.x_0, s, pred.eps)
        alpha_bar_t, alpha_bar_s = alpha_bars(schedule, t, s)
        h = self.r * (1 - alpha_bar_t)  # r sigma^2, in x_t
        moved = unadjusted(lambda x_t: score_from_eps(schedule, pred.eps, t), x_t, h, noise)
        return moved if s == t else (alpha_bar_s / alpha_bar_t) ** 0.5 * moved
