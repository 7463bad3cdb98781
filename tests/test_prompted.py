"""ddpm/metrics/scenes.py and metric=scenes: what is right is counted by hand, beside its ceiling and chance."""

import json
import math
import re

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from test_cli import call, typed  # noqa: F401
from test_reader import true

from ddpm import cli
from ddpm.commands.evaluate import evaluating, scene_attributes
from ddpm.commands.evaluate.context import EvaluationContext
from ddpm.config import InvalidInput, compose
from ddpm.data import ImageData, Scenes, scenes
from ddpm.data.scenes import Layout, Solid, drawn, parse
from ddpm.diffusion import GaussianDiffusion
from ddpm.figures import plots
from ddpm.figures.images import to_float
from ddpm.metrics.intervals import wilson
from ddpm.metrics.reader import Reading, read
from ddpm.metrics.scenes import cases, chance_of_pairs, judge_all, judged, parts_of, results
from ddpm.runs.directory import Run
from ddpm.samplers import DDIM
from ddpm.schedules import cosine
from ddpm.sources.trained import TrainedSampler
from models.reader import Reader
from models.text import TextEncoder
from models.tokenizer import learn
from models.unet import UNet

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def layout() -> Layout:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "BLOCK", 40)
        return drawn(40, (2, 3), seed=3)


def seeing(*solids: tuple[str, float, float]) -> Reading:
    """What a reader says of one picture: solids in words, surer of each than of the next, and where."""
    reading = Reading(*(torch.full((1, 32), -1.0) for _ in range(3)), torch.zeros(1, 32, 2))
    for i, (words, x, z) in enumerate(solids):
        solid = parse(f"{words} left of a red cube").solids[0]
        pair = 4 * solid.colour + solid.shape
        reading.presence[0, pair], reading.place[0, pair] = 9.0 - i, torch.tensor([x, z])
        reading.size[0, pair], reading.material[0, pair] = 2.0 * solid.size - 1, 2.0 * solid.material - 1
    return reading


PROMPT = parse("a small matt red sphere left of a large shiny blue cube")
SPHERE, CUBE = ("a small matt red sphere", 0.0, 0.0), ("a large shiny blue cube", 2.0, 1.0)


@pytest.mark.parametrize(
    ("picture", "all_right", "pairs", "size", "material", "relation"),
    [
        ([SPHERE, CUBE], True, True, [True, True], [True, True], [True]),
        ([CUBE, SPHERE], True, True, [True, True], [True, True], [True]),
        ([SPHERE, CUBE, ("a large matt green cone", 1, 1)], True, True, [True, True], [True, True], [True]),
        ([SPHERE, ("a large shiny blue cube", -2.0, 1.0)], False, True, [True, True], [True, True], [False]),
        ([SPHERE, ("a large matt blue cube", 2.0, 1.0)], False, True, [True, True], [True, False], [True]),
        ([("a large matt red sphere", 0.0, 0.0), CUBE], False, True, [False, True], [True, True], [True]),
        ([SPHERE, ("a large shiny blue cone", 2.0, 1.0)], False, False, [True], [True], []),
        ([("a small matt blue sphere", 0, 0), ("a large shiny red cube", 2, 1)], False, False, [], [], []),
    ],
)
def test_what_is_right_of_a_prompt_in_a_picture(picture, all_right, pairs, size, material, relation):
    found = judged(seeing(*picture), 0, PROMPT)
    assert found == (all_right, pairs, tuple(size), tuple(material), tuple(relation))


def test_what_a_prompt_does_not_say_is_not_counted():
    wrong = seeing(("a large shiny red sphere", 0, 0), ("a small matt blue cube", 2, 1))
    assert judged(wrong, 0, PROMPT).all is False
    short = judged(wrong, 0, parse("a red sphere left of a blue cube"))
    assert short == (True, True, (), (), (True,))
    sized = judged(wrong, 0, parse("a small red sphere left of a large blue cube"))
    assert sized.size == (False, False) and sized.material == () and not sized.all
    assert results([short], [short], 0.1).keys() == {"all", "pairs", "relation"}


def test_each_other_solid_has_a_relation_to_the_first():
    prompt = parse("a red sphere left of a blue cube and behind a green cone")
    picture = [("a small matt red sphere", 0, 0), ("a small matt blue cube", 2, 0), ("a small matt green cone", 0, 2)]
    assert judged(seeing(*picture), 0, prompt).relation == (True, False)
    assert judged(seeing(*picture[:2], ("a small matt cyan cone", 0, -2)), 0, prompt).relation == (True,)


def test_shares_have_their_intervals_and_the_ceiling_beside_them():
    right, half = (
        judged(seeing(SPHERE, CUBE), 0, PROMPT),
        judged(seeing(SPHERE, ("a small matt red cone", 1, 1)), 0, PROMPT),
    )
    drawn, real = [right, half, half, right, half], [right, right, right, half]
    found = results(drawn, real, chance=0.25)
    assert {what: (result.value, result.real_vs_real) for what, result in found.items()} == {
        "all": (0.4, 0.75), "pairs": (0.4, 0.75), "size": (1.0, 1.0), "material": (1.0, 1.0), "relation": (1.0, 1.0)
    }  # fmt: skip
    assert (found["all"].low, found["all"].high) == wilson(2, 5) and found["all"].interval == "wilson"
    assert found["size"].more["cases"] == 7 and found["size"].more["real_n"] == 7
    assert (found["pairs"].more["real_low"], found["pairs"].more["real_high"]) == wilson(3, 4)
    assert found["pairs"].more["chance"] == 0.25 and "chance" not in found["all"].more
    assert found["pairs"].words == (
        "all colours and shapes: 2 of 5, 40.0% (95%: 11.8% to 76.9%); of held-out pictures, the ceiling: "
        "3 of 4, 75.0% (95%: 30.1% to 95.4%); by chance 25.00%"
    )
    none = results([right], [judged(seeing(("a small matt cyan cone", 0, 0), CUBE), 0, PROMPT)], 0.0)
    assert none["relation"].real_vs_real is None and "ceiling: none" in none["relation"].words


def test_what_is_drawn_as_well_as_real_pictures_reaches_the_ceiling(layout):
    """Whatever the reader: one that is never wrong, and one that knows nothing."""
    prompts = [layout.scene(row) for row in range(40)]
    perfect = judge_all(true(layout), prompts)
    assert all(all(right) for right in cases(perfect).values())
    torch.manual_seed(0)
    x = to_float(scenes.render(layout, 8).picture)
    unknowing = judge_all(read(Reader(8, channels=4, blocks=1).eval(), x), prompts)
    for real in (perfect, unknowing):
        for result in results(real, real, 0.0).values():
            assert result.value == result.real_vs_real
    assert cases(unknowing)["pairs"].count(True) < 5


@pytest.mark.equation("Chance (pairs)")
def test_captions_in_another_order_are_right_by_chance():
    layout = drawn(2000, (2,), seed=6)
    assert chance_of_pairs([layout.scene(0)]) == 1 / 496
    three = PROMPT._replace(solids=(*PROMPT.solids, Solid(0, 0)), relations=(0, 0))
    assert chance_of_pairs([PROMPT, three]) == pytest.approx((1 / 496 + 1 / math.comb(32, 3)) / 2)
    pairs = (4 * layout.attributes[:, :2, 0] + layout.attributes[:, :2, 1]).sort(1).values
    counts = torch.bincount(32 * pairs[:, 0] + pairs[:, 1])
    alike = (counts * (counts - 1)).sum().item() / (2000 * 1999)  # of all captions for all other pictures
    assert alike == pytest.approx(1 / 496, rel=0.05)
    some = layout.rows(slice(400))
    shuffled = [layout.scene(row) for row in torch.arange(400).roll(1).tolist()]
    found = cases(judge_all(true(some), shuffled))
    assert sum(found["pairs"]) == (pairs[:400] == pairs[:400].roll(1, 0)).all(1).sum()
    low, high = wilson(sum(found["pairs"]), 400)
    assert low <= 1 / 496 <= high < 0.02
    low, high = wilson(sum(found["size"]), len(found["size"]))
    assert low <= 0.5 <= high and len(found["size"]) > 20


def test_combinations_that_are_held_out_are_told_apart():
    held_out, composed = torch.tensor([2, 3, 5, 8, 9]), torch.tensor([3, 9])
    parts = parts_of(held_out, composed)
    assert {name: numbers.tolist() for name, numbers in parts.items()} == {"seen": [2, 5, 8], "composed": [3, 9]}
    assert parts_of(held_out, composed[:0]).keys() == {"seen"} and parts_of(composed, composed).keys() == {"composed"}


def test_wrong_pictures_are_framed(tmp_path):
    plain = torch.zeros(1, 8, 8)
    pixels = []
    for right in (True, False):
        plots.prompted(
            tmp_path / "p.png", [("a red cube left of a very long description", [(plain, True), (plain, right)])]
        )
        picture = np.asarray(Image.open(tmp_path / "p.png").convert("RGB")).astype(int)
        pixels.append(int((picture[..., 0] - picture[..., 1] > 150).sum()))
    assert pixels[0] == 0 and pixels[1] > 100


# ------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def composed() -> DictConfig:
    few = ["scenes.count=40", "scenes.epochs=1", "reader.channels=4", "device=cpu", "sampler.steps=2"]
    return compose("evaluate", ["run=a/b/c", "metric=scenes", *few])


@pytest.fixture
def told(tmp_path, monkeypatch, composed):
    """Scenes of 8x8, and what is evaluated of a network that is told of them in words."""
    monkeypatch.setattr(scenes, "BLOCK", 60)

    def told(*words: str, words_too: bool = True, **options: object) -> EvaluationContext:
        given = {"count": 60, "image_size": 8, "without": ["red cube", "blue cone"]} | options
        data = Scenes(tmp_path / "data", **given)
        tokenizer = learn(data.captions, vocabulary=540, length=40)
        data = data.in_words(tokenizer) if words_too else data
        torch.manual_seed(0)
        text = TextEncoder(tokenizer.vocabulary, 40, channels=8, layers=1, heads=2) if words_too else None
        model = UNet(8, data.shape[0], channels=8, channel_mults=(1,), blocks=1, attention_resolutions=(8,), groups=4,
                     text=text)  # fmt: skip
        for p in model.parameters():
            if p.ndim > 1:
                torch.nn.init.normal_(p, std=0.2)
        source = TrainedSampler(GaussianDiffusion(cosine(T=20)), model, DDIM(2), data.shape, 0, CPU, data=data)
        config = OmegaConf.merge(composed, OmegaConf.from_dotlist(list(words)))
        run = Run(tmp_path / "runs" / "study" / "hash")
        run.path.mkdir(parents=True, exist_ok=True)
        return EvaluationContext(config, source, run, OmegaConf.create(), 1, data)

    return told


def test_what_is_drawn_is_told_each_caption_of_a_part_in_turn(told):
    context = told()
    source, data = context.source, context.every
    composed = source.conditioned_on(data.composed)
    numbers = [0, 1, len(data.composed)]
    tokens = composed.condition(numbers).tokens
    assert torch.equal(tokens, data.tokens[data.composed[[0, 1, 0]]])
    assert torch.equal(source.condition([0]).tokens, data.tokens[data.held_out[:1]])  # as it was
    x, _ = context.samples([0, 1], 0, conditions_of=data.composed)
    assert torch.equal(x, composed.draw([0, 1])) and not torch.equal(x, context.samples([0, 1], 0)[0])
    with pytest.raises(ValueError, match="no samples"):
        source.conditioned_on(data.composed[:0])


@pytest.mark.slow
def test_both_parts_are_recorded_and_drawn(told, capsys):
    context = told("n=5", "seeds=2")
    planned = scene_attributes.measure_scenes(context)
    seen, composed = (n for n in parts_of(context.every.held_out, context.every.composed).values())
    assert planned.evaluations == 2 * (2 * (5 * 2 + 16)) and "trained first, on 40 scenes" in planned.plan
    planned.carry_out()
    records = json.loads((context.run.path / "evaluation.json").read_text())
    assert list((context.run.path.parent.parent / "judges").glob("reader-8x8-solids2-40x1-*.safetensors"))
    names = {re.sub("reader-[0-9a-f]{6}", "R", name) for name in records}
    assert {
        "scenes_seen-all_R_5",
        "scenes_composed-all_R_5",
        "scenes_seen-pairs_R_5",
        "scenes_composed-pairs_R_5",
    } <= names
    record = next(record for name, record in records.items() if name.startswith("scenes_composed-all"))
    assert (record["n"], record["seeds"], record["real_n"]) == (5, [0, 1], min(5, len(composed)))
    assert record["value"] == sum(record["values"]) / 2 and record["interval"] == "seeds"
    assert Image.open(context.run.path / "scenes.png").height > 200 and len(seen) > 0
    assert "pairs that no training scene shows: " in capsys.readouterr().out
    assert "trained first" not in scene_attributes.measure_scenes(context).plan  # it is kept


def test_pictures_in_the_place_of_samples_reach_the_ceiling(told, monkeypatch):
    context = told("n=3")

    def real(numbers: list[int], seed: int, conditions_of: torch.Tensor) -> tuple[torch.Tensor, None]:
        return context.every.batch(conditions_of[torch.tensor(numbers) % len(conditions_of)]).x, None

    monkeypatch.setattr(context, "samples", real)
    scene_attributes.measure_scenes(context).carry_out()
    records = json.loads((context.run.path / "evaluation.json").read_text()).values()
    assert len(records) >= 4 and all(record["value"] == record["real_vs_real"] for record in records)


def test_what_has_no_prompts_of_scenes_is_refused(told):
    with pytest.raises(InvalidInput, match="trained without words; train one with experiment=text_scenes data=scenes"):
        scene_attributes.measure_scenes(told(words_too=False))
    with pytest.raises(InvalidInput, match="allowed: 3"):
        scene_attributes.measure_scenes(told(channels=1))
    with pytest.raises(InvalidInput, match="held"):
        scene_attributes.measure_scenes(told(validation=0.0, without=[]))
    context = told()
    config = context.config
    for key, value, words in (("n", 0, "n=0 must be"), ("scenes", 3, "scenes=3 must hold settings")):
        other = OmegaConf.merge(config)
        other[key] = value
        with pytest.raises(InvalidInput, match=words):
            evaluating._metrics(other)
    for key, words in (("count", r"scenes\.count=0 must be"), ("epochs", r"scenes\.epochs=x must be")):
        context.config = OmegaConf.merge(config, {"scenes": {key: 0 if key == "count" else "x"}})
        with pytest.raises(InvalidInput, match=words):
            scene_attributes.measure_scenes(context)
    context.config = config
    context.every = ImageData("cubes", "all", torch.zeros(9, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(InvalidInput, match="cubes has none; train with data=scenes"):
        scene_attributes.measure_scenes(context)


def test_samples_that_are_no_pictures_are_refused(told, monkeypatch):
    context = told("n=2")
    monkeypatch.setattr(context, "samples", lambda *given, **more: (torch.full((2, 3, 8, 8), math.nan), None))
    with pytest.raises(InvalidInput, match="2 of 2 samples hold NaN"):
        scene_attributes.measure_scenes(context).carry_out()


@pytest.mark.slow
def test_a_run_told_in_words_is_measured_as_it_is_typed(call, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(scenes, "BLOCK", 60)
    data = [f"data.root={tmp_path}", "data.count=60", "data.image_size=8", "data.without=[red cube]"]
    network = ["model.channels=8", "model.groups=4", "model.channel_mults=[1]", "model.blocks=1"]
    network += ["model.attention_resolutions=[4]", "text.channels=8", "text.layers=1", "text.heads=2"]
    short = ["trainer.steps=2", "trainer.seconds=null", "trainer.batch_size=4", "trainer.warmup=1"]
    trained = call(cli.train, "experiment=text_scenes", "data=scenes", *data, *network, *short, f"runs={tmp_path}/runs")
    assert trained.code == 0, trained
    (run,) = (tmp_path / "runs" / "default").iterdir()
    few = ["n=2", "metric=scenes", "scenes.count=40", "scenes.epochs=1", "reader.channels=4", "device=cpu"]
    for words, steps in (([], 2), (["guidance=classifier_free", "guidance.w=3"], 3)):
        measured = call(cli.evaluate, f"run={run}", *few, f"sampler.steps={steps}", *words)
        assert measured.code == 0 and "pairs that no training scene shows: everything in the prompt" in measured.out
    records = json.loads((run / "evaluation.json").read_text())
    record = next(values for name, values in records.items() if name.startswith("scenes_composed-all_reader-"))
    assert record["guidance"]["w"] == 3 and record["steps"] == 3 and record["before"][0]["steps"] == 2
    refused = call(cli.evaluate, f"run={run}", "metric=scenes", "n=0")
    assert refused.code == 2 and "n=0 must be an integer >= 1" in refused.err
