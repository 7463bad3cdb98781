r"""The index of equations: what a docstring quotes has a numeric test, and every such test a docstring.

A docstring quotes as `[DDPM (7)]`; its test is marked `@pytest.mark.equation("DDPM (7)")`. EQUATIONS.md shows the table
between `<!-- equations -->` and `<!-- /equations -->`; `python tests/test_equations.py` writes it.
"""

import ast
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
TAG = re.compile(r"\[([A-Za-z][\w+-]* \([^()\[\]]+\))\]")  # a paper and a number or name: [DDPM (7)], [PD (App. D)]
BLOCK = re.compile(r"<!-- equations -->\n(.*?)\n?<!-- /equations -->", re.DOTALL)
PAGE = Path(__file__).with_name("EQUATIONS.md")
PAPERS = ["DDPM", "iDDPM", "DDIM", "PD"]  # first in the table; others follow by name


def docstring_tags(source: str) -> list[tuple[str, str]]:
    """(tag, name of the function or class) of every equation that the docstrings of a module quote."""
    found = []
    for node in ast.walk(ast.parse(source)) if TAG.search(source) else ():
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            found += [(tag, getattr(node, "name", "module")) for tag in TAG.findall(text)]
    return found


def marked_tests(source: str) -> list[tuple[str, str]]:
    """(tag, name of the test) of every marker `pytest.mark.equation(tag)` on a test of a module."""
    found = []
    for node in ast.walk(ast.parse(source)) if "mark.equation(" in source else ():
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            calls = [n for d in node.decorator_list for n in ast.walk(d) if isinstance(n, ast.Call)]
            found += [(c.args[0].value, node.name) for c in calls if ast.unparse(c.func) == "pytest.mark.equation"]
    return found


@cache
def index() -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """tag -> where it is quoted, tag -> where it is tested; in markdown, with paths from here."""
    quoted, tested = defaultdict(list), defaultdict(list)
    folders = [("ddpm", docstring_tags, quoted), ("models", docstring_tags, quoted), ("tests", marked_tests, tested)]
    for folder, collect, places in folders:
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            name = path.relative_to(REPOSITORY).as_posix()
            for tag, where in collect(path.read_text(encoding="utf-8")):
                places[tag].append(f"[`{where}`](../{name})")
    return quoted, tested


def order(tag: str) -> tuple[int, str, int, str]:
    """Papers in the order of PAPERS, then numbers as numbers, then names."""
    paper, name = tag.split(" ", 1)
    number = re.fullmatch(r"\((\d+)\)", name)
    rank = PAPERS.index(paper) if paper in PAPERS else len(PAPERS)
    return rank, paper, int(number[1]) if number else 10**6, name


def table() -> str:
    """The table equation -> function -> test, in markdown."""
    quoted, tested = index()
    rows = [
        f"| {tag} | {'<br>'.join(dict.fromkeys(quoted[tag]))} | {'<br>'.join(dict.fromkeys(tested[tag]))} |"
        for tag in sorted(quoted, key=order)
    ]
    return "\n".join(["| equation | function | test |", "|---|---|---|", *rows])


def test_every_equation_has_a_test_and_every_test_an_equation():
    quoted, tested = index()
    untested = {tag: quoted[tag] for tag in quoted.keys() - tested.keys()}
    unquoted = {tag: tested[tag] for tag in tested.keys() - quoted.keys()}
    assert not untested, f"quoted in a docstring, but no test is marked with it: {untested}"
    assert not unquoted, f"a test is marked with it, but no docstring quotes it: {unquoted}"
    print("\n" + table())


def test_equations_are_quoted_inside_text_and_ones_that_must_be_there_are():
    """A tag outside of \\text{...} would be read as mathematics."""
    for path in (REPOSITORY / "ddpm").rglob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert all(rf"\text{{[{tag}]}}" in line for tag in TAG.findall(line)), f"{path}: {line.strip()}"
    required = {"DDPM (2)", "DDPM (4)", "DDPM (6)", "DDPM (7)", "DDPM (11)", "DDPM (14)", "DDPM (15)", "iDDPM (17)"}
    assert required | {"DDPM (Algorithm 2)", "iDDPM (15)", "DDIM (12)", "DDIM (16)"} <= index()[0].keys()


def test_the_table_in_the_file_is_this_one():
    block = BLOCK.search(PAGE.read_text(encoding="utf-8"))
    assert block is not None and block[1].strip() == table(), "`python tests/test_equations.py` writes it anew"


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        (r"\text{[DDPM (7)]} \\ \text{[PD (App. D)]}", ["DDPM (7)", "PD (App. D)"]),
        (r"\text{[DPM-Solver++ (Algorithm 2)]}", ["DPM-Solver++ (Algorithm 2)"]),
        ("in [-1, 1] or (B, *), DDPM (15) solved for eps, [0, 1)", []),
    ],
)
def test_what_counts_as_a_tag(text, tags):
    assert TAG.findall(text) == tags
    assert docstring_tags(f'def f():\n    r"""{text}"""\nx = "[DDPM (1)]"') == [(tag, "f") for tag in tags]


def test_what_counts_as_a_marker():
    source = '@pytest.mark.equation("A (1)")\n@pytest.mark.equation("B (2)")\n@pytest.mark.slow\ndef test_f(): pass\n'
    assert marked_tests(source + 'def test_g(): "pytest.mark.equation"') == [("A (1)", "test_f"), ("B (2)", "test_f")]


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(BLOCK.sub(lambda _: f"<!-- equations -->\n{table()}\n<!-- /equations -->", page), encoding="utf-8")
