"""The networks whose features LPIPS compares, AlexNet and VGG16, with their published weights.

Weights are given by the user, in the layout in which they are published: those of the features have torchvision's names
(`features.0.weight`, `features.0.bias`, ...; those of the classifier above them are not read), the weights of the
channels the names of the package lpips (`lin0.model.1.weight` of (1, C, 1, 1), ...).
Source: The Unreasonable Effectiveness of Deep Features as a Perceptual Metric (arXiv 1801.03924).
"""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from models.layers import one_of

POOL = None
Layer = tuple[int, int, int, int]  # channels, side of the kernel, stride, padding
ALEXNET: tuple[Layer | None, ...] = (
    (64, 11, 4, 2), POOL, (192, 5, 1, 2), POOL, (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1),
)  # fmt: skip
VGG16: tuple[Layer | None, ...] = tuple(
    None if channels is None else (channels, 3, 1, 1)
    for channels in (64, 64, POOL, 128, 128, POOL, 256, 256, 256, POOL, 512, 512, 512, POOL, 512, 512, 512)
)
NETWORKS = {  # layers, side of the pooling, the compared ReLUs, the side of the smallest image
    "alex": (ALEXNET, 3, (1, 4, 7, 9, 11), 31),
    "vgg": (VGG16, 2, (3, 8, 15, 22, 29), 16),
}
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of red, green and blue in [-1, 1]


class LPIPSNetwork(nn.Module):
    """A network from images to the features that LPIPS compares: convolutions with ReLU, and max pooling.

    Args:
        kind: "alex" or "vgg".
    Raises: ValueError for a kind that is not known.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, kind: str = "alex"):
        super().__init__()
        one_of("kind", kind, tuple(NETWORKS))
        form, pool, self.seen, self.least = NETWORKS[kind]
        layers, channels = list[nn.Module](), 3
        for layer in form:
            if layer is None:
                layers.append(nn.MaxPool2d(pool, 2))
                continue
            out, side, stride, padding = layer
            layers += [nn.Conv2d(channels, out, side, stride, padding), nn.ReLU()]
            channels = out
        self.features = nn.Sequential(*layers)  # the numbers of its layers are those of the published names
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None], persistent=False)

    @property
    def map_channels(self) -> tuple[int, ...]:
        """The channels of each of `maps`."""
        layers: list[Any] = list(self.features)
        return tuple(layers[i - 1].out_channels for i in self.seen)  # the convolution before the ReLU

    def maps(self, x: Tensor) -> list[Tensor]:
        """Return the activations that are compared, each (B, C', H', W').

        Args:
            x: images in [-1, 1], (B, 3, H, W), or (B, 1, H, W): grey is repeated as red, green and blue.
        Raises: ValueError for other channels, and for images too small for the pooling.
        """
        if x.ndim != 4 or x.shape[1] not in (1, 3) or min(x.shape[2:]) < self.least:
            raise ValueError(
                f"these features are of images with 1 or 3 channels and at least {self.least} x {self.least} pixels, "
                f"not of (C, H, W) = {tuple(x.shape[1:])}"
            )
        x, found = (x - self.shift.to(x.dtype)) / self.scale.to(x.dtype), []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.seen:
                found.append(x)
        return found


def load_lpips(kind: str, files: Sequence[str | Path]) -> tuple[LPIPSNetwork, list[Tensor]]:
    """Load the network with published weights, in evaluation mode on the CPU, and its maps' channel weights.

    Args:
        kind: "alex" or "vgg".
        files: which together hold the weights of the features and of the channels, .safetensors or saved by torch:
            of these only tensors are read, and no code is run.
    Returns:
        the network, and for each of its maps the weights of the channels, (C,): those of the squared differences.
    Raises: ValueError for a file that cannot be read, and for weights that are missing, of another shape or not finite,
        with their names; a kind that is not known.
    """
    network = LPIPSNetwork(kind)
    there = {name: x for file in files for name, x in _read(Path(file)).items()}
    needed = {f"features.{name}": tuple(x.shape) for name, x in network.features.state_dict().items()}
    needed |= {f"lin{i}.model.1.weight": (1, channels, 1, 1) for i, channels in enumerate(network.map_channels)}
    missing = [name for name in needed if name not in there]
    wrong = [
        f"{name} {tuple(there[name].shape)} in place of {shape}"
        for name, shape in needed.items()
        if name in there and tuple(there[name].shape) != shape
    ]
    known = {name: there[name].float() for name in needed if name in there}
    broken = [name for name, x in known.items() if not x.isfinite().all()]
    problems = {"missing": missing, "of another shape": wrong, "not finite": broken}
    if any(problems.values()):
        details = "; ".join(f"{key}: {', '.join(names[:5])}" for key, names in problems.items() if names)
        raise ValueError(f"{', '.join(map(str, files))}: no weights of LPIPS with kind = {kind!r}: {details}")
    network.load_state_dict({name: x for name, x in known.items() if name.startswith("features.")})
    of_channels = [known[f"lin{i}.model.1.weight"].flatten() for i in range(len(network.map_channels))]
    return network.eval(), of_channels


def _read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name, on the CPU; ValueError if there are none to read."""
    if not path.is_file():
        raise ValueError(f"{path} is no file; weights of LPIPS are .safetensors, .pth or .pt")
    try:
        read = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(f"{path} cannot be read as weights: {reason}") from error
    if not isinstance(read, dict) or not all(isinstance(x, Tensor) for x in read.values()):
        raise ValueError(f"{path} holds no weights by name")
    return {str(name): x for name, x in read.items()}
