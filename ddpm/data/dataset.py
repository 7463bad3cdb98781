"""Data sets in memory: a fixed held-out part, an order that is a pure function of the step; images stored as bytes."""

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from ddpm.data.batch import Batch, Condition, on
from ddpm.data.conditions import KINDS, image_of
from ddpm.figures.images import to_float
from ddpm.randomness import generator as keyed
from ddpm.runs.files import Origin
from ddpm.runs.preflight import available, in_words

EPOCHS_CACHED = 3  # permutations that `order` caches: a batch rarely touches more than two epochs


def height_width(image_size: int | Sequence[int]) -> tuple[int, int]:
    """Return (H, W) from one side of a square or from [H, W]; ValueError unless whole numbers >= 1."""
    size = tuple(image_size) if isinstance(image_size, Sequence) else (image_size, image_size)
    if len(size) != 2 or not all(isinstance(side, int) and side >= 1 for side in size):
        raise ValueError(f"image_size={image_size!r}: give a whole number of pixels >= 1, or [height, width]")
    return size


def spread(count: int, n: int) -> Tensor:
    """Return at most n indices of 0..count-1, evenly spaced: samples may lie in the order of their classes."""
    return torch.linspace(0, count - 1, min(n, count), dtype=torch.float64).round().long()


def check_choice(key: str, value: str, allowed: Iterable[str]) -> None:
    """Raise ValueError, with the allowed values, unless `value` is one of them."""
    if value not in allowed:
        raise ValueError(f"{key}={value!r}: choose one of {', '.join(allowed)}")


def check_options(
    image_size: int | Sequence[int] | None,
    channels: int | None,
    validation: float,
    condition: str | None = None,
    conditions: Sequence[str] = KINDS,
) -> None:
    """Raise ValueError for options that no source admits; a source calls it before it reads or downloads anything."""
    if image_size is not None:
        height_width(image_size)
    if channels not in (None, 1, 3):
        raise ValueError(f"channels={channels!r}: choose 1 (grayscale) or 3 (RGB)")
    if not isinstance(validation, int | float) or not 0 <= validation < 1:
        raise ValueError(f"validation={validation!r}: the held-out fraction lies in 0 <= validation < 1")
    if condition is not None:
        check_choice("condition", condition, conditions)
    if condition == "gray" and channels == 1:
        raise ValueError("condition='gray' gives away all of a gray image; set channels=3, or another condition")


def check_room(count: int, image_size: int | Sequence[int], channels: int) -> None:
    """Raise ValueError if this many images would not fit into memory, which holds them twice while they are stacked."""
    height, width = height_width(image_size)
    needed, there = count * channels * height * width, available(torch.device("cpu"))
    if there is not None and 2 * needed > there:
        raise ValueError(
            f"image_size={image_size!r}: {count:,} images of {channels}x{height}x{width} take {in_words(needed)}, and "
            f"twice that while they are read, but {in_words(there)} of memory are available"
        )


def check_name(name: str) -> None:
    """Raise ValueError for a name that could not be part of a file name, as files are named after their data."""
    if not isinstance(name, str) or not name.isprintable() or set("/\\") & set(name):
        raise ValueError(f"name={name!r}: the data's name becomes part of files' names; set a name without / and \\")


def check_labels(labels: Tensor, count: int, where: object) -> None:
    """Raise ValueError naming `where` and the first of `labels` (N,) that is outside 0..count-1."""
    wrong = ((labels < 0) | (labels >= count)).nonzero()
    if len(wrong):
        at = int(wrong[0])
        raise ValueError(f"{where}: label {int(labels[at])} of sample {at} is outside 0..{count - 1}")


def fit(images: Tensor, image_size: int | Sequence[int], channels: int) -> Tensor:
    """Bring images to one size and number of channels.

    The shorter side is scaled (bicubic, antialiased) and the longer one cropped around the centre. Colour becomes gray
    by the luma weights of ITU-R 601; gray becomes RGB by repeating.

    Args:
        images: uint8 (N, C, H, W), C is 1 or 3.
        image_size: side of a square, or (H', W').
        channels: 1 or 3.

    Returns: uint8 (N, channels, H', W'); `images` itself where nothing is to be done.

    Raises: ValueError if memory has no room for them.
    """
    height, width = height_width(image_size)
    if images.shape[1:] == (channels, height, width):
        return images
    check_room(len(images), image_size, channels)
    pixels = rearrange(images, "n c h w -> n h w c").numpy()
    pictures = (Image.fromarray(p[:, :, 0] if p.shape[2] == 1 else p) for p in pixels)
    mode = "L" if channels == 1 else "RGB"
    fitted = [np.asarray(ImageOps.fit(p.convert(mode), (width, height), Image.Resampling.BICUBIC)) for p in pictures]
    return rearrange(torch.from_numpy(np.stack(fitted)), "n h w ... -> n (...) h w").contiguous()


class Dataset(ABC):
    """Samples in memory, of which a fixed part is held out: the interface that training, sampling and measures use.

    The held-out part is a random fraction that depends on the number of samples alone, never on the run's seed, so that
    all runs on the same data are judged on the same samples.

    Args:
        name: printable and without slashes; part of their identity.
        split: which published part was read: "train", "test", or "all" where there is only one.
        count: the number N of samples.
        validation: the held-out fraction, 0 <= validation < 1. Unless it is 0 at least one sample is held out.
    Raises: ValueError for arguments outside these ranges.
    """

    origin: Origin | None = None  # the files a source reads: its data are reused while these stay the same
    holds: frozenset[str] = frozenset()
    """Properties that measures can require: "pictures" (x is (C, H, W)), "bytes" (each value one of the 256 that
    lie evenly in [-1, 1]), "classes"."""
    units = "samples"
    """The word for samples in messages."""
    labels: Tensor | None = None
    num_classes = 0
    further_labels: Tensor | None = None
    """Labels in addition to the class, int64 (N, K - 1)."""
    further_counts: tuple[int, ...] = ()
    """The number of values of each further label."""
    styles: tuple[str, ...] = ()
    """The names of the values of the second label; without names, numbers are used."""
    captions: Sequence[str] = ()
    """The caption of each sample, by its number; empty for data without captions."""
    tokens: Tensor | None = None
    """The token ids of the captions, int64 (N, L), of data whose samples are conditioned on text."""
    tokenizer: Any = None
    """The tokenizer that produced `tokens`."""
    prior_count = 0
    """The number of prior-preservation samples, see `ddpm.data.prior_preservation`."""

    def __init__(self, name: str, split: str, count: int, validation: float):
        check_name(name)
        self.name, self.split, self.count = name, split, count
        self.train, self.held_out = self._divide(count, validation)
        self._epochs: dict[tuple[int, int], Tensor] = {}

    def _divide(self, count: int, validation: float) -> tuple[Tensor, Tensor]:
        """Return the sorted indices of the training part and of the held-out part."""
        if validation > 0 and count == 1:
            raise ValueError(f"{self.name}: one sample leaves none to hold out; set validation=0")
        held_out = min(max(round(validation * count), 1), count - 1) if validation > 0 else 0
        shuffled = torch.randperm(count, generator=keyed(0, "held_out"))
        return shuffled[held_out:].sort().values, shuffled[:held_out].sort().values

    def __len__(self) -> int:
        return self.count

    def of_prior(self, indices: Tensor) -> Tensor:
        """Return whether samples of these indices (B,) belong to the prior (images of the subject's class)."""
        return indices >= len(self) - self.prior_count

    @property
    def label_counts(self) -> tuple[int, ...]:
        """The number of values of each label of a sample, the class first; empty for data without labels."""
        return () if self.labels is None else (self.num_classes, *self.further_counts)

    def of_classes(self, classes: Sequence[int]) -> Self:
        """Return a copy whose training and held-out parts are restricted to these classes.

        Raises: ValueError for data without labels.
        """
        if self.labels is None:
            raise ValueError(f"{self.name} has no labels: no class can be selected")
        return self._restricted(self.labels, classes)

    def of_styles(self, styles: Sequence[int]) -> Self:
        """Return a copy restricted to these values of the second label, the style; see `of_classes`.

        Raises: ValueError for data whose samples have no second label.
        """
        if self.further_labels is None:
            raise ValueError(f"{self.name} has no styles: none can be selected")
        return self._restricted(self.further_labels[:, 0], styles)

    def of_labels(self, classes: Sequence[int] | None = None, styles: Sequence[int] | None = None) -> Self:
        """Return a copy restricted to these classes and styles; None, or an empty list, restricts nothing."""
        chosen = self.of_classes(classes) if classes else self
        return chosen.of_styles(styles) if styles else chosen

    def _restricted(self, labels: Tensor, chosen: Sequence[int]) -> Self:
        """Return a copy whose parts contain only the samples whose label (N,) is among the chosen ones."""
        other, labels, values = copy.copy(self), labels.cpu(), torch.tensor(chosen)
        other.train, other.held_out = (part[torch.isin(labels[part], values)] for part in (self.train, self.held_out))
        other._epochs = {}
        return other

    def in_words(self, tokenizer: Callable[[Sequence[str]], Tensor]) -> Self:
        """Return a copy whose samples are also conditioned on their captions, as token ids.

        Args:
            tokenizer: N texts -> ids, int64 (N, L).
        Raises: ValueError for data without captions.
        """
        if len(self.captions) != len(self):
            raise ValueError(f"{self.name} has no captions; data=scenes, emoji and captioned have some")
        other = copy.copy(self)
        other.tokens, other.tokenizer = tokenizer(self.captions).to(self.device), tokenizer
        return other

    @property
    def original(self) -> "Dataset":
        """The data that samples are displayed as and compared with: these, or those that a `codec` encoded."""
        return self

    @property
    def codec(self) -> Any:
        """The codec that encoded the samples, see `ddpm.latent.codec.Codec`; None for data that are not encoded."""
        return None

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample x."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """The memory that the data take on their device, in bytes."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device of the data."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Self:
        """Move the data to a device; returns self."""

    @abstractmethod
    def batch(
        self, indices: Tensor, device: torch.device | str = "cpu", generator: torch.Generator | None = None
    ) -> Batch:
        """Return samples as the network sees them.

        Args:
            indices: their indices (B,), whole numbers in 0..N-1.
            device: where the result goes.
            generator: for random augmentation, such as mirrored images; None, as in evaluation, draws none.
        """

    def conditioned(self, batch: Batch, indices: Tensor, generator: torch.Generator | None = None) -> Batch:
        """Return a batch whose x was changed, with conditions that depend on x computed anew.

        Args:
            batch, indices, generator: what `batch` returned, with another x, and its arguments.
        """
        return batch

    def condition_rows(self, numbers: Sequence[int]) -> Tensor:
        """Return the indices (n,) of the samples whose conditions generated samples of these numbers get.

        Generated sample i takes the held-out sample i modulo their number; without a held-out part, a training sample.

        Raises: ValueError if there are none of either.
        """
        pool = self.held_out if len(self.held_out) else self.train
        if not len(pool):
            raise ValueError(f"{self.name} has no {self.units} of these labels to condition a sample on")
        return pool[torch.tensor(list(numbers), dtype=torch.long) % len(pool)]

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return what identifies the data, wherever they lie: a dict with name, split, count and sha256 at least."""

    def order(self, seed: int, step: int, batch_size: int) -> Tensor:
        """Return the indices (batch_size,) of one step's global batch: a pure function of (seed, step, batch_size).

        The training part is shuffled anew each epoch; the epochs, end to end, are cut into batches.

        Args:
            seed: the run's seed.
            step: counts from 1.
            batch_size: samples in the global batch, >= 1; may exceed an epoch.

        Raises: ValueError if step or batch_size is below 1.
        """
        if step < 1 or batch_size < 1:
            raise ValueError(f"step={step}, batch_size={batch_size}: both are at least 1")
        n, start = len(self.train), (step - 1) * batch_size
        stop = start + batch_size
        epochs = range(start // n, (stop - 1) // n + 1)
        return torch.cat([self._epoch(seed, e)[max(start - e * n, 0) : stop - e * n] for e in epochs])

    def _epoch(self, seed: int, epoch: int) -> Tensor:
        """Return the indices of the training part in the order of one epoch; epochs count from 0."""
        if (seed, epoch) not in self._epochs:
            while len(self._epochs) >= EPOCHS_CACHED:
                del self._epochs[next(iter(self._epochs))]
            shuffled = torch.randperm(len(self.train), generator=keyed(seed, "order", epoch))
            self._epochs[seed, epoch] = self.train[shuffled]
        return self._epochs[seed, epoch]


class InMemory(Dataset):
    """Samples in one tensor, with labels or without; subclasses define `batch`.

    Args:
        name, split, validation: as in `Dataset`.
        samples: (N, *), N >= 1.
        labels: whole numbers (N,) in 0..num_classes-1, or None.
        classes: the classes' names; without them, labels name themselves.
        holds: as in `Dataset`, without "classes", which is added for labelled data.
    Raises: ValueError for arguments outside these ranges.
    """

    glyphs: tuple[str, ...] = ()
    """The written character of each class, of data whose class names differ from it."""

    def __init__(
        self,
        name: str,
        split: str,
        samples: Tensor,
        labels: Tensor | None,
        classes: Sequence[str],
        validation: float,
        holds: Iterable[str] = (),
    ):
        if labels is not None:
            if labels.shape != samples.shape[:1]:
                raise ValueError(f"{name}: {len(samples)} {self.units} but labels of shape {tuple(labels.shape)}")
            classes = classes or tuple(str(y) for y in range(int(labels.max()) + 1))
            check_labels(labels, len(classes), name)
        self.samples = samples
        self.labels = None if labels is None else labels.long()
        self.classes, self.num_classes = tuple(classes), len(classes)
        self.holds = frozenset({*holds, *(["classes"] if labels is not None else [])})
        super().__init__(name, split, len(samples), validation)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.samples.shape[1:])

    @property
    def nbytes(self) -> int:
        """The memory of the samples, in bytes."""
        return self.samples.nbytes

    @property
    def device(self) -> torch.device:
        """The device of the samples."""
        return self.samples.device

    def to(self, device: torch.device | str) -> Self:
        """Move samples and labels to a device; returns self."""
        self.samples = self.samples.to(device)
        self.labels = None if self.labels is None else self.labels.to(device)
        self.further_labels = None if self.further_labels is None else self.further_labels.to(device)
        self.tokens = None if self.tokens is None else self.tokens.to(device)
        return self

    def _taken(self, indices: Tensor, device: torch.device | str) -> Batch:
        """Return the stored samples of these indices, with the classes int64 (B,) of labelled data as condition.

        With K labels the classes are (B, K). With text conditioning the token ids (B, L) are included.
        """
        indices = on(self.device, indices)
        classes = None if self.labels is None else self.labels[indices]
        if classes is not None and self.further_labels is not None:
            classes = torch.cat([classes[:, None], self.further_labels[indices]], dim=1)
        tokens = None if self.tokens is None else self.tokens[indices]
        return Batch(self.samples[indices], Condition(classes=classes, tokens=tokens)).to(device)

    def identity(self) -> dict[str, Any]:
        """Return what identifies the data, wherever they lie: {name, split, count, sha256}.

        The checksum is over the samples as they are stored, and over the labels, and is computed once.
        """
        return {"name": self.name, "split": self.split, "count": len(self), "sha256": self._sha256}

    @cached_property
    def _sha256(self) -> str:
        """The checksum of the samples' shape and bytes and of the labels."""
        digest = hashlib.sha256(repr((tuple(self.samples.shape), self.labels is not None)).encode())
        for x in (self.samples, self.labels):
            if x is not None:
                array = x.cpu().contiguous().numpy()
                digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).data)
        return digest.hexdigest()


class ImageData(InMemory):
    """Images in memory, with labels or without, of which a fixed part is held out; the base class of all image sources.

    Args:
        name, split, validation: as in `Dataset`.
        images: uint8 (N, C, H, W), N >= 1, C is 1 or 3.
        labels: whole numbers (N,) in 0..num_classes-1, or None.
        classes: the classes' names; without them, labels name themselves.
        image_size: side or (H, W) to bring the images to (see `fit`); None leaves them.
        channels: 1 or 3; None leaves them.
        flip: mirror half of the training images left to right, drawn anew each time.
        condition: a conditioning image, computed from the image itself: "mask", "low_resolution", "gray" or
            "edges", see `ddpm.data.conditions`; None for none.

    Raises: ValueError for arguments outside these ranges.
    """

    units = "images"
    conditions: tuple[str, ...] = KINDS
    """The kinds of conditioning images that are available."""
    measured: tuple[str, ...] = ()
    """Kinds that come from the scene rather than from its pixels, so that no augmentation may follow."""

    def __init__(
        self,
        name: str,
        split: str,
        images: Tensor,
        labels: Tensor | None = None,
        classes: Sequence[str] = (),
        *,
        image_size: int | Sequence[int] | None = None,
        channels: int | None = None,
        validation: float = 0.1,
        flip: bool = False,
        condition: str | None = None,
    ):
        check_name(name)
        check_options(image_size, channels, validation, condition, self.conditions)
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or not images.numel():
            raise ValueError(f"{name}: images are uint8 (N, 1 or 3, H, W), not {images.dtype} {tuple(images.shape)}")
        self.flip, self.condition = flip, condition
        images = fit(images, image_size or images.shape[2:], channels or images.shape[1])
        check_options(None, images.shape[1], validation, condition, self.conditions)
        super().__init__(name, split, images, labels, classes, validation, ("pictures", "bytes"))

    @property
    def condition_unit(self) -> float:
        """The measured difference that a difference of 1 in the conditioning image stands for; 1 without unit."""
        return 1.0

    @property
    def images(self) -> Tensor:
        """The samples: uint8 (N, C, H, W)."""
        return self.samples

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of one image."""
        _, height, width = self.shape
        return height, width

    def batch(
        self, indices: Tensor, device: torch.device | str = "cpu", generator: torch.Generator | None = None
    ) -> Batch:
        """Return images as the network sees them.

        Args:
            indices: image indices (B,), whole numbers in 0..N-1.
            device: where the result goes.
            generator: draws which rows are mirrored, if `flip`, and then the holes of masks, for condition "mask";
                None, as in evaluation, mirrors none, and gives each image its fixed hole.

        Returns: x float32 (B, C, H, W) in [-1, 1], and as condition the classes int64 (B,) of labelled data, and the
            image float32 (B, C', H, W) if there is one.
        """
        taken = self._taken(indices, device)
        x_0 = to_float(taken.x)
        if self.flip and generator is not None:
            coins = torch.rand(len(x_0), generator=generator, device=generator.device) < 0.5
            x_0 = torch.where(rearrange(coins, "b -> b 1 1 1").to(device), x_0.flip(-1), x_0)
        return self.conditioned(Batch(x_0, taken.condition), indices, generator)

    def conditioned(self, batch: Batch, indices: Tensor, generator: torch.Generator | None = None) -> Batch:
        """Return the batch with the image of its condition computed from its x."""
        if self.condition is None:
            return batch
        image = image_of(self.condition, batch.x, indices, generator)
        return replace(batch, condition=replace(batch.condition, image=image))

    def identity(self) -> dict[str, Any]:
        """Return what identifies the data, as training sees them (after `fit`): image_size and channels in addition.

        Of data with captions their checksum too.
        """
        channels, height, width = self.shape
        facts = super().identity() | {"image_size": [height, width], "channels": channels}
        if self.captions:
            facts["captions"] = hashlib.sha256("\n".join(self.captions).encode(errors="surrogatepass")).hexdigest()
        return facts
