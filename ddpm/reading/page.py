"""The frame of every page of the site, and the conversion of docstrings to HTML."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from ddpm.reading import docstrings as d
from ddpm.reading.equations import Equation, mathml, split
from ddpm.reading.letters import SHAPES

TITLE = "DDPM, from scratch"
NAV = (
    ("index.html", "Contents"),
    ("chapter-1.html", "Chapters"),
    ("papers.html", "Papers"),
    ("equations.html", "Equations"),
    ("letters.html", "Letters"),
)
CODE = re.compile(r"``([^`]+)``|`([^`]+)`")
INLINE_MATH = re.compile(r":math:`([^`]+)`")
EMPHASIS = re.compile(r"(?<![\w*(`])\*(\w(?:[^*`]*\w)?)\*(?![\w*])")
SHAPE = re.compile(r"\(((?:\w+'?|\*|T \+ 1|T\+1|\.\.\.)(?:, (?:\w+'?|\*|\.\.\.))*,?)\)")
WORD = re.compile(r"(?<![\w.&#;/-])[A-Za-z]\w*(?![\w(/-])")
INDEXED = re.compile(r"(?<![\w.&#;/-])([A-Za-z]\w*?(?=_\{)|[A-Za-z])_(?:\{([^{}]+)\}|([A-Za-z0-9]+))(?!\w)")
GREEK = {"theta": "θ", "phi": "φ", "eta": "η"}
PROTECTED = re.compile(r"(<[^>]*>[^<]*</(?:code|math|a)>|<math.*?</math>|<[^>]+>)", re.DOTALL)


@dataclass(frozen=True)
class Neighbour:
    """The previous or next page."""

    address: str
    title: str


def slug(tag: str) -> str:
    """Return a tag as part of an address: DDPM (7) is DDPM-7."""
    return re.sub(r"[^A-Za-z0-9]+", "-", tag.replace("++", "pp")).strip("-")


def document(
    title: str, body: str, kind: str = "", before: Neighbour | None = None, after: Neighbour | None = None
) -> str:
    """Return the HTML of a page of the site.

    Args:
        title: plain text.
        body: HTML.
        kind: CSS class of the body.
        before, after: the targets of "previous" and "next".
    """
    links = "".join(f'<a href="{address}">{name}</a>' for address, name in NAV)
    turns = ""
    for neighbour, rel, arrow in ((before, "prev", "←"), (after, "next", "→")):
        if neighbour is not None:
            words = f"{arrow} {escape(neighbour.title)}" if rel == "prev" else f"{escape(neighbour.title)} {arrow}"
            turns += f'<a rel="{rel}" class="{rel}" href="{neighbour.address}">{words}</a>'
    footer = f'<nav class="turn" aria-label="Previous and next">{turns}</nav>' if turns else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)} · {TITLE}</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="site.css">
</head>
<body class="{kind}">
<a class="skip" href="#the-text">To the text</a>
<header class="top"><a class="home" href="index.html">{TITLE}</a><nav aria-label="Site">{links}</nav>
<form role="search" id="the-search"><input type="search" id="the-query" placeholder="Search   /" autocomplete="off"
 aria-label="Search" aria-controls="the-results"><ol id="the-results" hidden></ol></form></header>
<main id="the-text">
{body}</main>
{footer}
<script src="letters.js"></script>
<script src="site.js"></script>
</body>
</html>
"""


class Prose:
    """Converter of docstrings to HTML.

    Args:
        place: of the file, such as ddpm/forward.py.
        link: a name between backticks -> its address, or None.
        letter: a word -> its name in the glossary, or None.
        symbol: a symbol of an equation -> its name in the glossary, or None.
        equation: renders an equation; (equation, MathML of its rows) -> HTML.
    """

    def __init__(
        self,
        place: str,
        link: Callable[[str], str | None],
        letter: Callable[[str], str | None],
        symbol: Callable[[str], str | None],
        equation: Callable[[Equation, Sequence[str]], str],
    ):
        self.place, self.link, self.letter, self.symbol, self.equation = place, link, letter, symbol, equation

    def html(self, blocks: Sequence[d.Block]) -> str:
        """Convert blocks, in order."""
        return "".join(self._block(block) for block in blocks)

    def _block(self, block: d.Block) -> str:
        if isinstance(block, d.Paragraph):
            return f"<p>{self.inline(block.text, block.line)}</p>\n"
        if isinstance(block, d.Formula):
            return "".join(self._equation(equation, block.line) for equation in split(block.latex))
        if isinstance(block, d.Literal):
            return f"<pre>{escape(block.text)}</pre>\n"
        if isinstance(block, d.Listing):
            return "<ul>" + "".join(f"<li>{self._flat(item)}</li>" for item in block.items) + "</ul>\n"
        if isinstance(block, d.Terms):
            terms = (f"<dt>{self._term(term)}</dt><dd>{self._flat(inner)}</dd>" for term, inner in block.terms)
            return f"<dl>{''.join(terms)}</dl>\n"
        title = {"Args": "Takes", "Attributes": "Has", "Returns": "Returns", "Source": "Source"}
        words = title.get(block.title, block.title)
        return f'<div class="part"><h4>{words}</h4>{self.html(block.blocks)}</div>\n'

    def _flat(self, blocks: Sequence[d.Block]) -> str:
        """Convert blocks; a single paragraph without its own element."""
        if len(blocks) == 1 and isinstance(blocks[0], d.Paragraph):
            return self.inline(blocks[0].text, blocks[0].line)
        return self.html(blocks)

    def _term(self, term: str) -> str:
        words = []
        for word in term.split(", "):
            letter = self.letter(word)
            words.append(f'<code data-l="{letter}">{escape(word)}</code>' if letter else f"<code>{escape(word)}</code>")
        return ", ".join(words)

    def _equation(self, equation: Equation, line: int) -> str:
        place = f"{self.place}:{line}"
        return self.equation(equation, [mathml(row, place, True, self.symbol) for row in equation.rows])

    def inline(self, text: str, line: int) -> str:
        """Convert a line of text: code, mathematics, emphasis, letters and shapes."""
        text = escape(text, quote=False)
        text = INLINE_MATH.sub(lambda m: mathml(_unescaped(m[1]), f"{self.place}:{line}", False, self.symbol), text)
        text = CODE.sub(lambda m: self._code(m[1] or m[2]), text)
        text = EMPHASIS.sub(r"<em>\1</em>", text)
        pieces = PROTECTED.split(text)  # every second one is markup
        return "".join(piece if i % 2 else self._letters(piece) for i, piece in enumerate(pieces))

    def _code(self, text: str) -> str:
        address = self.link(_unescaped(text))
        return f'<a href="{address}"><code>{text}</code></a>' if address else f"<code>{text}</code>"

    def _letters(self, text: str) -> str:
        pieces, end = [], 0
        for match in SHAPE.finditer(text):
            if (html := shape(match[1])).startswith("<"):
                pieces += [self._words(text[end : match.start()]), html]
                end = match.end()
        return "".join([*pieces, self._words(text[end:])])

    def _words(self, text: str) -> str:
        """Convert words outside of shapes: those with an index first, then those between them."""
        pieces, end = [], 0
        for match in INDEXED.finditer(text):
            letter = self.letter(match[0].replace("{", "").replace("}", ""))
            html = indexed(match)
            pieces.append(WORD.sub(self._word, text[end : match.start()]))
            pieces.append(f'<span data-l="{letter}">{html}</span>' if letter else html)
            end = match.end()
        return "".join([*pieces, WORD.sub(self._word, text[end:])])

    def _word(self, match: re.Match[str]) -> str:
        word = match[0]
        letter = self.letter(word) if "_" in word or word in ("eps", "beta", "eta", "lambda") else None
        return f'<span data-l="{letter}">{word}</span>' if letter else word


def indexed(match: re.Match[str]) -> str:
    """Return the HTML of a letter with an index as a subscript: x_t and x_{t-1}."""
    index = match[2] or match[3]
    return f"{match[1]}<sub>{GREEK.get(index, index.replace('-', '−'))}</sub>"


def words(text: str) -> str:
    """Convert plain text to HTML, with text in backticks as code and indices as subscripts."""
    parts = re.split(r"`([^`]+)`", escape(text, quote=False))
    return "".join(f"<code>{part}</code>" if i % 2 else INDEXED.sub(indexed, part) for i, part in enumerate(parts))


def shape(inner: str) -> str:
    """Return the HTML of a shape, (B, C, H, W), with the meanings of its letters; other text is unchanged."""
    parts = [part.replace("T+1", "T + 1").rstrip("'") for part in inner.rstrip(",").split(", ")]
    if not all(part in SHAPES or part.isdigit() for part in parts) or parts in (["1"], ["..."], ["t"], ["s"]):
        return f"({inner})"
    if len(parts) == 1 and not inner.endswith(",") and parts[0] not in ("*", "T + 1"):
        return f"({inner})"
    meaning = "; ".join(f"{part}: {SHAPES[part]}" for part in dict.fromkeys(parts) if part in SHAPES)
    return f'<span class="shape" title="{escape(meaning)}" data-s="{escape(meaning)}">({inner})</span>'


def _unescaped(text: str) -> str:
    return text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
