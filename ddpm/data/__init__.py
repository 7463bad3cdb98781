"""Sources of data, one a file."""

from ddpm.data.cifar10 import CIFAR10
from ddpm.data.dataset import Dataset, ImageData
from ddpm.data.devanagari import Devanagari
from ddpm.data.dhcd import DHCD
from ddpm.data.digits import Digits
from ddpm.data.folder import Folder
from ddpm.data.hub import Hub
from ddpm.data.idx import IDX
from ddpm.data.points import Gaussians, Moons, Points, SwissRoll

__all__ = [
    "CIFAR10",
    "DHCD",
    "IDX",
    "Dataset",
    "Devanagari",
    "Digits",
    "Folder",
    "Gaussians",
    "Hub",
    "ImageData",
    "Moons",
    "Points",
    "SwissRoll",
]
