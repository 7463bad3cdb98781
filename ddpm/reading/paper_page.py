"""The page of a paper: its equations in order, our lines and tests, and differences with reasons."""

import re
from collections.abc import Sequence
from html import escape

from ddpm.reading import letters
from ddpm.reading.equations import Equation, mathml
from ddpm.reading.library import Library, anchor, in_words
from ddpm.reading.library import paper_page as page_of
from ddpm.reading.listing import listing
from ddpm.reading.mistakes import Mistake
from ddpm.reading.module_page import test_of_equations
from ddpm.reading.page import slug, words
from ddpm.reading.papers import OTHERS, PAPERS, Numbered, Paper
from ddpm.reading.source import Definition

UNVERIFIED = (
    '<span class="unverified" title="This number was not found in a second public text of the paper.">unverified</span>'
)

FEW = 3
"""Equations up to which a page has no list of them at its head."""


def entries(library: Library, paper: Paper) -> list[Numbered]:
    """Return a paper's equations in its own numbering, then ours with a name in place of a number.

    Raises: Mistake for one that no docstring quotes and that has no note.
    """
    quoted = {tag.partition(" ")[2].strip("()"): tag for tag in library.quoted if tag.partition(" ")[0] == paper.name}
    for equation in paper.equations:
        if equation.number not in quoted and not equation.note:
            what = f"{paper.name} ({equation.number}) is listed, but no docstring quotes it, and no reason is given"
            raise Mistake("ddpm/reading/papers.py", what)
    listed = {equation.number for equation in paper.equations}
    return [*paper.equations, *(Numbered(number) for number in sorted(quoted.keys() - listed, key=in_order))]


def in_order(number: str) -> tuple[int, str]:
    """Return a sort key: numbers by value, then names."""
    return (int(number), "") if number.isdigit() else (10**6, number)


def paper_page(library: Library, paper: Paper) -> str:
    """Return the body of a paper's page.

    Raises: Mistake as in `entries`.
    """
    source = f"{escape(paper.authors)}, {paper.year}"
    if paper.arxiv:
        source += f', <a href="https://arxiv.org/abs/{paper.arxiv}">arXiv {paper.arxiv}</a>'
    found = entries(library, paper)
    ours = sum(f"{paper.name} ({equation.number})" in library.quoted for equation in found)
    notes = f"<p>{words(paper.letters)}</p>" if paper.letters else ""
    notes += f'<p class="note">{ours} of its equations are computed here, each with a test.'
    if len(found) > ours:
        notes += f" {len(found) - ours} more are listed with the reason why they are not."
    notes += "</p>"
    if len(found) > FEW:
        links = "".join(f'<a href="#{slug(f"{paper.name} ({e.number})")}">{_number(e)}</a>' for e in found)
        notes += f'<nav class="here" aria-label="Equations">{links}</nav>'
    head = f'<header class="head"><p class="kind">{source}</p><h1>{escape(paper.title)}</h1>{notes}</header>\n'
    return head + "".join(_entry(library, f"{paper.name} ({equation.number})", equation) for equation in found)


def others_page(library: Library) -> str:
    """Return the body of the page of all tags of no listed paper."""
    tags = sorted(other_tags(library))
    head = f'<header class="head"><h1>{OTHERS}</h1></header>\n'
    return head + "".join(_entry(library, tag, Numbered(tag)) for tag in tags)


def other_tags(library: Library) -> list[str]:
    """Return the tags of no listed paper."""
    names = {paper.name for paper in PAPERS}
    return [tag for tag in library.quoted if tag.partition(" ")[0] not in names]


def _entry(library: Library, tag: str, equation: Numbered) -> str:
    """Return the section of an equation of a paper."""
    number = f'<p class="number">{_number(equation)}</p>'
    what = f"<p>{words(equation.what)}</p>" if equation.what else ""
    note = f'<p class="note">{_linked(library, words(equation.note))}</p>' if equation.note else ""
    mark = "" if equation.verified else UNVERIFIED
    if tag not in library.quoted:
        return (
            f'<section class="numbered" id="{slug(tag)}">{number}<div class="absent">{what}{mark}{note}</div>'
            f'<div class="absent"><p class="note">Not computed here under this number.</p></div></section>\n'
        )
    left, right = [what], []
    for definition in library.quoted[tag]:
        for of, line in library.equations(definition):
            if tag in of.tags:
                left.append(_display(library, definition, of, line))
                right.append(_lines(library, definition, of))
    tests = "".join(test_of_equations(test, {tag}, code=False) for test in dict.fromkeys(library.marked[tag]))
    return (
        f'<section class="numbered" id="{slug(tag)}">{number}<div>{"".join(left)}{mark}{note}</div>'
        f'<div>{"".join(right)}</div><div class="below">{tests}</div></section>\n'
    )


def _linked(library: Library, html: str) -> str:
    """Link the tags in a note, such as DDPM (13), to the equations."""

    def link(match: re.Match[str]) -> str:
        tag = match[0]
        return f'<a href="{page_of(tag)}#{slug(tag)}">{tag}</a>' if tag in library.quoted else tag

    return re.sub(r"[A-Za-z][\w+-]* \([^()]+\)", link, html)


def _number(equation: Numbered) -> str:
    """Return the heading of an equation on the page of its paper: (7), or its name."""
    return escape(equation.number if re.search(r"[A-Za-z]", equation.number) else f"({equation.number})")


def _display(library: Library, definition: Definition, equation: Equation, line: int) -> str:
    place = f"{library.modules[definition.module].path}:{line}"
    symbols = letters.symbols_in(definition.module)
    rows: Sequence[str] = [mathml(row, place, True, symbols.get) for row in equation.rows]
    return f'<div class="eq">{"".join(f"<div>{row}</div>" for row in rows)}</div>'


def _lines(library: Library, definition: Definition, equation: Equation) -> str:
    """Return the lines that compute an equation, with their place."""
    module = library.modules[definition.module]
    lines = library.lines_of(definition, equation)
    where = f"{module.path}, line{'s' * (len(lines) > 1)} {in_words(lines)}" if lines else module.path
    code = listing(library.coloured[module.name], module.text.splitlines(), lines, ids=False)
    return (
        f'<p class="note"><a href="{module.name}.html#{anchor(definition)}">'
        f"<code>{escape(definition.name or module.name)}"
        f"</code></a> in {escape(where)}</p>{code}"
    )
