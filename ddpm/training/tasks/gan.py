"""Generative adversarial networks: a generator and a discriminator that are trained against each other."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddpm.data.batch import Batch, Condition, labels_of
from ddpm.data.dataset import Dataset, check_choice
from ddpm.latent.adversarial import GAMES, differentiable, r1
from ddpm.randomness import Keyed
from ddpm.sources.decoded import Generated
from ddpm.training.task import Drawn, Losses, Phase, Task, must_take


@dataclass(frozen=True, kw_only=True)
class Match(Drawn):
    """Data, and the codings from which samples are generated.

    Args:
        x: data, (B, *).
        condition: the condition of both networks.
        z: standard normal codings of the discriminator's phase, (B, codings); z_generator: those of the generator's
            phase.
    """

    x: Tensor
    condition: Condition
    z: Tensor
    z_generator: Tensor


class GAN(Task):
    r"""Train a generator and a discriminator in turn, each by an optimizer of its own.

    .. math:: \min_D \; L_D(D(x), D(G(z))) + \tfrac{\gamma}{2} \lVert \nabla_x D(x) \rVert^2, \qquad
        \min_G \; L_G(D(G(z')))

    Samples are drawn from the averaged generator.

    Args:
        model: the generator, with `decode(z, y)` -> (B, *) in [-1, 1], `codings` and `shape`.
        discriminator: (x, y) -> logits (B, *), larger for data.
        game: "non_saturating" or "hinge", see `ddpm.latent.adversarial.GAMES`.
        r1: gamma, the R1 penalty's weight; 0 for none.
        only: as in `Task`.
    Raises: ValueError for another game, gamma out of range.
    Source: Generative Adversarial Nets (arXiv 1406.2661); Which Training Methods for GANs do actually Converge? (arXiv
        1801.04406); averaged generators: The Unusual Effectiveness of Averaging in GAN Training (arXiv 1806.04498).
    """

    def __init__(
        self,
        model: nn.Module,
        discriminator: nn.Module,
        game: str = "non_saturating",
        r1: float = 1.0,
        only: Sequence[str] | None = None,
    ):
        check_choice("game", game, GAMES)
        if isinstance(r1, bool) or not 0 <= r1 < math.inf:
            raise ValueError(f"r1 = {r1!r} must be >= 0 and finite")
        super().__init__({"model": model, "discriminator": discriminator}, weights={"r1": r1}, only=only)
        self.game = GAMES[game]

    @property
    def model(self) -> Any:
        return self.modules["model"]

    @property
    def discriminator(self) -> nn.Module:
        return self.modules["discriminator"]

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The discriminator's phase, then the generator's."""
        return (
            Phase("discriminator", ("discriminator",), self.losses),
            Phase("generator", ("model",), self.generator_losses),
        )

    def averages(self, name: str) -> bool:
        """Return whether a module's weights are averaged: only the generator's, which the discriminator sees raw."""
        return name == "model"

    def draw(self, batch: Batch, random: Keyed, progress: float) -> Match:
        """Draw the codings of both phases, for a step's whole batch."""
        z, z_generator = (
            torch.randn(len(batch), self.model.codings, device=batch.x.device, generator=random(stream))
            for stream in ("eps", "eps of the generator")
        )
        return Match(x=batch.x, condition=batch.condition, z=z, z_generator=z_generator)

    def losses(self, drawn: Any, progress: float) -> Losses:
        """Return the discriminator's losses: the game's, and the penalty, each (B,)."""
        real = differentiable(drawn.x) if self.weights["r1"] else drawn.x
        parts = self._judged(real, drawn)
        of_real = parts.pop("logits")
        return parts | ({"r1": r1(of_real, real)} if self.weights["r1"] else {})

    def generator_losses(self, drawn: Any, progress: float) -> Losses:
        """Return the generator's loss, (B,)."""
        made = self.model.decode(drawn.z_generator, drawn.condition.for_network(self.model))
        return {"generator": self.game.generator(self._logits(made, drawn))}

    def held_out(self, drawn: Match) -> Losses:  # type: ignore[override]  # its own draws
        """Return the discriminator's loss on held-out data and samples: who is ahead, not sample quality."""
        parts = self._judged(drawn.x, drawn)
        del parts["logits"]
        return parts

    def _judged(self, real: Tensor, drawn: Match) -> Losses:
        """Return the discriminator's loss, and its logits of data."""
        with torch.no_grad():
            made = self.model.decode(drawn.z, drawn.condition.for_network(self.model))
        of_real, of_made = self._logits(real, drawn), self._logits(made, drawn)
        return {"discriminator": self.game.discriminator(of_real, of_made), "logits": of_real}

    def _logits(self, x: Tensor, drawn: Match) -> Tensor:
        logits: Tensor = self.discriminator(x, drawn.condition.for_network(self.discriminator))
        return logits

    def check(self, data: Dataset) -> None:
        """Raise ValueError for data that the networks do not take, or networks with different conditions."""
        must_take(self.model, data)
        must_take(self.discriminator, data)
        if labels_of(self.model) != labels_of(self.discriminator):
            ours, theirs = (getattr(network, "num_classes", None) for network in (self.model, self.discriminator))
            raise ValueError(f"discriminator.num_classes = {theirs}, but model.num_classes = {ours}; set both alike")

    def source(
        self,
        data: Dataset | None,
        seed: int,
        device: torch.device,
        precision: str = "fp32",
        requested: Sequence[int] | None = None,
    ) -> Generated:
        """Return the source that decodes normal codings."""
        return Generated(self.model, self.model.shape, seed, device, precision, requested)
