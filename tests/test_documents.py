"""README and the pages beside the code: links lead somewhere, scripts import what is there, commands suit any shell."""

import ast
import re
from pathlib import Path

import pytest

from ddpm.commands.evaluate.evaluating import METRICS

REPOSITORY = Path(__file__).parents[1]
PAGES = sorted(
    path
    for path in REPOSITORY.rglob("*.md")
    if not {".venv", "runs", "reports"} & set(path.relative_to(REPOSITORY).parts) and ".pytest_cache" not in path.parts
)
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
SPAN = re.compile(r"`([^`]+)`")
QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
BRACKETS = re.compile(r"[\w.+/@]+=(?:[\[{]|glob\(|range\()\S*")  # zsh takes them for names of files


def links(path: Path) -> list[tuple[str, str]]:
    """(text, target) of every link of a page that leads to a file of the project."""
    return [pair for pair in LINK.findall(path.read_text(encoding="utf-8")) if not re.match("https?:|#", pair[1])]


def blocks(path: Path, *kinds: str) -> list[str]:
    """The fenced blocks of a page that are in one of these languages."""
    return [text for kind, text in BLOCK.findall(path.read_text(encoding="utf-8")) if kind in kinds]


def unquoted(line: str) -> list[str]:
    """The words of a command whose brackets a shell would read."""
    return BRACKETS.findall(QUOTED.sub("", line))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_every_link_leads_somewhere(page):
    paths = [target.strip("<>").partition("#")[0] for _, target in links(page)]
    missing = [path for path in paths if not (page.parent / path).exists()]
    assert missing == []


def headings(page: Path) -> set[str]:
    """What GitHub calls the headings of a page in links to them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_to_a_heading_lead_to_one():
    missing = []
    for page in PAGES:
        for _, target in LINK.findall(page.read_text(encoding="utf-8")):
            path, _, heading = target.partition("#")
            there = page.parent / path if path else page
            if heading and there.suffix == ".md" and "//" not in path and heading not in headings(there):
                missing.append((page.name, target))
    assert missing == []


def test_links_to_a_line_lead_to_the_definition():
    to_lines = [(text, target) for text, target in links(REPOSITORY / "README.md") if "#L" in target]
    assert len(to_lines) >= 3
    for text, target in to_lines:
        path, _, number = target.partition("#L")
        line = (REPOSITORY / path).read_text(encoding="utf-8").splitlines()[int(number) - 1]
        assert re.match(rf"(def|class) {text.strip('`')}\b", line), f"{target} is {line!r}"


def test_every_room_has_a_page():
    packages = [path.parent for path in (REPOSITORY / "ddpm").glob("*/__init__.py")]
    rooms = [REPOSITORY / name for name in ("ddpm", "models", "conf")] + packages
    assert [room for room in rooms if not (room / "README.md").is_file()] == []


def test_every_module_stands_on_the_page_of_its_room():
    for page in [*(REPOSITORY / "ddpm").glob("**/README.md"), REPOSITORY / "models" / "README.md"]:
        text = page.read_text(encoding="utf-8")
        rooms = [page.parent, *(room for room in page.parent.iterdir() if room.is_dir())]
        own = [room for room in rooms if room == page.parent or not (room / "README.md").is_file()]
        modules = [path.relative_to(page.parent).as_posix() for room in own for path in room.glob("*.py")]
        assert [name for name in modules if Path(name).name != "__init__.py" and f"({name})" not in text] == [], page


def test_the_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_scripts_import_what_is_there(page):
    for script in blocks(page, "python"):
        for node in ast.walk(ast.parse(script)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                exec(ast.unparse(node), {})  # ImportError says what is not there


def test_brackets_in_commands_are_quoted():
    assert unquoted("train.py -m a.b=[1,2] 'seed=range(5)' c=glob(*) 'd=[\"e=[f]\"]'") == ["a.b=[1,2]", "c=glob(*)"]
    found = []
    for page in PAGES:
        lines = "\n".join(blocks(page, "sh", "bash")).splitlines()
        found += [(page.name, word) for line in lines for word in unquoted(re.sub(r"(^|\s)#.*", "", line))]
        if page.parent.name != "chapters":  # on the site these are keys of a configuration, not words to type
            spans = SPAN.findall(BLOCK.sub("", page.read_text(encoding="utf-8")))
            found += [(page.name, word) for span in spans for word in unquoted(span)]
    assert found == []


def test_the_page_of_evaluation_has_a_row_for_each_measure():
    rows = (REPOSITORY / "experiments" / "evaluation.md").read_text(encoding="utf-8").partition("`metric=`")[2]
    named = re.findall(r"^\| `(\w+)` \|", rows.partition("\n\n")[0], re.M)
    assert sorted(named) == sorted(METRICS)
