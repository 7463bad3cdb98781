"""Autoencoders whose latents are codes of a codebook."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ddpm.checks import is_whole
from ddpm.data.batch import Batch
from ddpm.data.dataset import Dataset
from ddpm.latent.codec import Discrete
from ddpm.randomness import Keyed
from ddpm.sources.base import Source
from ddpm.sources.reconstructed import Reconstructed
from ddpm.training.task import Losses
from ddpm.training.tasks.autoencoder import Autoencoder, Seen

OWN = ("codebook", "commitment")  # parts that compare with no data


@dataclass(frozen=True, kw_only=True)
class Quantised(Seen):
    """Data, and where dead codes go.

    Args:
        chosen: the numbers, in the whole batch, of the vectors that dead codes become, (B, n): the first K of all.
    """

    chosen: Tensor


class VQVAE(Autoencoder):
    r"""Train an encoder, a codebook and a decoder.

    .. math:: L = \sum_k w_k L_k(x, \hat x) + \lVert \operatorname{sg}[z_e(x)] - e \rVert_2^2
            + \beta \lVert z_e(x) - \operatorname{sg}[e] \rVert_2^2

    with beta = parts.commitment. After each step codes of which moving averages are kept take what they stand for then,
    by the encoder as it is after the step; every `revive` steps those that stand for nothing become vectors of the
    batch.

    Args:
        model: with `forward(x)` -> (x, codes, z_e, z_q), `codebook`, `grid`, `encode`, as `models.vqvae.VQVAE` has it.
        parts: name -> weight, 0 for a part that is not computed; of `ddpm.latent.reconstruction.PARTS`, codebook (of a
            codebook that is trained by its gradient) and commitment.
        revive: steps from one revival of dead codes to the next; 0 for none.
        binarise, only: as in `ddpm.training.tasks.autoencoder.Autoencoder`.
    Raises: ValueError as there, and for numbers out of range.
    Source: Neural Discrete Representation Learning (arXiv 1711.00937); codes are revived as in Jukebox (arXiv
        2005.00341), section 3.1.
    """

    draws_of_data = True

    def __init__(
        self,
        model: nn.Module,
        parts: Mapping[str, float],
        revive: int = 10,
        binarise: bool = False,
        only: Sequence[str] | None = None,
    ):
        for name in OWN:
            weight = parts.get(name, 0)
            if isinstance(weight, bool) or not 0 <= weight < math.inf:
                raise ValueError(f"parts.{name} = {weight!r} must be >= 0 and finite")
        if not is_whole(revive, 0):
            raise ValueError(f"revive = {revive!r} must be an integer >= 0: steps, or 0 for never")
        super().__init__(model, parts, OWN, binarise, only)
        if self.model.codebook.m is None and not parts.get("codebook"):
            raise ValueError("parts.codebook = 0 trains no codebook; set parts.codebook=1, or model.update=average")
        self.weights |= {"perplexity": 0.0}  # which is looked at
        self.revive, self.steps = revive, 0

    # -------------------------------------------------------------------------------------------------- what is trained

    def draw(self, batch: Batch, random: Keyed, progress: float) -> Quantised:
        """Which pixels are white, if they are drawn so, and where codes go that are dead."""
        device, (h, w) = batch.x.device, self.model.grid
        x = self.reconstruction.drawn(
            batch.x, lambda: torch.rand(batch.x.shape, device=device, generator=random("binarise"))
        )
        n, codes = len(batch), self.model.codebook.codes
        shape = (n, math.ceil(codes / n))
        chosen = torch.randint(n * h * w, shape, device=device, generator=random("revive"))
        return Quantised(x=x, condition=batch.condition, chosen=chosen)

    def output(self, drawn: Quantised) -> Tensor:
        """The decoder's output (B, *) for codes."""
        output: Tensor = self.model(drawn.x).x
        return output

    def losses(self, drawn: Quantised, progress: float) -> Losses:  # type: ignore[override]  # its own draws
        """The parts by name, each (B,), and the perplexity of the codebook's averages, which is not trained."""
        coded, book = self.model(drawn.x), self.model.codebook
        parts = self.compared(coded.x, drawn, progress)
        own = book.losses(coded.z_e, coded.z_q)
        size = coded.z_e[0].numel()  # a sum over dimensions, as of x
        parts |= {name: size * part for name, part in own.items() if self.weights.get(name)}
        p = book.N / book.N.sum()
        return parts | {"perplexity": torch.special.entr(p).sum().exp().expand(len(drawn.x))}

    @torch.no_grad()
    def after_step(self, drawn: Quantised, losses: Losses) -> None:  # type: ignore[override]  # its own draws
        """Take note of what codes stand for, in the whole batch; revive those that are dead, if it is time for that.

        A step whose losses are not finite is passed over, as its weights are.
        """
        self.steps += 1
        book = self.model.codebook
        z_e = self.model.z_e(drawn.x)
        if not (z_e.isfinite().all() and self.total(losses).isfinite().all()):
            return
        book.update(z_e, book.nearest(z_e))
        if self.revive and self.steps % self.revive == 0:
            book.revive(z_e, drawn.chosen.flatten()[: book.codes])

    def state_dict(self) -> dict[str, int]:
        """The number of steps; what codes stand for is in the network's file."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from `state_dict`."""
        self.steps = state.get("steps", 0)

    # ------------------------------------------------------------------------------------------------ what is looked at

    def codec(self) -> Discrete:
        """The codec between data and codes."""
        return Discrete(self.model, self.reconstruction.picture)

    def source(
        self,
        data: Dataset | None,
        seed: int,
        device: torch.device,
        precision: str = "fp32",
        requested: Sequence[int] | None = None,
    ) -> Source | None:
        """Held-out data, reconstructed: there is no distribution of codes to draw from yet."""
        return None if data is None else Reconstructed(self.codec(), data, seed, device, precision, requested)

    @torch.no_grad()
    def draw_results(self, folder: Path, data: Dataset) -> None:
        """Pictures of data, their codes, and what is made of these."""
        from ddpm.figures import plots

        self.model.eval()
        codec, x = self.codec(), self.figure_batch(data).x
        codes = codec.posterior(x)
        plots.code_maps(
            folder / "reconstructions.png",
            [("held out", x.cpu()), ("codes", codes.cpu()), ("reconstructed", codec.decode(codes.long()).cpu())],
            codec.codes,
        )
