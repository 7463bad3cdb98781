"""The parsed project behind the pages: modules, tests, references, and addresses."""

import ast
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from ddpm.reading import letters, listing
from ddpm.reading.contents import Room, rooms_of
from ddpm.reading.docstrings import blocks_of, formulas
from ddpm.reading.equations import Equation, split
from ddpm.reading.mistakes import Mistake
from ddpm.reading.page import slug
from ddpm.reading.papers import PAPERS
from ddpm.reading.source import (
    Definition,
    Module,
    Test,
    assigned_lines,
    callers,
    known_names,
    read_modules,
    read_tests,
)

FOLDERS = ("ddpm", "models")
DOES = ("step", "forward", "__call__", "denoise", "losses", "draw", "drawn", "update", "apply")
"""Methods, by priority, that compute the equations of a class's docstring."""


class Library:
    """A parsed project.

    Args:
        root: its folder, with ddpm/, models/ and tests/.
        rooms: the modules with pages; None for those of `contents`.
    Raises:
        Mistake: for a listed module that does not exist, and an equation without a test.
    """

    def __init__(self, root: Path, rooms: Sequence[Room] | None = None):
        self.root = root
        self.modules: Mapping[str, Module] = read_modules(root, FOLDERS)
        self.known = known_names(self.modules)
        self.callers = callers(self.modules, self.known)
        self.tests = read_tests(root, self.known)
        self.rooms = rooms_of(self.modules) if rooms is None else tuple(rooms)
        self.paged = [name for room in self.rooms for name in room.modules]
        self.definitions = {d.full_name: d for m in self.modules.values() for d in m.definitions}
        self.marked: dict[str, list[Test]] = defaultdict(list)
        for test in self.tests:
            for tag in test.tags:
                self.marked[tag].append(test)
        self.quoted: dict[str, list[Definition]] = defaultdict(list)
        for name in self.paged:
            for definition in self.modules[name].definitions:
                for tag in definition.tags:
                    self.quoted[tag].append(definition)
                    if tag not in self.marked:
                        place = f"{self.modules[name].path}:{definition.docstring_line}"
                        raise Mistake(place, f'[{tag}] has no test: mark one @pytest.mark.equation("{tag}")')

    @cached_property
    def coloured(self) -> dict[str, list[str]]:
        """Module -> its lines as HTML."""
        return {name: self._coloured(name) for name in self.paged}

    def _coloured(self, name: str) -> list[str]:
        module, known = self.modules[name], letters.known_in(name)

        def letter(word: str) -> str | None:
            return known[word].name if word in known else None

        return listing.coloured(module.text, lambda word: self.address_in(name, word), letter)

    def address(self, full_name: str) -> str | None:
        """Return the address of a definition, such as ddpm.forward.html#q_sample, or None without a page."""
        definition = self.definitions.get(self.known.get(full_name, full_name))
        if definition is None or definition.module not in self.paged:
            return None
        return f"{definition.module}.html#{anchor(definition)}"

    def address_in(self, module: str, word: str) -> str | None:
        """Return the address of a name as a module uses it: `at`, `Sampler.step`, `forward.q_sample`, or a full one."""
        head, _, rest = word.partition(".")
        names = self.modules[module].names
        full = ".".join(filter(None, [names.get(head, head), rest]))
        if full in self.known and (head in names or "." in word):
            return self.address(full)
        for definition in self.modules[module].definitions:  # a method, within its class's module
            if definition.name.endswith(f".{word}"):
                return f"{definition.module}.html#{anchor(definition)}"
        return None

    def naming(self, definition: Definition) -> list[Test]:
        """Return the tests that name a definition and are not marked with one of its equations."""
        if definition.kind in ("module", "constants"):
            return []
        owner = f"{definition.module}.{definition.name.partition('.')[0]}"
        marked = {id(test) for tag in definition.tags for test in self.marked[tag]}
        return [test for test in self.tests if owner in test.uses and id(test) not in marked]

    def equations(self, definition: Definition) -> list[tuple[Equation, int]]:
        """Return the equations that a definition quotes, with the line of each in its file."""
        displays = formulas(blocks_of(definition.docstring, definition.docstring_line))
        return [(equation, display.line) for display in displays for equation in split(display.latex)]

    def lines_of(self, definition: Definition, equation: Equation) -> list[int]:
        """Return the lines that compute an equation: assignments to its left-hand sides, else the whole body."""
        node = definition.node
        if node is None or definition.kind == "module":
            return []
        inner = f"{definition.name}."  # separately documented methods compute for their class, too
        of = [d for d in self.modules[definition.module].definitions if d.name.startswith(inner)]
        own = {line for one in (definition, *of) for line in one.lines}
        found: set[int] = set()
        for names in equation.names:
            for name in names:
                lines = {i for span in assigned_lines(node, name) for i in span} & own
                if lines:
                    found |= lines
                    break
        return sorted(found or self._body(node) & own or set(definition.lines))

    def _body(self, node: ast.AST) -> set[int]:
        """Return the lines of a function's statements, or of the method that computes a class's equations."""
        if isinstance(node, ast.ClassDef):
            methods = {m.name: m for m in node.body if isinstance(m, ast.FunctionDef | ast.AsyncFunctionDef)}
            chosen = next((methods[name] for name in DOES if name in methods), None)
            return self._body(chosen) if chosen is not None else set()
        body = getattr(node, "body", [])
        statements = body[1:] if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) else body
        return {i for s in statements for i in range(s.lineno, (s.end_lineno or s.lineno) + 1)}

    def pages_of(self, tag: str) -> list[str]:
        """Return the pages that must include an equation: of its modules, its paper, and the list of all."""
        return [*dict.fromkeys(f"{d.module}.html" for d in self.quoted[tag]), paper_page(tag), "equations.html"]


def anchor(definition: Definition) -> str:
    """Return the id of a definition on its module's page."""
    return definition.name or "top"


def paper_page(tag: str) -> str:
    """Return the page of the paper of a tag."""
    name = tag.partition(" ")[0]
    return f"paper-{slug(name)}.html" if any(paper.name == name for paper in PAPERS) else "paper-others.html"


def in_words(lines: Sequence[int]) -> str:
    """Format line numbers as ranges: 88-91, 95."""
    runs: list[list[int]] = []
    for line in lines:
        if runs and line == runs[-1][-1] + 1:
            runs[-1].append(line)
        else:
            runs.append([line])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
