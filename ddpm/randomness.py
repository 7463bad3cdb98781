"""Keyed randomness: every draw is a pure function of (seed, stream, indices), and no generator state is carried.

Nothing needs to save or restore a generator, so an interrupted run resumes exactly, two arms of an ablation see the
same noise, and the batch size of sampling never changes a sample.
"""

import copy
import hashlib

import torch
from torch import Tensor


def generator(seed: int, stream: str, *index: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator whose state depends only on (seed, stream, index).

    Args:
        seed: the run's seed.
        stream: the name of the draws, such as "order" or "eps"; two streams are independent.
        index: step, epoch or sample number.
    """
    key = hashlib.blake2b(repr((int(seed), stream, *map(int, index))).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(key, "little") >> 1)


class Keyed:
    """The generators of one step, or of one measurement: a function of (seed, stream, index) only.

    Args:
        seed, index: as in `generator`.
        device: the device of the generators.
    """

    def __init__(self, seed: int, *index: int, device: torch.device | str = "cpu"):
        self.seed, self.index, self.device = seed, index, device

    def __call__(self, stream: str) -> torch.Generator:
        """Return a new generator of a stream, at its beginning."""
        return generator(self.seed, stream, *self.index, device=self.device)


class SampleNoise:
    """Normal noise for a batch of samples, keyed by (seed, sample number, draw).

    Row i depends on `indices[i]` and never on the other rows, so samples do not depend on the batch they are drawn in.
    It is drawn on the CPU, so that it is the same on every device.

    Args:
        seed: the seed of sampling; or the seed of each row.
        indices: the number of each sample, one a row.
        stream: the name of the draws; two streams are independent.
    """

    def __init__(self, seed: int | list[int], indices: range | list[int], stream: str = "sample"):
        self.indices, self.stream = list(indices), stream
        self.seeds = seed if isinstance(seed, list) else [seed] * len(self.indices)

    def __call__(self, draw: int, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
        """Return noise (B, *shape), float32; `draw` is 0 for x_T and counts the sampler's steps from 1."""
        keys = list(zip(self.seeds, self.indices, strict=True))
        rows = {
            (seed, n): torch.randn(shape, generator=generator(seed, self.stream, n, draw))
            for seed, n in dict.fromkeys(keys)  # networks that are sampled together often have one seed
        }
        return torch.stack([rows[key] for key in keys]).to(device)

    def x_T(self, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
        """Return the starting noise (B, *shape)."""
        return self(0, shape, device)

    def of(self, stream: str) -> "SampleNoise":
        """Return the noise of the same samples in another stream."""
        other = copy.copy(self)
        other.stream = stream
        return other


def normal(generator: torch.Generator | SampleNoise | None, draw: int, x: Tensor) -> Tensor:
    """Return standard normal noise of the shape, dtype and device of x, (B, *).

    Args:
        generator: a torch generator on x's device, drawn from in the order of the calls; noise keyed by sample number;
            None for torch's global generator.
        draw: the index of a sample's noise, as in `SampleNoise`: 0 for x_T; a torch generator ignores it.
    Raises:
        ValueError: noise keyed for another number of samples.
    """
    if isinstance(generator, SampleNoise):
        if len(generator.indices) != len(x):
            raise ValueError(f"noise keyed for {len(generator.indices)} samples, but x_t has {len(x)}")
        return generator(draw, x.shape[1:], x.device).to(x.dtype)
    return torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
