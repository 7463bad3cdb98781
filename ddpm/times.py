"""Sampling of the training times t."""

import torch
from torch import Tensor

from ddpm.checks import check_one_of
from ddpm.schedules import NoiseSchedule

TIME_SAMPLINGS = ("uniform", "stratified", "loss_aware", "lognormal")


class TimeSampler:
    r"""Draw t for a batch, with the weight of each image's loss.

    "uniform": independent, every t alike. "stratified": one t from each of B equal parts of 1..T. "loss_aware": more
    often where the loss is large,

    .. math:: L_\text{vlb} = E_{t \sim p_t}\left[\frac{L_t}{p_t}\right], \quad
        p_t \propto \sqrt{E[L_t^2]}, \quad \sum_t p_t = 1 \qquad \text{[iDDPM (18)]}

    with E over the last ten losses of each t, and uniform until there are ten finite ones of each. These three have
    the same mean loss. "lognormal" changes it: most t are at intermediate noise levels,

    .. math:: \ln \sigma \sim \mathcal N(P_\text{mean}, P_\text{std}^2) \qquad \text{[EDM (noise levels)]}

    each the t whose ln sigma, which is -lambda_t, is nearest; never one of pure noise.

    Args:
        kind: one of the four.
        schedule: whose steps they are.
        device: the device of t and of the stored losses.
    Raises:
        ValueError: a kind that is not known; lognormal times of a schedule of pure noise.
    Source: Improved DDPM (arXiv 2102.09672), section 3.3; strata after Variational Diffusion Models (arXiv 2107.00630);
        EDM (arXiv 2206.00364), table 1.
    """

    HISTORY = 10
    P_MEAN, P_STD = -1.2, 1.2  # of EDM, for data of standard deviation 0.5

    def __init__(self, kind: str, schedule: NoiseSchedule, device: torch.device | str = "cpu"):
        check_one_of("time_sampling", kind, TIME_SAMPLINGS)
        self.kind, self.T = kind, (T := schedule.T)
        self.levels = schedule.with_finite_lambda() if kind == "lognormal" else schedule
        self.losses = torch.zeros(T + 1, self.HISTORY, device=device, dtype=torch.float64)
        self.count = torch.zeros(T + 1, device=device, dtype=torch.long)

    def to(self, device: torch.device | str) -> None:
        """Move the stored losses, and the drawing of t, to another device."""
        self.losses, self.count = self.losses.to(device), self.count.to(device)

    def draw(self, B: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Return t, integers (B,) in 1..T, and 1 / (T p_t), (B,), or None where that is 1."""
        device = self.count.device
        if self.kind == "uniform":
            return torch.randint(1, self.T + 1, (B,), device=device, generator=generator), None
        if self.kind == "stratified":
            u = torch.rand(B, device=device, dtype=torch.float64, generator=generator)
            stratum = torch.arange(B, device=device)
            return ((stratum + u) / B * self.T).long().clamp(max=self.T - 1) + 1, None
        if self.kind == "lognormal":
            z = torch.randn(B, device=device, dtype=torch.float64, generator=generator)
            ln_sigma = self.P_MEAN + self.P_STD * z
            return self.levels.to(device).t_at(-ln_sigma).round().long().clamp(min=1), None
        p = self.probabilities()
        chosen = torch.multinomial(p, B, replacement=True, generator=generator)
        return chosen + 1, (1 / (self.T * p[chosen])).float()

    def probabilities(self) -> Tensor:
        """Return p_t, (T,), of loss-aware sampling."""
        root = (self.losses[1:] ** 2).mean(1).sqrt()
        known = (self.count[1:] >= self.HISTORY).all() & root.isfinite().all() & (root > 0).all()
        p = torch.where(known, root, torch.ones_like(root))
        return p / p.sum()

    def update(self, t: Tensor, loss: Tensor) -> None:
        """Store the losses (B,), unweighted, of the times t (B,), without synchronising with the device."""
        if self.kind != "loss_aware":
            return
        same = t[:, None] == t
        earlier, later = same.tril(-1).sum(1), same.triu(1).sum(1)
        row = t.where(later < self.HISTORY, 0)  # entries that the same batch overwrites go to row 0, which is not read
        self.losses[row, (self.count[t] + earlier) % self.HISTORY] = loss.double()
        self.count.index_add_(0, t, torch.ones_like(t))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state that a resumed run needs."""
        return {"losses": self.losses, "count": self.count} if self.kind == "loss_aware" else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore `state_dict`."""
        for name, value in state.items():
            getattr(self, name).copy_(value)
