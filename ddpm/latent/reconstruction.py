r"""Reconstruction losses: the distance of a decoder's output from data, by named parts.

Data are in [-1, 1]. The decoder's output is either the logit of each pixel being white (`bernoulli`,
`focal`) or the picture itself, in the units of the data. A part is a sum over the dimensions of x, one number a sample,
so that likelihoods are in nats and may be added to a KL as they are.
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from einops import reduce
from torch import Tensor
from torch.nn import functional as F

HALF_BIN = 1 / 255  # of a byte, where bytes 0..255 are -1..1
EDGE = 0.999  # beyond it lies the first, or the last, of the bytes


def _sum(x: Tensor) -> Tensor:
    return reduce(x, "b ... -> b", "sum")


# ------------------------------------------------------------------------------------------------------ likelihoods


def bernoulli(logits: Tensor, x: Tensor) -> Tensor:
    r"""Return -log p(x given z) of black and white pixels.

    .. math:: -\log p(x \mid z) = -\sum_i u_i \log p_i + (1 - u_i) \log(1 - p_i), \quad u = \frac{x + 1}{2}, \quad
        p = \operatorname{sigmoid}(\text{logits}) \qquad \text{[VAE (Bernoulli)]}

    Grey pixels count as the expectation over draws of black and white ones.

    Args:
        logits, x: (B, *).
    Returns:
        Nats, (B,).
    Source: Auto-Encoding Variational Bayes (arXiv 1312.6114), appendix C.1.
    """
    return _sum(F.binary_cross_entropy_with_logits(logits, (x + 1) / 2, reduction="none"))


def gaussian(mean: Tensor, x: Tensor, log_scale: Tensor) -> Tensor:
    r"""Return -log p(x given z) of N(mean, scale^2), with one scale for all dimensions.

    .. math:: -\log p(x \mid z) = \sum_i \frac{(x_i - \mu_i)^2}{2 \sigma^2} + \log \sigma + \tfrac12 \log 2\pi
        \qquad \text{[VAE (Gaussian)]}

    Args:
        mean, x: (B, *); log_scale: log sigma, a scalar.
    Returns:
        Nats, (B,).
    Source: Auto-Encoding Variational Bayes (arXiv 1312.6114), appendix C.2.
    """
    return _sum(((x - mean) / log_scale.exp()).square() / 2 + log_scale + math.log(2 * math.pi) / 2)


def logistic(mean: Tensor, x: Tensor, log_scale: Tensor) -> Tensor:
    r"""Return -log P(x given z) of bytes, by a logistic distribution integrated over the bin of each.

    .. math:: P(x_i \mid z) = \operatorname{sigmoid}\left(\frac{x_i + \frac{1}{255} - \mu_i}{s}\right) -
        \operatorname{sigmoid}\left(\frac{x_i - \frac{1}{255} - \mu_i}{s}\right) \qquad \text{[IAF (logistic)]}

    The bins of the first and of the last byte reach to infinity.

    Args:
        mean, x: (B, *), x bytes k as k / 127.5 - 1; log_scale: log s, a scalar.
    Returns:
        Nats, (B,).
    Source: Improving Variational Inference with Inverse Autoregressive Flow (arXiv 1606.04934), appendix C.3.
    """
    above, below = ((x + side - mean) / log_scale.exp() for side in (HALF_BIN, -HALF_BIN))
    # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)), without cancellation
    inside = F.logsigmoid(above) + F.logsigmoid(-below) + (-torch.expm1(-2 * HALF_BIN / log_scale.exp())).log()
    log_p = torch.where(x < -EDGE, F.logsigmoid(above), torch.where(x > EDGE, F.logsigmoid(-below), inside))
    return -_sum(log_p)


# -------------------------------------------------------------------------------------------------------- distances


def squared(picture: Tensor, x: Tensor) -> Tensor:
    """Return the squared error, (B,)."""
    return _sum((picture - x).square())


def absolute(picture: Tensor, x: Tensor) -> Tensor:
    """Return the absolute error, (B,)."""
    return _sum((picture - x).abs())


def huber(picture: Tensor, x: Tensor, delta: float = 0.1) -> Tensor:
    r"""Return the Huber loss, squared for small errors and absolute for large ones, (B,).

    .. math:: h(e) = \begin{cases} \frac12 e^2 & |e| \le \delta \\ \delta (|e| - \frac12 \delta) & \text{else}
        \end{cases} \qquad \text{[Huber (loss)]}
    """
    return _sum(F.huber_loss(picture, x, reduction="none", delta=delta))


def focal(logits: Tensor, x: Tensor, gamma: float = 2.0) -> Tensor:
    r"""Return the focal loss: cross-entropy with less weight on pixels that are right already, (B,).

    .. math:: -\sum_i (1 - p_{t,i})^\gamma \log p_{t,i} \qquad \text{[Focal (loss)]}

    with p_t the probability of a pixel's value; for a grey one the expectation over black and white.

    Source: Focal Loss for Dense Object Detection (arXiv 1708.02002), section 3.2.
    """
    u, log_p, log_not_p = (x + 1) / 2, F.logsigmoid(logits), F.logsigmoid(-logits)
    return -_sum(u * log_not_p.exp() ** gamma * log_p + (1 - u) * log_p.exp() ** gamma * log_not_p)


def ssim(picture: Tensor, x: Tensor) -> Tensor:
    r"""Return one minus the structural similarity, times the dimensions of x, (B,).

    .. math:: \text{SSIM}(x, y) = \frac{(2 \mu_x \mu_y + C_1)(2 \sigma_{xy} + C_2)}
        {(\mu_x^2 + \mu_y^2 + C_1)(\sigma_x^2 + \sigma_y^2 + C_2)} \qquad \text{[SSIM (13)]}

    Means, variances and covariance are those of a Gaussian window of standard deviation 1.5 and 11 x 11 pixels (the
    largest odd size that fits into smaller images), averaged over every place inside of the image. C_1 =
    (0.01 L)^2 and C_2 = (0.03 L)^2 with L = 2, the range of the data.

    Args:
        picture, x: (B, C, H, W).
    Source: Wang et al., Image Quality Assessment: From Error Visibility to Structural Similarity (2004).
    """
    exact = contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
    with exact:  # variances are small differences, which half precision would lose
        similar = _similarity(picture.to(x.dtype), x)
    return (1 - reduce(similar, "b ... -> b", "mean")) * x[0].numel()


def _similarity(picture: Tensor, x: Tensor) -> Tensor:
    """Return the similarity of each window, see `ssim`, (B, C, H', W')."""
    size = min(11, *(side - 1 + side % 2 for side in x.shape[2:]))
    at = torch.arange(size, device=x.device, dtype=x.dtype) - size // 2
    row = (-at.square() / (2 * 1.5**2)).exp()
    row = row / row.sum()
    window = (row[:, None] * row).expand(x.shape[1], 1, -1, -1)

    def mean(y: Tensor) -> Tensor:
        return F.conv2d(y, window, groups=x.shape[1])

    mu_x, mu_y = mean(x), mean(picture)
    var_x, var_y, cov = mean(x * x) - mu_x**2, mean(picture * picture) - mu_y**2, mean(x * picture) - mu_x * mu_y
    C_1, C_2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    return (2 * mu_x * mu_y + C_1) * (2 * cov + C_2) / ((mu_x**2 + mu_y**2 + C_1) * (var_x + var_y + C_2))


def perceptual(distance: Callable[[Tensor, Tensor], Tensor], picture: Tensor, x: Tensor) -> Tensor:
    r"""Return a distance of features, which is about 0 to 1, times the dimensions of x, (B,).

    .. math:: L_\text{perceptual} = d(\hat x, x) \dim x \qquad \text{[perceptual (part)]}

    So it can be added to the other parts, each of which is a sum over the dimensions, as `ssim` does.

    Args:
        distance: (picture, x) -> (B,), such as `ddpm.latent.perceptual.Perceptual`.
        picture, x: (B, C, H, W).
    """
    return distance(picture, x) * x[0].numel()


OF_LOGITS: dict[str, Callable[..., Tensor]] = {"bernoulli": bernoulli, "focal": focal}
OF_SCALE: dict[str, Callable[..., Tensor]] = {"gaussian": gaussian, "logistic": logistic}  # with a scale of the decoder
OF_PICTURES: dict[str, Callable[..., Tensor]] = {
    "squared": squared,
    "absolute": absolute,
    "huber": huber,
    "ssim": ssim,
}
PERCEPTUAL = "perceptual"  # the part that needs a network, given in addition
BY_THEMSELVES = (*OF_LOGITS, *OF_SCALE, *OF_PICTURES)
PARTS = (*BY_THEMSELVES, PERCEPTUAL)
LIKELIHOODS = ("bernoulli", *OF_SCALE)


class Reconstruction:
    """The interpretation of a decoder's output, and its comparison with data.

    Args:
        parts: name -> weight, of `PARTS`; those of weight 0 are not computed.
        binarise: of the Bernoulli likelihood, whether pixels are drawn black or white with their brightness as
            probability. Grey ones as they are have no likelihood.
        others: parts of the same loss that do not compare with data: names for messages.
    Attributes:
        logits: whether the output is the logits of pixels, else it is the picture itself.
        scaled: the part that needs a scale of the decoder, or None.
    Raises: ValueError for parts that are not known, or that interpret the output differently, or none.
    """

    def __init__(self, parts: Mapping[str, float], binarise: bool = True, others: Sequence[str] = ("kl",)):
        for name, weight in parts.items():
            if name not in PARTS:
                raise ValueError(f"parts: {name!r} is not known; allowed: {', '.join((*PARTS, *others))}")
            if isinstance(weight, bool) or not 0 <= weight < math.inf:
                raise ValueError(f"parts.{name} = {weight!r} must be >= 0 and finite")
        self.parts = [name for name, weight in parts.items() if weight]
        if not any(name in BY_THEMSELVES for name in self.parts):
            alone = f"{PERCEPTUAL} alone does not determine data" if self.parts else "none compares with data"
            raise ValueError(f"parts: {alone}; set one of {', '.join(BY_THEMSELVES)} to 1")
        self.logits = any(name in OF_LOGITS for name in self.parts)
        self.scaled = next((name for name in self.parts if name in OF_SCALE), None)
        if self.logits and self.scaled:
            other = next(name for name in self.parts if name in OF_LOGITS)
            raise ValueError(
                f"parts: {self.scaled} takes the decoder's output for a picture, {other} for logits; set one to 0"
            )
        self.binarise = binarise and "bernoulli" in self.parts

    @property
    def likelihood(self) -> str:
        """The part by which the decoder is a distribution of data.

        Raises: ValueError where it is none.
        """
        name = self.parts[0]
        if len(self.parts) > 1 or name not in LIKELIHOODS or (name == "bernoulli" and not self.binarise):
            raise ValueError(
                f"a network trained by {', '.join(self.parts)} has no likelihood; that takes one of "
                f"{', '.join(LIKELIHOODS)} alone (with binarise = true)"
            )
        return name

    def __call__(
        self,
        output: Tensor,
        x: Tensor,
        log_scale: Tensor | None = None,
        distance: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Return the parts by name, each (B,).

        Args:
            output, x: (B, *); log_scale: of the decoder, a scalar.
            distance: the distance of the perceptual part, see `perceptual`.
        Raises: ValueError for a perceptual part without a distance.
        """
        picture, parts = self.picture(output), dict[str, Tensor]()
        for name in self.parts:
            if name in OF_LOGITS:
                parts[name] = OF_LOGITS[name](output, x)
            elif name in OF_SCALE:
                parts[name] = OF_SCALE[name](output, x, log_scale)
            elif name == PERCEPTUAL:
                if distance is None:
                    raise ValueError(f"parts.{PERCEPTUAL} is computed by a network, and none was given")
                parts[name] = perceptual(distance, picture, x)
            else:
                parts[name] = OF_PICTURES[name](picture, x)
        return parts

    def picture(self, output: Tensor) -> Tensor:
        """Return the picture of a decoder's output, in [-1, 1]: itself, or the mean of the pixels by their logits."""
        return 2 * output.sigmoid() - 1 if self.logits else output

    def drawn(self, x: Tensor, uniform: Callable[[], Tensor]) -> Tensor:
        """Return x unchanged, or binarised to -1 or 1 by uniform numbers of its shape."""
        return torch.where(uniform() < (x + 1) / 2, 1.0, -1.0).to(x.dtype) if self.binarise else x
