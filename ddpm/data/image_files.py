"""Image files of any origin: every failure to read one is raised as `UnreadableImage`."""

from collections.abc import Callable
from typing import TypeVar

from PIL import UnidentifiedImageError

from ddpm.runs.files import shortened

T = TypeVar("T")
KINDS = "PNG, JPEG, WebP, BMP or TIFF"


class UnreadableImage(ValueError):
    """An image file that cannot be read.

    Args:
        name: of the file, as messages call it.
        reason: why, in one line.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name} cannot be read: {reason}")
        self.reason = reason


def read_image(name: str, decode: Callable[[], T], kinds: str = KINDS) -> T:
    """Decode an image file, raising `UnreadableImage` for any failure.

    Args:
        name: of the file, as messages call it.
        decode: opens the file, or its bytes, and decodes it.
        kinds: the formats that it knows, for messages.
    Returns: the result of `decode`.
    Raises: UnreadableImage, from whatever `decode` raised.
    """
    try:
        return decode()
    except UnidentifiedImageError as error:
        raise UnreadableImage(name, f"not a {kinds} file") from error
    except Exception as error:  # PIL's decoders raise nearly anything on damaged files
        raise UnreadableImage(name, shortened(" ".join(str(error).split())) or type(error).__name__) from error
