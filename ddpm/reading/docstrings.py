"""Parser of docstrings into blocks: paragraphs, equations, lists, and sections such as Args."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Source")
SECTION = re.compile(rf"({'|'.join(SECTIONS)}):(?: (.*))?$")
TERM = re.compile(r"([\w*][\w*, .'\-]*): (.*)")
ITEM = re.compile(r"[-*] (.*)")
MATH = ".. math::"
DOLLARS = "$$"


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    text: str
    line: int


@dataclass(frozen=True)
class Formula:
    """The LaTeX of a math directive."""

    latex: str
    line: int


@dataclass(frozen=True)
class Literal:
    """Preformatted lines."""

    text: str
    line: int


@dataclass(frozen=True)
class Listing:
    """A list, whose items are sequences of blocks."""

    items: tuple[tuple["Block", ...], ...]
    line: int


@dataclass(frozen=True)
class Terms:
    """A definition list of terms and their blocks: (("x_0", ...), ...)."""

    terms: tuple[tuple[str, tuple["Block", ...]], ...]
    line: int


@dataclass(frozen=True)
class Section:
    """A section: Args, Attributes, Returns, Yields, Raises or Source."""

    title: str
    blocks: tuple["Block", ...]
    line: int


Block = Paragraph | Formula | Literal | Listing | Terms | Section
Lines = Sequence[tuple[int, str]]
"""(line number in the file, text without the block's indentation)."""


def blocks_of(docstring: str, line: int = 1) -> tuple[Block, ...]:
    """Parse a docstring into blocks.

    Args:
        docstring: as returned by `ast.get_docstring`.
        line: line of its file at which it begins.
    """
    return _blocks(list(enumerate(docstring.splitlines(), line)))


def formulas(blocks: Sequence[Block]) -> list[Formula]:
    """Return all formulas within blocks, in order."""
    found: list[Formula] = []
    for block in blocks:
        if isinstance(block, Formula):
            found.append(block)
        elif isinstance(block, Section):
            found += formulas(block.blocks)
        elif isinstance(block, Listing):
            found += [formula for item in block.items for formula in formulas(item)]
        elif isinstance(block, Terms):
            found += [formula for _, inner in block.terms for formula in formulas(inner)]
    return found


def _blocks(lines: Lines) -> tuple[Block, ...]:
    """Parse lines that begin without indentation into blocks."""
    blocks: list[Block] = []
    i = 0
    while i < len(lines):
        number, text = lines[i]
        if not text.strip():
            i += 1
        elif text.startswith(MATH):
            end = _until(lines, i + 1, lambda later: not later.startswith(" "))
            latex = " ".join([text[len(MATH) :].strip(), *(later.strip() for _, later in lines[i + 1 : end])])
            blocks.append(Formula(latex.strip(), number))
            i = end
        elif text.startswith(DOLLARS):
            end = next((j for j in range(i, len(lines)) if lines[j][1].rstrip().endswith(DOLLARS, 2)), len(lines) - 1)
            latex = " ".join(later.strip() for _, later in lines[i : end + 1])
            blocks.append(Formula(latex.strip("$ "), number))
            i = end + 1
        elif header := SECTION.match(text):
            end = _until_dedent(lines, i + 1)
            first = [(number, header[2])] if header[2] else []
            body = [*first, *_dedented(lines[i + 1 : end])]
            blocks.append(Section(header[1], _section(header[1], body), number))
            i = end
        elif ITEM.match(text):
            items, i = _items(lines, i)
            blocks.append(Listing(items, number))
        elif text.startswith(" "):
            end = _until_dedent(lines, i)
            blocks.append(Literal("\n".join(later for _, later in _dedented(lines[i:end])).rstrip(), number))
            i = end
        else:
            end = _until(lines, i + 1, _begins_a_block)
            blocks.append(Paragraph(" ".join(later.strip() for _, later in lines[i:end]), number))
            i = end
    return tuple(blocks)


def _begins_a_block(text: str) -> bool:
    """Whether a line ends the paragraph before it."""
    return not text.strip() or text.startswith((MATH, DOLLARS)) or bool(SECTION.match(text) or ITEM.match(text))


def _until(lines: Lines, i: int, ends: Callable[[str], bool]) -> int:
    """Return the first index from i on for whose text `ends` is true."""
    while i < len(lines) and not ends(lines[i][1]):
        i += 1
    return i


def _until_dedent(lines: Lines, i: int) -> int:
    """Return the first index from i on whose text is not indented; trailing blank lines are not included."""
    end = i
    while i < len(lines) and (not lines[i][1].strip() or lines[i][1].startswith(" ")):
        i += 1
        if lines[i - 1][1].strip():
            end = i
    return end


def _dedented(lines: Lines) -> list[tuple[int, str]]:
    """Return lines without their common indentation."""
    widths = [len(text) - len(text.lstrip()) for _, text in lines if text.strip()]
    width = min(widths, default=0)
    return [(number, text[width:]) for number, text in lines]


def _section(title: str, lines: Lines) -> tuple[Block, ...]:
    """Parse the body of a section; arguments and errors become terms, where each line begins with one."""
    starts = [i for i, (_, text) in enumerate(lines) if text.strip() and not text.startswith(" ")]
    if title in ("Args", "Attributes", "Raises") and starts and all(TERM.match(lines[i][1]) for i in starts):
        terms = []
        for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
            number, text = lines[start]
            match = TERM.match(text)
            assert match is not None
            later = _dedented(lines[start + 1 : end])
            terms.append((match[1], _blocks([(number, match[2]), *later])))
        return (Terms(tuple(terms), lines[0][0]),)
    if len(starts) > 1 or not lines:
        return _blocks(lines)
    head, *rest = lines  # continuation lines of a single sentence are indented
    return _blocks([head, *_dedented(rest)])


def _items(lines: Lines, i: int) -> tuple[tuple[tuple[Block, ...], ...], int]:
    """Return the items of a list from index i on, and the index after them."""
    items = []
    while i < len(lines) and (match := ITEM.match(lines[i][1])):
        end = _until_dedent(lines, i + 1)
        items.append(_blocks([(lines[i][0], match[1]), *_dedented(lines[i + 1 : end])]))
        i = end
        following = _until(lines, i, lambda text: bool(text.strip()))
        if following < len(lines) and ITEM.match(lines[following][1]):
            i = following
    return tuple(items), i
