"""Codes and latents: data sets encoded by a frozen autoencoder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ddpm.data.batch import Batch
from ddpm.data.dataset import Dataset, InMemory
from ddpm.runs import tensor_cache

AT_A_TIME = 256  # samples that are encoded at once


class Codec(Protocol):
    """The interface of an encoder, see `ddpm.latent.codec.Codec`."""

    kind: str
    of: tuple[int, ...]
    shape: tuple[int, ...]

    def posterior(self, x: Tensor) -> Tensor: ...
    def sample(self, posterior: Tensor, generator: torch.Generator | None = None) -> Tensor: ...
    def fit(self, posterior: Tensor) -> "Codec": ...


class Encoded(InMemory):
    """A data set encoded sample by sample with a codec; the held-out part and the labels stay the same.

    Args:
        data: the data that were encoded.
        codec: the codec that encoded them.
        posterior: parameters of q(z | x) of each sample, as the codec gives them, (N, *).
        fit: whether to fit the codec to the training part, or to take it as it is.
    Attributes:
        original: `data`.
        codec: the codec, fitted.
    """

    def __init__(self, data: Dataset, codec: Codec, posterior: Tensor, fit: bool = True):
        labels = None if data.labels is None else data.labels.cpu()
        super().__init__(data.name, data.split, posterior, labels, getattr(data, "classes", ()), 0.0, [codec.kind])
        self.train, self.held_out, self.units = data.train, data.held_out, data.units
        self.further_labels, self.further_counts, self.styles = data.further_labels, data.further_counts, data.styles
        self.captions, self.tokens, self.tokenizer = data.captions, data.tokens, data.tokenizer
        self.prior_count = data.prior_count
        self._original, self._codec = data, codec.fit(posterior[data.train]) if fit else codec

    @property
    def original(self) -> Dataset:
        """The data that were encoded."""
        return self._original

    @property
    def codec(self) -> Any:
        """The codec that encoded them."""
        return self._codec

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample's latents."""
        return self._codec.shape

    def order(self, seed: int, step: int, batch_size: int) -> Tensor:
        """Return the order of the original data if they have prior-preservation samples; else as in `Dataset`."""
        return (
            self._original.order(seed, step, batch_size) if self.prior_count else super().order(seed, step, batch_size)
        )

    def batch(
        self, indices: Tensor, device: torch.device | str = "cpu", generator: torch.Generator | None = None
    ) -> Batch:
        """Return latents as the network sees them.

        Args:
            indices, device: as in `Dataset`.
            generator: draws latents that have a distribution; None, as in evaluation, takes their means.

        Returns: x (B, *shape), floats or, for codes, int64; and as condition the classes of labelled data. Samples of
            the prior are marked as such.
        """
        taken = self._taken(indices, device)
        marks = self.of_prior(indices).to(device) if self.prior_count else None
        return Batch(self._codec.sample(taken.x, generator), taken.condition, of_prior=marks)

    def identity(self) -> dict[str, Any]:
        """Return the identity of the data that were encoded; a run identifies the codec by its weights."""
        return self._original.identity()


def must_suit(data: Dataset, codec: Codec) -> None:
    """Raise ValueError for data that a codec does not encode, or options that latents cannot reflect."""
    if "pictures" not in data.holds or data.shape != codec.of:
        raise ValueError(
            f"the codec was trained on images (C, H, W) = {codec.of}, but {data.name} has samples of shape "
            f"{data.shape}; set data= to what it was trained on, with data.image_size and data.channels"
        )
    for key in ("flip", "condition"):
        if getattr(data, key, None):
            raise ValueError(
                f"data.{key}={str(getattr(data, key)).lower()}: latents are encoded once, from unchanged images; "
                f"set data.{key}={'false' if key == 'flip' else 'null'}"
            )


@torch.no_grad()
def encoded(
    data: Dataset,
    codec: Codec,
    device: torch.device,
    cache: Path | None = None,
    log: Callable[[str], None] = lambda words: None,
    fit: bool = True,
) -> Encoded:
    """Return data encoded with a codec, computed once and read from a cache file after that.

    Args:
        codec: on the device.
        cache: the file; None for none.
        log: called with a message where it takes a while.
        fit: as in `Encoded`.
    Raises: ValueError for data that the codec does not take, see `must_suit`, or if latents are not finite.
    """
    must_suit(data, codec)
    one = codec.posterior(data.batch(torch.arange(1), device).x)
    shape = (len(data), *one.shape[1:])
    posterior = None if cache is None else tensor_cache.load_tensor(cache, one.dtype, shape)
    if posterior is None:
        log(f"{len(data):,} {data.units} are encoded")
        parts = torch.arange(len(data)).split(AT_A_TIME)
        posterior = torch.cat([codec.posterior(data.batch(part, device).x).cpu() for part in parts])
        if not posterior.isfinite().all():
            raise ValueError(f"{data.name} has {data.units} whose latents are not finite")
        if cache is not None:
            tensor_cache.save_tensor(posterior, cache)
    return Encoded(data, codec, posterior, fit)
