"""notebooks/: executed from top to bottom, small, and without logic of their own; slowly: they still run.

`python tests/test_notebooks.py [FILE ...]` executes them anew, all or those given, and stores what they show.
"""

import ast
import json
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
import pytest
from test_equations import REPOSITORY, index

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
LARGEST = 300_000  # bytes
TAG = re.compile(r"\\text\{\[([^\[\]]+)\]\}")
ABSOLUTE = re.compile(r"(?<![\w.:/<)])/[\w.-]+/[\w.-]+|[A-Z]:\\\\?\w+|site-packages")  # a path of some machine
FORBIDDEN = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.If, ast.While, ast.Try, ast.Match)
EVERY = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def logic(source: str) -> list[str]:
    """Statements that a notebook should leave to the package: definitions, branches, loops of more than five lines."""
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, FORBIDDEN)]
    for loop in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.For)):
        nested = [node for node in ast.walk(loop) if isinstance(node, ast.For)][2:]  # a table may have rows and columns
        found += [loop] if nested or len(loop.body) > 5 or loop.orelse else []
    return [ast.unparse(node) for node in found]


def executed(path: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook, run in a fresh kernel in a folder."""
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=None, kernel_name="python3", record_timing=False, resources=resources).execute()
    return notebook


def store(path: Path) -> None:
    """Execute a notebook and write it back, without what differs from machine to machine."""
    with tempfile.TemporaryDirectory() as folder:
        notebook = executed(path, Path(folder))
    notebook.metadata["language_info"] = {"name": "python"}
    text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")
    print(f"{path.name}: {path.stat().st_size:,} bytes")


def test_all_fourteen_are_there_and_listed():
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{number:02}" for number in range(1, 15)]
    readme = (REPOSITORY / "notebooks" / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\((\w+\.ipynb)\)", readme) == [path.name for path in NOTEBOOKS]


@EVERY
def test_valid_small_and_executed_in_order(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < LARGEST
    code = cells(path, "code")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert all(output.output_type != "error" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert all(cell.source.strip() for cell in notebook.cells)


@EVERY
def test_no_logic_of_its_own(path):
    assert [found for cell in cells(path, "code") for found in logic(cell.source)] == []


@pytest.mark.slow
@EVERY
def test_every_equation_that_it_quotes_stands_in_a_docstring(path):
    tags = {tag for cell in cells(path, "markdown") for tag in TAG.findall(cell.source)}
    assert tags, "a notebook quotes the equations that it is about"
    assert tags <= index()[0].keys()


@EVERY
def test_links_lead_somewhere(path):
    for cell in cells(path, "markdown"):
        for link in re.findall(r"\]\(([^)]+)\)", cell.source):
            assert (path.parent / link).exists(), link


@EVERY
def test_the_sources_that_it_shows_are_those_of_today(path):
    """Stored outputs with the text of a function: a changed function asks for a new execution."""
    files = [file for folder in ("ddpm", "models") for file in (REPOSITORY / folder).rglob("*.py")]
    package = [file.read_text(encoding="utf-8") for file in files]
    for cell in cells(path, "code"):
        for output in cell.outputs:
            text = output.get("data", {}).get("text/markdown", "")
            for block in re.split(r"\n(?= *(?:def |@))", text.removeprefix("```python\n").removesuffix("```")):
                assert any(block.strip() in source for source in package), f"execute again, for this changed:\n{block}"


@EVERY
def test_it_speaks_of_no_machine(path):
    """No absolute path in what was typed or printed, and no time of execution."""
    outputs = [output for cell in cells(path, "code") for output in cell.outputs]
    shown = [v for output in outputs for kind, v in output.get("data", {}).items() if not kind.startswith("image/")]
    typed = [cell.source for kind in ("code", "markdown") for cell in cells(path, kind)]
    for text in [*typed, *shown, *(output.get("text", "") for output in outputs)]:
        assert not ABSOLUTE.search(text), ABSOLUTE.search(text)
    assert "execution" not in str([cell.metadata for cell in nbformat.read(path, as_version=4).cells])  # no timestamps


@pytest.mark.slow
@EVERY
def test_it_runs_in_a_fresh_kernel_anywhere(path, tmp_path, monkeypatch):
    """From another folder, and to the end: an error in a cell is raised here, with the cell."""
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])))
    executed(path, tmp_path)
    assert list(tmp_path.iterdir()) == []  # it leaves nothing where it runs


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("x = [f(t) for t in range(3)]\nprint(x)", 0),
        ("for t in range(3):\n    x = f(x, t)\n    xs.append(x)", 0),
        ("for t in a:\n    for s in b:\n        print(t, s)", 0),
        ("def f(x):\n    return x", 1),
        ("for t in a:\n    if t > 0:\n        f(t)", 1),
        ("for t in a:\n" + "    f(t)\n" * 6, 1),
    ],
)
def test_what_counts_as_logic(source, count):
    assert len(logic(source)) == count


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:] or NOTEBOOKS):
        store(path)
