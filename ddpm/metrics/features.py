"""Feature extractors by which samples are compared with data; their names are part of the protocol."""

import math
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm.checks import is_whole
from ddpm.figures.images import to_float, to_uint8
from ddpm.metrics.judge import in_batches
from ddpm.runs.files import regular_size, shortened

INCEPTION = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
LARGEST = 1 << 28  # bytes of a file of weights; the published one has 95,628,359
EXTRA = "it needs torch-fidelity, and a torchvision of torch's own build: pip install 'ddpm-ablations[fid]'"


class Features(ABC):
    """Base class of feature extractors: images to feature vectors.

    Attributes:
        name: part of protocol names, unique to the extractor.
        size: D, the number of features.
    """

    name: str
    size: int

    def __call__(self, x: Tensor, batch_size: int = 500) -> Tensor:
        """Return features (n, D), on the CPU, of samples; images (n, C, H, W) in [-1, 1] are quantised as in files.

        Raises: ValueError with the number of samples that contain NaN or infinity.
        """
        if broken := int((~x.isfinite().flatten(1).all(1)).sum()):
            raise ValueError(f"{broken} of {len(x)} samples hold NaN or infinity")
        return in_batches(lambda part: self._of(self._quantised(part)).cpu(), x, batch_size)

    def _quantised(self, x: Tensor) -> Tensor:
        """Return samples as a file stores them: floats as bytes."""
        return to_uint8(x)

    @abstractmethod
    def _of(self, images: Tensor) -> Tensor:
        """Return features (B, D) of quantised images (B, C, H, W)."""


class Coordinates(Features):
    """Coordinates as features, of samples that are not images, such as points.

    Args:
        shape: of one sample.
    """

    def __init__(self, shape: tuple[int, ...]):
        self.name, self.size = "coordinates", math.prod(shape)

    def _quantised(self, x: Tensor) -> Tensor:
        return x

    def _of(self, images: Tensor) -> Tensor:
        return images.flatten(1).float()


class Pixels(Features):
    """Pixels in [0, 1] as features, for small images.

    Args:
        shape: (C, H, W).
    """

    def __init__(self, shape: tuple[int, ...]):
        self.name, self.size = "pixels", shape[0] * shape[1] * shape[2]

    def _of(self, images: Tensor) -> Tensor:
        return rearrange(images, "n c h w -> n (c h w)").float() / 255


class PCA(Features):
    """Largest principal components of the pixels, fitted to a set of images.

    Args:
        x: the images to fit to, (N, C, H, W) in [-1, 1].
        components: D; at most C H W, and less than N.
        name: of these images, in the protocol's name.
    Raises: ValueError for another number of components.
    """

    def __init__(self, x: Tensor, components: int, name: str):
        self.pixels = Pixels((x.shape[1], x.shape[2], x.shape[3]))
        most = min(self.pixels.size, len(x) - 1)
        if not is_whole(components, 1, most):
            raise ValueError(f"pca = {components!r}: components of {len(x)} images are an integer from 1 to {most}")
        self.name, self.size, self.x = f"pca{components}-{name}", components, x

    @cached_property
    def axes(self) -> tuple[Tensor, Tensor]:
        """The mean (C H W,) and the directions (C H W, D), computed at first use."""
        rows = self.pixels(self.x).double()
        mean = rows.mean(0)
        rows -= mean
        if len(rows) < self.pixels.size:  # the same directions, by the smaller of the two matrices
            _, vectors = torch.linalg.eigh(rows @ rows.mT)  # ascending eigenvalues
            directions = F.normalize(rows.mT @ vectors[:, -self.size :], dim=0)
        else:
            directions = torch.linalg.eigh(rows.mT @ rows).eigenvectors[:, -self.size :]
        return mean, directions.flip(1)

    def _of(self, images: Tensor) -> Tensor:
        mean, directions = self.axes
        return (self.pixels._of(images).cpu().double() - mean) @ directions


class Judge(Features):
    """Penultimate layer of a classifier as features.

    Args:
        classifier: trained, in evaluation mode; maps images (B, C, H, W) in [-1, 1] to logits, and has `features`.
        name: identifies the classifier in `name`.
    """

    def __init__(self, classifier: nn.Module, name: str):
        self.classifier, self.name = classifier, f"classifier-{name}"
        parameter = next(classifier.parameters())
        self.device, self.layer = parameter.device, classifier.get_submodule("classify")
        self.size = next(m for m in self.layer.modules() if isinstance(m, nn.Linear)).in_features

    def _of(self, images: Tensor) -> Tensor:
        penultimate: Any = self.classifier.features  # a method, which torch's stubs take for a tensor or a module
        return penultimate(to_float(images.to(self.device)))

    @torch.no_grad()
    def probabilities(self, features: Tensor) -> Tensor:
        """Return the probability of every class (n, K), on the CPU, from features (n, D)."""
        return in_batches(lambda part: self.layer(part.to(self.device)).softmax(1).cpu(), features)


class Inception(Features):
    """The 2,048 Inception-v3 features of published FID (Heusel et al., arXiv 1706.08500), by torch-fidelity.

    Images have any size; grey ones are repeated to three channels, and all are resized to 299x299 as in TensorFlow.

    Args:
        weights: a file; None for the standard one, from torch's cache or downloaded into it and checked.
        device: the device of the network.
    Raises:
        ImportError: torch-fidelity is not installed.
        ConnectionError: the weights can be neither found nor downloaded.
        ValueError: the file does not contain these weights.
    """

    size = 2048

    def __init__(self, weights: str | Path | None = None, device: torch.device | str = "cpu"):
        from ddpm.runs import checkpoint

        published = self.must_be_there(weights)
        path = _inception_weights() if weights is None else Path(weights).expanduser()
        regular_size(path, LARGEST)
        checksum = checkpoint.sha256(path)
        if checksum != INCEPTION_SHA256:
            if weights is None:
                raise ValueError(f"{path} is damaged: its sha256 is {checksum[:8]}...; remove it to download it again")
            checkpoint.load_plain(path)  # before torch-fidelity loads it, which would execute code in it
        try:
            network = published("inception", ["2048"], feature_extractor_weights_path=str(path))
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"{path} does not hold the weights of Inception-v3: {shortened(str(error))}") from error
        self.name = f"inception-{checksum[:8]}"
        self.device, self.network = torch.device(device), network.to(device)

    @staticmethod
    def must_be_there(weights: str | Path | None = None) -> Any:
        """Return the class of the published network after checking its requirements, without downloading or loading.

        Raises: ImportError, and OSError or ValueError for a file that weights cannot be read from.
        """
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that was built for another torch
            raise ImportError(f"{EXTRA} ({error})") from error
        if weights is not None:
            regular_size(Path(weights).expanduser(), LARGEST)
        return FeatureExtractorInceptionV3

    def _of(self, images: Tensor) -> Tensor:
        if images.shape[1] == 1:
            images = repeat(images, "n 1 h w -> n c h w", c=3)
        return self.network(images.to(self.device))[0]

    def __call__(self, x: Tensor, batch_size: int = 50) -> Tensor:
        return super().__call__(x, batch_size)


def _inception_weights() -> Path:
    """Return the path of the standard weights in torch's cache, downloading them if needed."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION.rpartition("/")[2]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(INCEPTION, str(path), hash_prefix=INCEPTION_SHA256)
        except (OSError, RuntimeError) as error:
            raise ConnectionError(
                f"the weights of Inception-v3 cannot be downloaded ({error}); put {path.name} into {path.parent} by "
                "hand, or set inception.weights=FILE; features=classifier needs no download"
            ) from error
    return path
