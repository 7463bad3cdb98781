"""The base of autoencoders' tasks: data preparation, and the parts of a loss that compare with data."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ddpm.data.batch import Batch, Condition
from ddpm.data.dataset import Dataset, spread
from ddpm.latent.reconstruction import PERCEPTUAL, Reconstruction
from ddpm.training.task import Drawn, Losses, Task, must_take

SHOWN = 12  # data in a figure, next to their reconstructions
OF_BYTES = ("bernoulli", "focal", "logistic")  # parts that need byte data
OF_IMAGES = ("ssim", PERCEPTUAL)


@dataclass(frozen=True, kw_only=True)
class Seen(Drawn):
    """Data as an autoencoder sees them.

    Args:
        x: (B, *), binarised if the task does so.
        condition: the condition of encoder and decoder.
    """

    x: Tensor
    condition: Condition


class Autoencoder(Task):
    """Train an encoder and a decoder by parts of a loss, some of which compare with data, and some of which do not.

    The part "perceptual" is computed by `frozen["perceptual"]`, a `ddpm.latent.perceptual.Perceptual`, which the caller
    sets before training; encoding and decoding do not need it.

    Args:
        model: with `shape` of a sample, and `log_scale` where a part has a scale.
        parts: name -> weight, 0 for a part that is not computed.
        own: the names of the parts that do not compare with data; the others are of `ddpm.latent.reconstruction.PARTS`.
        binarise: as in `ddpm.latent.reconstruction.Reconstruction`.
        only: as in `Task`.
    Raises: ValueError for parts that are not known, or that interpret the decoder's output differently.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Mapping[str, float],
        own: Sequence[str],
        binarise: bool,
        only: Sequence[str] | None = None,
    ):
        of_data = {name: weight for name, weight in parts.items() if name not in own}
        self.reconstruction = Reconstruction(of_data, binarise, own)
        super().__init__({"model": model}, weights=dict(parts), only=only)
        if (scaled := self.reconstruction.scaled) and getattr(model, "log_scale", None) is None:
            raise ValueError(f"parts: {scaled} has a scale, and the decoder has none; set model.scale=1")

    @property
    def model(self) -> Any:
        return self.modules["model"]

    @property
    def perceives(self) -> bool:  # type: ignore[override]  # by its parts
        """Whether one of the parts is the perceptual one."""
        return PERCEPTUAL in self.reconstruction.parts

    @abstractmethod
    def output(self, drawn: Any) -> Tensor:
        """Return the decoder's output (B, *) for a step's draws."""

    def compared(self, output: Tensor, drawn: Any, progress: float) -> Losses:
        """Return the parts that compare a decoder's output (B, *) with data, each (B,)."""
        distance = self.frozen.get(PERCEPTUAL)
        return self.reconstruction(output, drawn.x, getattr(self.model, "log_scale", None), distance)

    def check(self, data: Dataset) -> None:
        """Raise ValueError for data that the network does not take, or that a part is not defined for."""
        must_take(self.model, data)
        for name in self.reconstruction.parts:
            holds = "bytes" if name in OF_BYTES else "pictures" if name in OF_IMAGES else None
            if holds is not None and holds not in data.holds:
                raise ValueError(
                    f"parts.{name} needs {holds}, and {data.name} holds none; set parts.gaussian=1 instead"
                )

    def figure_batch(self, data: Dataset) -> Batch:
        """Return the data of figures of reconstructions: held out, if any are."""
        numbers = data.held_out if len(data.held_out) else data.train
        return data.batch(numbers[spread(len(numbers), SHOWN)], next(self.model.parameters()).device)
