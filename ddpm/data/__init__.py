"""Sources of data, one a file."""

from ddpm.data.captioned import Captioned
from ddpm.data.cifar10 import CIFAR10
from ddpm.data.dataset import Dataset, ImageData
from ddpm.data.devanagari import Devanagari
from ddpm.data.dhcd import DHCD
from ddpm.data.digits import Digits
from ddpm.data.emoji import Emoji
from ddpm.data.folder import Folder
from ddpm.data.hub import Hub
from ddpm.data.idx import IDX
from ddpm.data.mixture import Mixture
from ddpm.data.points import Points
from ddpm.data.points_file import PointsFile
from ddpm.data.scenes import Scenes
from ddpm.data.shapes import Checkerboard, Gaussians, Moons, Pinwheel, Rings, Spiral, SwissRoll
from ddpm.data.sound import Sound
from ddpm.data.spoken_digits import SpokenDigits
from ddpm.data.subject import Subject

__all__ = [
    "CIFAR10",
    "DHCD",
    "IDX",
    "Captioned",
    "Checkerboard",
    "Dataset",
    "Devanagari",
    "Digits",
    "Emoji",
    "Folder",
    "Gaussians",
    "Hub",
    "ImageData",
    "Mixture",
    "Moons",
    "Pinwheel",
    "Points",
    "PointsFile",
    "Rings",
    "Scenes",
    "Sound",
    "Spiral",
    "SpokenDigits",
    "Subject",
    "SwissRoll",
]
