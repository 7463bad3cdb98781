r"""Adversarial losses of a generator, such as a decoder, and of a discriminator of its pictures.

A discriminator scores how real a picture looks: a logit, or one for each patch, (B, *). Every loss is a mean over
the patches, one number a sample, (B,).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import reduce
from torch import Tensor
from torch.nn import functional as F

DELTA = 1e-6  # added to the gradient's norm, as published


def _mean(x: Tensor) -> Tensor:
    return reduce(x, "b ... -> b", "mean")


def _must_pair(real: Tensor, made: Tensor) -> None:
    """Raise ValueError for logits of two shapes, which would be broadcast."""
    if real.shape != made.shape or not real.ndim:
        raise ValueError(
            f"logits of real and generated pictures have one shape (B, *), not {tuple(real.shape)} and "
            f"{tuple(made.shape)}"
        )


# ----------------------------------------------------------------------------------------------------------- losses


def hinge(real: Tensor, made: Tensor) -> Tensor:
    r"""Return the hinge loss of a discriminator: logits need not exceed 1 for data, nor fall below -1 for samples.

    .. math:: L_D = E_{x \sim p_\text{data}}[\max(0, 1 - D(x))] + E_{x \sim p_g}[\max(0, 1 + D(x))]
        \qquad \text{[GeometricGAN (hinge)]}

    It is least for D = sign(p_data - p_g), and then twice the mass that the two have in common.

    Args:
        real, made: logits of as many data and pictures of the generator, (B, *).
    Returns:
        (B,).
    Raises: ValueError for two shapes.
    Source: Geometric GAN, Lim & Ye 2017 (arXiv 1705.02894).
    """
    _must_pair(real, made)
    return _mean((1 - real).relu()) + _mean((1 + made).relu())


def hinge_generator(made: Tensor) -> Tensor:
    r"""Return the loss of a generator against `hinge`.

    .. math:: L_G = -E_{x \sim p_g}[D(x)] \qquad \text{[GeometricGAN (generator)]}

    Args:
        made: logits of its pictures, (B, *).
    Returns:
        (B,).
    Source: as `hinge`.
    """
    return -_mean(made)


def non_saturating(real: Tensor, made: Tensor) -> Tensor:
    r"""Return the cross-entropy of a discriminator between data and generated samples.

    .. math:: L_D = -E_{x \sim p_\text{data}}[\log D(x)] - E_{x \sim p_g}[\log(1 - D(x))] \qquad \text{[GAN (1)]}

    with D the sigmoid of the logit. It is least for the logit log p_data / p_g:

    .. math:: D^*(x) = \frac{p_\text{data}(x)}{p_\text{data}(x) + p_g(x)} \qquad \text{[GAN (2)]}

    Args:
        real, made: logits of as many data and pictures of the generator, (B, *).
    Returns:
        Nats, (B,).
    Raises: ValueError for two shapes.
    Source: Generative Adversarial Networks (arXiv 1406.2661).
    """
    _must_pair(real, made)
    return _mean(F.softplus(-real)) + _mean(F.softplus(made))


def non_saturating_generator(made: Tensor) -> Tensor:
    r"""Return the loss of a generator against `non_saturating`: its samples are to be classified as real.

    .. math:: L_G = -E_{x \sim p_g}[\log D(x)] \qquad \text{[GAN (non-saturating)]}

    Where D is near 0 its gradient is that of the logit, that of log(1 - D) vanishes.

    Args:
        made: logits of its pictures, (B, *).
    Returns:
        Nats, (B,).
    Source: Generative Adversarial Networks (arXiv 1406.2661), section 3.
    """
    return _mean(F.softplus(-made))


class Game(NamedTuple):
    """The losses of a generator and a discriminator that are trained against each other."""

    discriminator: Callable[[Tensor, Tensor], Tensor]  # (logits of data, logits of samples) -> loss
    generator: Callable[[Tensor], Tensor]  # logits of samples -> loss


GAMES = {"hinge": Game(hinge, hinge_generator), "non_saturating": Game(non_saturating, non_saturating_generator)}
"""The games by name, for a setting."""


# ----------------------------------------------------------------------------------------------- how they are balanced


def differentiable(x: Tensor) -> Tensor:
    """Return data (B, *) with respect to which logits can be differentiated, see `r1`.

    They are a view, as the FLOP counter cannot follow a gradient that ends in a leaf.
    """
    return x.detach().requires_grad_().view_as(x)


def r1(logits: Tensor, x: Tensor, gamma: float = 1.0) -> Tensor:
    r"""Return the R1 penalty: the squared gradient of a discriminator at data, which stabilises training.

    .. math:: R_1 = \frac{\gamma}{2} E_{x \sim p_\text{data}} \left[ \| \nabla_x D(x) \|^2 \right]
        \qquad \text{[R1 (9)]}

    with D the mean over the patches. The norm is over all dimensions of x, and the gradient can be differentiated.

    Args:
        logits: of data, (B, *), each row computed of that row of x alone: batch norm would mix them.
        x: the data, (B, *), which require a gradient since before the logits were computed.
        gamma: the strength, >= 0; 1 where it is a weight of the part instead.
    Returns:
        (B,).
    Raises: ValueError where there is no gradient, as within `torch.no_grad()`.
    Source: Which Training Methods for GANs do actually Converge?, Mescheder et al. 2018 (arXiv 1801.04406).
    """
    if not (x.requires_grad and logits.requires_grad):
        raise ValueError("R1 needs logits of x with a gradient: x.requires_grad_() before, and no torch.no_grad()")
    (gradient,) = torch.autograd.grad(_mean(logits).sum(), x, create_graph=True)
    return gamma / 2 * reduce(gradient.square(), "b ... -> b", "sum")


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, most: float = 1e4) -> Tensor:
    r"""Return the adversarial part's weight that balances both gradients at the decoder's last layer.

    .. math:: \lambda = \frac{\| \nabla_{G_L} L_\text{rec} \|}{\| \nabla_{G_L} L_\text{GAN} \| + \delta}
        \qquad \text{[VQGAN (7)]}

    with G_L the weights of the last layer and delta = 1e-6.

    Args:
        reconstruction, adversarial: the two parts, each a scalar, or (B,), of which the mean is taken; their graphs
            are retained.
        last_layer: the weights that both depend on.
        most: the largest value.
    Returns:
        A scalar in [0, most], which sends no gradient.
    Raises: ValueError where there is no gradient, as within `torch.no_grad()`.
    Source: Taming Transformers for High-Resolution Image Synthesis (arXiv 2012.09841), section 3.2.
    """
    if not (reconstruction.requires_grad and adversarial.requires_grad and last_layer.requires_grad):
        raise ValueError("an adaptive weight needs gradients of both parts by the last layer: no torch.no_grad()")
    of_reconstruction, of_adversarial = (
        torch.autograd.grad(part.mean(), last_layer, retain_graph=True)[0].norm()
        for part in (reconstruction, adversarial)
    )
    return (of_reconstruction / (of_adversarial + DELTA)).clamp(max=most).detach()
