"""Sounds of a published network: mel spectrograms sampled unconditionally, and their inversion to sound."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddpm.data.batch import takes
from ddpm.data.spectrogram import Mel
from ddpm.figures.images import to_uint8
from ddpm.latent.codec import Continuous
from ddpm.runs.precision import PRECISIONS
from ddpm.samplers.base import Callback, Sampler
from ddpm.sources.published import Scheduler
from ddpm.sources.trained import TrainedSampler

KIND = "sound"
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue, by which the published pipeline converts colour to gray


def gray(x: Tensor) -> Tensor:
    """Return gray pictures (n, 1, H, W) of pictures in colour (n, 3, H, W); gray ones are returned unchanged."""
    return x if x.shape[1] == 1 else (x * x.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)


@dataclass
class SoundPipeline:
    """A published audio model: U-Net, mel settings, scheduler, and an autoencoder if it draws latents.

    Args:
        model: the U-Net, unconditional: (x_t, t) -> (B, C, h, w).
        mel: how pictures become sounds; its bands and frames are the size of a picture.
        scheduler: the process, and the default sampler.
        codec: the autoencoder of pictures, gray or in colour, whose latents the U-Net draws; None for pictures.
        device, precision: of the U-Net's computation; the codec decodes in float32.
        about: its licence and its origin.
    Raises: ValueError for an unknown precision, or parts that do not fit each other.
    """

    model: nn.Module
    mel: Mel
    scheduler: Scheduler
    codec: Continuous | None
    device: torch.device
    precision: str = "fp32"
    about: tuple[str, ...] = ()
    kind = KIND

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision = {self.precision!r} is not known; allowed: {', '.join(PRECISIONS)}")
        if self.codec is not None:
            self.codec = self.codec.of_size(self.mel.n_mels, self.mel.frames)
            self.codec.picture, self.codec.of = gray, (1, *self.codec.of[1:])
        _must_fit(self.model, self.mel, self.codec)
        for network in (self.model, *(() if self.codec is None else (self.codec.model,))):
            network.to(self.device).eval().requires_grad_(False)

    def of(self, sampler: Sampler | int | None = None, seed: int = 0) -> TrainedSampler:
        """Return the source of pictures (n, 1, mel.n_mels, mel.frames); nothing is drawn yet.

        Args:
            sampler: any of `ddpm.samplers`; None for the scheduler's own with its own times, a number for that many
                steps of it.
            seed: of all noise.
        Raises: ValueError for more steps than the scheduler has.
        """
        if not isinstance(sampler, Sampler):
            sampler = self.scheduler.sampler(self.scheduler.usual if sampler is None else sampler)
        shape = (1, self.mel.n_mels, self.mel.frames) if self.codec is None else self.codec.shape
        source = TrainedSampler(self.scheduler.diffusion, self.model, sampler, shape, seed, self.device, self.precision)
        return source.decoded_by(self.codec)

    def draw(
        self,
        n: int = 1,
        sampler: Sampler | int | None = None,
        seed: int = 0,
        *,
        batch: int = 4,
        callback: Callback | None = None,
    ) -> Tensor:
        """Draw pictures (n, 1, mel.n_mels, mel.frames) in [-1, 1], on the CPU; sample i depends on seed and i alone.

        Args: as in `of`; batch and callback as in `ddpm.sources.prompted.Pipeline.draw`.
        Raises: ValueError as `of`, and for n or a batch below 1.
        """
        for name, value in (("n", n), ("batch", batch)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} = {value!r} must be an integer >= 1")
        source = self.of(sampler, seed)
        parts = [list(range(start, min(start + batch, n))) for start in range(0, n, batch)]
        return torch.cat([source.draw(numbers, callback) for numbers in parts])

    def sound(self, x: Tensor) -> Tensor:
        """Return the sounds of pictures: float32 (n, mel.slice_size), with a peak of 0.9."""
        return self.mel.decode(to_uint8(x.cpu()))


def _must_fit(model: nn.Module, mel: Mel, codec: Continuous | None) -> None:
    """Raise ValueError for parts that do not fit each other, as far as their attributes tell."""
    drawn = (1, mel.n_mels, mel.frames) if codec is None else codec.shape
    channels, size = getattr(model, "in_channels", drawn[0]), tuple(getattr(model, "image_size", drawn[1:]))
    wrong = []
    if takes(model):
        wrong.append(f"the U-Net is conditioned on {', '.join(takes(model))}, but sounds are drawn from noise alone")
    if (channels, *size) != tuple(drawn):
        what = "pictures" if codec is None else "latents"
        wrong.append(
            f"the U-Net draws {'x'.join(map(str, (channels, *size)))}, and {what} of {mel.n_mels} bands and "
            f"{mel.frames} frames are {'x'.join(map(str, drawn))}"
        )
    if wrong:
        raise ValueError(f"the parts do not fit each other: {'; '.join(wrong)}")
