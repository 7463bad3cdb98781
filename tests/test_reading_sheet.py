"""The reading sheet: its intervals, its blindness, its scores, what is refused, and all of it in a browser."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import SAY, said_in_a_browser
from PIL import Image
from test_evaluate import pictures as folder_of_pictures
from test_evaluate import records, train
from torch import Tensor

from ddpm.commands.evaluate import blind_reading, evaluating
from ddpm.commands.evaluate.context import EvaluationContext
from ddpm.config import InvalidInput, compose
from ddpm.data import ImageData
from ddpm.data.dataset import spread
from ddpm.data.devanagari import CLASSES, GLYPHS
from ddpm.figures import reading_page
from ddpm.metrics import reading_sheet
from ddpm.metrics.intervals import wilson
from ddpm.metrics.reading_sheet import Answer, Item, Key, answers_of, identified, mixed, remarks, same, score
from ddpm.sources.trained import TrainedSampler
from ddpm.study.reading import arms_of, read
from ddpm.study.report import findings

REPOSITORY = Path(__file__).parents[1]
EVIL = "</script><b>&\"'"
N = 6  # samples of the sheets here


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Digits, by class; 36 images are held out. Tests take a copy."""
    return train(tmp_path_factory.mktemp("trained"), "model.num_classes=10")


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "default" / trained.name))


def evaluate(run: Path, *words: object) -> None:
    given = [f"run={run}", "sampler.steps=2", "device=cpu", f"n={N}", "metric=reading_sheet", *map(str, words)]
    named = {word.partition("=")[0]: word for word in given}  # the last of a key counts
    evaluating.evaluate(compose("evaluate", list(named.values())))


def key_of(run: Path, name: str = blind_reading.KEY) -> Key:
    return Key.from_json(json.loads((run / name).read_text()))


def content(page: str) -> dict[str, Any]:
    return json.loads(re.search(r'<script type="application/json" id="content">(.*?)</script>', page, re.DOTALL)[1])


def decoded(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2]))))


def answered(key: Key, **changed: object) -> dict[str, Any]:
    """All pictures as their own class, and taken for what they are."""
    answers = [{"read": key.classes[item.label][0], "real": not item.sample} for item in key.items]
    return {"sheet": key.sheet, "answers": answers} | changed


# ----------------------------------------------------------------------------------------------------------- intervals


@pytest.mark.equation("Wilson (interval)")
@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_wilson_is_where_the_score_test_just_rejects(level):
    """By its definition: at both ends |k / n - p| = z sqrt(p (1 - p) / n); and as SciPy computes it."""
    z = scipy.stats.norm.ppf((1 + level) / 2)
    for k, n in ((0, 1), (1, 1), (0, 40), (31, 40), (40, 40), (7, 1000)):
        ends = wilson(k, n, level)
        for p, extreme in zip(ends, (0, n), strict=True):
            if k != extreme:
                assert abs(k / n - p) == pytest.approx(z * (p * (1 - p) / n) ** 0.5, rel=1e-9)
        theirs = scipy.stats.binomtest(k, n).proportion_ci(level, method="wilson")
        assert ends == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_wilson_by_known_values():
    """Of none among n the upper end is z^2 / (n + z^2); 15 of 148 is Newcombe's example (1998)."""
    z = 1.959963984540054
    assert wilson(0, 10) == pytest.approx((0, z**2 / (10 + z**2)))
    assert wilson(10, 10) == pytest.approx((10 / (10 + z**2), 1))
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 5)[0] >= 0 and wilson(5, 5)[1] <= 1


@pytest.mark.parametrize(("k", "n"), [(-1, 3), (4, 3), (0, 0)])
def test_what_is_no_share_is_refused(k, n):
    with pytest.raises(ValueError, match=f"k = {k} of n = {n}"):
        wilson(k, n)


# ----------------------------------------------------------------------------------------------------------- blindness


def test_the_order_is_a_function_of_the_seed_and_mixes():
    order = mixed(80, 3)
    assert torch.equal(order, mixed(80, 3)) and not torch.equal(order, mixed(80, 4))
    assert sorted(order.tolist()) == list(range(80))
    assert 5 < (order[:40] < 40).sum() < 35


def test_equal_pictures_are_equal_bytes_and_the_length_tells_nothing():
    random = np.random.default_rng(0)
    for shape in ((8, 8, 1), (28, 28, 1), (32, 20, 3)):
        noise, grey = random.integers(0, 256, shape, dtype=np.uint8), np.full(shape, 7, np.uint8)
        uris = [reading_page.data_uri(picture) for picture in (noise, grey, noise.copy())]
        assert uris[0] == uris[2] != uris[1] and len({len(uri) for uri in uris}) == 1
        assert (decoded(uris[0]) == noise.squeeze(-1) if shape[-1] == 1 else decoded(uris[0]) == noise).all()


def test_no_byte_of_the_page_depends_on_which_pictures_are_samples(run, monkeypatch):
    """Samples that are copies of the held-out images, and each of them in the place of its copy."""

    def copies(context: EvaluationContext, numbers: list[int], seed: int) -> tuple[Tensor, Tensor | None]:
        batch = context.data.batch(context.data.held_out[spread(len(context.data.held_out), len(numbers))])
        return batch.x, batch.y

    monkeypatch.setattr(EvaluationContext, "samples", copies)
    order, made = mixed(2 * N, 0), []
    for places in (order, (order + N) % (2 * N)):
        monkeypatch.setattr(reading_sheet, "mixed", lambda count, seed, places=places: places)
        evaluate(run)
        made.append(((run / blind_reading.PAGE).read_bytes(), key_of(run)))
    (page, key), (other, swapped) = made
    assert [item.sample for item in key.items] == [not item.sample for item in swapped.items]
    assert page == other and key.sheet == swapped.sheet
    assert {*Counter(content(page.decode())["pictures"]).values()} == {2}


def test_the_page_shows_samples_and_images_as_bytes_in_the_order_of_the_key(run):
    evaluate(run)
    key, text = key_of(run), (run / blind_reading.PAGE).read_text()
    shown = [decoded(uri) for uri in content(text)["pictures"]]
    assert sorted(item.sample for item in key.items) == [False] * N + [True] * N == sorted([False, True] * N)
    source, data = reading_source(run)
    numbers = [item.number for item in key.items if item.sample]
    assert sorted(numbers) == list(range(blind_reading.FIRST, blind_reading.FIRST + N))  # none of those in samples.png
    for item, picture in zip(key.items, shown, strict=True):
        if item.sample:
            x = source.draw([item.number])[0, 0]
            expected = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
            assert item.label == item.number % 10
        else:
            expected = data.images[item.number, 0]
            assert item.number in data.held_out and item.label == data.labels[item.number]
        assert np.abs(picture.astype(int) - expected.numpy()).max() <= int(item.sample)  # drawn in another batch
    assert "sample" not in re.sub("<pre>.*?</pre>", "", text.lower()) and not re.search(r'(src|href)="(?!data:)', text)
    assert "http:" not in text and "https:" not in text


def reading_source(run: Path) -> tuple[TrainedSampler, Any]:
    from ddpm.commands.load import data_of
    from ddpm.commands.sources import source_of

    config = compose("evaluate", [f"run={run}", "sampler.steps=2", "device=cpu"])
    source, _, trained, _ = source_of(config)
    return source, data_of(config, trained)


class Texts(HTMLParser):
    """What stands between tags, and the tags."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_names_are_text_and_never_markup():
    pictures = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    text = reading_page.page(EVIL, pictures, [[EVIL, "x"], ["b"]], "0" * 64, f"{EVIL}.json", f"score {EVIL}")
    parser = Texts()
    parser.feed(text)
    assert "b" not in parser.tags and parser.tags.count("script") == 2
    assert parser.texts.count(EVIL) >= 2 and f"score {EVIL}" in parser.texts
    assert content(text)["file"] == f"{EVIL}.json" and len(content(text)["pictures"]) == 2


def test_without_labels_any_text_may_be_typed():
    page = reading_page.page("x", torch.zeros(1, 1, 600, 4, dtype=torch.uint8), [], "0" * 64, "a.json", "b")
    assert "datalist" not in page and 'list="' not in page and "width:4px" in page


def test_a_character_may_be_typed_as_it_is_written_or_by_its_name():
    labels = torch.arange(len(CLASSES))
    data = ImageData("d", "all", torch.zeros(len(labels), 1, 4, 4, dtype=torch.uint8), labels, CLASSES)
    data.glyphs = GLYPHS
    assert blind_reading._classes(data)[0] == ["क", "character_1_ka"] and len(blind_reading._classes(data)) == 46
    data.glyphs = ()
    assert blind_reading._classes(data)[45] == ["digit_9"]


# -------------------------------------------------------------------------------------------------------------- scores

ITEMS = [Item(True, 0, 0), Item(True, 1, 1), Item(True, 2, 1), Item(False, 5, 0), Item(False, 6, 1), Item(False, 7, 1)]
KEY = Key("a" * 64, "reading_sheet_3", {"n": 3, "seeds": [0]}, [["क", "ka"], ["É"]], ITEMS)


def test_scores_of_answers_by_hand():
    found = score(KEY, [
        Answer("KA", True), Answer("", False), Answer("क", None),
        Answer(" क ".strip(), True), Answer("e\u0301", True), Answer(None, False),
    ])  # fmt: skip
    assert list(found) == ["read", "right", "real"]
    shares = {name: (result.value, result.real_vs_real) for name, result in found.items()}
    assert shares == {"read": (2 / 3, 1), "right": (1 / 3, 1), "real": (1 / 2, 2 / 3)}
    for name, k, n, real_k, m in (("read", 2, 3, 2, 2), ("right", 1, 3, 2, 2), ("real", 1, 2, 2, 3)):
        result = found[name]
        assert (result.low, result.high) == wilson(k, n) and result.interval == "wilson"
        assert (result.more["real_low"], result.more["real_high"]) == wilson(real_k, m)
        assert (result.more["answered"], result.more["real_n"]) == (n, m)
        assert f"{k} of {n}, {k / n:.1%}" in result.words and f"{real_k} of {m}, {real_k / m:.1%}" in result.words


def test_text_is_compared_without_case_space_and_composition():
    assert same(" É\n") == same("e\u0301") == same("é") != same("e")
    assert same("STRASSE") == same("straße") and same("क्ष") != same("क")


def test_what_is_not_answered_is_counted_and_left_out():
    answers = [Answer("ka", None)] + [Answer(None, None)] * 5
    found = score(KEY, answers)
    assert list(found) == ["read", "right"] and found["read"].real_vs_real is None
    assert found["read"].more == {"answered": 1, "real_n": 0} and "none is answered" in found["read"].words
    assert remarks(KEY, answers) == [
        "of 6 pictures 5 were not read and 6 not judged real or generated: they are left out"
    ]


def test_texts_that_name_no_class_are_told_and_so_is_how_labels_were_read():
    answers = [Answer("x", True), Answer("x", True), Answer("", True), *[Answer("ka", True)] * 3]
    assert remarks(KEY, answers) == ["no class is called 'x'"]
    unasked = KEY._replace(items=[item._replace(label=None) if item.sample else item for item in ITEMS])
    assert list(score(unasked, answers)) == ["read", "real"]
    assert remarks(unasked, answers)[1].startswith("held-out images read as their label: 1 of 3, 33.3%")
    unlabelled = KEY._replace(items=[item._replace(label=None) for item in ITEMS], classes=[])
    assert list(score(unlabelled, answers)) == ["read", "real"] and remarks(unlabelled, answers) == []


def test_the_id_is_of_the_pictures_and_what_may_be_typed():
    pictures = torch.arange(32, dtype=torch.uint8).reshape(2, 1, 4, 4)
    ids = [identified(p, c) for p, c in ((pictures, [["a"]]), (pictures.flip(0), [["a"]]), (pictures, [["b"]]))]
    ids.append(identified(pictures.reshape(2, 1, 2, 8), [["a"]]))
    assert (
        len({*ids}) == 4 and ids[0] == identified(pictures.clone(), [["a"]]) and reading_sheet.SHEET.fullmatch(ids[0])
    )


def test_a_key_is_read_as_it_was_written():
    assert Key.from_json(json.loads(json.dumps(KEY.as_json()))) == KEY


NO_KEYS: list[Callable[[dict[str, Any]], object]] = [
    lambda key: [], lambda key: None, lambda key: "key", lambda key: key | {"items": None},
    lambda key: {k: v for k, v in key.items() if k != "settings"}, lambda key: key | {"settings": {"n": 3}},
    lambda key: key | {"items": [{"sample": True}]}, lambda key: key | {"items": [*key["items"], 3]},
    lambda key: key | {"items": [{"sample": 1, "number": 2, "label": None}]},
    lambda key: key | {"items": [{"sample": True, "number": 2, "label": 9}]}, lambda key: key | {"classes": [[3]]},
    lambda key: key | {"protocol": "../frechet"}, lambda key: key | {"sheet": 3},
]  # fmt: skip


@pytest.mark.parametrize("change", NO_KEYS)
def test_what_is_no_key_is_refused(change):
    with pytest.raises(ValueError, match="not the key of a reading sheet"):
        Key.from_json(change(json.loads(json.dumps(KEY.as_json()))))


def test_answers_of_other_shapes_are_refused():
    right = answered(KEY)
    assert answers_of(right, KEY)[0] == Answer("क", False)
    for changed, told in (
        ({"sheet": "b" * 64}, "it answers sheet bbbbbbbbbbbb, not aaaaaaaaaaaa"),
        ({"sheet": 3}, "holds no answers"),
        ({"answers": {}}, "holds no answers"),
        ({"answers": right["answers"][1:]}, "has 5 answers, but the sheet has 6 pictures"),
        ({"answers": [3, *right["answers"][1:]]}, "answer 1 is not"),
        ({"answers": [*right["answers"][1:], {"read": "x"}]}, "answer 6 is not"),
        ({"answers": [{"read": 3, "real": None}, *right["answers"][1:]]}, "answer 1: read must be text"),
        ({"answers": [{"read": "x" * 1001, "real": None}, *right["answers"][1:]]}, "up to 1000 characters"),
        ({"answers": [{"read": None, "real": 1}, *right["answers"][1:]]}, "answer 1: real must be true, false or null"),
        ({"answers": [{"read": None, "real": None}] * 6}, "no sample has an answer"),
    ):
        with pytest.raises(ValueError, match=re.escape(told)):
            answers_of(right | changed, KEY)


# -------------------------------------------------------------------------------------------------------- the commands


def test_a_sheet_and_its_scores(run, tmp_path, capsys, monkeypatch):
    evaluate(run, "weights=raw")
    told = capsys.readouterr().out
    assert f"reading_sheet: a page of {N} samples, seed 0, DDIM with 2 steps, mixed with {N} held-out images" in told
    assert f"{2 * N} evaluations" in told and f"open {run / blind_reading.PAGE}" in told and records(run) == {}
    key, answers = key_of(run), tmp_path / "answers.json"
    assert told.endswith(f"metric=reading_sheet reading_sheet.answers=reading_sheet_answers-{key.sheet[:8]}.json\n")
    saved = answered(key)
    wrong = next(i for i, item in enumerate(key.items) if item.sample)
    saved["answers"][wrong] = {"read": "", "real": None}
    answers.write_text(json.dumps(saved))
    monkeypatch.setattr(TrainedSampler, "draw", lambda *arguments: pytest.fail("drawn"))
    evaluate(run, f"reading_sheet.answers={answers}", "n=99", "sampler=heun", "seed=7")  # of other samples
    told, found = capsys.readouterr().out, records(run)
    assert "evaluations" not in told and found.keys() == {
        f"reading_sheet-{name}_{N}" for name in ("read", "right", "real")
    }
    for name, (k, n) in {"read": (N - 1, N), "right": (N - 1, N), "real": (0, N - 1)}.items():
        record = found[f"reading_sheet-{name}_{N}"]
        assert (record["value"], record["low"], record["high"]) == pytest.approx((k / n, *wilson(k, n)))
        assert record["real_vs_real"] == 1 and record["real_n"] == N and record["interval"] == "wilson"
        assert (record["n"], record["seeds"], record["weights"], record["sampler"]) == (N, [0], "raw", "DDIM")
        assert record["checkpoint"] == 4 and record["evaluations"] == 2 and record["commit"]
        assert f"reading_sheet-{name}_{N}:\nsamples {'taken' if name == 'real' else 'read'}" in told
    assert f"of {2 * N} pictures 0 were not read and 1 not judged real or generated: they are left out" in told


def test_a_report_lists_the_shares(run, tmp_path):
    evaluate(run)
    (tmp_path / "answers.json").write_text(json.dumps(answered(key_of(run))))
    evaluate(run, f"reading_sheet.answers={tmp_path / 'answers.json'}")
    runs, unread = read(run.parent, lambda settings: {"model": settings["model"]})
    found = findings(run.parent, arms_of(runs), unread, lambda settings: None, lambda settings: None)
    of = {m.title: (m.unit, m.real, [e.mean for e in m.arms.values()]) for m in found.measures if "reading" in m.name}
    assert of == {
        "Samples read as requested": ("%", 100, [100]),
        "Samples read by a person": ("%", 100, [100]),
        "Samples taken for real": ("%", 100, [0]),
    }


def test_another_sheet_leaves_the_one_before_to_its_reader(run, tmp_path, capsys):
    evaluate(run)
    first, page = key_of(run), (run / blind_reading.PAGE).read_bytes()
    evaluate(run)
    assert not list(run.glob("reading_sheet-*")) and (run / blind_reading.PAGE).read_bytes() == page  # the same one
    evaluate(run, "seed=1")
    own = f"reading_sheet-{first.sheet[:12]}"
    assert f"renamed to {run / own}.html;" in capsys.readouterr().out and (run / f"{own}.html").read_bytes() == page
    assert key_of(run) != first == key_of(run, f"{own}.json")
    for key, seed in ((first, 0), (key_of(run), 1)):
        (tmp_path / "answers.json").write_text(json.dumps(answered(key)))
        evaluate(run, f"reading_sheet.answers={tmp_path / 'answers.json'}")
        assert records(run)[f"reading_sheet-read_{N}"]["seeds"] == [seed]


def test_it_stands_beside_other_measures(run, capsys):
    evaluate(run, "metric=[kernel,reading_sheet]", "features=pixels")
    told = capsys.readouterr().out
    assert "kernel: 6 samples" in told and "reading_sheet: a page of 6" in told and (run / blind_reading.PAGE).exists()
    assert list(records(run)) == [f"kernel_pixels_{N}_train"]


def test_where_classes_are_asked_for_the_images_are_theirs(run, tmp_path):
    evaluate(run, "class=[3,5]")
    key = key_of(run)
    assert {item.label for item in key.items} == {3, 5} and len(key.classes) == 10
    (tmp_path / "answers.json").write_text(json.dumps(answered(key)))
    evaluate(run, f"reading_sheet.answers={tmp_path / 'answers.json'}")
    assert f"reading_sheet-right_{N}_class3-5" in records(run)


def test_a_person_is_given_forty_samples_unless_told_otherwise_and_all_images_where_they_are_fewer(run):
    evaluate(run, "n=null")
    samples = [item.sample for item in key_of(run).items]
    assert samples.count(True) == 40 and samples.count(False) == 36


@pytest.mark.slow
def test_pictures_without_labels_and_a_run_that_is_measured_at_its_end(tmp_path):
    words = folder_of_pictures(tmp_path / "pictures", 24)
    words[1] += "/0"
    run = train(tmp_path / "runs", *words, f"evaluation=['metric=reading_sheet n={N} sampler.steps=2']")
    key = key_of(run)
    assert key.classes == [] and {item.label for item in key.items} == {None}
    answers = {"sheet": key.sheet, "answers": [{"read": "x", "real": True}] * len(key.items)}
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    evaluate(run, f"reading_sheet.answers={tmp_path / 'answers.json'}")
    assert {name: record["value"] for name, record in records(run).items()} == {
        f"reading_sheet-read_{N}": 1, f"reading_sheet-real_{N}": 1
    }  # fmt: skip


WRONG: dict[str, tuple[list[str], str]] = {
    "too many": (["n=501"], "n = 501: reading_sheet takes at most 500 samples"),
    "none": (["n=0"], "n=0"),
    "no walk": (["sampler.steps=11"], "sampler"),
    "no settings": (["reading_sheet=null"], "reading_sheet=None must hold settings"),
    "no name": (["reading_sheet.answers=3"], "reading_sheet.answers=3 must be the name of a file"),
    "no file": (["reading_sheet.answers=/no/such.json"], "reading_sheet.answers=/no/such.json: there is no such file"),
}


@pytest.mark.parametrize("which", WRONG)
def test_wrong_input_is_refused_in_one_line(which, run, monkeypatch):
    monkeypatch.setattr(TrainedSampler, "draw", lambda *arguments: pytest.fail("drawn"))
    words, told = WRONG[which]
    with pytest.raises(InvalidInput) as refused:
        evaluate(run, *words)
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_a_page_of_large_pictures_has_fewer_of_them(run, monkeypatch):
    monkeypatch.setattr(blind_reading, "LARGEST_PAGE", 2000)
    with pytest.raises(InvalidInput, match="n = 12: reading_sheet takes at most 11 samples of this size"):
        evaluate(run, "n=12")


def test_data_that_hold_nothing_out_or_no_pictures_are_refused(tmp_path):
    run = train(tmp_path / "runs", *folder_of_pictures(tmp_path / "pictures", 8), "data.validation=0")
    with pytest.raises(InvalidInput, match="has no held-out part"):
        evaluate(run)
    with pytest.raises(InvalidInput, match="metric=reading_sheet needs pictures"):
        evaluating._must_hold(
            type("Points", (), {"holds": [], "name": "p", "units": "", "shape": (2,)}), ["reading_sheet"]
        )


@pytest.mark.slow
def test_files_that_hold_no_answers_are_refused_in_one_line(run, tmp_path):
    path = tmp_path / "answers.json"

    def assert_refused(text: str, *told: str) -> None:
        path.write_text(text)
        with pytest.raises(InvalidInput) as refused:
            evaluate(run, f"reading_sheet.answers={path}")
        line = str(refused.value)
        assert line.startswith(f"reading_sheet.answers={path}: ") and "\n" not in line, line
        assert all(word in line for word in told), line

    assert_refused(json.dumps(answered(KEY)), "reading_sheet.json does not exist", "metric=reading_sheet makes a sheet")
    evaluate(run)
    key = key_of(run)
    assert_refused("{", "cannot be read")
    assert_refused("[1]", "holds no answers")
    assert_refused(json.dumps(answered(KEY)), "it answers sheet aaaaaaaaaaaa", key.sheet[:12])
    assert_refused(json.dumps(answered(key, answers=[])), "has 0 answers")
    assert_refused(" " * (blind_reading.LARGEST_ANSWERS + 1), "has more than")
    nothing = [{"read": None, "real": None}] * len(key.items)
    assert_refused(json.dumps(answered(key, answers=nothing)), "no sample has an answer")
    (run / blind_reading.KEY).write_text("{}")
    assert_refused(json.dumps(answered(key)), f"{run / blind_reading.KEY}: it is not the key of a reading sheet")
    assert records(run) == {}


# ----------------------------------------------------------------------------------------------------------- a browser

SCRIPT = """
const said = location.hash ? JSON.parse(decodeURIComponent(location.hash.slice(1))) : { errors: [], loads: 0 };
window.addEventListener("error", (event) => said.errors.push(event.message));
document.addEventListener("securitypolicyviolation", (event) => said.errors.push(event.blockedURI));
const saved = [];
URL.createObjectURL = (blob) => { saved.push(blob); return "blob:none"; };
HTMLAnchorElement.prototype.click = function () { said.file = this.download; };
window.addEventListener("load", async () => {
  const element = (name) => document.getElementById(name);
  const type = (text) => {
    element("read").focus();
    element("read").value = text;
    element("read").dispatchEvent(new Event("input"));
  };
  const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  const place = () => [element("place").textContent, element("count").textContent, element("progress").value];
  said.loads += 1;
  if (said.loads === 1) {
    said.begin = place();
    said.options = [...element("classes").options].map((option) => option.value);
    const number = Number(element("picture").alt.match(/\\d+/)[0]);
    type(" 7 ");
    element("none").focus();
    press("r");  // the first one: 7, real
    said.pressed = [document.activeElement.value, number];
    element("item").requestSubmit();
    element("none").click();
    press("D");  // the second one: no character, drawn
    element("item").requestSubmit();
    document.querySelector("[data-text='3']").click();
    document.querySelector("[value=true]").click();  // the third one: 3, real
    element("item").requestSubmit();
    type("r");  // which is text there, and no choice
    press("d");
    said.middle = place();
    location.href = `?again#${encodeURIComponent(JSON.stringify(said))}`;
    return;
  }
  said.restored = [...place(), element("read").value];
  element("back").click();
  said.back = [...place(), element("read").value, document.querySelector("[name=real]:checked").value];
  for (let i = 2; i < 11; i += 1) element("item").requestSubmit();
  said.last = place();
  element("item").requestSubmit();
  said.first_open = place();
  element("save").click();
  said.text = element("text").value;
  said.saved = await saved[0].text();
  const named = (input) => input.labels?.length || input.getAttribute("aria-label") || input.textContent;
  said.unnamed = [...document.querySelectorAll("input,button,textarea,progress")].filter((e) => !named(e)).length;
  said.alt = element("picture").alt;
"""


@pytest.mark.slow
def test_a_sheet_is_read_in_a_browser_and_scored(run, tmp_path):
    evaluate(run)
    key, text = key_of(run), (run / blind_reading.PAGE).read_text(encoding="utf-8")
    options = ["--disable-background-networking", "--disable-sync", "--disable-component-update", "--no-first-run"]
    options += ["--window-size=1200,900", "--virtual-time-budget=20000"]
    said = said_in_a_browser(text, f"{SCRIPT}{SAY}}});", tmp_path, *options)
    assert said["unnamed"] == 0
    assert said["begin"] == ["Picture 1 of 12", "0 answered", 0] and said["options"] == [str(y) for y in range(10)]
    assert said["pressed"] == ["true", 1] and said["middle"] == ["Picture 4 of 12", "3 answered", 3]
    assert said["loads"] == 2 and said["restored"] == [*said["middle"], "r"]
    assert said["back"] == ["Picture 3 of 12", "3 answered", 3, "3", "true"]
    assert said["last"][0] == "Picture 12 of 12" and said["first_open"][0] == said["alt"] == "Picture 4 of 12"
    assert said["text"] == said["saved"] and said["file"] == f"reading_sheet_answers-{key.sheet[:8]}.json"

    answers = tmp_path / said["file"]
    answers.write_text(said["saved"], encoding="utf-8")
    given = [("7", True), ("", False), ("3", True), ("r", None)] + [(None, None)] * 8
    assert answers_of(json.loads(said["saved"]), key) == [Answer(*each) for each in given]
    words = [sys.executable, "experiments/evaluate.py", f"run={run}", "metric=reading_sheet"]
    words += [f"reading_sheet.answers={answers}", "device=cpu"]
    scored = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert (
        scored.returncode == 0 and "of 12 pictures 8 were not read and 9 not judged real or generated" in scored.stdout
    ), scored
    of_samples = [
        answer for item, answer in zip(key.items, given, strict=True) if item.sample and answer[0] is not None
    ]
    record = records(run)[f"reading_sheet-read_{N}"]
    assert record["value"] == sum(text != "" for text, _ in of_samples) / len(of_samples)
    assert record["answered"] == len(of_samples) and record["real_n"] == 4 - len(of_samples)


def test_samples_beyond_the_range_are_shown_clipped_and_told(run, monkeypatch, capsys):
    draw = TrainedSampler.draw

    def far(self: TrainedSampler, numbers: Any, callback: Any = None) -> Tensor:
        x = draw(self, numbers) * 0 + 3
        self.range.note(x)
        return x

    monkeypatch.setattr(TrainedSampler, "draw", far)
    evaluate(run)
    key, pictures = key_of(run), content((run / blind_reading.PAGE).read_text())["pictures"]
    assert {decoded(uri).min() for uri, item in zip(pictures, key.items, strict=True) if item.sample} == {255}
    assert "lie outside [-1, 1]" in capsys.readouterr().out
