"""Chapters of the introduction in markdown, with links to equations, code and notebooks."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path

from ddpm.reading.equations import mathml
from ddpm.reading.mistakes import Mistake

FOLDER = Path(__file__).with_name("chapters")
TARGET = re.compile(r"\[\[([^\]|]+)(?:\|([^\]]+))?\]\]")
MATH = re.compile(r"\$([^$]+)\$")
CODE = re.compile(r"`([^`]+)`")
EMPHASIS = re.compile(r"\*([^*]+)\*")
ITEM = re.compile(r"(\d+\.|-) (.*)")
Resolve = Callable[[str], tuple[str, str] | None]
"""Text in double brackets -> (address, HTML of its name), or None if unknown."""


@dataclass(frozen=True)
class Chapter:
    """A chapter of the introduction.

    Args:
        number: from 1.
        path: of its file, for messages.
        title: its first line.
        opening: its first paragraph, as text.
        text: all after the title, in markdown.
        first_line: line of the file at which `text` begins.
    """

    number: int
    path: str
    title: str
    opening: str
    text: str
    first_line: int

    @property
    def page(self) -> str:
        """The address of its page."""
        return f"chapter-{self.number}.html"


def read_chapters(folder: Path = FOLDER) -> list[Chapter]:
    """Read the chapters of a folder, NUMBER_NAME.md, in order.

    Raises: Mistake for one without a title.
    """
    chapters = []
    for path in sorted(folder.glob("*.md")):
        first, _, rest = path.read_text(encoding="utf-8").partition("\n")
        where = f"ddpm/reading/chapters/{path.name}"
        if not first.startswith("# "):
            raise Mistake(f"{where}:1", "a chapter begins with its title, as in `# What noise does`")
        opening = rest.strip().partition("\n\n")[0].replace("\n", " ")
        number = int(path.name.partition("_")[0])
        chapters.append(Chapter(number, where, first.removeprefix("# "), opening, rest, 2))
    return chapters


def html_of(text: str, path: str, first_line: int, resolve: Resolve) -> str:
    """Convert markdown to HTML: headings, paragraphs, lists, fences, `code`, *emphasis*, $mathematics$ and [[links]].

    Args:
        text: the markdown.
        path, first_line: its place, for error messages.
        resolve: finds the targets of links.
    Raises:
        Mistake: for a link without a target, and for LaTeX that cannot be converted.
    """
    lines = text.split("\n")
    parts: list[str] = []
    i = 0
    while i < len(lines):
        place = f"{path}:{first_line + i}"
        if not lines[i].strip():
            i += 1
        elif lines[i].startswith("```"):
            end = next((j for j in range(i + 1, len(lines)) if lines[j].startswith("```")), len(lines))
            parts.append(f"<pre>{escape(chr(10).join(lines[i + 1 : end]))}</pre>\n")
            i = end + 1
        elif lines[i].startswith("#"):
            marks, _, title = lines[i].partition(" ")
            parts.append(f"<h{len(marks)}>{_inline(title, place, resolve)}</h{len(marks)}>\n")
            i += 1
        else:
            end = next(
                (j for j in range(i, len(lines)) if not lines[j].strip() or lines[j].startswith("```")), len(lines)
            )
            parts.append(_paragraph(lines[i:end], path, first_line + i, resolve))
            i = end
    return "".join(parts)


def _paragraph(lines: list[str], path: str, number: int, resolve: Resolve) -> str:
    """Convert a paragraph, or a list whose items continue on indented lines."""
    if not ITEM.match(lines[0]):
        return f"<p>{_inline(' '.join(map(str.strip, lines)), f'{path}:{number}', resolve)}</p>\n"
    items: list[tuple[int, str]] = []
    for i, line in enumerate(lines):
        if match := ITEM.match(line):
            items.append((number + i, match[2]))
        else:
            items[-1] = (items[-1][0], f"{items[-1][1]} {line.strip()}")
    kind = "ul" if lines[0].startswith("-") else "ol"
    contents = (_inline(text, f"{path}:{at}", resolve) for at, text in items)
    return f"<{kind}>{''.join(f'<li>{item}</li>' for item in contents)}</{kind}>\n"


def _inline(text: str, place: str, resolve: Resolve) -> str:
    fragments: list[str] = []

    def protect(html: str) -> str:
        """Replace finished HTML by a placeholder that later substitutions leave alone."""
        fragments.append(html)
        return f"\0{len(fragments) - 1}\0"

    def link(match: re.Match[str]) -> str:
        found = resolve(match[1])
        if found is None:
            raise Mistake(
                place, f"[[{match[1]}]] leads nowhere: there is no such equation, module, function or notebook"
            )
        words = _inline(match[2], place, resolve) if match[2] else found[1]
        return protect(f'<a href="{found[0]}">{words}</a>')

    text = CODE.sub(lambda m: protect(f"<code>{escape(m[1])}</code>"), text)
    text = MATH.sub(lambda m: protect(mathml(m[1], place)), text)
    text = TARGET.sub(link, text)
    text = EMPHASIS.sub(r"<em>\1</em>", escape(text, quote=False))
    return re.sub(r"\0(\d+)\0", lambda m: fragments[int(m[1])], text)
