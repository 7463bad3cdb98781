"""Data for prior preservation (DreamBooth): every batch pairs pictures of a subject with others of its class."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ddpm.data.batch import Batch
from ddpm.data.dataset import ImageData
from ddpm.randomness import generator as keyed


class WithPrior(ImageData):
    """A few captioned images of a subject, and as many of its class (the prior) in each batch.

    The held-out part, the length of an epoch, and the conditions of samples are those of the subject's images alone.

    Args:
        subject: the few images with captions.
        images: of the class, uint8 (M, C, H, W), of the same shape.
        captions: of those.

    Attributes:
        prior_count: M.

    Raises: ValueError for images of another shape, none at all, or captions that are not as many as images.
    """

    def __init__(self, subject: ImageData, images: Tensor, captions: Sequence[str]):
        for pictures, captioned in ((subject.images, subject.captions), (images, captions)):
            if len(pictures) != len(captioned) or not len(pictures):
                raise ValueError(f"{subject.name}: {len(pictures)} images and {len(captioned)} captions; one of each")
        if images.shape[1:] != subject.images.shape[1:]:
            raise ValueError(
                f"{subject.name}: images of the class are {tuple(images.shape[1:])}, those of the subject "
                f"{tuple(subject.images.shape[1:])}; both need one size"
            )
        self._parts, self.prior_count, self._subject = (
            (subject.train, subject.held_out),
            len(images),
            subject.identity(),
        )
        self.captions = (*subject.captions, *captions)
        both = torch.cat([subject.images.cpu(), images])
        settings: dict[str, Any] = {"flip": subject.flip, "condition": subject.condition}
        super().__init__(subject.name, subject.split, both, validation=0.0, **settings)
        self.origin = subject.origin

    def _divide(self, count: int, validation: float) -> tuple[Tensor, Tensor]:
        """Return the training and held-out indices of the subject's pictures."""
        return self._parts

    def order(self, seed: int, step: int, batch_size: int) -> Tensor:
        """Return the indices (batch_size,) of one step's batch, alternating the subject and its class.

        Both kinds are shuffled anew whenever all of one have been used.

        Args, raises: as in `Dataset`; a batch of fewer than 2 has no room for both.
        """
        if batch_size < 2:
            raise ValueError(f"batch_size={batch_size}: one of the subject and one of its class need 2 at least")
        of_class = batch_size // 2
        numbers = torch.empty(batch_size, dtype=torch.long)
        numbers[::2] = super().order(seed, step, batch_size - of_class)
        first = (step - 1) * of_class
        turns = [divmod(place, self.prior_count) for place in range(first, first + of_class)]
        shuffled = {turn: self._shuffled(seed, turn) for turn in {turn for turn, _ in turns}}
        numbers[1::2] = torch.stack([shuffled[turn][place] for turn, place in turns])
        return numbers

    def _shuffled(self, seed: int, turn: int) -> Tensor:
        """Return the indices of all images of the class, shuffled for one pass over them."""
        order = torch.randperm(self.prior_count, generator=keyed(seed, "order beside", turn))
        return len(self) - self.prior_count + order

    def batch(
        self, indices: Tensor, device: torch.device | str = "cpu", generator: torch.Generator | None = None
    ) -> Batch:
        """Return a batch as in `ImageData`, with images of the class marked as `of_prior`."""
        batch = super().batch(indices, device, generator)
        return replace(batch, of_prior=self.of_prior(indices).to(batch.x.device))

    def identity(self) -> dict[str, Any]:
        """Return the identity of the subject's data, and the count and checksums of all images together."""
        both = super().identity()
        return self._subject | {"beside": {key: both[key] for key in ("count", "sha256", "captions")}}
