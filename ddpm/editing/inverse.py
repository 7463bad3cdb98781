"""Linear inverse problems y = A x_0 + sigma_y z, solved by guidance: DPS and PiGDM."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from einops import reduce, repeat
from torch import Tensor

from ddpm.checks import check_whole
from ddpm.schedules import NoiseSchedule, Time, at
from ddpm.targets import Denoise, Prediction


class Operator(ABC):
    """A linear measurement operator A on images."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Return A x, for images (B, C, H, W)."""

    @abstractmethod
    def transpose(self, y: Tensor) -> Tensor:
        """Return A^T y, (B, C, H, W): <A x, y> = <x, A^T y> for all x and y."""

    @abstractmethod
    def solve(self, y: Tensor, r2: Tensor, sigma2: float) -> Tensor:
        """Return (r2 A A^T + sigma2 I)^{-1} y, of y's shape, for y within the range of A; r2 is (B, 1, 1, 1)."""


class Inpainting(Operator):
    """The operator that sets unknown pixels to 0.

    Args:
        mask: 1 (or true) where pixels are drawn anew, 0 where they are known; broadcasts against images.
    """

    def __init__(self, mask: Tensor):
        self.known = mask == 0

    def __call__(self, x: Tensor) -> Tensor:
        """Return the images with unknown pixels set to 0, (B, C, H, W)."""
        return self.known.to(x.device) * x

    def transpose(self, y: Tensor) -> Tensor:
        """Return A^T y = A y: A is a projection."""
        return self(y)

    def solve(self, y: Tensor, r2: Tensor, sigma2: float) -> Tensor:
        """Solve on the known pixels, see `Operator.solve`; 0 elsewhere."""
        return self(y / (r2 + sigma2))


class SuperResolution(Operator):
    """The operator of the mean over squares of pixels: an image `factor` times smaller.

    Args:
        factor: side of a square, >= 1.
    Raises:
        ValueError: another factor; on use, images whose sides are not multiples of it.
    """

    def __init__(self, factor: int):
        check_whole("factor", factor, 1)
        self.factor = factor

    def __call__(self, x: Tensor) -> Tensor:
        """Return the small images, (B, C, H / factor, W / factor)."""
        if x.shape[-2] % self.factor or x.shape[-1] % self.factor:
            height, width = x.shape[-2:]
            raise ValueError(f"factor = {self.factor} does not divide {width}x{height}, the width and height of images")
        return reduce(x, "b c (h i) (w j) -> b c h w", "mean", i=self.factor, j=self.factor)

    def transpose(self, y: Tensor) -> Tensor:
        """Return each pixel spread over its square, (B, C, factor H, factor W)."""
        return repeat(y, "b c h w -> b c (h i) (w j)", i=self.factor, j=self.factor) / self.factor**2

    def solve(self, y: Tensor, r2: Tensor, sigma2: float) -> Tensor:
        """Solve, see `Operator.solve`: A A^T = I / factor^2."""
        return y / (r2 / self.factor**2 + sigma2)


class Blur(Operator):
    """The operator of a circular convolution, for which A A^T is diagonal in the Fourier transform.

    Args:
        kernel: (h, w), with odd sides; its centre is the position of the pixel.
    Raises:
        ValueError: a side that is even.
    """

    def __init__(self, kernel: Tensor):
        if kernel.ndim != 2 or not all(side % 2 for side in kernel.shape):
            raise ValueError(f"a kernel (h, w) has odd sides, not the shape {tuple(kernel.shape)}")
        self.kernel = kernel

    @classmethod
    def gaussian(cls, std: float) -> "Blur":
        """Return the blur by a Gaussian of this standard deviation in pixels, > 0, cut off at three of them."""
        if isinstance(std, bool) or not isinstance(std, int | float) or not 0 < std < float("inf"):
            raise ValueError(f"the standard deviation of a blur, {std!r}, must be a number of pixels > 0")
        reach = max(1, round(3 * std))
        line = torch.exp(-(torch.arange(-reach, reach + 1, dtype=torch.float64) ** 2) / (2 * std**2))
        return cls(torch.outer(line, line) / line.sum() ** 2)

    def spectrum(self, x: Tensor) -> Tensor:
        """Return the kernel's Fourier transform on the grid of images, (H, W // 2 + 1)."""
        (h, w), (height, width) = self.kernel.shape, x.shape[-2:]
        rows, columns = (torch.arange(h) - h // 2) % height, (torch.arange(w) - w // 2) % width
        wrapped = torch.zeros(height, width, dtype=torch.float64)
        wrapped.index_put_((rows[:, None], columns), self.kernel.double(), accumulate=True)
        return torch.fft.rfft2(wrapped).to(x.device)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the blurred images, (B, C, H, W)."""
        return self._filtered(x, self.spectrum(x))

    def transpose(self, y: Tensor) -> Tensor:
        """Return the convolution with the mirrored kernel, (B, C, H, W)."""
        return self._filtered(y, self.spectrum(y).conj())

    def solve(self, y: Tensor, r2: Tensor, sigma2: float) -> Tensor:
        """Solve, see `Operator.solve`; 0 at frequencies of which the kernel passes less than 1e-6 if sigma2 is 0."""
        power = self.spectrum(y).abs() ** 2
        gram = r2.double() * power + sigma2
        lost = (power < 1e-12) & (sigma2 == 0)
        return self._filtered(y, torch.where(lost, 0, 1 / torch.where(lost, 1, gram)))

    @staticmethod
    def _filtered(x: Tensor, spectrum: Tensor) -> Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(x.double()) * spectrum, s=x.shape[-2:]).to(x.dtype)


def dps(schedule: NoiseSchedule, denoise: Denoise, A: Callable[[Tensor], Tensor], y: Tensor, scale: float) -> Denoise:
    r"""Return the prediction guided by diffusion posterior sampling towards the measurement y.

    .. math:: \nabla_{x_t} \log p(x_t \mid y) \approx s_\theta(x_t, t)
        - \rho\, \nabla_{x_t} \| y - A(\hat x_0(x_t)) \|_2^2 \qquad \text{[DPS (16)]}

    This treats x_0 as known given x_t, which is right where there is little noise; at high noise it pulls too hard
    for a likelihood's rho = 1 / (2 sigma_y^2), and a smaller one is used. (The paper's algorithm 1 adds the gradient to
    x_{t-1}, with rho / ||y - A x_0||: by a step's beta more than here.)

    Args:
        denoise: the raw prediction, to be clipped, if at all, afterwards.
        A: any function of images (B, *) that can be differentiated, an `Operator` among them.
        y: the measurement, of the shape of A(x) or broadcasting against it.
        scale: rho >= 0; 0 leaves the prediction as it is.
    Returns:
        A `Denoise`.
    Source: DPS (Chung et al., arXiv 2209.14687).
    """

    def of(x_0: Tensor, t: Time) -> Tensor:
        return -scale * ((y - A(x_0)) ** 2).sum()

    return _guided(schedule, denoise, of)


def pigdm(
    schedule: NoiseSchedule, denoise: Denoise, A: Operator, y: Tensor, sigma_y: float, variance: float = 1.0
) -> Denoise:
    r"""Return the prediction by pseudoinverse guidance: as DPS, with x_0 given x_t Gaussian, of variance r_t^2.

    .. math:: p(x_0 \mid x_t) \approx \mathcal N(\hat x_0, r_t^2 I) \;\Rightarrow\; \nabla_{x_t} \log p(y \mid x_t)
        \approx \left(\frac{\partial \hat x_0}{\partial x_t}\right)^{\!T} A^T
        \left(r_t^2 A A^T + \sigma_y^2 I\right)^{-1} (y - A \hat x_0) \qquad \text{[PiGDM (guidance)]} \\
        r_t^2 = \frac{c^2 (1 - \bar\alpha_t)}{\bar\alpha_t c^2 + 1 - \bar\alpha_t} \qquad \text{[PiGDM (r_t)]}

    r_t^2 is Var[x_0 | x_t] of data N(m, c^2 I), for which the guided prediction is the exact one given y. The paper has
    c = 1, and in its noise level sigma^2 = (1 - alpha_bar) / alpha_bar it reads sigma^2 / (1 + sigma^2).

    Args:
        denoise: the raw prediction, to be clipped, if at all, afterwards.
        y: the measurement, of the shape of A(x) or broadcasting against it.
        sigma_y: standard deviation of the noise in y, >= 0, in the units of images.
        variance: c^2, of the data.
    Returns:
        A `Denoise`.
    Source: PiGDM (Song, Vahdat, Mardani & Kautz, ICLR 2023).
    """

    def of(x_0: Tensor, t: Time) -> Tensor:
        alpha_bar = schedule.alpha_bar_at(t)
        r2 = at(variance * (1 - alpha_bar) / (alpha_bar * variance + 1 - alpha_bar), ..., x_0)
        residual = (y - A(x_0)).detach()
        return (A.solve(residual, r2, sigma_y**2) * A(x_0)).sum()

    return _guided(schedule, denoise, of)


def _guided(schedule: NoiseSchedule, denoise: Denoise, of: Callable[[Tensor, Time], Tensor]) -> Denoise:
    """Return the prediction whose score is that of `denoise` plus the gradient of a function of (x_0_theta, t) by x_t.

    The score is -eps / sqrt(1 - alpha_bar_t), and x_0 follows, so that the pair composes x_t as before. Where
    alpha_bar_t = 0 the prediction is unchanged, as x_t contains nothing of x_0.
    """

    def guided(x_t: Tensor, t: Time) -> Prediction:
        alpha_bar = schedule.alpha_bar_at(t)
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            pred = denoise(x, t)
            [gradient] = torch.autograd.grad(of(pred.x_0, t), x)
        gain = torch.where(alpha_bar > 0, (1 - alpha_bar) / alpha_bar.sqrt(), 0)
        gradient = torch.where(at(alpha_bar, ..., x_t) > 0, gradient, 0)
        eps = pred.eps.detach() - at((1 - alpha_bar).sqrt(), ..., x_t) * gradient
        x_0 = pred.x_0.detach() + at(gain, ..., x_t) * gradient
        frac = pred.frac.detach() if isinstance(pred.frac, Tensor) else pred.frac
        return Prediction(eps, x_0, frac)

    return guided
