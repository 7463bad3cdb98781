"""Self-contained HTML page of a blind reading sheet, on which a person labels pictures one by one."""

import base64
import io
import json
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image
from torch import Tensor

from ddpm.figures.images import to_numpy
from ddpm.figures.offline_page import document

SIDE, SCALE = 320, 16  # largest pixels of a picture's longer side, for phones; largest enlargement
LISTED = 64  # classes up to which the list is open at first


def page(title: str, pictures: Tensor, classes: Sequence[Sequence[str]], sheet: str, file: str, command: str) -> str:
    """Return the HTML page, which treats samples and real images alike.

    Args:
        title: name of the real images.
        pictures: bytes (N, C, H, W), in the order of the page.
        classes: of each class, the accepted texts, the suggested one first; empty for any text.
        sheet: the sheet's id, which is stored with the answers.
        file: the file name of the saved answers.
        command: the command that scores them.
    """
    tiles = to_numpy(pictures)
    _, height, width, _ = tiles.shape
    content = {"sheet": sheet, "file": file, "pictures": [data_uri(tile) for tile in tiles]}
    scale = max(1, min(SCALE, SIDE // max(height, width)))
    body = f"""<header>
<p class="kind">Reading sheet</p>
<h1>{escape(title)}</h1>
<p>Some of these {len(tiles)} pictures are real images of the data, some were drawn by a network. For each, say what you
read, and whether you think it is real.</p>
</header>
<noscript><p class="warning">This page needs JavaScript, which is switched off.</p></noscript>
<main hidden>
<p class="progress"><span id="place" aria-live="polite"></span> <span id="count"></span>
<progress id="progress" max="{len(tiles)}" value="0" aria-label="Pictures that are answered"></progress></p>
<form id="item" autocomplete="off">
<figure><img id="picture" alt="" style="width:{scale * width}px"></figure>
<div class="questions">
<div>
<label for="read">What do you read?</label>
<div class="reading">
<input id="read" type="text" dir="auto" maxlength="200" autocapitalize="off" spellcheck="false"{_list(classes)}>
<button type="button" id="none" aria-pressed="false">No character</button>
</div>
{_classes(classes)}</div>
<fieldset>
<legend>Is it a real image?</legend>
<label><input type="radio" name="real" value="true"> <span><u>R</u>eal</span></label>
<label><input type="radio" name="real" value="false"> <span><u>D</u>rawn by the network</span></label>
</fieldset>
<div class="steps">
<button type="button" id="back">Back</button>
<button type="submit" id="next">Next</button>
</div>
<p class="note keys">Keys: type, Enter, R or D, Enter. Tab and space for “No character”.</p>
</div>
</form>
<section aria-labelledby="saving">
<h2 id="saving">Save the answers</h2>
<p id="kept" class="note"></p>
<p class="tools"><button type="button" id="save">Save answers</button>
<button type="button" id="open">First unanswered picture</button>
<button type="button" id="anew">Begin anew</button></p>
<p>The browser saves <code>{escape(file)}</code>. Once it lies in the folder where you type, score it by:</p>
<pre>{escape(command)}</pre>
<details><summary>The answers as text, where nothing can be saved</summary>
<textarea id="text" readonly rows="6" aria-label="The answers as text"></textarea></details>
</section>
</main>
<script type="application/json" id="content">{_json(content)}</script>
"""
    return document(f"Reading sheet: {title}", body, "ddpm.figures", "reading_page")


def data_uri(picture: np.ndarray) -> str:
    """Encode a picture, uint8 (H, W, 1) or (H, W, 3), as the data URI of an uncompressed PNG.

    Its length depends on the shape alone; that of a compressed one would reveal noisy pictures.
    """
    file = io.BytesIO()
    Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(file, format="PNG", compress_level=0)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _list(classes: Sequence[Sequence[str]]) -> str:
    """Return the attribute that suggests classes while typing."""
    return ' list="classes"' if classes else ""


def _classes(classes: Sequence[Sequence[str]]) -> str:
    """Return the accepted texts, as suggestions while typing and as buttons."""
    if not classes:
        return ""
    options = "".join(f'<option value="{escape(first)}">{escape(" ".join(rest))}</option>' for first, *rest in classes)
    buttons = "".join(
        f'<button type="button" dir="auto" data-text="{escape(first)}"{_named(rest)}>{escape(first)}</button>'
        for first, *rest in classes
    )
    is_open = " open" if len(classes) <= LISTED else ""
    return (
        f'<datalist id="classes">{options}</datalist>\n<details{is_open}><summary>What may be typed</summary>'
        f'<div class="classes">{buttons}</div></details>\n'
    )


def _named(texts: Sequence[str]) -> str:
    """Return the tooltip of a button: the other names of its class."""
    return f' title="{escape(", ".join(texts))}"' if texts else ""


def _json(content: object) -> str:
    """Encode plain data for a script element, escaped so that no text ends the element."""
    return json.dumps(content).replace("<", "\\u003c")
