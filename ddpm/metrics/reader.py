"""Scene reader: a network that predicts the colour-shape pairs in a picture, their size, material and place.

It is trained on scenes rendered for it alone, of all pairs, including those that no generator was trained on.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor, nn

from ddpm.data.raycast import SHAPES
from ddpm.data.scenes import DRAWING, PAIRS, Layout, drawn, render
from ddpm.figures import images
from ddpm.metrics.judge import in_batches
from ddpm.randomness import generator
from ddpm.runs import checkpoint

FACTS = 4  # predicted of a pair in addition to its presence: size, material, x and z
SEED = 1_000_003  # of the scenes that a reader is trained on: another than data have
UNIT = 3.0  # scale of predicted places, so that outputs are about 1 at most
NOISE = 0.1  # largest standard deviation of the noise added to training pictures in [-1, 1]
LEARNING = 2  # raised by every change that trains other readers: part of the cache key


class Facts(NamedTuple):
    """The true attributes of all pairs of B scenes: pair = colour times the number of shapes, plus shape."""

    present: Tensor  # (B, PAIRS), 1 where a solid of that colour and shape is present, else 0
    size: Tensor  # (B, PAIRS), 0 or 1; arbitrary where it is absent
    material: Tensor  # likewise
    place: Tensor  # (B, PAIRS, 2): x and z in the world


class Reading(NamedTuple):
    """Predictions of all pairs in B pictures."""

    presence: Tensor  # (B, PAIRS), logits
    size: Tensor  # logits of 1
    material: Tensor
    place: Tensor  # (B, PAIRS, 2), in the world

    @classmethod
    def of(cls, outputs: Tensor) -> "Reading":
        """Split the outputs (B, PAIRS, 5) of a network."""
        return cls(outputs[..., 0], outputs[..., 1], outputs[..., 2], UNIT * outputs[..., 3:])


def pair_of(colour: Tensor, shape: Tensor) -> Tensor:
    """Return the indices of the pairs of colours and shapes."""
    return colour * len(SHAPES) + shape


def facts_of(layout: Layout) -> Facts:
    """Return the true attributes of the scenes of a layout."""
    colour, shape, size, material = layout.attributes.unbind(-1)
    row, solid = (colour >= 0).nonzero(as_tuple=True)
    pair = pair_of(colour, shape)[row, solid]
    present, sizes, materials = (torch.zeros(len(colour), PAIRS) for _ in range(3))
    facts = Facts(present, sizes, materials, torch.zeros(len(colour), PAIRS, 2))
    facts.present[row, pair] = 1
    facts.size[row, pair], facts.material[row, pair] = size[row, solid].float(), material[row, solid].float()
    facts.place[row, pair] = layout.places[row, solid, :2].float()
    return facts


def reader_loss(reading: Reading, facts: Facts) -> Tensor:
    r"""Return the training loss of a reader for each of B pictures.

    .. math:: L = \sum_k H(o_k, p_k) + \sum_{k:\, p_k = 1} \Big( H(s_k, \hat s_k) + H(m_k, \hat m_k)
        + \frac{(x_k - \hat x_k)^2 + (z_k - \hat z_k)^2}{\text{UNIT}^2} \Big), \quad
        H(o, p) = \log(1 + e^o) - p\,o \qquad \text{[Reader (loss)]}

    over the pairs k of a colour and a shape: presence for all of them; size, material and place where a solid is.

    Returns: (B,).
    """
    H, p = F.binary_cross_entropy_with_logits, facts.present
    there = H(reading.presence, p, reduction="none")
    like = H(reading.size, facts.size, reduction="none") + H(reading.material, facts.material, reduction="none")
    place = ((reading.place - facts.place) / UNIT).square().sum(-1)
    return (there + p * (like + place)).sum(1)


def relation_between(first: Tensor, other: Tensor) -> Tensor:
    r"""Return the relation of a solid to another by their places on the ground: the axis nearest to the line between.

    .. math:: r = \arg\max_r\, a_r \cdot (q - p), \qquad a = (1, 0), (-1, 0), (0, 1), (0, -1)
        \qquad \text{[Relation (nearest axis)]}

    for the first solid at p = (x, z) and the other at q: a solid that is left of another has it to its right.

    Args:
        first, other: places (..., 2).
    Returns: (...), indices into `ddpm.data.scenes.RELATIONS`.
    """
    x, z = (other - first).unbind(-1)
    return torch.stack([x, -x, z, -z], -1).argmax(-1)


class Seen(NamedTuple):
    """The solids predicted in a picture, the most probable first, in the encoding of a scene."""

    pair: list[int]
    size: list[int]
    material: list[int]
    place: Tensor  # (n, 2)


def seen(reading: Reading, row: int, n: int) -> Seen:
    """Return the n most probable pairs of a picture with their attributes."""
    pair = reading.presence[row].topk(n).indices
    size, material = (values[row, pair] > 0 for values in (reading.size, reading.material))
    return Seen(pair.tolist(), size.int().tolist(), material.int().tolist(), reading.place[row, pair])


def read(network: nn.Module, pictures: Tensor, device: torch.device | str = "cpu") -> Reading:
    """Return a network's reading of pictures (B, C, H, W) in [-1, 1], quantised as in files; on the CPU."""
    rounded = images.to_float(images.to_uint8(pictures))
    return Reading.of(in_batches(lambda part: network(part.to(device)).float().cpu(), rounded))


# ------------------------------------------------------------------------------------------------------------ training


def train_reader(
    network: nn.Module,
    layout: Layout,
    pictures: Tensor,
    seed: int = 0,
    epochs: int = 8,
    batch_size: int = 64,
    lr: float = 5e-3,
    weight_decay: float = 0.01,
    tell: Callable[[int, float], None] = lambda epoch, loss: None,
) -> nn.Module:
    """Train a network to read scenes, with AdamW and one cycle of the learning rate, on slightly noisy pictures.

    On a CPU the same seed, weights and thread count give the same reader.

    Args:
        network: maps pictures to (B, PAIRS, 5); trained in place.
        layout, pictures: N scenes, and their pictures, uint8 (N, 3, H, W).
        seed: of order and noise.
        tell: called with each epoch and its mean loss.

    Returns: the network, in evaluation mode.
    """
    if len(pictures) != len(layout.places) or len(pictures) == 0:
        raise ValueError(f"a reader learns from as many pictures as scenes, not {len(pictures)}, {len(layout.places)}")
    device, facts, batches = next(network.parameters()).device, facts_of(layout), max(1, len(pictures) // batch_size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=weight_decay)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * batches)
    network.train()
    for epoch in range(epochs):
        order = torch.randperm(len(pictures), generator=generator(seed, "reader order", epoch))
        random, total = generator(seed, "reader noise", epoch), 0.0
        for chosen in order[: batches * batch_size].split(batch_size):
            x = _noisy(images.to_float(pictures[chosen]), random).to(device, memory_format=torch.channels_last)
            target = Facts(*(values[chosen].to(device) for values in facts))
            loss = reader_loss(Reading.of(network(x)), target).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cycle.step()
            total += loss.item() / batches
        tell(epoch, total)
    return network.eval()


def _noisy(x: Tensor, random: torch.Generator) -> Tensor:
    """Add noise of a random strength to each picture: samples are never as clean as rendered pictures."""
    strength = NOISE * torch.rand(len(x), 1, 1, 1, generator=random)
    return x + strength * torch.randn(x.shape, generator=random)


def reader_of(
    network: nn.Module,
    size: tuple[int, int],
    solids: Sequence[int],
    cache: Path,
    count: int = 20_000,
    epochs: int = 8,
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = print,
) -> str:
    """Load a reader's weights, trained once per picture size and numbers of solids, and cached.

    Args:
        network: a `models.reader.Reader`, untrained; left in evaluation mode.
        size: of the pictures, (H, W).
        solids: the numbers of solids that a scene may have.
        cache: the folder of trained readers.
        count, epochs: number of training scenes, which are rendered for it and not stored, and of passes over them.
        device: the device of the network.
        say: called with lines that report progress.
    Returns: six digits of the checksum of its weights.
    Raises: ValueError for a file that is damaged.
    """
    path = reader_path(network, size, solids, cache, count, epochs)
    if not path.exists():
        with FileLock(path.with_suffix(".lock")):  # of concurrent evaluations one trains it, the others wait
            if not path.exists():
                say(f"drawing {count:,} scenes and training their reader, once: it will be saved as {path}")
                layout = drawn(count, solids, SEED)
                pictures = render(layout, size).picture

                def tell(epoch: int, loss: float) -> None:
                    say(f"  epoch {epoch + 1} of {epochs}: loss {loss:.3f}")

                train_reader(network.to(device), layout, pictures, epochs=epochs, tell=tell)
                checkpoint.save_weights(network, path)
    try:
        checkpoint.load_into(network, path)
    except ValueError as error:
        raise ValueError(f"{error}; remove it to have the reader trained anew") from error
    network.to(device).eval()
    return checkpoint.sha256(path)[:6]


def reader_path(
    network: nn.Module, size: tuple[int, int], solids: Sequence[int], cache: Path, count: int, epochs: int
) -> Path:
    """Return the path of a cached reader."""
    height, width = size
    facts = [str(network), height, width, list(solids), count, epochs, SEED, DRAWING, LEARNING]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:6]
    numbers = "-".join(map(str, solids))
    return cache / f"reader-{height}x{width}-solids{numbers}-{count}x{epochs}-{key}.safetensors"
