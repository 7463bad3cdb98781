"""Image sources, one a file."""

from ddpm.data.cifar10 import CIFAR10
from ddpm.data.dataset import ImageData
from ddpm.data.digits import Digits
from ddpm.data.folder import Folder
from ddpm.data.idx import IDX

__all__ = ["CIFAR10", "IDX", "Digits", "Folder", "ImageData"]
