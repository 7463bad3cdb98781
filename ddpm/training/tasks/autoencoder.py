"""The base of autoencoders' tasks: data, as they are modelled, and the parts of a loss that compare with them."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ddpm.data.batch import Batch, Condition
from ddpm.data.dataset import Dataset, spread
from ddpm.latent.reconstruction import PERCEPTUAL, Reconstruction
from ddpm.training.task import Drawn, Losses, Task, must_take

SHOWN = 12  # data that are drawn beside what is made of them
OF_BYTES = ("bernoulli", "focal", "logistic")  # parts of data that are bytes
OF_IMAGES = ("ssim", PERCEPTUAL)


@dataclass(frozen=True, kw_only=True)
class Seen(Drawn):
    """Data as an autoencoder sees them.

    Args:
        x: (B, *), black and white where they are modelled so.
        condition: what encoder and decoder are told.
    """

    x: Tensor
    condition: Condition


class Autoencoder(Task):
    """Train an encoder and a decoder by parts of a loss, some of which compare with data, and some of which do not.

    The part "perceptual" is computed by `frozen["perceptual"]`, a `ddpm.latent.perceptual.Perceptual`, which whoever
    trains the task puts there: what was trained encodes and decodes without.

    Args:
        model: with `shape` of a sample, and `log_scale` where a part has a scale.
        parts: name -> weight, 0 for a part that is not computed.
        own: the names of the parts that compare with no data; the others are of `ddpm.latent.reconstruction.PARTS`.
        binarise: as in `ddpm.latent.reconstruction.Reconstruction`.
        only: as in `Task`.
    Raises: ValueError for parts that are not known, or that take the decoder's output for different things.
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
        """The decoder's output (B, *) for what was drawn."""

    def compared(self, output: Tensor, drawn: Any, progress: float) -> Losses:
        """The parts that compare a decoder's output (B, *) with data, each (B,)."""
        distance = self.frozen.get(PERCEPTUAL)
        return self.reconstruction(output, drawn.x, getattr(self.model, "log_scale", None), distance)

    def check(self, data: Dataset) -> None:
        """Raise ValueError for data that the network does not take, or of which a part has no meaning."""
        must_take(self.model, data)
        for name in self.reconstruction.parts:
            holds = "bytes" if name in OF_BYTES else "pictures" if name in OF_IMAGES else None
            if holds is not None and holds not in data.holds:
                raise ValueError(
                    f"parts.{name} is of {holds}, and {data.name} holds none; set parts.gaussian=1 instead"
                )

    def figure_batch(self, data: Dataset) -> Batch:
        """Data that are drawn beside what is made of them: held out, if any are."""
        numbers = data.held_out if len(data.held_out) else data.train
        return data.batch(numbers[spread(len(numbers), SHOWN)], next(self.model.parameters()).device)
