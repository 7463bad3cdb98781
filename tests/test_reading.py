"""ddpm/reading: docstrings as blocks, LaTeX as MathML, pages from source, and links that lead somewhere."""

import ast
import html
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path

import pytest
from matplotlib import rc_context
from matplotlib.figure import Figure
from test_equations import PAGE, TAG

pytest.importorskip("latex2mathml", reason="needs the extra reading")
pytest.importorskip("pygments", reason="needs the extra reading")

from ddpm.reading import chapters, drawing, figures, letters, listing, network_map
from ddpm.reading.contents import ROOMS, Room, rooms_of
from ddpm.reading.docstrings import Formula, Listing, Paragraph, Section, Terms, blocks_of, formulas
from ddpm.reading.equations import Equation, mathml, python_names, split
from ddpm.reading.library import Library, in_words, paper_page
from ddpm.reading.mistakes import Mistake
from ddpm.reading.module_page import module_page
from ddpm.reading.page import Prose, shape, slug, words
from ddpm.reading.paper_page import entries
from ddpm.reading.papers import PAPERS, Numbered, Paper
from ddpm.reading.site import LARGEST, Pages, build, check_links

REPOSITORY = Path(__file__).parents[1]
SOURCE = r'''"""The forward process of a tiny project."""

from ddpm.constants import at

SCALE = 2.0


def q_sample(x_0, t, eps):
    r"""x_t at any t, see `at`.

    .. math:: a = 2 t \\
        x_t = a\, x_0 + \sigma_t \epsilon \qquad \text{[DDPM (4)]}

    Args:
        x_0: data, (B, *).
        t: a time; where it is odd

            .. math:: t \ne 2 k
        eps: noise, of
            the same shape.
    Returns:
        x_t, (B, *).
    """
    a = at(t) * SCALE
    x_t = (
        a * x_0
        + eps
    )
    return x_t


class Walk:
    """A walk, by `q_sample`."""

    def step(self, x):
        """One step."""
        return q_sample(x, 1, 0)

    def back(self, x):
        """One step back.

        Returns: x.
        """
        return x
'''
TESTS = """import pytest
from ddpm.forward import q_sample
from ddpm import forward


@pytest.mark.slow
@pytest.mark.equation("DDPM (4)")
def test_x_t():
    assert q_sample(1, 1, 1)


@pytest.mark.parametrize("x", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_walk(x):
    assert forward.Walk().step(x)
"""
ROOM = (Room("All", ("ddpm.constants", "ddpm.forward")),)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of two modules and a test; without figures."""
    monkeypatch.setattr(figures, "FIGURES", {})
    root = tmp_path / "project"
    for folder in ("ddpm", "models", "tests", "notebooks"):
        (root / folder).mkdir(parents=True)
    (root / "ddpm" / "constants.py").write_text('"""Constants."""\n\n\ndef at(t):\n    """t itself."""\n    return t\n')
    (root / "ddpm" / "forward.py").write_text(SOURCE)
    (root / "tests" / "test_forward.py").write_text(TESTS)
    return root


def changed(project: Path, file: str, old: str, new: str) -> None:
    path = project / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def line_of(text: str, part: str) -> int:
    return text[: text.index(part)].count("\n") + 1


# ----------------------------------------------------------------------------------------------------------- docstrings


def test_a_docstring_is_paragraphs_formulas_lists_and_sections():
    text = (
        "One line\nand its end.\n\n- a\n  b\n- c\n\n.. math:: x\n    + y\n\nArgs:\n    a, b: first\n        second.\n"
        "    c: third,\n\n        .. math:: z\nReturns:\n    (B,), nats: of\n    the image.\n"
        "Raises: ValueError for c.\nSource: a paper, with\n    its end."
    )
    first, items, formula, args, returns, raises, source = blocks_of(text, 10)
    assert first == Paragraph("One line and its end.", 10)
    assert items == Listing(((Paragraph("a b", 13),), (Paragraph("c", 15),)), 13)
    assert formula == Formula("x + y", 17)
    (terms,) = args.blocks
    assert isinstance(terms, Terms) and [term for term, _ in terms.terms] == ["a, b", "c"]
    assert terms.terms[0][1] == (Paragraph("first second.", 21),)
    assert terms.terms[1][1] == (Paragraph("third,", 23), Formula("z", 25))
    assert returns == Section("Returns", (Paragraph("(B,), nats: of the image.", 27),), 26)
    assert raises.blocks == (Paragraph("ValueError for c.", 29),)
    assert source.blocks == (Paragraph("a paper, with its end.", 30),)
    assert [f.latex for f in formulas(blocks_of(text))] == ["x + y", "z"]
    assert blocks_of("A\n$$ a\n   b $$\nc", 1) == (Paragraph("A", 1), Formula("a b", 2), Paragraph("c", 4))


# ------------------------------------------------------------------------------------------------------------ equations


def test_a_display_is_one_equation_a_tag_with_the_lines_that_lead_to_it():
    latex = r"a = \begin{cases} 1 \\ 2 \end{cases} \\ "
    latex += r"b = \frac{1 \\ 2}{3} \qquad \text{[A (1)]} \\ c \quad \text{[B (x)]} \\ d"
    assert split(latex) == [
        Equation((r"a = \begin{cases} 1 \\ 2 \end{cases}", r"b = \frac{1 \\ 2}{3}"), ("A (1)",)),
        Equation(("c",), ("B (x)",)),
        Equation(("d",), ()),
    ]


def test_a_long_row_is_cut_at_its_outermost_spaces_alone():
    one, other = " + ".join(["a"] * 20), r"\left( b \quad c \right)" + " + d" * 10
    assert split(rf"{one}, \quad {other}") == [Equation((f"{one},", other), ())]
    assert split(r"a, \quad b") == [Equation((r"a, \quad b",), ())]


@pytest.mark.parametrize(
    ("latex", "name"),
    [
        (r"\tilde\mu_t(x_t, x_0)", "mu_tilde"),
        (r"\bar\alpha_t", "alpha_bar"),
        (r"\sigma_t", "sigma_t"),
        (r"L_\text{simple}", "L_simple"),
        (r"x_{0,\theta}", "x_0_theta"),
        (r"\lambda_t", "lambda_"),
        (r"\hat\epsilon(x_t)", "eps_hat"),
        (r"r_t^2", "r_t2"),
        (r"\text{SNR}(t)", "snr"),
    ],
)
def test_what_a_left_side_is_called_in_code(latex, name):
    assert name in python_names(latex)
    assert python_names(r"q(x_t \mid x_0)") != [name] and python_names(r"\|\epsilon\|") == []


def test_mathml_of_letters_that_are_marked_and_commands_that_are_not_known():
    symbols = letters.symbols_in("ddpm.forward")
    text = mathml(r"\tilde\mu_t = \sqrt{\bar\alpha_t} x_0 + \mathcal N(\epsilon)", "here", True, symbols.get)
    root = ET.fromstring(text)
    assert [e.get("data-l") for e in root.iter() if e.get("data-l")] == [
        "mu_tilde",
        "t",
        "alpha_bar",
        "t",
        "x_0",
        "eps",
    ]
    assert root.get("display") == "block" and "𝒩" in text and "mathvariant" not in text
    assert "arg" in mathml(r"\arg\min x", "here") and "a_b" in mathml(r"\text{a\_b}", "here")
    with pytest.raises(Mistake, match=r"ddpm/x.py:3: the LaTeX command \\foo is not known, in \\foo x"):
        mathml(r"\foo x", "ddpm/x.py:3")
    for latex in (r"\frac{a", r"\left( a", r"a }"):
        with pytest.raises(Mistake, match=r"ddpm/x.py:3: braces, or \\left and \\right, that do not match"):
            mathml(latex, "ddpm/x.py:3")
    with pytest.raises(Mistake, match=r"ddpm/x.py:3: LaTeX that cannot be read"):
        mathml(r"a_b_c", "ddpm/x.py:3")
    assert "<mo" in mathml(r"\left\{ x \leftarrow \{y\} \right)", "here")


def displays() -> list[tuple[str, str]]:
    """(place, LaTeX) of every display of the project's docstrings."""
    found = []
    for path in [*(REPOSITORY / "ddpm").rglob("*.py"), *(REPOSITORY / "models").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        if ".. math::" not in text and not TAG.search(text):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (docstring := ast.get_docstring(node)):
                place = path.relative_to(REPOSITORY).as_posix()
                found += [(place, formula.latex) for formula in formulas(blocks_of(docstring))]
    return found


def test_the_latex_of_every_docstring_is_set_and_every_tag_is_found_in_it():
    found = displays()
    tags = []
    for place, latex in found:
        for equation in split(latex):
            tags += equation.tags
            for row in equation.rows:
                assert mathml(row, place, True).startswith("<math")
    assert len(found) > 150
    written = set(re.findall(r"^\| ([^|]+ \([^|]+\)) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    assert set(tags) == written


# --------------------------------------------------------------------------------------------------------- the glossary


def test_every_letter_is_in_the_code_where_it_is_said_to_be():
    texts = {
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts): path.read_text(encoding="utf-8")
        for path in (REPOSITORY / "ddpm").rglob("*.py")
    }
    for letter in letters.LETTERS:
        words = re.compile(rf"\b({'|'.join(map(re.escape, (letter.name, *letter.code)))})\b")
        places = [name for name, text in texts.items() if name.startswith(letter.modules) and words.search(text)]
        said = [m for m in letter.modules if not any(name.startswith(m) for name in texts)]
        assert places and said == [], letter.name
    assert {"t", "s", "alpha_bar", "lambda_", "eps_theta"} <= {letter.name for letter in letters.LETTERS}
    assert letters.known_in("models.unet") == {}


@pytest.mark.parametrize(
    ("text", "known"),
    [("B, *", True), ("T+1,", True), ("B,", True), ("B, C', H, W", True), ("x, y", False), ("t", False), ("1", False)],
)
def test_what_counts_as_a_shape(text, known):
    assert shape(text).startswith("<span") is known
    assert f"({text})" in shape(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("q(x_{t-1} | x_t)", "q(x<sub>t−1</sub> | x<sub>t</sub>)"),
        ("p_theta(x_0)", "p<sub>θ</sub>(x<sub>0</sub>)"),
        ("alpha_bar_{t-1}, alpha_bar_t", "alpha_bar<sub>t−1</sub>, alpha_bar_t"),
        ("`x_t` < x_0_theta, max_t", "<code>x_t</code> &lt; x_0_theta, max_t"),
    ],
)
def test_an_index_stands_below_its_letter(text, shown):
    assert words(text) == shown


def test_indices_of_prose_keep_their_letters_and_shapes():
    prose = Prose("here", lambda word: None, {"x_t": "x_t", "x_0": "x_0"}.get, lambda symbol: None, lambda e, rows: "")
    assert prose.inline("p_theta(x_0), (B, *)", 1).startswith(
        'p<sub>θ</sub>(<span data-l="x_0">x<sub>0</sub></span>), <'
    )
    assert prose.inline("L_T of `x_t`", 1) == "L<sub>T</sub> of <code>x_t</code>"


# ------------------------------------------------------------------------------------------------------------- the code


def test_code_keeps_its_text_its_numbers_and_its_links():
    text = '"""Two\n    lines <b>."""\nx = f(t)  # why\n'
    rows = listing.coloured(text, {"f": "a.html"}.get, {"t": "t"}.get)
    plain = html.unescape(re.sub(r"<[^>]+>", "", "\n".join(rows)))
    assert plain == text
    assert '<a href="a.html">f</a>' in rows[2] and '<span data-l="t">t</span>' in rows[2] and "&lt;b&gt;" in rows[1]
    shown = listing.listing(rows, text.splitlines(), (2, 3))
    assert re.findall(r'data-n="(\d+)"', shown) == ["2", "3"] and listing.GAP not in shown
    assert listing.GAP in listing.listing(rows, text.splitlines(), (1, 3))
    assert "<span" not in listing.coloured("o.f", {"f": "a.html"}.get)[0]  # another's attribute


def test_a_project_is_read(project):
    library = Library(project, ROOM)
    q_sample, walk, back = (library.definitions[f"ddpm.forward.{n}"] for n in ("q_sample", "Walk", "Walk.back"))
    assert [d.name for d in library.modules["ddpm.forward"].definitions] == [
        "",
        "SCALE",
        "q_sample",
        "Walk",
        "Walk.back",
    ]
    assert q_sample.tags == ["DDPM (4)"] and library.pages_of("DDPM (4)")[0] == "ddpm.forward.html"
    code = SOURCE.splitlines()
    assert [code[i - 1].strip() for i in q_sample.lines][:2] == ["def q_sample(x_0, t, eps):", "a = at(t) * SCALE"]
    assert not set(walk.lines) & set(back.lines)
    assert library.callers == {
        "ddpm.constants.at": ["ddpm.forward.q_sample"],
        "ddpm.forward.q_sample": ["ddpm.forward.Walk"],
    }
    (test,) = library.marked["DDPM (4)"]
    assert test.command == "python -m pytest -m slow tests/test_forward.py::test_x_t"
    (naming,) = library.naming(walk)
    assert naming.name == "test_walk" and not naming.slow and library.naming(q_sample) == []


def test_an_equation_is_beside_the_lines_that_give_its_left_sides_their_values(project):
    library = Library(project, ROOM)
    definition = library.definitions["ddpm.forward.q_sample"]
    (equation, line), _ = library.equations(definition)
    assert line == line_of(SOURCE, ".. math:: a")
    first, second = line_of(SOURCE, "a = at(t)"), line_of(SOURCE, "x_t = (")
    assert library.lines_of(definition, equation) == [first, *range(second, second + 4)]
    whole = library.lines_of(definition, Equation((r"\text{nobody} = 1",), ()))
    assert whole == list(range(first, second + 5))  # the body
    assert library.lines_of(library.definitions["ddpm.forward.Walk"], equation) == [line_of(SOURCE, "return q_sample")]
    assert in_words([1, 2, 3, 7]) == "1-3, 7"


# ------------------------------------------------------------------------------------------------------------ the pages


def test_the_page_of_a_module(project):
    page = module_page(Library(project, ROOM), "ddpm.forward")
    tag = re.search(r'<div class="eq" id="eq-DDPM-4" data-lines="([^"]+)">', page)
    first = line_of(SOURCE, "a = at(t)")
    assert tag is not None and tag[1] == f"{first}-{first + 4}"
    assert f'<a class="lines" href="#L{first}">' in page and f'id="L{first}"' in page
    assert '<a class="tag" href="paper-DDPM.html#DDPM-4">DDPM (4)</a>' in page
    assert '<a href="ddpm.constants.html#at">at</a>' in page  # in the code
    assert '<a href="ddpm.constants.html#at"><code>at</code></a>' in page  # and in its docstring
    assert "python -m pytest -m slow tests/test_forward.py::test_x_t" in page
    assert 'Named by <a href="ddpm.forward.html#Walk"><code>Walk</code></a>' in page
    assert '<code data-l="x_0">x_0</code>' in page and 'class="shape"' in page
    assert page.count("One step back.") == 1  # the docstring is not in the code again


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        (r"\sigma_t \epsilon", r"\sogma_t \epsilon", r"ddpm/forward.py:11: the LaTeX command \\sogma is not known"),
        (r"t \ne 2 k", r"t \ne \frac{2", r"ddpm/forward.py:18: braces"),
        (
            "DDPM (4)",
            "DDPM (99)",
            r'ddpm/forward.py:9: \[DDPM \(99\)\] has no test: mark one @pytest.mark.equation\("DDPM',
        ),
    ],
)
def test_a_mistake_in_a_docstring_stops_the_build_with_its_place(project, tmp_path, old, new, place):
    changed(project, "ddpm/forward.py", old, new)
    with pytest.raises(Mistake, match=place):
        build(project, tmp_path / "out", rooms=ROOM)
    assert not (tmp_path / "out").exists()


def test_a_listed_module_that_is_not_there_and_one_that_joins_by_its_equation(project):
    modules = Library(project, ROOM).modules
    with pytest.raises(Mistake, match=r"ddpm.nowhere is listed, but there is no such module"):
        rooms_of(modules, (Room("Some", ("ddpm.nowhere",)),))
    assert rooms_of(modules, (Room("Some", ("ddpm.constants",)),))[-1].modules == ("ddpm.forward",)


def test_the_equations_of_a_paper_in_its_order(project, monkeypatch):
    library = Library(project, ROOM)
    paper = Paper("DDPM", "", "", 2020, equations=(Numbered("9", note="why not"), Numbered("4", "x_t")))
    assert [e.number for e in entries(library, paper)] == ["9", "4"]
    unnamed = Paper("DDPM", "", "", 2020)
    assert [e.number for e in entries(library, unnamed)] == ["4"]
    with pytest.raises(Mistake, match=r"DDPM \(7\) is listed, but no docstring quotes it, and no reason is given"):
        entries(library, Paper("DDPM", "", "", 2020, equations=(Numbered("7", "what"),)))


def test_papers_are_listed_once_with_their_numbers_once():
    names = [paper.name for paper in PAPERS]
    assert len(set(names)) == len(names)
    for paper in PAPERS:
        numbers = [equation.number for equation in paper.equations]
        assert len(set(numbers)) == len(numbers), paper.name
        whole = [int(number) for number in numbers if number.isdigit()]
        assert whole == sorted(whole), paper.name
        assert paper.arxiv == "" or re.fullmatch(r"\d{4}\.\d{4,5}", paper.arxiv), paper.name


def test_every_paper_says_what_differs():
    for paper in PAPERS:
        assert paper.letters or any(equation.note for equation in paper.equations), paper.name


def test_every_module_of_the_rooms_is_there():
    for room in ROOMS:
        for name in room.modules:
            assert (REPOSITORY / f"{name.replace('.', '/')}.py").is_file(), name


def test_dead_links_and_ids_that_stand_twice():
    check_links({"a.html": '<p id="x"><a href="b.html#y">', "b.html": '<p id="y"><a href="../n.ipynb">'})
    for text, said in (
        ('<a href="c.html">', "a.html: a link leads to c.html, and there is no such page"),
        ('<a href="#z">', "a.html: a link leads to #z, and there is no such place on that page"),
        ('<p id="x"><p id="x">', "a.html: the id x occurs there twice"),
        ('<img src="https://example.org/a.png">', "and there is no such page"),
    ):
        with pytest.raises(Mistake, match=said):
            check_links({"a.html": text})


def test_markdown_of_a_chapter():
    text = "One *two* `a*b*` $x_0$ [[A (1)]], [[A (1)|its *words*]].\n\n"
    text += "1. first\n   goes on\n2. second\n\n```sh\na < b\n```\n## End"
    found = chapters.html_of(text, "c.md", 2, lambda target: ("p.html#A-1", "A (1)") if target == "A (1)" else None)
    for part in (
        "<em>two</em>",
        "<code>a*b*</code>",
        "<math",
        '<a href="p.html#A-1">A (1)</a>',
        '<a href="p.html#A-1">its <em>words</em></a>',
        "<ol><li>first goes on</li><li>second</li></ol>",
        "<pre>a &lt; b</pre>",
        "<h2>End</h2>",
    ):
        assert part in found
    with pytest.raises(Mistake, match=r"c.md:4: \[\[B\]\] leads nowhere"):
        chapters.html_of("a\n\nb [[B]]", "c.md", 2, lambda target: None)


def test_the_chapters_are_eight_and_lead_to_notebooks():
    found = chapters.read_chapters()
    assert [chapter.number for chapter in found] == list(range(1, 9))
    for chapter in found:
        names = re.findall(r"\[\[notebook (\w+)\]\]", chapter.text)
        assert names and all((REPOSITORY / "notebooks" / f"{name}.ipynb").is_file() for name in names), chapter.path
        assert "## Step by step" in chapter.text and "## Try it" in chapter.text


def test_the_map_of_a_network_has_every_part_with_its_channels_and_levels():
    stages = [
        network_map.Stage("conv_in", "conv", (1, 16, 8, 8)),
        network_map.Stage("down.0.resample", "down", (1, 32, 4, 4)),
        network_map.Stage("up.0.resample", "up", (1, 24, 8, 8)),
    ]
    root = ET.fromstring(network_map.of_network(stages))
    texts = [e.text for e in root.iter("text")]
    assert texts == ["conv", "16", "down", "32", "up", "24", "8 px", "4 px"]
    boxes = [(float(e.attrib["x"]), float(e.attrib["y"])) for e in root.iter("rect")]
    assert boxes == sorted(boxes, key=lambda box: box[0]) and boxes[0][1] == boxes[2][1] < boxes[1][1]
    assert [e.text for e in root.iter("title")][1] == "down.0.resample: (B, 32, 4, 4)"


def test_a_figure_is_the_same_again_in_the_colours_of_its_page():
    def drawn(name: str) -> str:
        with rc_context(drawing.LOOKS):
            figure = Figure(figsize=(1, 1))
            figure.add_subplot().plot([1, 2])
            return drawing.svg(figure, name)

    assert drawn("a") == drawn("a") != drawn("b")
    assert drawn("a").startswith("<svg ") and "currentColor" in drawn("a") and drawing.INK not in drawn("a")
    ids = [set(re.findall(r'id="(p\w+|m\w+)"', drawn(name))) for name in "ab"]
    assert ids[0] and not ids[0] & ids[1]  # a page may hold both


# ------------------------------------------------------------------------------------------------------ the whole, slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's own site, with the map of the default network."""
    from ddpm.commands.reading_site import network_of

    stages, said = network_of([])
    return build(REPOSITORY, tmp_path_factory.mktemp("site") / "reference", stages, said).parent


@pytest.mark.slow
def test_every_equation_stands_on_exactly_the_pages_that_it_should(site):
    """On those of the modules that quote it, on that of its paper, and in the list of all."""
    library = Library(REPOSITORY)
    tags = re.findall(r"^\| ([^|]+ \([^|]+\)) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(tags) == library.quoted.keys() and len(tags) > 150
    ids, links = defaultdict(set), defaultdict(set)
    for path in site.glob("*.html"):
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r' id="([^"]+)"', text):
            ids[name].add(path.name)
        for tag in re.findall(r'<a class="tag" href="[^"]+">([^<]+)</a>', text):
            links[html.unescape(tag)].add(path.name)
    for tag in tags:
        quoting = {f"{definition.module}.html" for definition in library.quoted[tag]}
        assert links[tag] == quoting, tag
        assert ids[slug(tag)] == {paper_page(tag), "equations.html"}, tag
        assert ids[f"eq-{slug(tag)}"] == quoting, tag


@pytest.mark.slow
def test_a_figure_of_every_module_in_the_table_has_the_colours_of_its_page(site):
    for name in figures.FIGURES:
        page = (site / f"{name}.html").read_text(encoding="utf-8")
        drawn = page[page.index("<svg") : page.index("</svg>")]
        assert "currentColor" in drawn and drawing.INK not in drawn and len(drawn) < 80_000, name
        assert "nan" not in drawn and drawn.count("<path") > 8, name


@pytest.mark.slow
def test_the_site_is_small_and_leads_nowhere_else(site):
    files = list(site.iterdir())
    assert sum(path.stat().st_size for path in files) < LARGEST
    assert {path.suffix for path in files} == {".html", ".css", ".js"}
    for path in files:
        addresses = set(re.findall(r"https?://[^\s\"'<>)]+", path.read_text(encoding="utf-8")))
        assert all(a.startswith(("https://arxiv.org/abs/", "http://www.w3.org/")) for a in addresses), path.name
    assert "px</text>" in (site / "models.unet.html").read_text(encoding="utf-8")


PROBE = """
const said = { errors: [] };
addEventListener("error", (event) => said.errors.push(String(event.message)));
addEventListener("load", () => {
  const box = document.getElementById("the-query");
  box.value = "ddpm 7";
  box.dispatchEvent(new Event("input"));
  const equation = document.querySelector(".eq[data-lines]");
  equation.dispatchEvent(new PointerEvent("pointerenter"));
  said.lit = document.querySelectorAll(".r.lit").length;
  const letter = equation.querySelector("[data-l]");
  const touch = { bubbles: true, pointerType: "touch" };
  letter.dispatchEvent(new PointerEvent("pointerover", touch));
  letter.dispatchEvent(new PointerEvent("pointerout", touch));
  said.letter = document.getElementById("the-letter").textContent;
  said.stays = !document.getElementById("the-letter").hidden;
  const boxes = [...document.querySelectorAll(".eq > div, pre.code")];
  said.cut = boxes.filter((box) => box.scrollWidth > box.clientWidth + 1).length;
  setTimeout(() => {
    said.found = [...document.querySelectorAll("#the-results a")].map((a) => a.getAttribute("href"));
    said.chosen = document.querySelector("#the-results [aria-selected=true]").getAttribute("href");
    said.by = {};
    for (const words of ["eq 12", "DDPM 11", "DDPM (9)", "alpha bar", "ᾱ"]) {
      box.value = words;
      box.dispatchEvent(new Event("input"));
      said.by[words] = document.querySelector("#the-results a").getAttribute("href");
    }
    box.value = "ddpm 7";
    box.dispatchEvent(new Event("input"));
    box.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowDown", cancelable: true }));
    said.second = document.querySelector("#the-results [aria-selected=true]").getAttribute("href");
    box.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape", cancelable: true }));
    said.hidden = document.getElementById("the-results").hidden;
    said.requests = performance.getEntriesByType("resource").map((entry) => entry.name);
    said.wide = document.documentElement.scrollWidth > innerWidth;
    said.turns = [...document.querySelectorAll(".turn a")].map((a) => a.rel);
    const out = document.createElement("pre");
    out.id = "said";
    out.textContent = JSON.stringify(said);
    document.body.append(out);
  }, 400);
});
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", ["1440,900", "500,900"])
def test_the_pages_in_a_browser(site, tmp_path, size):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here")
    page = site / "ddpm.forward.html"
    text = page.read_text(encoding="utf-8")
    probed = site / "probed.html"
    probed.write_text(text.replace("</head>", f"<script>{PROBE}</script></head>"), encoding="utf-8")
    try:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--window-size={size}"]
        options += [
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=5000",
            "--dump-dom",
            probed.as_uri(),
        ]
        done = subprocess.run([browser, *options], capture_output=True, text=True, timeout=240)
    finally:
        probed.unlink()
    assert "CONSOLE" not in done.stderr
    said = json.loads(html.unescape(re.search(r'<pre id="said">(.*?)</pre>', done.stdout, re.DOTALL)[1]))
    assert said["errors"] == [] and not said["wide"] and said["hidden"]
    assert all(name.startswith((site.as_uri(), "data:")) for name in said["requests"])
    assert said["chosen"] == "paper-DDPM.html#DDPM-7" == said["found"][0] and said["second"] == said["found"][1]
    assert said["by"] == {
        "eq 12": "paper-DDPM.html#DDPM-12",
        "DDPM 11": "paper-DDPM.html#DDPM-11",
        "DDPM (9)": "paper-DDPM.html#DDPM-9",
        "alpha bar": "letters.html#alpha_bar",
        "ᾱ": "letters.html#alpha_bar",
    }
    assert said["stays"] and said["cut"] == 0  # a finger's letter stays; no equation or line of code is cut
    assert said["lit"] >= 2 and said["letter"].startswith(("x_", "t", "beta")) and said["turns"] == ["prev", "next"]


@pytest.mark.slow
def test_the_commands_of_the_chapters_compose():
    """What is typed to train; and the Python of chapters runs."""
    import shlex

    from ddpm.config import compose, jobs

    typed = []
    for chapter in chapters.read_chapters():
        for block in re.findall(r"```sh\n(.*?)```", chapter.text, re.DOTALL):
            typed += [
                shlex.split(line, comments=True)[1:] for line in block.splitlines() if line.startswith("python exp")
            ]
        for block in re.findall(r"```python\n(.*?)```", chapter.text, re.DOTALL):
            exec(compile(block, chapter.path, "exec"), {})
    names = {"experiments/train.py": "train", "experiments/sample.py": "sample", "experiments/evaluate.py": "evaluate"}
    assert len(typed) > 12
    for script, *rest in typed:
        assert (REPOSITORY / script).is_file()
        if script in names:
            swept = "-m" in rest
            overrides = [word for word in rest if not word.startswith("-")]
            for job in jobs(names[script], overrides, True)[:1] if swept else [overrides]:
                compose(names[script], [word for word in job if not word.startswith("hydra")])


def test_what_the_command_refuses(tmp_path, monkeypatch):
    from ddpm.commands import reading_site
    from ddpm.config import InvalidInput

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "other.txt").touch()
    for given, said in (
        (["open=maybe"], "open=maybe must be true or false"),
        (["out="], "out= must name a folder"),
        ([f"out={tmp_path / 'full'}"], "is not a reading site"),
    ):
        with pytest.raises(InvalidInput, match=said):
            reading_site.read(given)
    monkeypatch.setattr("ddpm.__file__", str(tmp_path / "ddpm" / "__init__.py"))
    with pytest.raises(InvalidInput, match=r"has no tests/ and notebooks/ next to ddpm/"):
        reading_site.read([])


def test_the_map_is_of_what_the_network_computes():
    from ddpm.commands.reading_site import stages_of
    from models.unet import UNet

    model = UNet(8, 1, channels=8, channel_mults=(1, 2), blocks=1, attention_resolutions=(4,), groups=4)
    stages = stages_of(model)
    assert [(s.kind, s.shape[1:]) for s in stages[:5]] == [
        ("conv", (8, 8, 8)),
        ("block", (8, 8, 8)),
        ("down", (8, 4, 4)),
        ("block", (16, 4, 4)),
        ("attention", (16, 4, 4)),
    ]
    assert stages[-1] == network_map.Stage("conv_out", "conv", (1, 1, 8, 8))


def test_the_pages_of_a_project_are_whole(project, tmp_path, monkeypatch):
    """Chapters and papers of the whole are left out: what they lead to is not there."""
    listed = (
        Numbered("4", "x_t directly."),
        Numbered("9", "A step of a proof.", "See DDPM (4), not DDPM (5).", verified=False),
    )
    monkeypatch.setattr("ddpm.reading.site.PAPERS", (Paper("DDPM", "A paper", "Nobody", 2020, equations=listed),))
    chapter = chapters.Chapter(1, "1.md", "One", "Of [[DDPM (4)]].", "\nOf [[ddpm.forward.q_sample]].", 2)
    made = Pages(Library(project, ROOM), [chapter], "..").all()
    assert '<a href="ddpm.forward.html#q_sample">' in made["chapter-1.html"]
    check_links(made)
    assert {
        "index.html",
        "ddpm.forward.html",
        "paper-DDPM.html",
        "equations.html",
        "letters.html",
        "search.js",
    } <= made.keys()
    entries = json.loads(made["search.js"].removeprefix("window.ENTRIES = ").rstrip(";\n"))
    said = "Equation. x_t directly. q_sample: x_t at any t, see `at`."
    assert ["DDPM (4)", "paper-DDPM.html#DDPM-4", said] in entries
    assert ["DDPM (9)", "paper-DDPM.html#DDPM-9", "Equation. A step of a proof."] in entries  # is found, too
    assert made["paper-DDPM.html"].count('class="unverified"') == 1
    assert 'See <a href="paper-DDPM.html#DDPM-4">DDPM (4)</a>, not DDPM (5).' in made["paper-DDPM.html"]
    assert any(entry[0] == "alpha_bar" and entry[2].endswith(" α¯") for entry in entries)
    known = json.loads(made["letters.js"].removeprefix("window.LETTERS = ").rstrip(";\n"))
    assert known["alpha_bar"]["elsewhere"][0].startswith("DDIM")
    shown = set(re.findall(r'data-l="([^"]+)"', "".join(made.values())))
    assert shown <= known.keys() and {"x_0", "t"} <= shown
