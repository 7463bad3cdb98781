"""Oracles: data whose exact denoiser, density and flow are known in closed form, as a perfect network.

Samplers, bounds and losses are measured against them without a network. Written independently of the functions that
they judge: of `ddpm` they use the schedule's alpha_bar alone, at integer or real t.
"""

import math

import torch
from torch import Tensor

from ddpm.schedules import NoiseSchedule, Time
from ddpm.targets import Prediction

PARTS = ("weights", "means", "covariances")  # of data whose density is known


class MixtureOracle:
    """The oracle of data whose pixels are independent draws from a mixture of Gaussians N(m_k, c_k^2) with weights w_k.

    With a = sqrt(alpha_bar_t), component k of x_t is N(a m_k, a^2 c_k^2 + 1 - a^2), so posteriors are Gaussian sums.

    Args:
        schedule: the forward process.
        weights, means, variances: w_k, m_k and c_k^2, K of each; the weights add up to 1.
        frac: of the reverse variance, as in `Prediction`.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        weights: list[float],
        means: list[float],
        variances: list[float],
        frac: float | Tensor = 0.0,
    ):
        self.schedule, self.frac = schedule, frac
        self.w, self.m, self.c2 = (torch.tensor(v, dtype=torch.float64) for v in (weights, means, variances))

    def at(self, t: Time, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return alpha_bar_t (B or 1, 1, ..., 1), and the components' mean and variance, the same with K at the end."""
        alpha_bar = self.schedule.alpha_bar_at(t).reshape(-1, *[1] * (x.ndim - 1))
        a2 = alpha_bar[..., None]
        return alpha_bar, a2.sqrt() * self.m, a2 * self.c2 + 1 - a2

    def joint(self, x_t: Tensor, t: Time) -> Tensor:
        """Return log w_k N(x_t; component k), (B, *, K)."""
        _, mean, var = self.at(t, x_t)
        return self._joint(x_t, mean, var)

    def _joint(self, x_t: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return self.w.log() - 0.5 * (2 * math.pi * var).log() - (x_t.double()[..., None] - mean) ** 2 / (2 * var)

    def log_prob(self, x_t: Tensor, t: Time) -> Tensor:
        """Return log q(x_t) of each pixel, (B, *)."""
        return self.joint(x_t, t).logsumexp(-1)

    def denoise(self, x_t: Tensor, t: Time) -> Prediction:
        """Return E[eps | x_t] and E[x_0 | x_t], (B, *): the prediction of a perfect network. A `Denoise`."""
        alpha_bar, mean, var = self.at(t, x_t)
        share = self._joint(x_t, mean, var).softmax(-1)
        score = (x_t.double()[..., None] - mean) / var
        x_0 = (share * (self.m + alpha_bar[..., None].sqrt() * self.c2 * score)).sum(-1)
        eps = (1 - alpha_bar).sqrt() * (share * score).sum(-1)
        return Prediction(eps.to(x_t.dtype), x_0.to(x_t.dtype), self.frac)

    def cdf(self, x_t: Tensor, t: Time) -> Tensor:
        """Return P(pixel of x_t <= its value), (B, *)."""
        _, mean, var = self.at(t, x_t)
        return (self.w * torch.special.ndtr((x_t[..., None] - mean) / var.sqrt())).sum(-1)

    def exact_ode(self, x_t: Tensor, t: int | float, s: int | float) -> Tensor:
        """Return the probability flow from t to s; in one dimension it preserves quantiles."""
        low, high = torch.full_like(x_t, -20.0), torch.full_like(x_t, 20.0)
        target = self.cdf(x_t, t)
        for _ in range(80):
            middle = (low + high) / 2
            below = self.cdf(middle, s) < target
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


class GaussianOracle(MixtureOracle):
    """The oracle of data N(mean, variance): the mixture with one component, where the flow is affine too."""

    def __init__(self, schedule: NoiseSchedule, mean: float = 0.7, variance: float = 0.25, frac: float | Tensor = 0.0):
        super().__init__(schedule, [1.0], [mean], [variance], frac)
        self.mean, self.variance = mean, variance

    def marginal(self, t: int | float) -> tuple[float, float]:
        """Return the mean and variance of q(x_t)."""
        alpha_bar = self.schedule.alpha_bar_at(t).item()
        return math.sqrt(alpha_bar) * self.mean, alpha_bar * self.variance + 1 - alpha_bar

    def x_0_variance(self, t: int | float) -> float:
        """Return Var[x_0 | x_t]."""
        return self.variance * (1 - self.schedule.alpha_bar_at(t).item()) / self.marginal(t)[1]

    def exact_ode(self, x_t: Tensor, t: int | float, s: int | float) -> Tensor:
        """Return the probability flow from t to s."""
        (mean_t, var_t), (mean_s, var_s) = self.marginal(t), self.marginal(s)
        return mean_s + math.sqrt(var_s / var_t) * (x_t - mean_t)


class JointMixture:
    """The oracle of data from a mixture of Gaussians N(m_k, S_k) with weights w_k, whose pixels are dependent.

    With a = sqrt(alpha_bar_t), component k of x_t is N(a m_k, a^2 S_k + (1 - a^2) I), diagonal in the eigenvectors of
    S_k at every t.

    Args:
        schedule: the forward process.
        weights: w_k, (K,), which add up to 1.
        means: m_k, (K, d).
        covariances: S_k, (K, d, d), symmetric, without negative eigenvalues; positive ones if t = 0 is used.
        frac: of the reverse variance, as in `Prediction`.
    Raises:
        ValueError: invalid weights, means or covariances, or ones that do not fit each other.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        weights: Tensor | list[float],
        means: Tensor,
        covariances: Tensor,
        frac: float | Tensor = 0.0,
    ):
        self.schedule, self.frac = schedule, frac
        self.weights, self.means, self.covariances = (
            torch.as_tensor(part, dtype=torch.float64) for part in (weights, means, covariances)
        )
        self._must_fit()
        values, self.vectors = torch.linalg.eigh(self.covariances)
        if not torch.allclose(self.covariances, self.covariances.mT) or values.min() < -1e-8 * values.abs().max():
            raise ValueError("every covariance must be symmetric, without negative eigenvalues")
        self.values = values.clamp(min=0)
        self.centres = torch.einsum("kij,ki->kj", self.vectors, self.means)  # the means in the eigenvectors

    @classmethod
    def of(cls, schedule: NoiseSchedule, data: object, frac: float | Tensor = 0.0) -> "JointMixture":
        """Return the mixture that data are drawn from, by their `weights`, `means` and `covariances`.

        Raises: ValueError for data without these.
        """
        if not cls.knows(data):
            name = getattr(data, "name", type(data).__name__)
            raise ValueError(f"the density of {name} is not known; that of data=mixture is")
        weights, means, covariances = (getattr(data, part) for part in PARTS)
        return JointMixture(schedule, weights, means, covariances, frac)

    @staticmethod
    def knows(data: object) -> bool:
        """Whether the density of data is known."""
        return all(hasattr(data, part) for part in PARTS)

    def _must_fit(self) -> None:
        w, S, d = self.weights, self.covariances, self.means.shape[-1]
        if w.ndim != 1 or self.means.shape != (len(w), d) or S.shape != (len(w), d, d):
            shapes = ", ".join(str(tuple(part.shape)) for part in (w, self.means, S))
            raise ValueError(f"weights, means, covariances of shapes {shapes}: (K,), (K, d), (K, d, d) are needed")
        if not (w >= 0).all() or abs(w.sum().item() - 1) > 1e-6:
            raise ValueError(f"weights = {w.tolist()} must be >= 0 and add up to 1")

    def at(self, x_t: Tensor, t: Time) -> tuple[Tensor, Tensor, Tensor]:
        """Return alpha_bar_t (B or 1, 1, 1); x_t - a m_k in the eigenvectors of S_k, and its variance, (B, K, d)."""
        alpha_bar = self.schedule.alpha_bar_at(t).reshape(-1, 1, 1)
        y = torch.einsum("bi,kij->bkj", x_t.double().flatten(1), self.vectors) - alpha_bar.sqrt() * self.centres
        return alpha_bar, y, alpha_bar * self.values + 1 - alpha_bar

    def joint(self, x_t: Tensor, t: Time) -> Tensor:
        """Return log w_k N(x_t; component k), (B, K)."""
        return self._joint(*self.at(x_t, t)[1:])

    def _joint(self, y: Tensor, var: Tensor) -> Tensor:
        return self.weights.log() - 0.5 * (y**2 / var + (2 * math.pi * var).log()).sum(-1)

    def log_prob(self, x_t: Tensor, t: Time) -> Tensor:
        """Return log q(x_t), (B,), in nats; x_t is (B, *) with d numbers a row."""
        return self.joint(x_t, t).logsumexp(1)

    def shares(self, x_t: Tensor, t: Time) -> Tensor:
        """Return P(component k | x_t), (B, K): the responsibilities."""
        return self.joint(x_t, t).softmax(1)

    def score(self, x_t: Tensor, t: Time) -> Tensor:
        """Return the gradient of log q at x_t, (B, *)."""
        _, y, var = self.at(x_t, t)
        score = -self._mixed(self._joint(y, var).softmax(1), y / var)
        return score.reshape(x_t.shape).to(x_t.dtype)

    def denoise(self, x_t: Tensor, t: Time) -> Prediction:
        """Return E[eps | x_t] and E[x_0 | x_t], (B, *) with d numbers a row, for t > 0. A `Denoise`."""
        alpha_bar, y, var = self.at(x_t, t)
        share = self._joint(y, var).softmax(1)
        x_0 = share @ self.means + self._mixed(share, alpha_bar.sqrt() * self.values * y / var)
        eps = (1 - alpha_bar[..., 0]).sqrt() * self._mixed(share, y / var)
        eps, x_0 = (part.reshape(x_t.shape).to(x_t.dtype) for part in (eps, x_0))
        return Prediction(eps, x_0, self.frac)

    def _mixed(self, share: Tensor, y: Tensor) -> Tensor:
        """Return vectors (B, K, d), given in each component's eigenvectors, weighted by share and summed, (B, d)."""
        return torch.einsum("bk,bkj,kij->bi", share, y, self.vectors)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Return n draws of x_0, (n, d), float64."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[1], dtype=torch.float64, generator=generator)
        return self.means[k] + torch.einsum("nij,nj->ni", self.vectors[k], self.values[k].sqrt() * z)


class JointGaussian(JointMixture):
    """The oracle of data N(mean, covariance): the mixture with one component, with posteriors in closed form.

    Args:
        schedule: the forward process.
        mean: m, (d,).
        covariance: S, (d, d), symmetric, without negative eigenvalues.
        frac: of the reverse variance, as in `Prediction`.
    """

    def __init__(self, schedule: NoiseSchedule, mean: Tensor, covariance: Tensor, frac: float | Tensor = 0.0):
        super().__init__(schedule, [1.0], mean[None], covariance[None], frac)
        self.mean, self.covariance = self.means[0], self.covariances[0]

    def posterior(self, A: Tensor, y: Tensor, sigma_y: float = 0.0) -> "JointGaussian":
        """Return the oracle of the data given y = A x_0 + sigma_y z, z standard normal: Gaussian again.

        Args:
            A: (k, d), of full rank if sigma_y = 0; rows of the identity for pixels that are known.
            y: (k,).
        """
        A, y = A.double(), y.double()
        gain = torch.linalg.solve(A @ self.covariance @ A.T + sigma_y**2 * torch.eye(len(A)), A @ self.covariance).T
        mean, covariance = self.mean + gain @ (y - A @ self.mean), self.covariance - gain @ A @ self.covariance
        return JointGaussian(self.schedule, mean, (covariance + covariance.T) / 2, self.frac)


class PointsOracle:
    """The oracle of data that are one of K known images, equally likely, blurred by N(0, c^2) in every pixel.

    With c = 0 and the training images as points this is the minimiser of the training loss itself: a network without
    error, which samples training images only. With c > 0 it is a kernel density estimate.

    Args:
        schedule: the forward process.
        points: the images m_k, (K, *).
        variance: c^2 >= 0.
        frac: of the reverse variance, as in `Prediction`.
    """

    def __init__(self, schedule: NoiseSchedule, points: Tensor, variance: float = 0.0, frac: float | Tensor = 0.0):
        self.schedule, self.points, self.c2, self.frac = schedule, points.double().flatten(1), variance, frac

    def joint(self, x_t: Tensor, t: Time) -> Tensor:
        """Return log N(x_t; a m_k, a^2 c^2 + 1 - a^2) / K, (B, K)."""
        alpha_bar = self.schedule.alpha_bar_at(t).reshape(-1, 1)
        x, mean = x_t.double().flatten(1), self.points
        var, a = alpha_bar * self.c2 + 1 - alpha_bar, alpha_bar.sqrt()
        distance = (x**2).sum(1, keepdim=True) - 2 * a * (x @ mean.T) + alpha_bar * (mean**2).sum(1)
        return -distance / (2 * var) - x.shape[1] / 2 * (2 * math.pi * var).log() - math.log(len(mean))

    def log_prob(self, x_t: Tensor, t: Time) -> Tensor:
        """Return log q(x_t) of each image, (B,), in nats."""
        return self.joint(x_t, t).logsumexp(1)

    def denoise(self, x_t: Tensor, t: Time) -> Prediction:
        """Return E[eps | x_t] and E[x_0 | x_t], (B, *), for t > 0. A `Denoise`."""
        alpha_bar = self.schedule.alpha_bar_at(t).reshape(-1, 1)
        x, a = x_t.double().flatten(1), alpha_bar.sqrt()
        var = alpha_bar * self.c2 + 1 - alpha_bar
        point = self.joint(x_t, t).softmax(1) @ self.points
        x_0 = point + a * self.c2 / var * (x - a * point)
        eps = (1 - alpha_bar).sqrt() / var * (x - a * point)
        eps, x_0 = (part.reshape(x_t.shape).to(x_t.dtype) for part in (eps, x_0))
        return Prediction(eps, x_0, self.frac)
