"""Self-contained HTML page of sounds, each with a spectrogram and a player."""

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from ddpm.figures.images import to_numpy
from ddpm.figures.offline_page import document

SIDE = 160  # pixels of a spectrogram's longer side, at least
MOST_BYTES = 12 << 20  # of the sounds of a page


class Heard(NamedTuple):
    """A sound of the page: name, spectrogram and WAV file."""

    name: str
    picture: Tensor  # bytes (1, H, W), low frequencies at the bottom
    wav: bytes


def page(title: str, words: str, groups: Sequence[tuple[str, Sequence[Heard]]], seconds: float, top: float) -> str:
    """Return the HTML page; beyond `MOST_BYTES` it has the first sounds of each group, and states how many.

    Args:
        title: plain text.
        words: description of the sounds, plain text.
        groups: (heading, sounds) each.
        seconds: of a sound.
        top: the highest frequency, in hertz.
    """
    included = [(heading, sounds[: _fitting(sounds, len(groups))]) for heading, sounds in groups]
    body = f"""<header>
<p class="kind">Sounds</p>
<h1>{escape(title)}</h1>
<p>{escape(words)}</p>
<p class="note">A spectrogram is {seconds:.2f} s wide, and goes from 0 Hz below to {top:,.0f} Hz above, evenly by
ear.</p>
</header>
<main>
"""
    for (heading, sounds), (_, every) in zip(included, groups, strict=True):
        some = f" <span class='note'>({len(sounds)} of {len(every)})</span>" if len(sounds) < len(every) else ""
        tiles = "\n".join(_figure(sound) for sound in sounds)
        body += f"<section>\n<h2>{escape(heading)}{some}</h2>\n<div class='sounds'>\n{tiles}\n</div>\n</section>\n"
    return document(title, body + "</main>\n", __package__, "listen_page", sounds=True)


def _fitting(sounds: Sequence[Heard], groups: int) -> int:
    """Return the number of sounds of a group that a page has room for, at least one."""
    largest = max((len(sound.wav) for sound in sounds), default=1)
    return max(1, MOST_BYTES // groups // largest)


def _figure(sound: Heard) -> str:
    """Return a spectrogram with its player."""
    pixels = to_numpy(sound.picture[None])[0, :, :, 0]
    height, width = pixels.shape
    scale = max(1, SIDE // max(height, width))
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    name = escape(sound.name)
    return (
        f"<figure><img alt='Spectrogram of {name}' width='{scale * width}' height='{scale * height}' "
        f"src='{_uri('image/png', file.getvalue())}'>"
        f"<figcaption>{name}</figcaption>"
        f"<audio controls preload='metadata' aria-label='{name}' src='{_uri('audio/wav', sound.wav)}'></audio></figure>"
    )


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
