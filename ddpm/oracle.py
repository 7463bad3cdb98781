"""Data whose exact denoiser, density and flow are known in closed form: what a perfect network would answer.

Samplers, bounds and losses are measured against it without a network and without luck. Written apart from the functions
that it judges: of `ddpm` it reads the schedule's alpha_bar alone, at integer or real t.
"""

import math

import torch
from torch import Tensor

from ddpm.schedules import NoiseSchedule, Time
from ddpm.targets import Prediction


class MixtureOracle:
    """Data whose pixels are drawn independently from a mixture of Gaussians N(m_k, c_k^2) with weights w_k.

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
        """alpha_bar_t (B or 1, 1, ..., 1), and mean and variance of the components, the same with K at the end."""
        alpha_bar = self.schedule.alpha_bar_at(t).reshape(-1, *[1] * (x.ndim - 1))
        a2 = alpha_bar[..., None]
        return alpha_bar, a2.sqrt() * self.m, a2 * self.c2 + 1 - a2

    def joint(self, x_t: Tensor, t: Time) -> Tensor:
        """log w_k N(x_t; component k), (B, *, K)."""
        _, mean, var = self.at(t, x_t)
        return self.w.log() - 0.5 * (2 * math.pi * var).log() - (x_t.double()[..., None] - mean) ** 2 / (2 * var)

    def log_prob(self, x_t: Tensor, t: Time) -> Tensor:
        """log q(x_t) of each pixel, (B, *)."""
        return self.joint(x_t, t).logsumexp(-1)

    def denoise(self, x_t: Tensor, t: Time) -> Prediction:
        """E[eps | x_t] and E[x_0 | x_t], (B, *): what a perfect network answers. A `Denoise`."""
        alpha_bar, mean, var = self.at(t, x_t)
        share = self.joint(x_t, t).softmax(-1)
        score = (x_t.double()[..., None] - mean) / var
        x_0 = (share * (self.m + alpha_bar[..., None].sqrt() * self.c2 * score)).sum(-1)
        eps = (1 - alpha_bar).sqrt() * (share * score).sum(-1)
        return Prediction(eps.to(x_t.dtype), x_0.to(x_t.dtype), self.frac)

    def cdf(self, x_t: Tensor, t: Time) -> Tensor:
        """P(pixel of x_t <= its value), (B, *)."""
        _, mean, var = self.at(t, x_t)
        return (self.w * torch.special.ndtr((x_t[..., None] - mean) / var.sqrt())).sum(-1)

    def exact_ode(self, x_t: Tensor, t: int | float, s: int | float) -> Tensor:
        """The probability flow from t to s. In one dimension it keeps the order of points, hence their quantiles."""
        low, high = torch.full_like(x_t, -20.0), torch.full_like(x_t, 20.0)
        target = self.cdf(x_t, t)
        for _ in range(80):
            middle = (low + high) / 2
            below = self.cdf(middle, s) < target
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


class GaussianOracle(MixtureOracle):
    """Data N(mean, variance): the mixture with one component, where the flow is affine too."""

    def __init__(self, schedule: NoiseSchedule, mean: float = 0.7, variance: float = 0.25, frac: float | Tensor = 0.0):
        super().__init__(schedule, [1.0], [mean], [variance], frac)
        self.mean, self.variance = mean, variance

    def marginal(self, t: int | float) -> tuple[float, float]:
        """Mean and variance of q(x_t)."""
        alpha_bar = self.schedule.alpha_bar_at(t).item()
        return math.sqrt(alpha_bar) * self.mean, alpha_bar * self.variance + 1 - alpha_bar

    def x_0_variance(self, t: int | float) -> float:
        """Var[x_0 | x_t]."""
        return self.variance * (1 - self.schedule.alpha_bar_at(t).item()) / self.marginal(t)[1]

    def exact_ode(self, x_t: Tensor, t: int | float, s: int | float) -> Tensor:
        """The probability flow from t to s."""
        (mean_t, var_t), (mean_s, var_s) = self.marginal(t), self.marginal(s)
        return mean_s + math.sqrt(var_s / var_t) * (x_t - mean_t)


class JointGaussian:
    """Data N(mean, covariance) whose pixels depend on each other: what is told of one says something of the others.

    Args:
        schedule: the forward process.
        mean: m, (d,).
        covariance: S, (d, d), symmetric, without negative eigenvalues.
        frac: of the reverse variance, as in `Prediction`.
    """

    def __init__(self, schedule: NoiseSchedule, mean: Tensor, covariance: Tensor, frac: float | Tensor = 0.0):
        self.schedule, self.frac = schedule, frac
        self.mean, self.covariance = mean.double(), covariance.double()
        self.values, self.vectors = torch.linalg.eigh(self.covariance)

    def denoise(self, x_t: Tensor, t: Time) -> Prediction:
        """E[eps | x_t] and E[x_0 | x_t], (B, *) with d numbers a row, for t > 0. A `Denoise`."""
        alpha_bar = self.schedule.alpha_bar_at(t).reshape(-1, 1)
        a = alpha_bar.sqrt()
        score = (x_t.double().flatten(1) - a * self.mean) @ self.vectors
        score = score / (alpha_bar * self.values + 1 - alpha_bar)  # of x_t, in the eigenvectors, but for its sign
        x_0 = self.mean + (a * self.values * score) @ self.vectors.T
        eps = (1 - alpha_bar).sqrt() * (score @ self.vectors.T)
        eps, x_0 = (part.reshape(x_t.shape).to(x_t.dtype) for part in (eps, x_0))
        return Prediction(eps, x_0, self.frac)

    def posterior(self, A: Tensor, y: Tensor, sigma_y: float = 0.0) -> "JointGaussian":
        """The data given y = A x_0 + sigma_y z, z standard normal: Gaussian again.

        Args:
            A: (k, d), of full rank if sigma_y = 0; rows of the identity for pixels that are known.
            y: (k,).
        """
        A, y = A.double(), y.double()
        gain = torch.linalg.solve(A @ self.covariance @ A.T + sigma_y**2 * torch.eye(len(A)), A @ self.covariance).T
        mean, covariance = self.mean + gain @ (y - A @ self.mean), self.covariance - gain @ A @ self.covariance
        return JointGaussian(self.schedule, mean, (covariance + covariance.T) / 2, self.frac)


class PointsOracle:
    """Data that are one of K known images, each as likely, blurred by N(0, c^2) in every pixel.

    With c = 0 and the training images as points this is the minimiser of the training loss itself: a network without
    error, that can draw nothing but training images. With c > 0 it is a kernel density estimate.

    Args:
        schedule: the forward process.
        points: the images m_k, (K, *).
        variance: c^2 >= 0.
        frac: of the reverse variance, as in `Prediction`.
    """

    def __init__(self, schedule: NoiseSchedule, points: Tensor, variance: float = 0.0, frac: float | Tensor = 0.0):
        self.schedule, self.points, self.c2, self.frac = schedule, points.double().flatten(1), variance, frac

    def joint(self, x_t: Tensor, t: Time) -> Tensor:
        """log N(x_t; a m_k, a^2 c^2 + 1 - a^2) / K, (B, K)."""
        alpha_bar = self.schedule.alpha_bar_at(t).reshape(-1, 1)
        x, mean = x_t.double().flatten(1), self.points
        var, a = alpha_bar * self.c2 + 1 - alpha_bar, alpha_bar.sqrt()
        distance = (x**2).sum(1, keepdim=True) - 2 * a * (x @ mean.T) + alpha_bar * (mean**2).sum(1)
        return -distance / (2 * var) - x.shape[1] / 2 * (2 * math.pi * var).log() - math.log(len(mean))

    def log_prob(self, x_t: Tensor, t: Time) -> Tensor:
        """log q(x_t) of each image, (B,), in nats."""
        return self.joint(x_t, t).logsumexp(1)

    def denoise(self, x_t: Tensor, t: Time) -> Prediction:
        """E[eps | x_t] and E[x_0 | x_t], (B, *), for t > 0. A `Denoise`."""
        alpha_bar = self.schedule.alpha_bar_at(t).reshape(-1, 1)
        x, a = x_t.double().flatten(1), alpha_bar.sqrt()
        var = alpha_bar * self.c2 + 1 - alpha_bar
        point = self.joint(x_t, t).softmax(1) @ self.points
        x_0 = point + a * self.c2 / var * (x - a * point)
        eps = (1 - alpha_bar).sqrt() / var * (x - a * point)
        eps, x_0 = (part.reshape(x_t.shape).to(x_t.dtype) for part in (eps, x_0))
        return Prediction(eps, x_0, self.frac)
