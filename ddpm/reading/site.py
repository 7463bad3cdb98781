"""The whole site: its pages, the search index, and the check for dead links."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from html import escape
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from urllib.parse import unquote

from ddpm.reading import figures, letters, network_map
from ddpm.reading.chapters import Chapter, html_of, read_chapters
from ddpm.reading.contents import Room
from ddpm.reading.equations import mathml, symbol
from ddpm.reading.library import Library, anchor
from ddpm.reading.library import paper_page as page_of
from ddpm.reading.mistakes import Mistake
from ddpm.reading.module_page import module_page
from ddpm.reading.page import Neighbour, document, slug, words
from ddpm.reading.paper_page import entries, in_order, other_tags, others_page, paper_page
from ddpm.reading.papers import OTHERS, PAPERS, Numbered, Paper

LARGEST = 5 * 10**6
"""Largest size of the whole site, in bytes."""
FIRST = 13
"""Number of papers listed on the first page."""
NETWORK = "models.unet"
"""The module whose page has the diagram of a network."""


def build(
    root: Path,
    out: Path,
    network: Sequence[network_map.Stage] = (),
    network_is: str = "",
    rooms: Sequence[Room] | None = None,
) -> Path:
    """Parse a project and write its site.

    Args:
        root: the project's folder.
        out: the folder of the pages; an older site in it is replaced.
        network: the stages of the composed network, for its diagram; none for no diagram.
        network_is: description of that network.
        rooms: as in `Library`.
    Returns:
        The path of the first page.
    Raises:
        Mistake: for an error in the source, with its place; nothing is then written.
    """
    library = Library(root, rooms)
    pages = Pages(library, read_chapters(), os.path.relpath(root, out))
    made = pages.all(network, network_is)
    check_links(made)
    if (size := sum(len(text.encode()) for text in made.values())) > LARGEST:
        raise Mistake("the site", f"has {size / 1e6:.1f} MB, and {LARGEST / 1e6:g} are allowed")
    out.mkdir(parents=True, exist_ok=True)
    for path in out.glob("*.html"):
        if path.name not in made:
            path.unlink()
    for name, text in made.items():
        (out / name).write_text(text, encoding="utf-8")
    return out / "index.html"


class Pages:
    """Renderer of the pages of a library.

    Args:
        chapters: of the introduction.
        home: path of the project's folder relative to the site, for links to notebooks.
    """

    def __init__(self, library: Library, chapters: Sequence[Chapter], home: str):
        self.library, self.chapters, self.home = library, chapters, home
        names = {tag.partition(" ")[0] for tag in library.quoted}
        self.papers = [paper for paper in PAPERS if paper.name in names or paper.equations]

    def all(self, network: Sequence[network_map.Stage] = (), network_is: str = "") -> dict[str, str]:
        """Return file name -> content, of the whole site.

        Raises: Mistake for an error in the source.
        """
        library = self.library
        order = [("index.html", "Contents"), *((c.page, c.title) for c in self.chapters)]
        order += [(f"{name}.html", name.rpartition(".")[2]) for name in library.paged]
        order += [(_page(paper), paper.title) for paper in self.papers]
        turns = self._turns(order)
        made = {}
        for name in library.paged:  # first: most mistakes are in docstrings
            body = module_page(library, name, self._figure(name, network, network_is))
            made[f"{name}.html"] = document(name, body, "module", **turns[f"{name}.html"])
        for chapter in self.chapters:
            body = (
                f'<p class="kind">Chapter {chapter.number} of {len(self.chapters)}</p><h1>{escape(chapter.title)}</h1>'
            )
            body += html_of(chapter.text, chapter.path, chapter.first_line, self.resolve)
            made[chapter.page] = document(chapter.title, body, "chapter", **turns[chapter.page])
        for paper in self.papers:
            name = _page(paper)
            made[name] = document(paper.title, paper_page(library, paper), "paper", **turns[name])
        made |= {
            "index.html": document("Contents", self._index(), "index", **turns["index.html"]),
            "papers.html": document("Papers", self._papers()),
            "equations.html": document("Equations", self._equations(), "equations"),
            "letters.html": document("Letters", self._letters()),
            "search.js": f"window.ENTRIES = {_json(self.entries())};\n",
            "letters.js": f"window.LETTERS = {_json(_letters_for_pages())};\n",
        }
        for name in ("site.css", "site.js"):
            made[name] = (files("ddpm.reading") / name).read_text(encoding="utf-8")
        if other_tags(library):
            made["paper-others.html"] = document(OTHERS, others_page(library), "paper")
        return made

    def _turns(self, order: Sequence[tuple[str, str]]) -> Mapping[str, Mapping[str, Neighbour | None]]:
        """Return page -> previous and next page, as arguments of `document`."""
        neighbours = [None, *(Neighbour(*page) for page in order), None]
        return {page[0]: {"before": neighbours[i], "after": neighbours[i + 2]} for i, page in enumerate(order)}

    def resolve(self, target: str) -> tuple[str, str] | None:
        """Return address and name of a link in a chapter: an equation, a module, a definition or a notebook."""
        if target in self.library.quoted:
            return f"{page_of(target)}#{slug(target)}", escape(target)
        if target.startswith("notebook "):
            name = target.removeprefix("notebook ")
            path = f"notebooks/{name}.ipynb"
            there = (self.library.root / path).is_file()
            return (f"{self.home}/{path}", f"notebook {escape(name[:2])}") if there else None
        address = self.library.address(target)
        if address is None:
            return None
        return address.removesuffix("#top"), f"<code>{escape(target.rpartition('.')[2])}</code>"

    def _figure(self, name: str, network: Sequence[network_map.Stage], network_is: str) -> str:
        """Return the figure of a module, or ""."""
        if name == NETWORK and network:
            caption = f"{network_is} In the order in which it computes; numbers are channels. Orange: attention."
            diagram = network_map.of_network(network)
            return f'<figure tabindex="0">{diagram}<figcaption>{escape(caption)}</figcaption></figure>\n'
        if name not in figures.FIGURES:
            return ""
        caption = words(figures.FIGURES[name][1])
        return f"<figure>{figures.figure_of(name)}<figcaption>{caption}</figcaption></figure>\n"

    def _index(self) -> str:
        """Return the first page: the chapters, then all modules."""
        counted = (
            f"{len(self.library.quoted)} equations, each next to the lines that compute it and the test that checks it."
        )
        way = "".join(
            f'<li><div><a href="{chapter.page}">{escape(chapter.title)}</a>{self._first_words(chapter)}</div></li>'
            for chapter in self.chapters
        )
        rooms = "".join(
            f"<div><h3>{escape(room.title)}</h3><ul>{''.join(self._module(name) for name in room.modules)}</ul></div>"
            for room in self.library.rooms
        )
        papers = ", ".join(f'<a href="{_page(p)}">{escape(p.name)}</a>' for p in self.papers[:FIRST])
        return (
            '<header class="head"><h1>DDPM, read alongside its papers</h1>'
            f'<p class="lead">{counted} Made from the source: what is wrong there is wrong here.</p>'
            f'<p>By paper: {papers}, <a href="papers.html">and all others</a>. Press <code>/</code> to search, '
            "<code>←</code> and <code>→</code> to turn pages.</p></header>"
            f'<h2>A way through</h2><ol class="way">{way}</ol><h2>Every module</h2>'
            '<p class="note">The number next to a name: how many equations of papers it computes.</p>'
            f'<div class="rooms">{rooms}</div>'
        )

    def _first_words(self, chapter: Chapter) -> str:
        """Return the first sentence of a chapter, as HTML."""
        return html_of(_first_sentence(chapter.opening), chapter.path, chapter.first_line, self.resolve)

    def _module(self, name: str) -> str:
        first = self.library.modules[name].definitions[0]
        tags = len({tag for d in self.library.modules[name].definitions for tag in d.tags})
        count = f' <span class="note">{tags}</span>' if tags else ""
        title = escape(_first_sentence(first.docstring.partition("\n")[0]))
        return (
            f'<li><a href="{name}.html" title="{title}"><code>{escape(name.partition(".")[2])}</code></a>{count}</li>'
        )

    def _papers(self) -> str:
        """Return the page of all papers, with the numbers of their computed equations."""
        rows = []
        for paper in self.papers:
            ours = sum(f"{paper.name} ({e.number})" in self.library.quoted for e in entries(self.library, paper))
            rows.append(
                f'<tr><td>{escape(paper.name)}</td><td><a href="{_page(paper)}">{escape(paper.title)}</a><br>'
                f'<span class="note">{escape(paper.authors)}, {paper.year}</span></td><td>{ours}</td></tr>'
            )
        others = other_tags(self.library)
        if others:
            rows.append(f'<tr><td></td><td><a href="paper-others.html">{OTHERS}</a></td><td>{len(others)}</td></tr>')
        head = "<tr><th>tag</th><th>paper</th><th>equations here</th></tr>"
        return f"<h1>Papers</h1>{_table(head, rows)}"

    def _equations(self) -> str:
        """Return the page of all equations with their functions and tests."""
        rows = []
        rank = {paper.name: i for i, paper in enumerate(PAPERS)}

        def key(tag: str) -> tuple[int, str, tuple[int, str]]:
            name, _, number = tag.partition(" ")
            return rank.get(name, len(rank)), name, in_order(number.strip("()"))

        for tag in sorted(self.library.quoted, key=key):
            where = "<br>".join(
                f'<a href="{self.library.address(d.full_name)}"><code>{escape(d.name or d.module)}</code></a>'
                for d in dict.fromkeys(self.library.quoted[tag])
            )
            tests = "<br>".join(f"<code>{escape(t.name)}</code>" for t in dict.fromkeys(self.library.marked[tag]))
            rows.append(
                f'<tr id="{slug(tag)}"><td><a href="{page_of(tag)}#{slug(tag)}">{escape(tag)}</a></td>'
                f"<td>{where}</td><td>{tests}</td></tr>"
            )
        head = "<tr><th>equation</th><th>computed by</th><th>tested by</th></tr>"
        return f"<h1>Equations</h1>{_table(head, rows)}"

    def _letters(self) -> str:
        """Return the page of the glossary."""
        rows = []
        for letter in letters.LETTERS:
            symbol = " ".join(mathml(latex, "ddpm/reading/letters.py") for latex in letter.latex[:1])
            there = "<br>".join(f"{escape(paper)}: {escape(name)}" for paper, name in letter.elsewhere.items())
            rows.append(
                f'<tr id="{letter.name}"><td><code>{letter.name}</code></td><td>{symbol}</td>'
                f"<td>{words(letter.meaning)}</td>"
                f'<td>{escape(letter.shape)}</td><td class="note">{there}</td></tr>'
            )
        head = "<tr><th>in code</th><th>letter</th><th>meaning</th><th>shape</th><th>elsewhere</th></tr>"
        shapes = "".join(
            f"<tr><td><code>{escape(k)}</code></td><td>{escape(v)}</td></tr>" for k, v in letters.SHAPES.items()
        )
        note = "The paper's index is the array's index: every constant has T + 1 entries, and t = 0 is data."
        return f"<h1>Letters</h1><p>{note}</p>{_table(head, rows)}<h2>Shapes</h2><table><tbody>{shapes}</tbody></table>"

    def _entry(self, paper: str, equation: Numbered) -> tuple[str, str, str]:
        """Return the search entry of an equation, computed or only listed; without a paper, its number is its tag."""
        tag = f"{paper} ({equation.number})" if paper else equation.number
        texts = [equation.what]
        for first in self.library.quoted.get(tag, [])[:1]:
            texts.append(f"{first.name or first.module}: {first.docstring.partition(chr(10))[0]}")
        return tag, f"{page_of(tag)}#{slug(tag)}", " ".join(["Equation.", *filter(None, texts)])

    def entries(self) -> list[tuple[str, str, str]]:
        """Return the search index: (title, address, text)."""
        library = self.library
        found = [
            (chapter.title, chapter.page, f"Chapter {chapter.number}. {chapter.opening}") for chapter in self.chapters
        ]
        found += [self._entry(paper.name, equation) for paper in self.papers for equation in entries(library, paper)]
        found += [self._entry("", Numbered(tag)) for tag in other_tags(library)]
        for name in library.paged:
            for d in library.modules[name].definitions:
                if d.kind == "constants":
                    continue
                summary = d.docstring.partition("\n")[0]
                tags = " ".join(d.tags)
                title = d.name or name
                found.append(
                    (title, f"{name}.html{f'#{anchor(d)}' if d.name else ''}", f"{name}: {summary} {tags}".strip())
                )
        for paper in self.papers:
            found.append((paper.title, _page(paper), f"{paper.name}, {paper.authors}, {paper.year} {paper.arxiv}"))
        for letter in letters.LETTERS:
            text = " ".join(["Letter.", letter.meaning, *dict.fromkeys(map(symbol, letter.latex))])
            found.append((letter.name, f"letters.html#{letter.name}", text))
        return found


def _table(head: str, rows: Sequence[str]) -> str:
    """Return a table that scrolls by itself where it is wider than the page."""
    return f'<div class="wide"><table class="stack"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def _page(paper: Paper) -> str:
    """Return the page of a paper."""
    return page_of(f"{paper.name} (1)")


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.?!]) (?=[A-Z])", text)[0]


def _letters_for_pages() -> dict[str, object]:
    return {
        letter.name: {
            "meaning": letter.meaning,
            "shape": letter.shape,
            "elsewhere": [f"{paper}: {name}" for paper, name in letter.elsewhere.items()],
        }
        for letter in letters.LETTERS
    }


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


class _Anchors(HTMLParser):
    """Collector of the ids and link targets of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Record the id and links of an element."""
        for name, value in attrs:
            if name == "id" and value:
                self.ids.append(value)
            if name in ("href", "src") and value:
                self.links.append(value)


def check_links(made: Mapping[str, str]) -> None:
    """Raise Mistake for a link to a missing page or id, and for an id that occurs twice on a page.

    Args:
        made: file name -> content. Links to notebooks, to data and to arXiv are not checked.
    Raises:
        Mistake: naming the page.
    """
    read = {}
    for name, text in made.items():
        if name.endswith(".html"):
            read[name] = _Anchors()
            read[name].feed(text)
    for name, page in read.items():
        if twice := {i for i in page.ids if page.ids.count(i) > 1}:
            raise Mistake(name, f"the id {min(twice)} occurs there twice")
        for link in page.links:
            if link.startswith(("data:", "https://arxiv.org/")) or link.endswith(".ipynb"):
                continue
            file, _, place = link.partition("#")
            file = file or name
            if file not in made:
                raise Mistake(name, f"a link leads to {link}, and there is no such page")
            if place and unquote(place) not in read[file].ids:
                raise Mistake(name, f"a link leads to {link}, and there is no such place on that page")
