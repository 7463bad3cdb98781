"""README and the pages beside the code: every link leads somewhere, and those to a line to what they name."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PAGES = sorted(
    path
    for path in REPOSITORY.rglob("*.md")
    if not {".venv", "runs", "reports"} & set(path.relative_to(REPOSITORY).parts) and ".pytest_cache" not in path.parts
)
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def links(path: Path) -> list[tuple[str, str]]:
    """(text, target) of every link of a page that leads to a file of the project."""
    return [pair for pair in LINK.findall(path.read_text(encoding="utf-8")) if not re.match("https?:|#", pair[1])]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_every_link_leads_somewhere(page):
    paths = [target.strip("<>").partition("#")[0] for _, target in links(page)]
    missing = [path for path in paths if not (page.parent / path).exists()]
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
        modules = [path.name for path in page.parent.glob("*.py") if path.name != "__init__.py"]
        assert [name for name in modules if f"({name})" not in text] == [], page


def test_the_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
