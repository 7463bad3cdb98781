"""Conversion of docstrings' LaTeX to MathML, and the code names of an equation's left-hand sides."""

import contextlib
import re
import unicodedata
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass

from ddpm.reading.mistakes import Mistake

NAMESPACE = "{http://www.w3.org/1998/Math/MathML}"
ADDED = {"arg": r"\operatorname{arg}"}
"""Replacements of commands that the converter lacks."""
WIDTHS = {"negativethinmathspace": "-0.167em"}
TAGGED = re.compile(r"\s*(?:\\q?quad\s*)?\\text\{\[([A-Za-z][\w+-]* \([^()\[\]]+\))\]\}")
NAMES = {"epsilon": "eps", "varphi": "phi", "lambda": "lambda_"}
LONG = 44
"""Letters and signs above which a row is split."""
ACCENTS = r"\\(bar|tilde|hat)\s*\{?(\\?[A-Za-z]+)\}?"


@dataclass(frozen=True)
class Equation:
    """An equation, or lines of one up to its tag.

    Args:
        rows: LaTeX of each line, without tags.
        tags: of the equation; none for an untagged display.
    """

    rows: tuple[str, ...]
    tags: tuple[str, ...]

    @property
    def names(self) -> list[list[str]]:
        """The possible code names of each left-hand side, such as `mu_tilde`, the likeliest first."""
        found = []
        for row in self.rows:
            for part in re.split(r"\\q?quad", row):
                left, equals, _ = part.partition("=")
                if not equals:
                    left, equals, _ = part.partition(r"\leftarrow")
                if equals and (names := python_names(left)):
                    found.append(names)
        return found


def split(latex: str) -> list[Equation]:
    """Split a display into its equations: one a tag, with the lines that lead to it."""
    equations, rows = [], []
    for row in _rows(latex):
        tags = TAGGED.findall(row)
        rows += _pieces(TAGGED.sub("", row).strip())
        if tags:
            equations.append(Equation(tuple(rows), tuple(tags)))
            rows = []
    if any(rows):
        equations.append(Equation(tuple(rows), ()))
    return equations


def _rows(latex: str) -> list[str]:
    r"""Split LaTeX at its outermost \\."""
    rows, depth, start, i = [], 0, 0, 0
    while i < len(latex):
        if latex.startswith(("\\begin", "\\end"), i):
            depth += 1 if latex.startswith("\\begin", i) else -1
            i += 4
        elif latex.startswith("\\\\", i):
            if depth == 0:
                rows.append(latex[start:i])
                start = i + 2
            i += 2
        elif latex[i] == "\\":
            i += 2
        else:
            depth += {"{": 1, "}": -1}.get(latex[i], 0)
            i += 1
    return [row.strip() for row in [*rows, latex[start:]] if row.strip()]


def _pieces(row: str) -> list[str]:
    r"""Split a row at its outermost \quad where it is too long for a column."""
    if len(re.findall(r"\\?[A-Za-z]+|\d|[^\s{}_^]", row)) <= LONG:
        return [row]
    pieces, depth, start = [], 0, 0
    for mark in re.finditer(r"\\left|\\right|\\begin|\\end|\\q?quad\b|\\?[{}]", row):
        word = mark[0]
        depth += {"{": 1, "\\left": 1, "\\begin": 1, "}": -1, "\\right": -1, "\\end": -1}.get(word, 0)
        if depth == 0 and word.endswith("quad"):
            pieces.append(row[start : mark.start()].strip())
            start = mark.end()
    return [piece for piece in [*pieces, row[start:].strip()] if piece]


def python_names(latex: str) -> list[str]:
    r"""Return the possible code names of a letter: \tilde\mu_t(x_t, x_0) is mu_tilde_t, or mu_tilde."""
    text = re.sub(r"\([^()]*\)|\\[,;! ]|\\(?:text|mathrm|operatorname|mathcal)\b|\^\{[^{}]*\}", "", latex)
    squared = "^2" in text
    text = re.sub(r"\^\(?\w\)?|\^\\\w+", "", text)
    text = re.sub(ACCENTS, r"\2_\1", text)
    text = re.sub(r"\\?([A-Za-z]+)", lambda m: NAMES.get(m[1], m[1]), text)
    text = re.sub(r"[{}\\\s]", "", text).replace(",", "_").replace("__", "_")
    if not re.fullmatch(r"[A-Za-z]\w*", text):
        return []
    base = text.rpartition("_")[0]
    names = [text, *([base, f"{base}_"] if base else []), text.lower()]
    return [*([f"{name}2" for name in names] if squared else []), *names]


def mathml(latex: str, place: str, display: bool = False, letter: Callable[[str], str | None] | None = None) -> str:
    """Convert LaTeX to MathML.

    Args:
        latex: without tags.
        place: of the docstring, for error messages.
        display: whether it is displayed on its own line.
        letter: symbol, as returned by `symbol_of` -> the name of a letter of the glossary, or None.
    Raises:
        Mistake: for LaTeX that cannot be parsed, and an unknown command.
    """
    from latex2mathml.converter import convert

    braces = re.sub(r"\\[{}]", "", latex)
    if braces.count("{") != braces.count("}") or latex.count(r"\left") - latex.count(r"\leftarrow") != latex.count(
        r"\right"
    ) - latex.count(r"\rightarrow"):
        raise Mistake(place, f"braces, or \\left and \\right, that do not match: {latex}")
    latex = re.sub(r"\\text\{[^{}]*\}", lambda m: m[0].replace("\\_", "_"), latex)
    for name, other in ADDED.items():
        latex = re.sub(rf"\\{name}\b", other.replace("\\", r"\\"), latex)
    try:
        root = ET.fromstring(convert(latex, display="block" if display else "inline"))
    except Exception as error:  # the converter raises many kinds
        raise Mistake(place, f"LaTeX that cannot be read ({type(error).__name__}): {latex}") from error
    for element in root.iter():
        text = (element.text or "").strip()
        if "\\" in text:
            raise Mistake(place, f"the LaTeX command {text} is not known, in {latex}")
        element.tag = element.tag.removeprefix(NAMESPACE)
        if element.tag == "mi" and text in (";", ":"):
            element.tag = "mo"
        if variant := element.attrib.pop("mathvariant", None):
            element.text = _styled(text, variant)
        if element.get("width") in WIDTHS:
            element.set("width", WIDTHS[element.attrib["width"]])
    if letter is not None:
        _mark(root, letter)
    return ET.tostring(root, encoding="unicode")


def _styled(text: str, variant: str) -> str:
    """Return a letter in another alphabet as its Unicode character: a script N is 𝒩."""
    names = {"script": "SCRIPT", "double-struck": "DOUBLE-STRUCK", "bold": "BOLD", "fraktur": "FRAKTUR"}
    if variant not in names or len(text) != 1 or not text.isascii() or not text.isalpha():
        return text
    case = "CAPITAL" if text.isupper() else "SMALL"
    for name in (f"MATHEMATICAL {names[variant]} {case} {text.upper()}", f"{names[variant]} {case} {text.upper()}"):
        with contextlib.suppress(KeyError):
            return unicodedata.lookup(name)
    return text


def symbol_of(element: ET.Element) -> str:
    """Return the symbol in an element as one word: x_t, α¯."""
    parts = [symbol_of(child) for child in element]
    joint = "_" if element.tag.removeprefix(NAMESPACE) in ("msub", "munder") else ""
    return joint.join(parts) if parts else (element.text or "").strip()


def symbol(latex: str) -> str:
    """Return the symbol of a piece of LaTeX, as `symbol_of`."""
    from latex2mathml.converter import convert

    return symbol_of(ET.fromstring(convert(latex)))


def _mark(element: ET.Element, letter: Callable[[str], str | None]) -> None:
    """Mark every part that is a letter of the glossary with its name, the largest part first."""
    if element.tag in ("mi", "mtext", "msub", "mover") and (name := letter(symbol_of(element))):
        element.set("data-l", name)
        return
    for child in element:
        _mark(child, letter)
