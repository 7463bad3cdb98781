"""Autoregressive models of codes: the distribution of each code of a grid, given those before it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm.data.batch import Batch, Condition
from ddpm.data.dataset import Dataset, spread
from ddpm.randomness import Keyed
from ddpm.sources.autoregressive import Autoregressive as Source
from ddpm.training.task import Drawn, Losses, Task, must_take
from ddpm.training.tasks.autoencoder import SHOWN


@dataclass(frozen=True, kw_only=True)
class Grids(Drawn):
    """Grids of codes, with their conditions.

    Args:
        z: integers, (B, h, w).
        condition: the condition of the network.
    """

    z: Tensor
    condition: Condition


class Autoregressive(Task):
    r"""Train a network by the likelihood of codes.

    .. math:: L = -\frac{1}{hw} \log p_\theta(z \mid y)

    in nats, for each code.

    Args:
        model: with `forward(z, y)` -> logits (B, K, h, w), `codes`, `sample` and `check`.
        only: as in `Task`.
    Source: Conditional Image Generation with PixelCNN Decoders (arXiv 1606.05328).
    """

    replayable = True

    def __init__(self, model: nn.Module, only: Sequence[str] | None = None):
        super().__init__({"model": model}, only=only)

    @property
    def model(self) -> Any:
        return self.modules["model"]

    def draw(self, batch: Batch, random: Keyed, progress: float) -> Grids:
        """Return the codes of a step's whole batch; nothing is random."""
        return Grids(z=batch.x, condition=batch.condition)

    def losses(self, drawn: Grids, progress: float) -> Losses:  # type: ignore[override]  # its own draws
        """Return the nats per code, (B,)."""
        logits = self.model(drawn.z, drawn.condition.for_network(self.model))
        return {"codes": F.cross_entropy(logits, drawn.z, reduction="none").mean((1, 2))}

    def check(self, data: Dataset) -> None:
        """Raise ValueError for data that are no codes, or others than the network takes."""
        if "codes" not in data.holds:
            raise ValueError(f"{data.name} holds no codes; set init_codec= to a run of experiment=vqvae")
        must_take(self.model, data)
        if data.codec is not None and data.codec.codes != self.model.codes:
            raise ValueError(
                f"model.codes = {self.model.codes}, but the codec has {data.codec.codes} codes; leave model.codes out"
            )

    def source(
        self,
        data: Dataset | None,
        seed: int,
        device: torch.device,
        precision: str = "fp32",
        requested: Sequence[int] | None = None,
    ) -> Source:
        """Return the source that samples codes one by one."""
        return Source(self.model, seed, device, precision, requested)

    @torch.no_grad()
    def draw_results(self, folder: Path, data: Dataset) -> None:
        """Draw codes.png: data, their codes and reconstructions, sampled codes and their images."""
        if data.codec is None:
            return
        from ddpm.figures import plots

        device = next(self.model.parameters()).device
        numbers = data.held_out if len(data.held_out) else data.train
        numbers = numbers[spread(len(numbers), SHOWN)]
        real, codes = data.original.batch(numbers).x, data.batch(numbers, device).x
        source = self.source(data, 0, device).decoded_by(data.codec)
        drawn = source.codes(range(SHOWN))
        rows = [("held out", real), ("its codes", codes.cpu()), ("reconstructed", source.decode(codes))]
        rows += [("codes, drawn", drawn.cpu()), ("image of them", source.decode(drawn))]
        plots.code_maps(folder / "codes.png", rows, self.model.codes)
