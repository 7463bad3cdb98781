"""The page of a module: docstrings on the left, their code on the right."""

from collections.abc import Sequence
from html import escape

from ddpm.reading import letters
from ddpm.reading.docstrings import Paragraph, blocks_of
from ddpm.reading.equations import Equation
from ddpm.reading.library import Library, anchor, in_words, paper_page
from ddpm.reading.listing import coloured, listing
from ddpm.reading.page import Prose, slug
from ddpm.reading.source import Definition, Test

MOST = 12
"""Tests that are listed at most, of those that name a function and check none of its equations."""


def module_page(library: Library, name: str, figure: str = "") -> str:
    """Return the body of a module's page.

    Args:
        library: the project.
        name: of the module.
        figure: HTML to place under the opening.
    Raises:
        Mistake: for LaTeX that cannot be converted.
    """
    module = library.modules[name]
    first, *others = module.definitions
    writer = Writer(library, name)
    blocks = blocks_of(first.docstring, first.docstring_line)
    lead, rest = (blocks[:1], blocks[1:]) if blocks and isinstance(blocks[0], Paragraph) else ((), blocks)
    title = name.rpartition(".")[2]
    paragraphs = (writer.prose(first).inline(p.text, p.line) for p in lead if isinstance(p, Paragraph))
    opening = "".join(f'<p class="lead">{words}</p>' for words in paragraphs)
    named = [d for d in others if d.kind != "constants" and "." not in d.name and not d.name.startswith("_")]
    links = " ".join(f'<a href="#{anchor(d)}"><code>{escape(d.name)}</code></a>' for d in named)
    head = (
        f'<header class="head" id="top"><p class="kind">{escape(module.path)}</p><h1>{escape(title)}</h1>{opening}'
        f'{writer.prose(first).html(rest)}<nav class="here" aria-label="On this page">{links}</nav></header>\n'
    )
    rows = "".join(writer.row(definition) for definition in others)
    return f"{head}{figure}{rows}{_letters(name)}"


def _letters(name: str) -> str:
    """Return links to the letters of a page, for readers who cannot hover."""
    known = dict.fromkeys(letter.name for letter in letters.known_in(name).values())
    if not known:
        return ""
    links = " ".join(f'<a href="letters.html#{letter}"><code>{letter}</code></a>' for letter in known)
    return f'<section class="used"><h2>Letters</h2><p>{links}</p></section>'


class Writer:
    """Renderer of the definitions of one module as HTML."""

    def __init__(self, library: Library, name: str):
        self.library, self.module = library, library.modules[name]
        self.known, self.symbols = letters.known_in(name), letters.symbols_in(name)
        self.texts, self.seen = self.module.text.splitlines(), set[str]()

    def row(self, definition: Definition) -> str:
        """Return the row of a definition: prose, code, and beneath them its tests and callers."""
        code = listing(self.library.coloured[self.module.name], self.texts, definition.lines)
        if definition.kind == "constants":
            return f'<section class="row constants"><div></div>{code}</section>\n'
        blocks = blocks_of(definition.docstring, definition.docstring_line)
        depth = "h3" if "." in definition.name else "h2"
        title = f'<{depth}><a href="#{anchor(definition)}"><code>{escape(definition.name)}</code></a></{depth}>'
        prose = f'<div class="prose">{title}{self.prose(definition).html(blocks)}</div>'
        below = self._tests(definition) + self._callers(definition)
        below = f'<div class="below">{below}</div>' if below else ""
        return (
            f'<section class="row" id="{anchor(definition)}">{prose}<div class="beside">{code}</div>{below}</section>\n'
        )

    def prose(self, definition: Definition) -> Prose:
        """Return the renderer of a definition's docstring."""

        def equation(of: Equation, rows: Sequence[str]) -> str:
            return self._equation(definition, of, rows)

        def link(word: str) -> str | None:
            return self.library.address_in(self.module.name, word)

        def letter(word: str) -> str | None:
            for end in ("", "_t", "_s"):
                if word.endswith(end) and (found := self.known.get(word.removesuffix(end))):
                    return found.name
            return None

        return Prose(self.module.path, link, letter, self.symbols.get, equation)

    def _equation(self, definition: Definition, equation: Equation, rows: Sequence[str]) -> str:
        """Return a display, with its number in the paper and the lines that compute it."""
        display = "".join(f"<div>{row}</div>" for row in rows)
        if not equation.tags:
            return f'<div class="eq free">{display}</div>\n'
        lines = self.library.lines_of(definition, equation)
        names = "".join(
            f'<a class="tag" href="{paper_page(tag)}#{slug(tag)}">{escape(tag)}</a>' for tag in equation.tags
        )
        where = (
            f'<a class="lines" href="#L{lines[0]}">line{"s" * (len(lines) > 1)} {in_words(lines)}</a>' if lines else ""
        )
        ids = [f"eq-{slug(tag)}" for tag in equation.tags]
        name = f' id="{ids[0]}"' if ids[0] not in self.seen else ""
        self.seen |= set(ids)
        return (
            f'<div class="eq"{name} data-lines="{in_words(lines)}">{display}<p class="under">{names}{where}</p></div>\n'
        )

    def _tests(self, definition: Definition) -> str:
        """Return the tests of a definition's equations, folded; then those that name it."""
        marked = list(dict.fromkeys(test for tag in definition.tags for test in self.library.marked[tag]))
        parts = [test_of_equations(test, set(definition.tags)) for test in marked]
        others = self.library.naming(definition) if "." not in definition.name else []
        if others:
            names = "".join(f"<li><code>{escape(t.path)}::{escape(t.name)}</code></li>" for t in others[:MOST])
            more = f"<li>and {len(others) - MOST} more</li>" if len(others) > MOST else ""
            title = f"{len(others)} {'more ' if marked else ''}test{'s name' if len(others) > 1 else ' names'} it"
            parts.append(f"<details><summary>{title}</summary><ul>{names}{more}</ul></details>")
        return "".join(parts)

    def _callers(self, definition: Definition) -> str:
        """Return the functions and classes that name a definition, in this module and elsewhere."""
        found = self.library.callers.get(definition.full_name, [])
        if not found:
            return ""
        items = []
        for full in found:
            address = self.library.address(full)
            short = full.removeprefix(f"{self.module.name}.")
            items.append(f'<a href="{address}"><code>{short}</code></a>' if address else f"<code>{short}</code>")
        many = len(items) > 6
        listed = ", ".join(items)
        if many:
            return f"<details><summary>Named by {len(items)} others</summary><p>{listed}</p></details>"
        return f'<p class="callers">Named by {listed}</p>'


def test_of_equations(test: Test, tags: set[str], code: bool = True) -> str:
    """Return a test and the command that runs it, folded.

    Args:
        tags: the tags to list, of those that it checks.
        code: whether to include its source.
    """
    checks = ", ".join(tag for tag in test.tags if tag in tags)
    texts = test.code.splitlines()
    source = listing(coloured(test.code), texts, range(1, len(texts) + 1), ids=False) if code else ""
    return (
        f'<details class="test"><summary><span>Test of {escape(checks)}</span> '
        f"<code>{escape(test.name)}</code></summary>"
        f'<div class="run"><pre>{escape(test.command)}</pre><button type="button" hidden>copy</button></div>{source}'
        f'<p class="note">{escape(test.path)}, line {test.line}</p></details>'
    )
