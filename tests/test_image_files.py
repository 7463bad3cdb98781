"""ddpm/data/image_files.py: whatever a decoder raises becomes one sentence that names the file."""

import io

import pytest
from PIL import Image

from ddpm.data.image_files import UnreadableImage, read_image


def test_what_is_decoded_is_given_as_it_is():
    assert read_image("a.png", lambda: (1, "two")) == (1, "two")


def test_what_is_no_image_is_told_apart_from_a_damaged_one():
    with pytest.raises(ValueError, match=r"^a\.png cannot be read: not a PNG file$") as caught:
        read_image("a.png", lambda: Image.open(io.BytesIO(b"text")), "PNG")
    assert isinstance(caught.value, UnreadableImage) and caught.value.reason == "not a PNG file"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (SyntaxError("broken\n  PNG\tfile"), "broken PNG file"),
        (ZeroDivisionError(), "ZeroDivisionError"),
        (OSError("\x1b[2J"), r"'\x1b[2J'"),
        (ValueError(300 * "x"), 200 * "x" + "..."),
    ],
)
def test_the_reason_is_one_line_that_neither_steers_nor_floods_a_terminal(error, reason):
    def decode() -> None:
        raise error

    with pytest.raises(UnreadableImage) as caught:
        read_image("a.png", decode)
    assert str(caught.value) == f"a.png cannot be read: {reason}" and caught.value.reason == reason
    assert caught.value.__cause__ is error
