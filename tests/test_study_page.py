"""ddpm/study/{page,figures,words}.py: a report that stands alone, shows text as text, and decides nothing by itself."""

import html
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SAY, said_in_a_browser
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image

from ddpm.figures import images
from ddpm.study import figures, formatting, page
from ddpm.study.findings import Arm, Blocks, Curve, Effect, Failure, Findings, Front, Interaction, Measure
from ddpm.study.statistics import NOT_DECIDED, compare, estimate, front

EVIL = "<script>alert('x')</script> & \"q\" $a_b$ | `c`"


def measure(values: dict[str, dict[int, float]], baseline: str, name: str = "frechet", **others: object) -> Measure:
    arms = {label: estimate(points) for label, points in values.items()}
    rest = {label: points for label, points in values.items() if label != baseline}
    options = {"title": "Fréchet distance", "unit": "", "better": "lower", **others}
    differences = compare(rest, dict.fromkeys(rest, values[baseline]), options["better"])
    return Measure(name, arms=arms, differences=differences, **options)


def curve(level: float, n: int = 40) -> Curve:
    x = np.linspace(0, 20_000, n)
    y = level * (0.02 + np.exp(-x / 2000))
    return Curve(tuple(x), tuple(y), tuple(0.95 * y), tuple(1.05 * y))


def schedule(power: float) -> Curve:
    x = np.linspace(0, 1, 101)
    y = np.cos(x * np.pi / 2) ** power
    return Curve(tuple(x), tuple(y), tuple(y), tuple(y))


def strip(seed: int, n: int = 8, side: int = 32) -> np.ndarray:
    random = np.random.default_rng(seed)
    small = random.integers(0, 255, (n, 4, 4, 3)).repeat(side // 4, 1).repeat(side // 4, 2)
    board = np.full((side, n * (side + 2) - 2, 3), 255, np.uint8)
    for i, tile in enumerate(small):
        board[:, i * (side + 2) : i * (side + 2) + side] = tile
    return board


def study(factors: dict[str, tuple[str, ...]], seeds: int = 5, extra: str | None = None) -> Findings:
    """A grid of arms with everything that a report can have."""
    random = np.random.default_rng(0)
    cells = [dict(zip(factors, levels, strict=True)) for levels in product(*factors.values())]
    labels = [", ".join(f"{key}={value}" for key, value in cell.items()) for cell in cells]
    if extra is not None:
        cells, labels = [*cells, dict(cells[0])], [*labels, extra]
    base, n = labels[0], len(labels)
    luck = random.normal(0, 0.3, seeds)  # of a seed, the same for all arms: what pairing removes
    quality = np.concatenate([[0.0], np.sort(random.normal(0, 0.8, n - 1))])
    values = {
        label: {s: float(6 + quality[i] + luck[s] + random.normal(0, 0.12)) for s in range(seeds)}
        for i, label in enumerate(labels)
    }
    values[labels[-1]] = {s: value for s, value in values[labels[-1]].items() if s < 3}  # not decided
    recognition = {
        label: {s: 90 - 4 * v + float(random.normal(0, 1)) for s, v in points.items()}
        for label, points in values.items()
    }
    first = measure(values, base, real=4.21, noise=0.18)
    second = measure(
        recognition, base, "recognition", title="Recognised digits", unit="%", better="higher", note="ten classes"
    )
    bits = {label: {s: 2.9 + 0.02 * v for s, v in points.items()} for label, points in values.items()}
    third = measure(bits, base, "bits_per_dim", title="Negative log-likelihood bound", unit="bits/dim")
    arms = tuple(
        Arm(
            label, cell, tuple(Path(f"runs/s/{i:03d}{s}") for s in values[label]), tuple(values[label]),
            35_746_307 // (i + 1), 12.4 / (i + 1), 130.0 * (i + 1),
            ("another batch size: not paired in data order",) if i == 2 else (),
            (f"ddpm-train study=s arm={i} seed=0",),
        )
        for i, (label, cell) in enumerate(zip(labels, cells, strict=True))
    )  # fmt: skip
    names = list(factors)
    effects = tuple(
        Effect(
            f,
            {
                v: estimate({s: 5.5 + 0.3 * i + 0.1 * k + luck[s] for s in range(seeds)})
                for i, v in enumerate(factors[f])
            },
        )
        for k, f in enumerate(names)
    )
    interactions = []
    for a, b in [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]:
        means = [[5 + 0.4 * i - 0.2 * j for j in range(len(factors[b]))] for i in range(len(factors[a]))]
        cells_of = tuple(tuple(None if (i, j) == (0, 1) else v for j, v in enumerate(r)) for i, r in enumerate(means))
        interactions.append(Interaction(a, b, factors[a], factors[b], cells_of))
    fronts = []
    for cost, of in (("parameters", lambda arm: arm.parameters), ("seconds of training", lambda arm: arm.seconds)):
        points = {arm.label: (float(of(arm)), first.arms[arm.label].mean) for arm in arms}
        fronts.append(Front(cost, points, front(points, "lower")))
    return Findings(
        study="channels-and-attention",
        question="Does attention at 8 pixels pay at a fixed number of steps, and at which width?",
        design=(f"A grid of {len(factors)} factors with {n} arms.", f"{seeds} training seeds an arm, paired by seed.",
                "Held fixed: data, budget of 20,000 steps, batch 128, sampler DDIM 50."),
        baseline=base,
        arms=arms,
        measures=(first, second, third),
        verdict=(f"{labels[1]} is better than the baseline by 1.05 (0.74 to 1.36).", "For 1 arm nothing is decided."),
        effects=effects,
        interactions=tuple(interactions),
        fronts=tuple(fronts),
        losses={label: curve(0.8 + 0.05 * i) for i, label in enumerate(labels)},
        by_snr={label: Curve(tuple(range(-9, 10)), tuple(np.exp(np.linspace(-5, 0, 19)) * (1 + 0.1 * i)), (), ())
                for i, label in enumerate(labels)},
        schedules={label: schedule(1 + 0.4 * i) for i, label in enumerate(labels)},
        sheet={label: strip(i) for i, label in enumerate(labels)},
        environment={"commit": "1a2b3c4", "machine": "one H100", "torch": "2.6.0"},
        commands=("ddpm-train -m study=s \\\n  model.channels=32,64,128 seed=0,1,2,3,4",),
        failures=(Failure(labels[-1], 3, Path("runs/s/99"), "FAILED", "the loss is not finite at step 9", "Trace\n x"),
                  Failure(labels[-1], None, Path("runs/s/0100"), "INTERRUPTED", "signal 15", None)),
        warnings=("commits differ between runs: 1a2b3c4, 5d6e7f8",),
    )  # fmt: skip


GRID = {"channels": ("32", "64", "128"), "attention": ("none", "8", "16+8")}


@pytest.fixture(scope="module")
def grid() -> Findings:
    return study(GRID)


def in_blocks(found: Findings) -> Findings:
    """The same grid, compared with the first attention at each width."""
    factor, *_ = (factor for factor in found.arms[0].settings if factor != "channels")
    level = found.arms[0].settings[factor]
    against = {
        arm.label: arm.label.replace(f"{factor}={arm.settings[factor]}", f"{factor}={level}") for arm in found.arms
    }
    levels = {arm.label: f"{factor}={arm.settings[factor]}" for arm in found.arms}
    names = {arm.label: f"channels={arm.settings['channels']}" for arm in found.arms}

    def compared(of: Measure) -> Measure:
        points = {label: one.points for label, one in of.arms.items()}
        others = {label: values for label, values in points.items() if against[label] != label}
        differences = compare(others, {label: points[against[label]] for label in others}, of.better)
        return replace(of, differences=differences)

    effects = []
    for of in found.effects:
        points = {name: one.points for name, one in of.levels.items() if name != level}
        differences = compare(points, dict.fromkeys(points, found.effects[1].levels[level].points), "lower")
        effects.append(replace(of, differences=differences if of.factor == factor else {}))
    return replace(
        found,
        baseline=f"{factor}={level}",
        blocks=Blocks(factor, level, ("channels",), levels, names, against),
        measures=tuple(map(compared, found.measures)),
        effects=tuple(effects),
    )


class Parts(HTMLParser):
    """Elements of a page, and its text outside scripts and styles."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "input", "br", "img"):
            self.inside.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.inside.pop() == tag  # well nested

    def handle_data(self, data):
        if self.inside and self.inside[-1] not in ("script", "style"):
            self.words.append(data)


def sections(text: str) -> list[str]:
    return re.findall(r'<section id="([^"]+)">', text)


@pytest.mark.slow
def test_the_page_stands_alone(grid):
    text = page.page(grid)
    parts = Parts(text)
    assert parts.inside == []
    assert text.count("<script") == text.count("<style") == 1  # no figure brings its own
    assert "http:" not in text and "https:" not in text and "url(http" not in text and "@import" not in text
    policy = next(a["content"] for tag, a in parts.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';") and "img-src data:" in policy
    for _, attributes in parts.tags:
        assert not {name for name in attributes if name.startswith("on")}
        for name in ("src", "href", "xlink:href", "action", "poster", "data", "srcset"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#"))


@pytest.mark.slow
def test_names_in_the_page_are_unique_and_links_lead_somewhere(grid):
    parts = Parts(page.page(grid))
    names = [a["id"] for tag, a in parts.tags if "id" in a]
    assert len(names) == len(set(names))
    links = {a["href"][1:] for _, a in parts.tags if (a.get("href") or "").startswith("#")}
    clips = {found for _, a in parts.tags for found in re.findall(r"url\(#(\w+)\)", " ".join(map(str, a.values())))}
    assert links and clips and links | clips <= set(names)


@pytest.mark.slow
def test_the_order_of_the_page(grid):
    text = page.page(grid)
    order = ["arms", "measure-1", "measure-2", "measure-3", "effects", "interactions", "fronts", "curves", "samples",
             "failures", "made"]  # fmt: skip
    assert sections(text) == order
    said = " ".join(Parts(text).words)
    opening = [grid.study, grid.question, *grid.verdict, *grid.warnings, *grid.design, "Arms"]
    places = [said.index(sentence, said.index("Study")) for sentence in opening]
    assert places == sorted(places)


@pytest.mark.slow
def test_only_what_there_is_has_a_section(grid):
    bare = Findings("s", None, (), grid.baseline, grid.arms[:1], (), ())
    text = page.page(bare)
    assert sections(text) == ["arms", "made"]
    assert "lead" not in {a.get("class") for _, a in Parts(text).tags} and "How to read" not in text
    assert sections(page.page(replace(bare, arms=()))) == []
    assert "no arm could be compared" in page.page(bare) and "no arm could be compared" in formatting.markdown(bare)
    without = replace(grid, effects=(), fronts=(), by_snr={}, failures=(), sheet={})
    text = page.page(without)
    assert not {"effects", "fronts", "failures"} & set(sections(text))
    assert "Schedules</h2>" in text and "Samples</h2>" not in text and "Error by noise level" not in text
    assert "Quality by evaluations" in page.page(replace(grid, by_steps={"a, DDIM": curve(3)}))


@pytest.mark.slow
def test_text_is_text():
    """In the page, in figures and in Markdown, whatever labels and reasons hold."""
    found = study({EVIL: ("a", "b"), "x": ("1", "<b>2</b>")}, extra=EVIL)
    evil = replace(
        found,
        study=EVIL,
        question=EVIL,
        verdict=(EVIL,),
        design=(EVIL,),
        warnings=(EVIL,),
        environment={EVIL: EVIL},
        commands=(EVIL,),
        measures=tuple(replace(m, title=EVIL, unit=EVIL, note=EVIL) for m in found.measures),
        arms=tuple(replace(arm, flags=(EVIL,), commands=(EVIL,), runs=(Path(EVIL),)) for arm in found.arms),
        failures=(Failure(EVIL, 0, Path(EVIL), "FAILED", EVIL, EVIL),),
        by_steps={EVIL: curve(2), "_b": curve(3)},
    )
    text = page.page(evil)
    parts = Parts(text)
    assert parts.inside == [] and text.count("<script") == 1 and "<b>2</b>" not in text
    assert not {name for _, a in parts.tags for name in a if not re.fullmatch(r"[a-zA-Z:-]+", name)}
    assert "".join(parts.words).count(EVIL) > 30
    report = formatting.markdown(evil, "a b.png")
    outside = re.sub(r"```+bash\n.*?\n```+\n", "", report, flags=re.DOTALL)
    assert "<script" not in outside and "](<a b.png>)" in report
    assert all(len(re.findall(r"(?<!\\)\|", row)) == len(re.findall(r"(?<!\\)\|", table[0]))
               for table in tables(report) for row in table)  # fmt: skip


def tables(report: str) -> list[list[str]]:
    """The rows of each table, all of them beginning with a bar."""
    return [block.strip().split("\n") for block in report.split("\n\n") if block.startswith("| ")]


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((1.4656, 0.931, 2.0), "1.47 (0.93 to 2.00)"),
        ((147.2, 131.0, 163.4), "147 (131 to 163)"),
        ((0.03126, 0.0301, 0.0324), "0.0313 (0.0301 to 0.0324)"),
        ((-0.5, -7.0, 6.0), "−0.5 (−7.0 to 6.0)"),
        ((35746.0, 35200.0, 36292.0), "35,746 (35,200 to 36,292)"),
        ((1.47e-6, 0.93e-6, 2.01e-6), "1.47e-6 (0.93e-6 to 2.01e-6)"),
        ((-0.5, -1.0, -0.0008), "−0.500 (−1.000 to −0.001)"),  # an end that is not zero does not look so
        ((2.0, 2.0, 2.0), "2.00 (2.00 to 2.00)"),
        ((0.0, 0.0, 0.0), "0.00 (0.00 to 0.00)"),
        ((float("inf"), 1.0, 2.0), "not finite"),
        ((3.14159, None, None), "3.14"),
    ],
)
def test_the_interval_decides_the_digits(numbers, said):
    assert formatting.interval(*numbers) == said


def test_numbers():
    assert formatting.interval(0.53, 0.06, 1.0, signed=True) == "+0.53 (+0.06 to +1.00)"
    assert formatting.number(float("nan")) == "not finite" and formatting.number(0.0, signed=True) == "0.00"
    assert formatting.listed([-0.521, 0.1333, 0.2]) == "−0.52, +0.13, +0.20"
    assert formatting.listed([1.0]) == "+1.00" and formatting.listed([]) == ""
    assert [formatting.p_value(p) for p in (None, 1e-9, 0.0123, 0.04, 1.0)] == ["–", "< 0.001", "0.012", "0.040", "1"]
    amounts = [formatting.amount(n) for n in (None, 7, 999, 1234, 35_746_307, 2.5e9)]
    assert amounts == ["–", "7", "999", "1.23 k", "35.7 M", "2.50 G"]
    times = [None, 3.21, 59.4, 130, 1500, 3900, 250_000]
    assert [formatting.duration(t) for t in times] == [
        "–",
        "3.2 s",
        "59 s",
        "2 min 10 s",
        "25 min",
        "1 h 05 min",
        "2.9 d",
    ]


def test_markdown(grid):
    report = formatting.markdown(grid, "report.png")
    heads = re.findall(r"^## (.*)", report, flags=re.MULTILINE)
    assert heads == ["Verdict", "Design", "Arms", f"Differences to {grid.baseline}", "Main effects",
                     "Runs that are not done", "Commands", "Environment"]  # fmt: skip
    assert report.startswith(f"# {grid.study}\n\n{grid.question}\n")
    assert report.index("## Verdict") < report.index("![") < report.index("## Design")
    assert "![" not in formatting.markdown(grid)
    first = grid.measures[0]
    for arm in grid.arms:
        of = first.arms[arm.label]
        assert formatting.interval(of.mean, of.low, of.high) in next(
            row for row in tables(report)[0] if arm.label in row
        )
    assert "<sup>1</sup>" in report and "1. Another batch size: not paired in data order." in report
    assert "```bash\nddpm-train -m study=s \\\n" in report
    assert "FAILED: channels=128, attention=16+8, seed 3: the loss is not finite" in report


def test_markdown_of_blocks(grid):
    report = formatting.markdown(in_blocks(grid))
    arms, first, *_, levels = tables(report)[:6]
    assert [" (baseline)" in row for row in arms[2:]] == [True, False, False] * 3
    assert len(first) == 2 + 6 and "attention=none" not in "".join(first)
    assert "## Differences to attention=none, with the same channels\n" in report
    assert "An arm's baseline is that of attention=none with the same channels." in report
    assert "Differences to attention=none, means over channels: paired by seed, and tested separately." in report
    assert levels[0] == "| attention | difference | pairs | p | verdict |"
    assert [row.split(" | ")[0] for row in levels[2:]] == ["| 8", "| 16+8"]


@pytest.mark.slow
def test_the_page_of_blocks_marks_every_baseline(grid):
    found = in_blocks(grid)
    text = page.page(found)
    table = text[text.index('id="arms-table"') :]
    table = table[: table.index("</table>")]
    assert table.count("<tr class='baseline'>") == table.count('class="badge">baseline') == 3
    assert "difference to attention=none, with the same channels" in table
    samples = text[text.index('<section id="samples">') :]
    assert samples.count('class="badge">baseline') == 3
    assert "Differences to attention=none, with the same channels: Recognised digits" in text
    figure = figures.measure(found.measures[0], [arm.label for arm in found.arms], found.against)
    left, right = figure.axes
    assert sum(text.get_weight() == "bold" for text in left.texts) == 3
    assert [text.get_text() for text in right.texts].count("baseline") == 3
    between = [line.get_ydata()[0] for line in left.lines if list(line.get_xdata()) == [0, 1]]
    assert between == [2.5, 5.5]  # where another block begins
    plain = figures.measure(grid.measures[0], [arm.label for arm in grid.arms], grid.against)
    assert not [line for line in plain.axes[0].lines if list(line.get_xdata()) == [0, 1]]
    styles = figures.styles([arm.label for arm in found.arms], found.against)
    assert sum(style["color"] == figures.INK for style in styles.values()) == 3
    assert len({tuple(style.values()) for style in styles.values()}) == 9


def test_figures_of_many_blocks_have_the_baseline_and_the_best_of_each():
    """In the order of the study; of more blocks than there is room for, the first."""
    found = in_blocks(study({"channels": tuple("123456789"), "attention": ("none", "8", "16", "16+8", "32")}))
    means = {label: of.mean for label, of in found.measures[0].arms.items()}
    best = {
        channels: min((label for label in means if label.startswith(f"channels={channels}, ") and "none" not in label),
                      key=means.__getitem__)
        for channels in "123456789"
    }  # fmt: skip
    expected = [label for label in means if "none" in label or label in best.values()]
    assert list(figures.chosen(found, 18)) == expected
    assert list(figures.chosen(found, 4)) == expected[:4]
    few = figures.chosen(found)
    assert len(few) == 25 and set(expected) < set(few)
    measured = page._measure(1, found.measures[0], found, few)
    said = f"Shown are {page.OF_BLOCKS.format('best')} by Fréchet distance; 20 more"
    assert measured is not None and said in measured.body


@pytest.mark.slow
def test_the_summary_of_eighteen_arms_in_blocks(tmp_path):
    found = in_blocks(study({"channels": tuple("123"), "attention": ("none", "8", "16", "16+8", "32", "32+8")}))
    found = replace(found, sheet={arm.label: scatter() for arm in found.arms}, sheet_of_points=True, schedules={})
    figures.summary(tmp_path / "summary.png", found)
    picture = Image.open(tmp_path / "summary.png")
    assert picture.width == 1000 and 900 < picture.height < 1100
    figure, _ = figures._summary(found, figures.chosen(found), 8)
    names = {arm.label for arm in found.arms}
    assert {text.get_text() for text in figure.texts if text.get_text() in names} == names
    texts = drawn(figure)
    for (one, a), (other, b) in combinations(texts, 2):
        meet = min(a.x1, b.x1) > max(a.x0, b.x0) and min(a.y1, b.y1) > max(a.y0, b.y0) + 1
        assert not meet, (one, other)


@pytest.mark.slow
def test_what_is_not_decided_does_not_look_like_a_result(grid):
    label = grid.arms[-1].label
    found = grid.measures[0].differences[label]
    assert found.verdict == NOT_DECIDED and found.low is not None
    mean = formatting.digits(found.mean, found.low, found.high, signed=True)
    seeds = formatting.listed(found.points.values())
    report, text = formatting.markdown(grid), page.page(grid)
    (row,) = [row for row in tables(report)[1] if label in row]
    assert seeds in row and "| not decided |" in row and mean[1] not in row
    rows = [row for row in re.findall(r"<tr.*?</tr>", text, flags=re.DOTALL) if f">{html.escape(label)}<" in row]
    assert len(rows) == 4
    for row in rows[:2]:
        assert seeds in row and 'class="verdict undecided">not decided' in row and mean[1] not in row
        assert "better" not in row and "worse" not in row
    marked = sum(of.verdict in ("better", "worse") for m in grid.measures for of in m.differences.values())
    marked += sum(of.verdict in ("better", "worse") for of in grid.measures[0].differences.values())
    assert len(re.findall(r'class="verdict (?:better|worse)"', text)) == marked > 0


@pytest.mark.slow
def test_two_hundred_arms():
    found = study(
        {"channels": ("16", "32", "48", "64", "96"), "attention": ("none", "8", "16", "16+8", "32+16+8"),
         "schedule": ("linear", "cosine", "sigmoid", "zero"), "learning_rate": ("1e-4", "2e-4")}
    )  # fmt: skip
    shown = figures.chosen(found)
    means = {label: of.mean for label, of in found.measures[0].arms.items()}
    others = sorted(label for label in means if label != found.baseline)
    assert shown[0] == found.baseline and list(shown[1:]) == sorted(others, key=means.__getitem__)[:24]
    text = page.page(found)
    assert (
        text.count("Shown are the baseline and the best 24 arms by Fréchet distance; 175 more are in the tables") == 3
    )
    table = text[text.index('id="arms-table"') :]
    assert table[: table.index("</table>")].count("<tr class") == 200
    assert text.count("<img ") == 25 and "188 others" in text
    assert len(text) < 3_000_000


def test_a_diverged_arm_does_not_hide_the_others(grid):
    values = {label: dict(of.points) for label, of in grid.measures[0].arms.items()}
    values[grid.arms[1].label] = {s: 400.0 + s for s in range(5)}
    values[grid.arms[2].label] = {s: float("nan") for s in range(5)}
    found = measure(values, grid.baseline, real=4.0)
    figure = figures.measure(found, list(values), grid.against)
    left, right = figure.axes
    assert left.get_xscale() == "log" and max(map(abs, right.get_xlim())) < 20
    assert any(text.get_text().startswith("+396") for text in right.texts)
    assert "<svg" in figures.svg(figure, "a", "b")
    assert "not finite" in formatting.markdown(replace(grid, measures=(found,)))


def test_one_seed_has_no_interval():
    found = study({"channels": ("32", "64")}, seeds=1)
    text, report = page.page(found), formatting.markdown(found)
    assert "not decided" in text and " to " not in tables(report)[0][2]
    assert 'class="verdict better"' not in text and "**better**" not in report


def scatter() -> np.ndarray:
    return images.scatter(torch.randn(2000, 2), torch.randn(4000, 2), 240)


@pytest.mark.slow
@pytest.mark.parametrize("schedules", [False, True], ids=["alike", "differing"])
def test_points_stand_beside_each_other_each_with_its_label(grid, schedules):
    """Or in the rows of their schedules."""
    found = replace(grid, sheet={arm.label: scatter() for arm in grid.arms}, sheet_of_points=True)
    found = found if schedules else replace(found, schedules={})
    text = page.page(found)
    samples = text[text.index('<section id="samples">') :]
    samples = samples[: samples.index("</section>")]
    assert samples.count("<img ") == len(grid.arms) and "width:240px" in samples and page.OF_POINTS in samples
    assert ('class="tiles"' in samples) is not schedules and ("sheet scheduled" in samples) is schedules
    assert all(html.escape(arm.label) in samples for arm in grid.arms) and samples.count("baseline</span>") == 1
    assert page.OF_POINTS not in page.page(grid)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["samples", "points", "curves", "neither", "large", "grey", "nothing"])
def test_the_summary(grid, kind, tmp_path):
    found = {
        "samples": grid,
        "points": replace(grid, sheet={arm.label: scatter() for arm in grid.arms}, sheet_of_points=True),
        "curves": replace(grid, by_steps={f"a, {i}": curve(1 + i) for i in range(20)}),
        "neither": replace(grid, sheet={}, schedules={}),
        "large": replace(grid, sheet={arm.label: noise((128, 1024, 3)) for arm in grid.arms}, study="s" * 300),
        "grey": replace(grid, sheet={arm.label: noise((28, 8 * 28, 1)) for arm in grid.arms}),
        "nothing": Findings("s", None, (), "a", (), (), ()),
    }[kind]
    path = tmp_path / "summary.png"
    figures.summary(path, found)
    picture = Image.open(path)
    assert picture.width == 1000 and 60 < picture.height < 1000 and path.stat().st_size < 200_000
    assert (np.asarray(picture.convert("L")) > 250).mean() > 0.3


@pytest.mark.slow
def test_the_summary_says_what_it_leaves_out_and_its_words_do_not_meet():
    found = study({"a_rather_long_name_of_a_factor": tuple("abcdef"), "channels": ("32", "64")})

    def texts(most: int) -> list[str]:
        figure, _ = figures._summary(found, figures.chosen(found, most), 8)
        return [text.get_text() for text in figure.texts]

    assert "the baseline and the 9 best of 12 arms" in texts(10) and not any("best of" in text for text in texts(12))
    narrow, wide = (figures._summary(found, figures.chosen(found), tiles)[1] for tiles in (8, 4))
    assert narrow < figures.ROOM < wide


def drawn(figure: Figure) -> list[tuple[str, Bbox]]:
    """Every text that a reader sees, with its box in pixels."""
    figure.canvas.draw()
    hidden: set[int] = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            shown = axis._update_ticks() if axes.axison else []
            hidden |= {id(text) for text in axis.findobj(Text)} - {id(tick.label1) for tick in shown} - {id(axis.label)}
    texts = [text for text in figure.findobj(Text) if text.get_text() and id(text) not in hidden]
    return [(text.get_text(), text.get_window_extent()) for text in texts]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "study", "title", "tiny", "large", "curves"])
@pytest.mark.parametrize("factor", ["target", "a_rather_long_name_of_a_factor"])
def test_words_and_numbers_of_the_summary_do_not_meet(kind, factor):
    found = study({factor: tuple("abcdef"), "channels": ("32", "64")})
    scale = {"tiny": 1e-4, "large": 3e4}.get(kind, 1.0)
    values = {
        label: {seed: scale * value for seed, value in of.points.items()}
        for label, of in found.measures[0].arms.items()
    }
    title = "Error of eps over log-SNR of the signal" if kind == "title" else "Fréchet distance"
    found = replace(
        found,
        study="s" * 90 if kind == "study" else found.study,
        measures=(measure(values, found.baseline, title=title),),
        by_steps={arm.label: curve(1) for arm in found.arms} if kind == "curves" else {},
    )
    for tiles in (8, 6, 4, 3):
        figure, room = figures._summary(found, figures.chosen(found, 10), tiles)
        if room >= figures.ROOM:
            break
    texts = drawn(figure)
    wide, high = figure.canvas.get_width_height()
    for text, box in texts:
        assert 0 <= box.x0 < box.x1 <= wide and 0 <= box.y0 < box.y1 <= high, text
    for (one, a), (other, b) in combinations(texts, 2):
        meet = min(a.x1, b.x1) > max(a.x0, b.x0) and min(a.y1, b.y1) > max(a.y0, b.y0) + 1
        assert not meet, (one, other)


def test_a_summary_without_a_measure_calls_no_arm_best():
    found = replace(study({"channels": tuple("abcdef")}), measures=())
    figure, _ = figures._summary(found, figures.chosen(found, 4), 8)
    assert "the baseline and the first 3 of 6 arms" in [text.get_text() for text in figure.texts]


def noise(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_pictures_lose_nothing():
    for shape in ((8, 24), (8, 24, 1), (8, 24, 3)):
        picture = noise(shape)
        again = np.asarray(Image.open(io.BytesIO(figures.png(picture))))
        assert np.array_equal(again.reshape(shape), picture)


def test_short_labels_stay_different():
    labels = [
        f"model.channels={i},model.attention_resolutions=[16],schedule=cosine,diffusion.target=v" for i in range(9)
    ]
    middle = [f"{'a' * 40}{i}{'b' * 40}" for i in range(30)]
    for names in (labels, middle):
        short = figures.shortened(names, 40)
        assert len(set(short.values())) == len(names) and all(len(name) <= 40 for name in short.values())
    assert figures.shortened(["_a", "$x$"]) == {"_a": " _a", "$x$": r"\$x\$"}


SCRIPT = """
const said = { errors: [] };
window.addEventListener("error", (event) => said.errors.push(event.message));
document.addEventListener("securitypolicyviolation", (event) => said.errors.push(event.blockedURI));
window.addEventListener("load", () => {
  const table = document.getElementById("arms-table");
  const heads = [...table.tHead.rows[0].cells];
  const value = (cell) => cell.dataset.value ?? cell.textContent;
  const column = (i) => [...table.tBodies[0].rows].map((row) => value(row.cells[i]));
  const find = (start) => heads.findIndex((head) => head.textContent.startsWith(start));
  const click = (i) => {
    heads[i].querySelector("button").click();
    return [heads[i].getAttribute("aria-sort"), column(i)];
  };
  said.heads = heads.map((head) => head.textContent);
  said.keyboard = heads.every((head) => head.querySelector("button").tabIndex === 0);
  said.numbers = [click(find("Fréchet")), click(find("Fréchet"))];
  said.differences = [click(find("difference")), click(find("difference"))];
  said.text = [click(find("channels")), click(find("channels"))];
  said.sorted = heads.filter((head) => head.getAttribute("aria-sort") !== "none").length;
  const input = document.querySelector("input");
  const filter = (text) => {
    input.value = text;
    input.dispatchEvent(new Event("input"));
    const shown = [...table.tBodies[0].rows].filter((row) => row.getBoundingClientRect().height > 0).length;
    return [shown, document.getElementById("arms-table-count").textContent];
  };
  said.filter = [filter("ATTENTION=8 channels=128"), filter("nowhere"), filter("")];
  document.querySelector(".copyable button").click();
  said.selected = getSelection().toString();
"""


@pytest.mark.slow
def test_the_page_of_blocks_in_a_browser(grid, tmp_path):
    """Rows sort and filter as ever; the three baselines, without a difference, are last both ways."""
    found = in_blocks(grid)
    script = SCRIPT.replace('filter("nowhere")', 'filter("baseline")')
    said = said_in_a_browser(page.page(found), f"{script}{SAY}}});", tmp_path, "--window-size=1280,900")
    for _, values in said["differences"]:
        assert values[-3:] == [""] * 3 and "" not in values[:-3]
    assert said["filter"] == [[1, "1 of 9 arms"], [3, "3 of 9 arms"], [9, "9 of 9 arms"]]


@pytest.mark.slow
def test_the_page_in_a_browser(grid, tmp_path):
    said = said_in_a_browser(page.page(grid), f"{SCRIPT}{SAY}}});", tmp_path, "--window-size=1280,900")
    assert said["keyboard"]
    means = [of.mean for of in grid.measures[0].arms.values()]
    (up, rising), (down, falling) = said["numbers"]
    assert (up, down) == ("ascending", "descending")
    assert [float(value) for value in rising] == sorted(means) and rising[::-1] == falling
    for _, values in said["differences"]:
        assert values[-1] == "" and "" not in values[:-1]  # the baseline has none, and is last both ways
    (_, rising), (_, falling) = said["text"]
    assert rising == ["32"] * 3 + ["64"] * 3 + ["128"] * 3 and falling == rising[::-1]  # not 128, 32, 64
    assert said["sorted"] == 1
    assert said["filter"] == [[1, "1 of 9 arms"], [0, "0 of 9 arms"], [9, "9 of 9 arms"]]
    assert said["selected"].strip() == grid.commands[0]
