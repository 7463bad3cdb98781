"""Modules as text: their definitions, who names whom, and the tests. Nothing is imported."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

TAG = re.compile(r"\[([A-Za-z][\w+-]* \([^()\[\]]+\))\]")
"""Of an equation that a docstring quotes: a paper, and a number or name in brackets."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Definition:
    """A module, a class, a function or a method, or constants that stand between them.

    Args:
        module: dotted, `ddpm.forward`.
        name: dotted within the module, `DDIM.step`; empty for the module itself.
        kind: "module", "class", "function" or "constants".
        docstring: without its indentation.
        docstring_line: where it begins in the file.
        lines: numbers of the lines that are its code, without the docstring and what has a place of its own.
        node: its syntax; None for constants.
    """

    module: str
    name: str
    kind: str
    docstring: str
    docstring_line: int
    lines: tuple[int, ...]
    node: ast.AST | None = None

    @property
    def full_name(self) -> str:
        """`ddpm.samplers.ddim.DDIM.step`."""
        return f"{self.module}.{self.name}" if self.name else self.module

    @property
    def tags(self) -> list[str]:
        """Of the equations that it quotes, in order."""
        return list(dict.fromkeys(TAG.findall(self.docstring)))


@dataclass(frozen=True)
class Module:
    """A file of Python.

    Args:
        name: dotted.
        path: from the root of the project, with slashes.
        text: all of it.
        definitions: in the order of the file, the module itself first.
        names: what a name in it stands for, by imports and definitions: `at` is `ddpm.schedules.at`.
    """

    name: str
    path: str
    text: str
    definitions: tuple[Definition, ...]
    names: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Test:
    """A test function.

    Args:
        path, name, line: where it stands.
        code: its source with its decorators.
        tags: of the equations that it checks.
        slow: whether it runs with `-m slow` alone.
        uses: full names of what it names.
    """

    path: str
    name: str
    line: int
    code: str
    tags: tuple[str, ...]
    slow: bool
    uses: frozenset[str]

    @property
    def command(self) -> str:
        """What runs it, and nothing else."""
        return f"python -m pytest{' -m slow' if self.slow else ''} {self.path}::{self.name}"


def read_modules(root: Path, folders: Iterable[str]) -> dict[str, Module]:
    """All modules of these folders, by dotted name.

    Raises: SyntaxError for a file that is not Python.
    """
    files = [path for folder in folders for path in sorted((root / folder).rglob("*.py"))]
    return {(module := read_module(root, path)).name: module for path in files}


def read_module(root: Path, path: Path) -> Module:
    """One file, as a module of the project whose root is given."""
    relative = path.relative_to(root)
    name = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text, filename=str(relative))
    definitions = tuple(_definitions(name, tree))
    names = imported_names(tree, name, package=path.name == "__init__.py")
    names |= {d.name: d.full_name for d in definitions if d.name and "." not in d.name and d.kind != "constants"}
    return Module(name, relative.as_posix(), text, definitions, names)


def _definitions(module: str, tree: ast.Module) -> Iterator[Definition]:
    """The module, then what stands at its top: functions, classes with their methods, constants between them."""
    docstring, line = _docstring(tree)
    yield Definition(module, "", "module", docstring, line, (), tree)
    constants: list[ast.stmt] = []
    for node in tree.body[bool(docstring) :]:
        if isinstance(node, Function | ast.ClassDef):
            yield from _constants(module, constants)
            constants = []
            yield from _class(module, node) if isinstance(node, ast.ClassDef) else [_function(module, node, "")]
        elif not isinstance(node, ast.Import | ast.ImportFrom):
            constants.append(node)
    yield from _constants(module, constants)


def _class(module: str, node: ast.ClassDef) -> Iterator[Definition]:
    """A class with the code of its short methods; then every method that says more than one line of itself."""
    docstring, line = _docstring(node)
    own = [m for m in node.body if isinstance(m, Function) and "\n" in (ast.get_docstring(m) or "")]
    taken = {i for method in own for i in _span(method)} | _docstring_lines(node)
    lines = tuple(i for i in _span(node) if i not in taken)
    yield Definition(module, node.name, "class", docstring, line, lines, node)
    for method in own:
        yield _function(module, method, f"{node.name}.")


def _function(module: str, node: Function, prefix: str) -> Definition:
    docstring, line = _docstring(node)
    lines = tuple(i for i in _span(node) if i not in _docstring_lines(node))
    return Definition(module, f"{prefix}{node.name}", "function", docstring, line, lines, node)


def _constants(module: str, nodes: list[ast.stmt]) -> Iterator[Definition]:
    """What is assigned between definitions, named by the first name."""
    assigned = [name for node in nodes for name in _targets(node)]
    if assigned:
        lines = tuple(i for node in nodes for i in _span(node))
        yield Definition(module, assigned[0], "constants", "", lines[0], lines)


def _targets(node: ast.stmt) -> list[str]:
    """The names that a statement assigns."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [t.id for t in targets if isinstance(t, ast.Name)]


def _docstring(node: ast.Module | ast.ClassDef | Function) -> tuple[str, int]:
    """(text, the line that it begins in)."""
    text = ast.get_docstring(node)
    return (text, node.body[0].lineno) if text else ("", node.body[0].lineno if node.body else 1)


def _docstring_lines(node: ast.ClassDef | Function) -> set[int]:
    return set(_span(node.body[0])) if ast.get_docstring(node) else set()


def _span(node: ast.stmt) -> range:
    """The lines of a statement, from its first decorator."""
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(d.lineno for d in decorators)])
    return range(first, (node.end_lineno or node.lineno) + 1)


def imported_names(tree: ast.Module, module: str, package: bool = False, deep: bool = True) -> dict[str, str]:
    """What each imported name stands for: {"at": "ddpm.schedules.at"}.

    Args:
        tree: of a module.
        module: its name, to which relative imports are relative.
        package: whether it is the `__init__` of a package.
        deep: imports within functions count, too.
    """
    names: dict[str, str] = {}
    for node in ast.walk(tree) if deep else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                base = ".".join([*parts[: len(parts) - node.level + package], *filter(None, [base])])
            names |= {alias.asname or alias.name: f"{base}.{alias.name}" for alias in node.names}
    return names


def known_names(modules: Mapping[str, Module]) -> dict[str, str]:
    """Full name -> the full name where it is defined: `ddpm.samplers.DDIM` is `ddpm.samplers.ddim.DDIM`."""
    known = {d.full_name: d.full_name for m in modules.values() for d in m.definitions if d.kind != "constants"}
    for module in modules.values():
        for name, full in module.names.items():
            if full in known:
                known.setdefault(f"{module.name}.{name}", known[full])
    return known


def uses(node: ast.AST, names: Mapping[str, str], known: Mapping[str, str]) -> set[str]:
    """Full names of what a piece of code names: by a plain name, or as an attribute of a module or class."""
    found = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name | ast.Attribute):
            head, *rest = dotted(inner)
            full = ".".join([names.get(head, head), *rest]) if head else ""
            if full in known and head in names:
                found.add(known[full])
    return found


def dotted(node: ast.AST) -> list[str]:
    """The parts of a.b.c; [""] where it does not begin with a name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return [node.id, *parts] if isinstance(node, ast.Name) else [""]


def callers(modules: Mapping[str, Module], known: Mapping[str, str]) -> dict[str, list[str]]:
    """Full name of what is named -> full names of the functions and classes that name it, other than itself."""
    found = defaultdict(list)
    for module in modules.values():
        if module.name.startswith("ddpm.reading"):  # which names what it shows
            continue
        for definition in module.definitions:
            if definition.node is None or definition.kind == "module" or "." in definition.name:
                continue  # a method is part of its class
            for full in sorted(uses(definition.node, module.names, known) - {definition.full_name}):
                found[full].append(definition.full_name)
    return found


def words_of(code: str, names: Mapping[str, str], known: Mapping[str, str]) -> set[str]:
    """The same as `uses`, of text: for tests it is enough that a name occurs."""
    found = set()
    for head, rest in {
        (w.partition(".")[0], w.partition(".")[2]) for w in re.findall(r"(?<![\w.])[A-Za-z_][\w.]*", code)
    }:
        full = f"{names[head]}.{rest}".rstrip(".") if head in names else ""
        while full and full not in known and "." in full:
            full = full.rpartition(".")[0]
        if full in known:
            found.add(known[full])
    return found


def _marked(decorator: ast.expr) -> list[str]:
    """The tags of `pytest.mark.equation(...)`, or none."""
    if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.equation":
        return [a.value for a in decorator.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    return []


def read_tests(root: Path, known: Mapping[str, str]) -> list[Test]:
    """All tests of the folder tests, in the order of files and lines."""
    tests = []
    for path in sorted((root / "tests").glob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        tree, rows = ast.parse(text), text.splitlines()
        names = imported_names(tree, "tests", deep=False)
        slow_file = any("mark.slow" in ast.unparse(n) for n in tree.body if "pytestmark" in _targets(n))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
                tags = [tag for d in node.decorator_list for tag in _marked(d)]
                slow = slow_file or any(ast.unparse(d) == "pytest.mark.slow" for d in node.decorator_list)
                code = "\n".join(rows[i - 1] for i in _span(node))
                used = frozenset(words_of(code, names, known))
                name = path.relative_to(root).as_posix()
                tests.append(Test(name, node.name, node.lineno, code, tuple(tags), slow, used))
    return tests


def assigned_lines(node: ast.AST, name: str) -> list[range]:
    """The lines of the statements within a definition that give a name its value, as a name or as self.name."""
    found = []
    for inner in ast.walk(node):
        targets: list[ast.expr] = []
        if isinstance(inner, ast.Assign):
            targets = inner.targets
        elif isinstance(inner, ast.AugAssign | ast.AnnAssign):
            targets = [inner.target]
        parts = [e for t in targets for e in (t.elts if isinstance(t, ast.Tuple) else [t])]
        names = {e.id if isinstance(e, ast.Name) else e.attr for e in parts if isinstance(e, ast.Name | ast.Attribute)}
        names |= {e.value.attr for e in parts if isinstance(e, ast.Subscript) and isinstance(e.value, ast.Attribute)}
        if name in names and isinstance(inner, ast.stmt):
            found.append(_span(inner))
    return found
