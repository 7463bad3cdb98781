"""Autoencoders trained with a discriminator in addition, so that reconstructions look like data."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ddpm.data.dataset import Dataset, check_choice
from ddpm.latent.adversarial import GAMES, adaptive_weight, differentiable, r1
from ddpm.training.task import Drawn, Losses, Phase, must_take
from ddpm.training.tasks.autoencoder import Autoencoder
from ddpm.training.tasks.vae import VAE
from ddpm.training.tasks.vqvae import VQVAE

ADVERSARIAL = "adversarial"  # the part of the loss that a discriminator gives


class Adversarial(Autoencoder):
    """An autoencoder's task with a discriminator: an adversarial part of its loss, and a phase that trains the latter.

    A mixin, to be put before an autoencoder's task among the bases of a class. Both take effect from the share `start`
    of the budget on; before that neither is computed.

    Args:
        model: as the autoencoder's task has it, with `last_layer`, the weights of the decoder's last layer, where the
            weight is adaptive.
        discriminator: (x) -> logits (B, *), larger for data.
        parts: as the autoencoder's task has them, and adversarial; with weight 0 there is no discriminator.
        game: "hinge" or "non_saturating", see `ddpm.latent.adversarial.GAMES`.
        adaptive: whether the adversarial part is multiplied by
            `ddpm.latent.adversarial.adaptive_weight` before its own weight.
        r1: gamma, the R1 penalty's weight; 0 for none.
        start: in [0, 1).
        options: arguments of the autoencoder's task.
    Raises: ValueError for another game, numbers out of range, and as the autoencoder's task.
    Source: Taming Transformers for High-Resolution Image Synthesis (arXiv 2012.09841), section 3.1.
    """

    def __init__(
        self,
        model: nn.Module,
        discriminator: nn.Module,
        parts: Mapping[str, float],
        game: str = "hinge",
        adaptive: bool = True,
        r1: float = 0.0,
        start: float = 0.0,
        **options: Any,
    ):
        check_choice("game", game, GAMES)
        weight = parts.get(ADVERSARIAL, 0)
        for name, value in ((f"parts.{ADVERSARIAL}", weight), ("r1", r1)):
            if isinstance(value, bool) or not 0 <= value < math.inf:
                raise ValueError(f"{name} = {value!r} must be >= 0 and finite")
        if isinstance(start, bool) or not 0 <= start < 1:
            raise ValueError(f"start = {start!r} must lie in [0, 1): the share of the budget before the discriminator")
        super().__init__(model, {name: w for name, w in parts.items() if name != ADVERSARIAL}, **options)
        self.game, self.start, self.adaptive = GAMES[game], start, adaptive
        self.replayable = False
        self.weights |= {ADVERSARIAL: weight, "r1": r1}
        if weight:
            self.modules["discriminator"] = discriminator
            if adaptive and getattr(model, "last_layer", None) is None:
                raise ValueError("adaptive = true needs a decoder with last_layer; set task.adaptive=false")

    @property
    def discriminator(self) -> nn.Module | None:
        return self.modules.get("discriminator")

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The autoencoder's phase, then the discriminator's, if there is one."""
        own = Phase("autoencoder", ("model",), self.losses)
        if self.discriminator is None:
            return (own,)
        return (own, Phase("discriminator", ("discriminator",), self.discriminator_losses))

    def averages(self, name: str) -> bool:
        """Return whether a module's weights are averaged: only the autoencoder's."""
        return name == "model"

    def compared(self, output: Tensor, drawn: Drawn, progress: float) -> Losses:
        """Return the parts that compare a decoder's output (B, *) with data, and the adversarial part, each (B,)."""
        parts = super().compared(output, drawn, progress)
        if self.discriminator is None or progress < self.start or not torch.is_grad_enabled():
            return parts  # on held-out data only the reconstruction is measured
        made = self.discriminator(self.reconstruction.picture(output))
        adversarial = self.game.generator(made)
        if self.adaptive:
            adversarial = adversarial * adaptive_weight(self.total(parts), adversarial, self.model.last_layer)
        return parts | {ADVERSARIAL: adversarial}

    def discriminator_losses(self, drawn: Any, progress: float) -> Losses:
        """Return the discriminator's losses: the game's, and the penalty, each (B,); 0 before its start."""
        assert self.discriminator is not None
        if progress < self.start:
            return {"discriminator": self._nothing(len(drawn.x))}
        with torch.no_grad():
            made = self.reconstruction.picture(self.output(drawn))
        real = differentiable(drawn.x) if self.weights["r1"] else drawn.x
        of_real = self.discriminator(real)
        parts = {"discriminator": self.game.discriminator(of_real, self.discriminator(made))}
        return parts | ({"r1": r1(of_real, real)} if self.weights["r1"] else {})

    def _nothing(self, n: int) -> Tensor:
        """Return zeros (n,) that give every parameter of the discriminator the gradient 0."""
        return torch.stack([0 * p.sum() for p in self.modules["discriminator"].parameters()]).sum().expand(n)

    def check(self, data: Dataset) -> None:
        """Raise ValueError for data that the networks do not take."""
        super().check(data)
        if self.discriminator is not None:
            must_take(self.discriminator, data)
            if "pictures" not in data.holds:
                raise ValueError(f"parts.{ADVERSARIAL} needs pictures, and {data.name} holds none")


class AutoencoderKL(Adversarial, VAE):
    """The autoencoder of latent diffusion: a VAE whose latents are maps, with a discriminator; see `Adversarial`.

    Args:
        model, discriminator, game, adaptive, r1, start: as in `Adversarial`.
        parts: as in `ddpm.training.tasks.vae.VAE`, and adversarial.
        warmup, free_bits, only: as in `VAE`.
    Raises: ValueError as both.
    Source: High-Resolution Image Synthesis with Latent Diffusion Models (arXiv 2112.10752), section 3.1.
    """

    def __init__(
        self,
        model: nn.Module,
        discriminator: nn.Module,
        parts: Mapping[str, float],
        game: str = "hinge",
        adaptive: bool = True,
        r1: float = 0.0,
        start: float = 0.5,
        warmup: float = 0.0,
        free_bits: float = 0.0,
        only: Sequence[str] | None = None,
    ):
        options = {"warmup": warmup, "free_bits": free_bits, "only": only, "binarise": False}
        super().__init__(model, discriminator, parts, game, adaptive, r1, start, **options)


class VQGAN(Adversarial, VQVAE):
    """A VQ-VAE with a discriminator; see `Adversarial`.

    Args:
        model, discriminator, game, adaptive, r1, start: as in `Adversarial`.
        parts: as in `ddpm.training.tasks.vqvae.VQVAE`, and adversarial.
        revive, only: as in `VQVAE`.
    Raises: ValueError as both.
    Source: Taming Transformers for High-Resolution Image Synthesis (arXiv 2012.09841).
    """

    def __init__(
        self,
        model: nn.Module,
        discriminator: nn.Module,
        parts: Mapping[str, float],
        game: str = "hinge",
        adaptive: bool = True,
        r1: float = 0.0,
        start: float = 0.5,
        revive: int = 10,
        only: Sequence[str] | None = None,
    ):
        super().__init__(model, discriminator, parts, game, adaptive, r1, start, revive=revive, only=only)
