"""Vector-quantised autoencoders: latents are codes of a codebook."""

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

OWN = ("codebook", "commitment")  # parts that do not compare with data


@dataclass(frozen=True, kw_only=True)
class Quantised(Seen):
    """Data, with the vectors that dead codes are revived by.

    Args:
        chosen: indices in the whole batch of the vectors that replace dead codes, (B, n): the first K of all.
    """

    chosen: Tensor


class VQVAE(Autoencoder):
    r"""Train an encoder, a codebook and a decoder.

    .. math:: L = \sum_k w_k L_k(x, \hat x) + \lVert \operatorname{sg}[z_e(x)] - e \rVert_2^2
            + \beta \lVert z_e(x) - \operatorname{sg}[e] \rVert_2^2

    with beta = parts.commitment. After each step a codebook of moving averages is updated with the vectors assigned to
    each code, by the encoder as it is after the step; every `revive` steps dead codes, to which none are assigned, are
    replaced by vectors of the batch.

    Args:
        model: with `forward(x)` -> (x, codes, z_e, z_q), `codebook`, `grid`, `encode`, as in `models.vqvae.VQVAE`.
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
        self.weights |= {"perplexity": 0.0}  # logged, not trained
        self.revive, self.steps = revive, 0

    # -------------------------------------------------------------------------------------------------- training

    def draw(self, batch: Batch, random: Keyed, progress: float) -> Quantised:
        """Draw which pixels are white, if they are binarised, and the vectors that replace dead codes."""
        device, (h, w) = batch.x.device, self.model.grid
        x = self.reconstruction.drawn(
            batch.x, lambda: torch.rand(batch.x.shape, device=device, generator=random("binarise"))
        )
        n, codes = len(batch), self.model.codebook.codes
        shape = (n, math.ceil(codes / n))
        chosen = torch.randint(n * h * w, shape, device=device, generator=random("revive"))
        return Quantised(x=x, condition=batch.condition, chosen=chosen)

    def output(self, drawn: Quantised) -> Tensor:
        """Return the decoder's output (B, *) for codes."""
        output: Tensor = self.model(drawn.x).x
        return output

    def losses(self, drawn: Quantised, progress: float) -> Losses:  # type: ignore[override]  # its own draws
        """Return the parts by name, each (B,), and the perplexity of the codebook's averages, which is not trained."""
        coded, book = self.model(drawn.x), self.model.codebook
        parts = self.compared(coded.x, drawn, progress)
        own = book.losses(coded.z_e, coded.z_q)
        size = coded.z_e[0].numel()  # a sum over dimensions, as of x
        parts |= {name: size * part for name, part in own.items() if self.weights.get(name)}
        p = book.N / book.N.sum()
        return parts | {"perplexity": torch.special.entr(p).sum().exp().expand(len(drawn.x))}

    @torch.no_grad()
    def after_step(self, drawn: Quantised, losses: Losses) -> None:  # type: ignore[override]  # its own draws
        """Update the codebook's averages with the whole batch; revive dead codes, if it is time for that.

        A step whose losses are not finite is ignored, as for the weights.
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
        """Return the number of steps; the codebook's averages are in the network's file."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore `state_dict`."""
        self.steps = state.get("steps", 0)

    # ------------------------------------------------------------------------------------------------ evaluation

    def codec(self) -> Discrete:
        """Return the codec between data and codes."""
        return Discrete(self.model, self.reconstruction.picture)

    def source(
        self,
        data: Dataset | None,
        seed: int,
        device: torch.device,
        precision: str = "fp32",
        requested: Sequence[int] | None = None,
    ) -> Source | None:
        """Return the source of reconstructed held-out data: there is no distribution of codes to sample yet."""
        return None if data is None else Reconstructed(self.codec(), data, seed, device, precision, requested)

    @torch.no_grad()
    def draw_results(self, folder: Path, data: Dataset) -> None:
        """Draw reconstructions.png: data, their codes, and reconstructions."""
        from ddpm.figures import plots

        self.model.eval()
        codec, x = self.codec(), self.figure_batch(data).x
        codes = codec.posterior(x)
        plots.code_maps(
            folder / "reconstructions.png",
            [("held out", x.cpu()), ("codes", codes.cpu()), ("reconstructed", codec.decode(codes.long()).cpu())],
            codec.codes,
        )
