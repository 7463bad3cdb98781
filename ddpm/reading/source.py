"""Static parsing of modules and tests: definitions, references and tags. Nothing is imported."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

TAG = re.compile(r"\[([A-Za-z][\w+-]* \([^()\[\]]+\))\]")
"""The tag of an equation that a docstring quotes: a paper, and a number or name in brackets."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Definition:
    """A module, a class, a function or a method, or constants between them.

    Args:
        module: dotted, `ddpm.forward`.
        name: dotted within the module, `DDIM.step`; empty for the module itself.
        kind: "module", "class", "function" or "constants".
        docstring: without its indentation.
        docstring_line: line of the file at which it begins.
        lines: line numbers of its code, without the docstring and separately listed methods.
        node: its syntax tree; None for constants.
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
        """The dotted name with the module: `ddpm.samplers.ddim.DDIM.step`."""
        return f"{self.module}.{self.name}" if self.name else self.module

    @property
    def tags(self) -> list[str]:
        """The tags of the equations that it quotes, in order."""
        return list(dict.fromkeys(TAG.findall(self.docstring)))


@dataclass(frozen=True)
class Module:
    """A Python module.

    Args:
        name: dotted.
        path: from the root of the project, with slashes.
        text: the whole file.
        definitions: in the order of the file, the module itself first.
        names: name in it -> full name, by imports and definitions: `at` is `ddpm.schedules.at`.
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
        path, name, line: its place.
        code: its source with its decorators.
        tags: of the equations that it checks.
        slow: whether it runs only with `-m slow`.
        uses: full names of the definitions that it names.
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
        """The command that runs this test alone."""
        return f"python -m pytest{' -m slow' if self.slow else ''} {self.path}::{self.name}"


def read_modules(root: Path, folders: Iterable[str]) -> dict[str, Module]:
    """Parse all modules of these folders; return them by dotted name.

    Raises: SyntaxError for a file that is not Python.
    """
    files = [path for folder in folders for path in sorted((root / folder).rglob("*.py"))]
    return {(module := read_module(root, path)).name: module for path in files}


def read_module(root: Path, path: Path) -> Module:
    """Parse a file as a module of the project with this root."""
    relative = path.relative_to(root)
    name = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text, filename=str(relative))
    definitions = tuple(_definitions(name, tree))
    names = imported_names(tree, name, package=path.name == "__init__.py")
    names |= {d.name: d.full_name for d in definitions if d.name and "." not in d.name and d.kind != "constants"}
    return Module(name, relative.as_posix(), text, definitions, names)


def _definitions(module: str, tree: ast.Module) -> Iterator[Definition]:
    """Yield the module, then its top-level functions, classes with their methods, and constants between them."""
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
    """Yield a class with its short methods, then every method with a docstring of more than one line."""
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
    """Yield the constants assigned between definitions, named by the first of them."""
    assigned = [name for node in nodes for name in _targets(node)]
    if assigned:
        lines = tuple(i for node in nodes for i in _span(node))
        yield Definition(module, assigned[0], "constants", "", lines[0], lines)


def _targets(node: ast.stmt) -> list[str]:
    """Return the names that a statement assigns."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [t.id for t in targets if isinstance(t, ast.Name)]


def _docstring(node: ast.Module | ast.ClassDef | Function) -> tuple[str, int]:
    """Return (docstring, line at which it begins)."""
    text = ast.get_docstring(node)
    return (text, node.body[0].lineno) if text else ("", node.body[0].lineno if node.body else 1)


def _docstring_lines(node: ast.ClassDef | Function) -> set[int]:
    return set(_span(node.body[0])) if ast.get_docstring(node) else set()


def _span(node: ast.stmt) -> range:
    """Return the lines of a statement, from its first decorator."""
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(d.lineno for d in decorators)])
    return range(first, (node.end_lineno or node.lineno) + 1)


def imported_names(tree: ast.Module, module: str, package: bool = False, deep: bool = True) -> dict[str, str]:
    """Return imported name -> full name: {"at": "ddpm.schedules.at"}.

    Args:
        tree: of a module.
        module: its name, to which relative imports are relative.
        package: whether it is the `__init__` of a package.
        deep: whether to include imports within functions.
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
    """Return full name -> full name of its definition: `ddpm.samplers.DDIM` is `ddpm.samplers.ddim.DDIM`."""
    known = {d.full_name: d.full_name for m in modules.values() for d in m.definitions if d.kind != "constants"}
    for module in modules.values():
        for name, full in module.names.items():
            if full in known:
                known.setdefault(f"{module.name}.{name}", known[full])
    return known


def uses(node: ast.AST, names: Mapping[str, str], known: Mapping[str, str]) -> set[str]:
    """Return full names of the definitions that code names, directly or as an attribute of a module or class."""
    found = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name | ast.Attribute):
            head, *rest = dotted(inner)
            full = ".".join([names.get(head, head), *rest]) if head else ""
            if full in known and head in names:
                found.add(known[full])
    return found


def dotted(node: ast.AST) -> list[str]:
    """Return the parts of a.b.c; [""] where it does not begin with a name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return [node.id, *parts] if isinstance(node, ast.Name) else [""]


def callers(modules: Mapping[str, Module], known: Mapping[str, str]) -> dict[str, list[str]]:
    """Return full name of a definition -> full names of the other functions and classes that name it."""
    found = defaultdict(list)
    for module in modules.values():
        if module.name.startswith("ddpm.reading"):  # which names what it documents
            continue
        for definition in module.definitions:
            if definition.node is None or definition.kind == "module" or "." in definition.name:
                continue  # a method is part of its class
            for full in sorted(uses(definition.node, module.names, known) - {definition.full_name}):
                found[full].append(definition.full_name)
    return found


def words_of(code: str, names: Mapping[str, str], known: Mapping[str, str]) -> set[str]:
    """Return the same as `uses` for source text: for tests it is enough that a name occurs."""
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
    """Return the tags of `pytest.mark.equation(...)`, or none."""
    if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.equation":
        return [a.value for a in decorator.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    return []


def read_tests(root: Path, known: Mapping[str, str]) -> list[Test]:
    """Parse all tests of the folder tests, in the order of files and lines."""
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
    """Return the lines of the statements in a definition that assign a name, or an attribute of this name."""
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
