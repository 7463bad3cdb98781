"""ddpm/study/report.py: from arms to findings, checked by hand; and what `ddpm-study report` and `status` do."""

import json
import math
import random
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats
from test_study_reading import arms_in, write_run

from ddpm.commands.study import studying
from ddpm.config import InvalidInput
from ddpm.data import SwissRoll
from ddpm.figures import images
from ddpm.study import figures, formatting, page
from ddpm.study.findings import Findings
from ddpm.study.report import HELD_OUT, findings
from ddpm.study.statistics import BETTER, HIGHER, LOWER, NO_DIFFERENCE, NOT_DECIDED, WORSE, holm, p_of_no_difference

FRECHET, RECOGNITION, BY_SNR = "frechet_pixels_64_train", "recognition_logistic_64_train", "loss_by_snr_w1_9_held_out"
PURITY = "latent_purity-k10_64_held_out"
T_4 = 2.7764451  # Student's, 97.5 %, of 4 degrees of freedom


def found_in(folder: Path, **options: Any) -> Findings:
    """Findings, where a network of c channels has 1,000 c parameters and c / 10 GFLOP."""
    arms, unread = arms_in(folder)
    options = {"network": network, "schedule": schedule, **options}
    return findings(folder, arms, unread, **options)


def network(settings: Mapping[str, Any]) -> tuple[int, float]:
    return 1000 * settings["model"]["channels"], settings["model"]["channels"] / 10


def schedule(settings: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    return [0.0, 1.0], [1.0, settings["schedule"].get("s", 0.5)]


def frechet(value: float | None, **others: Any) -> dict[str, Any]:
    return {FRECHET: {"value": value, **others}}


def write_arm(folder: Path, lr: float, results: Sequence[Mapping[str, Any]], **others: Any) -> list[Path]:
    """Runs of a learning rate, one for each result: seeds 0, 1, ..."""
    values = {"optimizer.lr": lr, **others.pop("values", {})}
    typed = others.pop("typed", [f"optimizer.lr={lr}"])
    day = f"2026-01-{len(list(folder.iterdir())) + 1:02}" if folder.exists() else "2026-01-01"
    return [
        write_run(folder, f"{lr}-{seed}", typed, seed, values, evaluation=result, started=f"{day}T{seed:02}", **others)
        for seed, result in enumerate(results)
    ]


def two_arms(folder: Path, **second: Any) -> Findings:
    """A plain study, whose second arm is as said."""
    write_arm(folder, 0.1, [frechet(5 + s) for s in range(5)])
    write_arm(folder, 0.2, [frechet(4 + s) for s in range(5)], **second)
    return found_in(folder)


# ------------------------------------------------------------------------------------------------------------ measures


def test_means_and_differences_by_hand(tmp_path):
    """Differences -1, -1, -1, -1, -0.5: s = sqrt(0.05)."""
    folder = tmp_path / "my-study"
    a, b = [5, 6, 7, 8, 9], [4, 5, 6, 7, 8.5]
    share = [0.5, 0.5, 0.7, 0.7, 0.6]

    def results(values: Sequence[float], gain: float) -> list[dict[str, Any]]:
        return [
            frechet(value, real_vs_real=1.0 + s, low=value - 0.1 * s, high=value + 0.1 * s)
            | {RECOGNITION: {"value": share[s] + gain, "low": None, "high": None, "real_vs_real": 0.9}}
            for s, value in enumerate(values)
        ]

    write_arm(folder, 0.1, results(a, 0), losses=[0.5, 0.25], question="Which?")
    write_arm(folder, 0.2, results(b, 0.1), losses=[0.5, 0.375])
    found = found_in(folder)
    assert found.study == "my-study" and found.baseline == "lr=0.1"
    first, second, third = found.measures
    assert (first.name, second.name, third.name) == (FRECHET, RECOGNITION, HELD_OUT)
    of = first.arms["lr=0.1"]
    half = T_4 * math.sqrt(2.5) / math.sqrt(5)
    assert (of.mean, of.low, of.high) == pytest.approx((7, 7 - half, 7 + half)) and of.points == dict(enumerate(a))
    difference = first.differences["lr=0.2"]
    half = T_4 * math.sqrt(0.05) / math.sqrt(5)
    assert (difference.mean, difference.low, difference.high) == pytest.approx((-0.9, -0.9 - half, -0.9 + half))
    assert difference.verdict == BETTER and list(first.differences) == ["lr=0.2"]
    assert first.real == 3 and first.noise == pytest.approx(0.4)
    assert first.unit == "" and FRECHET in first.note
    assert second.unit == "%" and second.better == "higher" and second.real == pytest.approx(90)
    assert second.noise is None and second.arms["lr=0.2"].mean == pytest.approx(70)
    assert second.differences["lr=0.2"].mean == pytest.approx(10)
    assert second.differences["lr=0.2"].verdict == NO_DIFFERENCE  # all seeds gain the same: only the sign is known
    assert third.arms["lr=0.1"].mean == 0.25 and third.differences["lr=0.2"].mean == 0.125
    assert third.differences["lr=0.2"].verdict == NO_DIFFERENCE  # nor here
    assert found.verdict[0].startswith("Frechet distance of the baseline, lr=0.1: 7.0 (5.0 to 9.0)")
    assert "lr=0.2 is better, by −0.90 (−1.18 to −0.62)." in found.verdict
    assert found.design[0] == "2 arms, 5 training seeds (0 to 4), 10 runs." and "Varied: lr: 0.1, 0.2." in found.design
    fixed = next(sentence for sentence in found.design if sentence.startswith("The same in all"))
    assert "digits, 1,797 images of 8x8" in fixed and "40 steps" in fixed and "learning rate" not in fixed
    assert found.failures == found.warnings == () and [arm.flags for arm in found.arms] == [(), ()]
    assert [arm.seconds for arm in found.arms] == [10.0, 10.0] and found.arms[0].parameters == 8000
    assert found.arms[1].commands[3] == "ddpm-train optimizer.lr=0.2 seed=3"


def test_the_measure_that_was_asked_for_is_first(tmp_path):
    results = [frechet(5 + s) | {RECOGNITION: {"value": 0.5 + s / 100}} for s in range(5)]
    write_arm(tmp_path, 0.1, results, losses=[0.1])
    write_arm(tmp_path, 0.2, results, losses=[0.1])
    assert [m.name for m in found_in(tmp_path).measures] == [FRECHET, RECOGNITION, HELD_OUT]
    found = found_in(tmp_path, measure="recog")
    assert [m.name for m in found.measures] == [RECOGNITION, FRECHET, HELD_OUT]
    assert found.verdict[0].startswith("Recognised samples of the baseline")
    assert "No difference to it is shown for lr=0.2." in found.verdict
    assert found_in(tmp_path, measure=HELD_OUT).measures[0].name == HELD_OUT
    there = f"{FRECHET}, {RECOGNITION}, {HELD_OUT}"
    with pytest.raises(ValueError, match=f"measure=inception: no run has it; there: {there}"):
        found_in(tmp_path, measure="inception")


def test_shares_that_are_what_was_asked_for_are_a_measure_of_their_own(tmp_path):
    for lr, accuracy in ((0.1, 0.5), (0.2, None)):
        asked = {} if accuracy is None else {"accuracy": accuracy}
        write_arm(tmp_path, lr, [{RECOGNITION: {"value": 0.9} | asked} for _ in range(5)])
    recognised, named = found_in(tmp_path).measures
    assert named.name == "asked_logistic_64_train" and named.title == "Samples classified as requested"
    assert named.arms.keys() == {"lr=0.1"} and named.arms["lr=0.1"].mean == 50 and recognised.arms["lr=0.2"].mean == 90


@pytest.mark.parametrize(
    ("protocol", "title", "mean"),
    [
        ("latent_purity-k10_64_held_out", "Class structure of codings: purity", 25),
        ("latent_silhouette_64_held_out", "Class structure of codings: silhouette", 0.25),
        ("augmentation_10x10_64_held_out", "Accuracy gained by generated images", 25),
        ("scenes_composed-all_reader-1a2b3c_64", "Matched in full, of combinations held out", 25),
        ("scenes_seen-relation_reader-1a2b3c_64", "Correct relations of solids", 25),
        ("psnr_64_held_out", "Reconstruction (PSNR)", 0.25),
        ("bits_per_code_64_held_out", "Bits that a code needs", 0.25),
    ],
)
def test_measures_of_codings_are_in_a_report(protocol, title, mean, tmp_path):
    write_arm(tmp_path, 0.1, [{protocol: {"value": 0.25}}])
    (measure,) = found_in(tmp_path).measures
    (arm,) = measure.arms.values()
    assert (measure.title, arm.mean) == (title, mean)


def test_of_a_measure_of_which_neither_way_is_better_no_arm_is_better(tmp_path):
    """Differences of +10 % and -10 %, all alike but for one, in eight seeds: both are results."""
    for lr, value in ((0.1, 0.5), (0.2, 0.6), (0.3, 0.4)):
        results = [{PURITY: {"value": value + 0.01 * (s == 1) * (lr - 0.1)}} for s in range(8)]
        write_arm(tmp_path, lr, results, losses=[0.1])
    assert [m.name for m in found_in(tmp_path).measures] == [HELD_OUT, PURITY]  # the first decides
    found = found_in(tmp_path, measure="latent_purity")
    (first, *_) = found.measures
    assert {label: of.verdict for label, of in first.differences.items()} == {"lr=0.2": HIGHER, "lr=0.3": LOWER}
    said = " ".join(found.verdict)
    assert "(neither way is better)." in said and "Higher: lr=0.2 (+10" in said and "Lower: lr=0.3 (−" in said
    assert "worse" not in said.lower() and not found.fronts
    text, shown = formatting.markdown(found), page.page(found)
    assert "purity (%), neither way is better |" in text and "**higher**" in text and "**better**" not in text
    assert '<td class="verdict decided">higher</td>' in shown and "verdict better" not in shown
    axes = Figure().subplots()
    figures.differences(axes, first, ["lr=0.2", "lr=0.3"], found.against)
    assert axes.get_title("left") == axes.get_title("right") == ""


def test_of_one_measure_by_two_judges_that_of_most_runs_is_first(tmp_path):
    another = "frechet_classifier-0_64_train"
    few = [{another: frechet(7)[FRECHET]} if seed < 2 else {} for seed in range(5)]
    for lr in (0.1, 0.2):
        write_arm(tmp_path, lr, [more | frechet(5 + seed) for seed, more in enumerate(few)])
    found = found_in(tmp_path)
    assert [m.name for m in found.measures] == [FRECHET, another]
    assert [m.title for m in found.measures] == [
        "Frechet distance (pixels_64_train)", "Frechet distance (classifier-0_64_train)"
    ]  # fmt: skip
    assert found.verdict[0].startswith("Frechet distance (pixels_64_train) of the baseline, lr=0.1: 7.0")


def test_held_out_losses_are_compared_only_on_one_scale(tmp_path):
    write_arm(tmp_path, 0.1, [None] * 2, losses=[0.1, 0.2])
    write_arm(tmp_path, 0.2, [None] * 2, losses=[0.1, None])  # the last is what counts
    of = found_in(tmp_path).measures[0].arms
    assert of["lr=0.1"].mean == 0.2 and math.isnan(of["lr=0.2"].mean)
    write_arm(tmp_path, 0.3, [None] * 2, losses=[0.1], values={"diffusion.target": "eps"})
    assert found_in(tmp_path).measures == ()


def test_values_that_are_none_or_not_finite(tmp_path):
    write_arm(tmp_path, 0.1, [frechet(5 + s) for s in range(5)])
    write_arm(tmp_path, 0.2, [frechet(4 + s + 0.1 * (s % 2)) for s in range(5)])
    write_arm(tmp_path, 0.3, [frechet(math.nan if s == 2 else 9.0 + s * s) for s in range(5)])
    write_arm(tmp_path, 0.4, [frechet(None), frechet(3.0), {FRECHET: {}}, {"colour": {"value": 1.0}}, {}])
    write_arm(tmp_path, 0.5, [frechet(None)])
    measure, *others = found_in(tmp_path).measures
    assert others == [] and list(measure.arms) == ["lr=0.1", "lr=0.2", "lr=0.3", "lr=0.4", "lr=0.5"]
    verdicts = {label: of.verdict for label, of in measure.differences.items()}
    assert verdicts == {"lr=0.2": BETTER, "lr=0.3": NOT_DECIDED, "lr=0.4": NOT_DECIDED, "lr=0.5": NOT_DECIDED}
    assert math.isnan(measure.arms["lr=0.3"].mean) and measure.arms["lr=0.4"].points[1] == 3.0
    studying.report([str(tmp_path)])  # is shown, too


def test_too_few_seeds_are_told(tmp_path):
    write_arm(tmp_path, 0.1, [frechet(5)])
    write_arm(tmp_path, 0.2, [frechet(4)])
    found = found_in(tmp_path)
    assert "one training seed (0)" in found.design[0]
    assert found.verdict[1:] == (
        "Not decided, for fewer than 5 seeds in which both are measured, or because some failed: lr=0.2.",
    )


def errors_by_snr(errors: Sequence[float | None], low: float, high: float, value: float = 9.0) -> dict[str, Any]:
    log_snr = [-2.5, -1.5, -0.5, 0.5, 1.5]
    return {BY_SNR: {"value": value, "value_log_snr": [low, high], "log_snr": log_snr, "eps": errors}}


def test_errors_are_averaged_over_the_log_snr_that_all_arms_reach(tmp_path):
    """All reach -2.5 as well, but two of them lie below their range there."""
    write_arm(tmp_path, 0.1, [errors_by_snr([99.0, 1.0, 2.0, 3.0, None], -2, 1)] * 2)
    write_arm(tmp_path, 0.2, [errors_by_snr([5.0, 6.0, 7.0, None, None], -3, 0)] * 2, values={"schedule.s": 0.1})
    write_arm(tmp_path, 0.3, [errors_by_snr([8.0, 1.0, 0.0, 4.0, None], -2, 1)] * 2)
    write_arm(tmp_path, 0.4, [{BY_SNR: {"value": 0.001}}] * 2)  # of an unknown range
    found = found_in(tmp_path)
    (measure,) = found.measures
    assert {label: of.mean for label, of in measure.arms.items()} == {"lr=0.1": 1.5, "lr=0.2": 6.5, "lr=0.3": 0.5}
    assert "the mean over log-SNR -2 to 0" in measure.note
    assert found.by_snr["lr=0.1"].x == (-2.5, -1.5, -0.5, 0.5)
    assert found.by_snr["lr=0.1"].y == (99.0, 1.0, 2.0, 3.0)
    assert found.by_snr["lr=0.2"].x == (-2.5, -1.5, -0.5) and "lr=0.4" not in found.by_snr
    assert set(found.schedules) == {"lr=0.1", "lr=0.2", "lr=0.3", "lr=0.4"}
    assert found.schedules["lr=0.2"].y == (1.0, 0.1)
    write_arm(tmp_path, 0.5, [errors_by_snr([None, None, None, None, 1.0], 1, 2)] * 2)
    assert found_in(tmp_path).measures == ()  # nothing that all have


def test_a_result_by_other_settings_is_told(tmp_path):
    ddim = {"weights": "ema", "sampler": "DDIM", "sampler_settings": {"steps": 50}, "checkpoint": 40}
    write_arm(tmp_path, 0.1, [frechet(5 + s, **ddim | {"checkpoint": 40 + s}) for s in range(5)])
    assert "different settings" not in found_in(tmp_path).measures[0].note
    write_arm(tmp_path, 0.2, [frechet(5 + s, **ddim | {"sampler": "Heun"}) for s in range(5)])
    assert "different settings" in found_in(tmp_path).measures[0].note


# ------------------------------------------------------------------------------------------------------------ baseline


def test_the_baseline(tmp_path):
    """What is asked for, else what the study names, else the arm that was begun first."""
    for lr in (0.3, 0.1, 0.2):
        write_arm(tmp_path, lr, [frechet(5 + lr)] * 5)
    found = found_in(tmp_path)
    assert found.baseline == "lr=0.3" and [arm.label for arm in found.arms] == ["lr=0.3", "lr=0.1", "lr=0.2"]
    assert found.measures[0].differences["lr=0.1"].mean == pytest.approx(-0.2)
    found = found_in(tmp_path, baseline="lr=0.2")
    assert [arm.label for arm in found.arms] == ["lr=0.2", "lr=0.3", "lr=0.1"]
    assert list(found.measures[0].arms) == ["lr=0.2", "lr=0.3", "lr=0.1"]
    assert found.measures[0].differences["lr=0.1"].mean == pytest.approx(-0.1)
    with pytest.raises(ValueError, match=r"baseline=lr=7 is no arm .*; there: lr=0\.3; lr=0\.1; lr=0\.2"):
        found_in(tmp_path, baseline="lr=7")


def test_the_baseline_and_the_question_that_a_study_names(tmp_path):
    named = {"baseline": "lr=0.2", "question": "Which rate?"}
    for lr in (0.1, 0.2):
        write_arm(tmp_path, lr, [frechet(5 + lr)] * 5, values=named)
    found = found_in(tmp_path)
    assert found.baseline == "lr=0.2" and found.question == "Which rate?"
    assert found_in(tmp_path, baseline="lr=0.1").baseline == "lr=0.1"
    write_arm(tmp_path, 0.3, [frechet(5)] * 5, values={"baseline": "lr=0.3", "question": "Or?"})
    found = found_in(tmp_path)
    assert found.baseline == "lr=0.1" and found.question is None  # they disagree


def test_a_baseline_that_was_not_measured_is_told(tmp_path):
    write_arm(tmp_path, 0.1, [None] * 5)
    write_arm(tmp_path, 0.2, [frechet(5 + s) for s in range(5)])
    found = found_in(tmp_path)
    assert found.measures[0].differences == {}
    assert found.verdict == (
        "Frechet distance was not measured for the baseline, lr=0.1: nothing is compared with it.",
    )


# -------------------------------------------------------------------------------------------------------------- blocks


def write_blocks(
    folder: Path, without: Sequence[tuple[str, str, int]] = (), baseline: str | None = None, **others: Any
) -> None:
    """Objectives on mixtures, seeds s = 0 to 4, with the data's sha256 of the mixture.

    eps: 10, 20 and 30 + s; flow 1, 2 and 3 lower, score 2, 4 and 6 higher, each by s / 10 more with every seed.

    Args:
        without: objective, mixture and seed of runs that failed.
    """
    for i, objective in enumerate(("eps", "flow", "score")):
        for j, mixture in enumerate(("arms", "circle", "grid")):
            for s in range(5):
                value = 10 * (j + 1) + s + (0, -1, 2)[i] * (j + 1) + (0, -0.1, 0.1)[i] * s
                values = {"diffusion.target": objective, "data.mixture": mixture, "baseline": baseline}
                state = "FAILED" if (objective, mixture, s) in without else "DONE"
                words = [f"+ablation/objective={objective}", f"+ablation/mixture={mixture}"]
                write_run(folder, f"{i}{j}{s}", words, s, values, state, started=f"{i}{j}{s}",
                          evaluation=frechet(value) if state == "DONE" else None, data=POINTS | {"sha256": mixture},
                          **others)  # fmt: skip


def test_a_level_is_the_baseline_of_each_block(tmp_path):
    """Differences of flow on mixture j: -j - s / 10, mean -j - 0.2; Holm's family is of all six arms."""
    write_blocks(tmp_path)
    found = found_in(tmp_path, baseline="eps")
    assert found.baseline == "eps" and found.blocks.factor == "objective" and found.blocks.others == ("mixture",)
    assert [arm.label for arm in found.arms] == [
        f"{objective}, {mixture}" for mixture in ("arms", "circle", "grid") for objective in ("eps", "flow", "score")
    ]
    assert all(found.against[arm.label] == f"eps, {arm.settings['mixture']}" for arm in found.arms)
    (measure,) = found.measures
    assert list(measure.arms) == [arm.label for arm in found.arms]
    assert list(measure.differences) == [arm.label for arm in found.arms if not arm.label.startswith("eps")]
    for j, mixture in enumerate(("arms", "circle", "grid"), 1):
        flow, score = (measure.differences[f"{objective}, {mixture}"] for objective in ("flow", "score"))
        assert flow.points == pytest.approx({s: -j - s / 10 for s in range(5)}) and flow.mean == pytest.approx(-j - 0.2)
        assert score.mean == pytest.approx(2 * j + 0.2) and (flow.verdict, score.verdict) == (BETTER, WORSE)
    raw = {label: p_of_no_difference(list(of.points.values())) for label, of in measure.differences.items()}
    corrected = dict(zip(raw, holm(list(raw.values())), strict=True))
    assert {label: of.p for label, of in measure.differences.items()} == pytest.approx(corrected)
    assert found.verdict == (
        "Frechet distance of the baseline, eps, by mixture (lower is better): arms 12.0 (10.0 to 14.0), "
        "circle 22.0 (20.0 to 24.0), grid 32.0 (30.0 to 34.0).",
        "flow: better than eps on 3 of 3 (arms −1.20, circle −2.20, grid −3.20); on average −2.20 (−2.40 to −2.00).",
        "score: worse than eps on 3 of 3 (arms +2.20, circle +4.20, grid +6.20); on average +4.20 (+3.95 to +4.45).",
    )
    assert "Compared: every objective with eps, always at the same mixture." in found.design
    assert [arm.flags for arm in found.arms] == [()] * 9 and found.warnings == ()  # each has the data of its baseline
    assert "other data" in found_in(tmp_path, baseline="eps, arms").arms[1].flags


def test_means_over_blocks_are_compared_by_themselves(tmp_path):
    """Of flow and seed s: -(1 + 2 + 3) / 3 - s / 10; s = sqrt(0.025)."""
    write_blocks(tmp_path)
    objective, mixture = found_in(tmp_path, baseline="objective=eps").effects
    assert mixture.differences == {} and list(objective.differences) == ["flow", "score"]
    flow = objective.differences["flow"]
    half = float(stats.t.ppf(1 - 0.05 / 2, 4)) * math.sqrt(0.025 / 5)
    assert flow.points == pytest.approx({s: -2 - s / 10 for s in range(5)}) and flow.verdict == BETTER
    assert (flow.low, flow.high) == pytest.approx((-2.2 - half, -2.2 + half))
    assert all(effect.differences == {} for effect in found_in(tmp_path).effects)
    objective, mixture = found_in(tmp_path, baseline="grid").effects
    assert objective.differences == {} and list(mixture.differences) == ["arms", "circle"]


def test_seeds_that_failed_in_a_block_decide_nothing_there(tmp_path):
    """Nor does the mean over blocks; of the other blocks nothing changes but the family."""
    write_blocks(tmp_path, without=[("flow", "circle", 3)])
    found = found_in(tmp_path, baseline="eps")
    differences = found.measures[0].differences
    assert set(differences["flow, circle"].points) == {0, 1, 2, 4}
    assert {label for label, of in differences.items() if of.verdict == NOT_DECIDED} == {"flow, circle"}
    assert found.verdict[1] == "flow: better than eps on 2 of 3 (arms −1.20, grid −3.20)."
    assert found.verdict[-2].endswith("or because some failed: flow, circle.")
    shutil.rmtree(tmp_path)
    write_blocks(tmp_path, without=[("eps", "circle", 3)])
    differences = found_in(tmp_path, baseline="eps").measures[0].differences
    undecided = {label for label, of in differences.items() if of.verdict == NOT_DECIDED}
    assert undecided == {"flow, circle", "score, circle"}


def test_arms_without_a_baseline_in_their_block_are_not_compared(tmp_path):
    write_blocks(tmp_path, without=[("eps", "circle", s) for s in range(5)])
    found = found_in(tmp_path, baseline="eps")
    assert found.baseline == "eps" and len(found.arms) == 8 and found.effects == ()
    assert set(found.measures[0].differences) == {f"{of}, {on}" for of in ("flow", "score") for on in ("arms", "grid")}
    assert "flow: better than eps on 2 of 3 (arms −1.20, grid −3.20)." in found.verdict
    without = "Not compared, for no result of eps with the same mixture and seed: flow, circle; score, circle."
    assert found.verdict[-2:] == (without, "5 runs are not done.")


@pytest.mark.slow
def test_a_report_of_blocks_is_written(tmp_path, capsys):
    """Though one of them has no baseline."""
    write_blocks(tmp_path, without=[("eps", "circle", s) for s in range(5)])
    studying.report([str(tmp_path), "baseline=eps"])
    report = (tmp_path / "report.md").read_text()
    assert report.count(" (baseline)") == 2 and "## Differences to eps, with the same mixture" in report
    said = capsys.readouterr().out
    assert "flow: better than eps on 2 of 3" in said and "8 arms, 5 not done" in said
    with pytest.raises(InvalidInput, match=r"baseline=x is no arm .*; or a level of objective: eps"):
        studying.report([str(tmp_path), "baseline=x"])


def test_a_baseline_level_without_results_is_told(tmp_path):
    write_blocks(tmp_path)
    for path in tmp_path.glob("0*"):
        (path / "evaluation.json").unlink()
    found = found_in(tmp_path, baseline="eps")
    assert found.verdict == ("Frechet distance was not measured for the baseline, eps: nothing is compared with it.",)
    shutil.rmtree(tmp_path)
    write_blocks(tmp_path, without=[("eps", mixture, s) for mixture in ("arms", "circle", "grid") for s in range(5)])
    found = found_in(tmp_path, baseline="eps")
    assert found.baseline == "flow, arms" and found.blocks is None
    reason = "has no run that is done"
    assert f"the requested baseline, eps, {reason}: flow, arms is used instead" in found.warnings


def test_the_level_that_a_study_names(tmp_path):
    write_blocks(tmp_path, baseline="flow")
    found = found_in(tmp_path)
    assert found.baseline == "flow" and found.blocks.level == "flow" and found.warnings == ()
    assert found.verdict[1].startswith("eps: worse than flow on 3 of 3 (arms +1.20,")
    assert found_in(tmp_path, baseline="eps, grid").blocks is None
    shutil.rmtree(tmp_path / "224")
    assert found_in(tmp_path).blocks is not None
    for s in range(4):
        shutil.rmtree(tmp_path / f"22{s}")
    found = found_in(tmp_path)
    assert found.blocks is None and found.baseline == "eps, arms"
    reason = "is no arm of it, but a level, and the factors form no full grid"
    assert f"the requested baseline, flow, {reason}: eps, arms is used instead" in found.warnings


def test_levels_that_cannot_be_a_baseline(tmp_path):
    write_grid(tmp_path / "grid", [8, 16], [8, 16])
    there = "there: lr=8, batch_size=8; lr=8, batch_size=16; lr=16, batch_size=8; lr=16, batch_size=16"
    levels = "; or a level of lr: 8, 16; batch_size: 8, 16"
    several = "but a level of several factors (lr=8, batch_size=8)"
    with pytest.raises(ValueError, match=re.escape(f"baseline=8 is no arm of the study, {several}; {there}{levels}")):
        found_in(tmp_path / "grid", baseline="8")
    with pytest.raises(ValueError, match=re.escape(f"baseline=9 is no arm of the study; {there}{levels}")):
        found_in(tmp_path / "grid", baseline="9")
    found = found_in(tmp_path / "grid", baseline="lr=8")
    assert found.baseline == "lr=8" and found.blocks.names["lr=16, batch_size=8"] == "batch_size=8"
    assert found.verdict[1].startswith("lr=16: no difference to lr=8 shown on 2 of 2 (batch_size=8, batch_size=16)")
    write_grid(tmp_path / "part", [0.1, 0.2], [8, 16], without=[(1, 1)])
    with pytest.raises(ValueError, match=r"but a level, and the factors form no full grid.*; there: lr="):
        found_in(tmp_path / "part", baseline="0.1")


def test_an_arm_goes_before_a_level_of_its_name(tmp_path):
    """What arms of one factor are called is a level, too."""
    for i, name in enumerate(("eps", "v")):
        write_arm(tmp_path, i, [frechet(5 + i + s) for s in range(5)], typed=[f"+ablation/target={name}"])
    found = found_in(tmp_path, baseline="v")
    assert found.baseline == "v" and found.blocks is None and list(found.measures[0].differences) == ["eps"]


def test_samplers_are_compared_at_the_same_number_of_steps(tmp_path):
    for s in range(5):
        cells = [cell("DDIM", 10, 8.0 + s), cell("DDIM", 50, 4.0 + s), cell("Heun", 10, 5.0 + 1.1 * s, 19),
                 cell("Heun", 50, 3.0 + 1.1 * s, 99)]  # fmt: skip
        write_run(tmp_path, f"{s}", seed=s, evaluation={"steps_frechet_pixels_64": {"value": 3.0, "cells": cells}})
    found = found_in(tmp_path, baseline="DDIM")
    assert found.against["Heun 10"] == "DDIM 10" and found.against["Heun 50"] == "DDIM 50"
    differences = found.measures[0].differences
    assert {label: of.mean for label, of in differences.items()} == pytest.approx({"Heun 10": -2.8, "Heun 50": -0.8})
    assert found.verdict[1].startswith("Heun: better than DDIM on 2 of 2 (steps=10 −2.80, steps=50 −0.800)")


# --------------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("second", "flag"),
    [
        ({"commit": "5d6e7f8a9b0c1d2e+"}, "code of another commit: 1a2b3c, 5d6e7f8a9b0c+"),
        ({"precision": "bf16"}, "another precision: bf16, fp32"),
        ({"device": "cuda"}, "another device: cpu, cuda"),
        ({"threads": 8}, "another number of threads: 1, 8"),
        ({"data": {"name": "digits", "count": 5, "image_size": [8, 8], "sha256": "0"}}, "other data"),
        ({"paired": False}, "not paired with the baseline (ended by a time budget)"),
        ({"values": {"trainer.batch_size": 32}}, "not paired with the baseline (batch_size differs)"),
        ({"values": {"schedule.T": 20, "trainer.time_sampling": "low_discrepancy"}},
         "not paired with the baseline (time_sampling, T differ)"),
    ],
)  # fmt: skip
def test_flags(second, flag, tmp_path):
    first, other = two_arms(tmp_path, **second).arms
    assert first.flags == () and len(other.flags) == 1 and other.flags[0].startswith(flag)


def test_a_flag_for_all_that_a_time_budget_ended(tmp_path):
    write_arm(tmp_path, 0.1, [frechet(5 + s) for s in range(5)], paired=False)
    write_arm(tmp_path, 0.2, [frechet(5 + s) for s in range(5)])
    first, other = found_in(tmp_path).arms
    assert first.flags == () and "time budget" in other.flags[0]


def test_warnings(tmp_path):
    write_arm(tmp_path, 0.1, [frechet(5 + s) for s in range(5)])
    write_arm(tmp_path, 0.2, [frechet(5 + s) for s in range(3)], commit="ffff+")
    (write_run(tmp_path, "broken", seed=9) / "config.yaml").write_text("[")
    broken, *others = found_in(tmp_path).warnings
    assert broken.startswith("broken: ") and len(others) == 3
    assert others[0] == "its runs come from 2 commits" and "changed after its commit" in others[1]
    assert "different seeds" in others[2]


# --------------------------------------------------------------------------------------------------- grids and fronts


def write_grid(folder: Path, rates: Sequence[float], sizes: Sequence[int], without: Sequence[tuple[int, int]] = ()):
    """Of learning rate i and batch size j, seed s: 10 + 2 i + 3 j + i j + s."""
    for i, lr in enumerate(rates):
        for j, size in enumerate(sizes):
            if (i, j) in without:
                continue
            for s in range(5):
                value = 10 + 2 * i + 3 * j + i * j + s
                values = {"optimizer.lr": lr, "trainer.batch_size": size}
                typed = [f"optimizer.lr={lr}", f"trainer.batch_size={size}"]
                write_run(folder, f"{i}{j}{s}", typed, s, values, evaluation=frechet(value), started=f"{i}{j}{s}")


def test_effects_and_interactions_of_two_by_two(tmp_path):
    """Mean over the other factor, and over seeds: 12 + 3 / 2 + (2 + 1 / 2) i, and 12 + 1 + (3 + 1 / 2) j."""
    write_grid(tmp_path, [0.1, 0.2], [8, 16])
    found = found_in(tmp_path)
    rate, size = found.effects
    assert rate.factor == "lr" and {level: e.mean for level, e in rate.levels.items()} == {"0.1": 13.5, "0.2": 16.0}
    assert size.factor == "batch_size" and {k: e.mean for k, e in size.levels.items()} == {"8": 13.0, "16": 16.5}
    of = rate.levels["0.2"]
    assert of.points == {s: 14 + s for s in range(5)}
    assert of.high - of.low == pytest.approx(2 * T_4 * math.sqrt(2.5 / 5))
    (pair,) = found.interactions
    assert (pair.rows, pair.columns) == ("lr", "batch_size")
    assert (pair.row_levels, pair.column_levels) == (("0.1", "0.2"), ("8", "16"))
    assert pair.means == ((12.0, 15.0), (14.0, 18.0))


def test_effects_and_interactions_of_two_by_three(tmp_path):
    write_grid(tmp_path, [0.1, 0.2], [8, 16, 32])
    found = found_in(tmp_path)
    assert [e.mean for e in found.effects[0].levels.values()] == [15.0, 18.0]
    assert [e.mean for e in found.effects[1].levels.values()] == [13.0, 16.5, 20.0]
    assert found.interactions[0].means == ((12.0, 15.0, 18.0), (14.0, 18.0, 22.0))


def test_a_run_that_was_refused_does_not_hide_a_grid(tmp_path):
    """It has no configuration, and so no place in the grid."""
    write_grid(tmp_path, [0.1, 0.2], [8, 16])
    for seed in range(2):
        path = write_run(tmp_path, f"refused{seed}", ["optimizer.lr=0.2", "trainer.batch_size=7"], seed, state="FAILED")
        (path / "config.yaml").unlink()
    found = found_in(tmp_path)
    assert [effect.factor for effect in found.effects] == ["lr", "batch_size"]
    assert found.baseline == "lr=0.1, batch_size=8"
    assert [(failure.arm, failure.seed) for failure in found.failures] == [("lr=0.2, batch_size=7", s) for s in (0, 1)]
    assert any("digits, 1,797 images" in sentence for sentence in found.design)


def test_files_of_an_ablation_are_the_levels_of_one_factor(tmp_path):
    """Though each of them sets two keys; what they set is said all the same."""
    ablations = {"long": (0.9999, 9.0), "short": (0.99, 9.0), "none": (0.0, 0.0)}
    for i, (name, (decay, warmup)) in enumerate(ablations.items()):
        for j, kind in enumerate(("constant", "cosine")):
            values = {"trainer.ema_decay": decay, "trainer.ema_warmup": warmup, "trainer.lr_schedule": kind}
            words = [f"+ablation/ema={name}", f"trainer.lr_schedule={kind}"]
            for s in range(5):
                value = frechet(10 + 2 * i + 3 * j + s)
                write_run(tmp_path, f"{i}{j}{s}", words, s, values, evaluation=value, started=f"{i}{j}{s}")
    path = write_run(tmp_path, "refused", ["+ablation/ema=none", "trainer.lr_schedule=linear"], 0, state="FAILED")
    (path / "config.yaml").unlink()
    found = found_in(tmp_path)
    assert [(effect.factor, list(effect.levels)) for effect in found.effects] == [
        ("ema", ["long", "short", "none"]),
        ("lr_schedule", ["constant", "cosine"]),
    ]
    assert [e.mean for e in found.effects[0].levels.values()] == [13.5, 15.5, 17.5]
    assert found.interactions[0].means == ((12.0, 15.0), (14.0, 17.0), (16.0, 19.0))
    assert any(
        "ema_warmup: 0, 9" in sentence and "lr_schedule: constant, cosine" in sentence for sentence in found.design
    )
    shutil.rmtree(tmp_path / "000")
    for s in range(1, 5):
        shutil.rmtree(tmp_path / f"00{s}")
    assert not found_in(tmp_path).effects  # a cell of the grid is not there


def test_what_is_no_grid_has_neither(tmp_path):
    write_grid(tmp_path / "incomplete", [0.1, 0.2], [8, 16, 32], without=[(1, 2)])
    write_grid(tmp_path / "one", [0.1, 0.2, 0.3], [8])
    for name in ("incomplete", "one"):
        found = found_in(tmp_path / name)
        assert found.measures and found.effects == found.interactions == ()


def test_effects_are_of_seeds_that_all_arms_have(tmp_path):
    write_grid(tmp_path, [0.1, 0.2], [8, 16])
    (tmp_path / "003" / "evaluation.json").unlink()
    found = found_in(tmp_path)
    assert set(found.effects[1].levels["16"].points) == {0, 1, 2, 4}
    assert found.effects[1].levels["16"].mean == pytest.approx(16.5 - 0.25)
    for seed in range(5):
        (tmp_path / f"01{seed}" / "evaluation.json").unlink()
    found = found_in(tmp_path)
    assert found.effects == () and found.interactions[0].means[0][1] is None


def test_fronts(tmp_path):
    """Of 8, 16 and 24 channels: the last costs more and is worse than the second."""
    for number, (channels, value) in enumerate([(16, 4.0), (8, 6.0), (24, 5.0)]):
        for seed in range(5):
            typed, values = [f"model.channels={channels}"], {"model.channels": channels}
            write_run(tmp_path, f"{channels}-{seed}", typed, seed, values, evaluation=frechet(value),
                      seconds=float(channels), started=f"{number}{seed}")  # fmt: skip
    found = found_in(tmp_path)
    assert [front.cost for front in found.fronts] == ["parameters", "GFLOP an image", "seconds of training"]
    assert found.fronts[0].points == {"channels=16": (16000, 4), "channels=8": (8000, 6), "channels=24": (24000, 5)}
    assert [front.best for front in found.fronts] == [("channels=8", "channels=16")] * 3
    assert found.fronts[1].points["channels=24"] == (2.4, 5) and found.fronts[2].points["channels=8"] == (8, 6)
    unknown = found_in(tmp_path, network=lambda settings: None)
    assert [front.cost for front in unknown.fronts] == ["seconds of training"]
    assert [arm.parameters for arm in unknown.arms] == [None] * 3


def test_seconds_of_equal_work_are_no_cost(tmp_path):
    assert two_arms(tmp_path / "a", seconds=99.0).fronts == ()
    (front,) = two_arms(tmp_path / "b", seconds=99.0, values={"trainer.batch_size": 8}).fronts
    assert front.cost == "seconds of training"


# ------------------------------------------------------------------------------------------- ways to sample one network


def cell(sampler: str, steps: int, value: Any, evaluations: int | None = None, spacing="uniform") -> dict[str, Any]:
    evaluations = steps if evaluations is None else evaluations
    return {"sampler": sampler, "steps": steps, "spacing": spacing, "evaluations": evaluations, "value": value}


def test_ways_to_sample_one_network_are_arms(tmp_path):
    name = "steps_frechet_pixels_64"
    for s in range(5):
        cells = [cell("DDIM", 10, 8.0 + s), cell("DDIM", 50, 4.0 + s + (s % 2) / 8), cell("Heun", 10, 5.0 + s, 19),
                 cell("Heun", 10, 3.0 + s, 19, "karras"), cell("DDIM", 99, None), {"sampler": "DDIM"}]  # fmt: skip
        cells = [found for found in cells if s < 4 or found.get("spacing") != "karras"]
        result = {name: {"value": 3.0 + s, "real_vs_real": 1.0, "cells": cells}}
        write_run(tmp_path, f"{s}", seed=s, evaluation=result)
    found = found_in(tmp_path)
    assert [arm.label for arm in found.arms] == ["DDIM 10", "DDIM 50", "Heun 10", "Heun 10 karras"]
    assert found.arms[3].settings == {"sampler": "Heun", "steps": "10", "spacing": "karras"}
    assert found.arms[2].parameters == 8000 and found.arms[2].gflop == pytest.approx(0.8 * 19)
    assert found.design[0] == "4 ways to sample one network, 5 training seeds (0 to 4), 5 runs."
    (measure,) = found.measures
    assert measure.name == name and measure.title == "Frechet distance" and measure.real == 1
    assert {label: of.mean for label, of in measure.arms.items()} == {
        "DDIM 10": 10.0, "DDIM 50": 6.05, "Heun 10": 7.0, "Heun 10 karras": 4.5,
    }  # fmt: skip
    assert measure.differences["DDIM 50"].points == {s: -4 + (s % 2) / 8 for s in range(5)}
    assert measure.differences["DDIM 50"].verdict == BETTER
    assert measure.differences["Heun 10 karras"].points == {s: -5 for s in range(4)}
    assert measure.differences["Heun 10 karras"].verdict == NOT_DECIDED
    found = found_in(tmp_path, baseline="DDIM 50")
    assert found.arms[0].label == "DDIM 50" and found.measures[0].differences["Heun 10"].verdict == WORSE
    (front,) = found.fronts
    assert front.cost == "evaluations a sample" and front.best == ("DDIM 10", "Heun 10 karras")
    assert front.points["Heun 10"] == (19, 7.0)
    assert set(found.by_steps) == {"DDIM"}  # the others have one point, which is no curve
    assert found.by_steps["DDIM"].x == (10, 50) and found.by_steps["DDIM"].y == (10, 6.05)


def test_curves_over_evaluations_of_several_arms(tmp_path):
    for lr in (0.1, 0.2):
        cells = [[cell("DDIM", n, 100 / n + lr + s) for n in (10, 20, 50)] for s in range(5)]
        write_arm(tmp_path, lr, [{"steps_frechet_x": {"value": 2.0 + lr, "cells": found}} for found in cells])
    found = found_in(tmp_path)
    assert [arm.label for arm in found.arms] == ["lr=0.1", "lr=0.2"]
    curve = found.by_steps["lr=0.2, DDIM"]
    assert curve.x == (10, 20, 50) and curve.y == pytest.approx((12.2, 7.2, 4.2))
    assert curve.low == pytest.approx((10.2, 5.2, 2.2)) and curve.high == pytest.approx((14.2, 9.2, 6.2))


# -------------------------------------------------------------------------------------------------- curves and pictures


def test_losses_are_held_out_ones_where_they_make_a_curve(tmp_path):
    train = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    write_arm(tmp_path / "long", 0.1, [None, None], losses=[3.0, 2.0, 1.0], train=train)
    found = found_in(tmp_path / "long")
    assert found.losses_of == "Held-out loss" and found.losses["the run"].y == (3, 2, 1)
    assert found.losses["the run"].x == (10, 20, 30)
    write_arm(tmp_path / "short", 0.1, [None, None], losses=[3.0, 2.0], train=train)
    found = found_in(tmp_path / "short")
    assert "raining loss" in found.losses_of and found.losses["the run"].y == (1, 1.5, 2, 2.5, 3, 4)


def test_a_curve_is_the_mean_and_the_range_where_all_seeds_have_a_value(tmp_path):
    for seed, losses in enumerate([[4.0, 3.0, 2.0, 1.0], [6.0, None, 4.0, 2.0], [5.0, 5.0, 3.0, 3.0, 9.0]]):
        write_run(tmp_path, f"{seed}", seed=seed, losses=losses)
    curve = found_in(tmp_path).losses["the run"]
    assert curve.x == (10, 30, 40) and curve.y == (5, 3, 2) and curve.low == (4, 2, 1) and curve.high == (6, 4, 3)


SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 64), (1, 8, 16), (3, 20, 12)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_sheet_is_of_the_tiles_themselves(shape, tmp_path):
    channels, height, width = shape
    size = height if height == width else [height, width]
    drawn = {}
    for lr in (0.1, 0.2):
        for seed, path in enumerate(write_arm(tmp_path, lr, [None] * 2, values={"data.image_size": size})):
            x = torch.randint(0, 256, (64, *shape), dtype=torch.uint8)
            images.save_samples(path / "samples.npy", x)
            drawn[f"lr={lr}", seed] = x
    sheet = found_in(tmp_path, baseline="lr=0.2").sheet
    assert list(sheet) == ["lr=0.2", "lr=0.1"]
    for label, row in sheet.items():
        assert row.shape == (height, 8 * width + 7 * 2, channels) and row.dtype == np.uint8
        for i in range(8):
            tile = row[:, i * (width + 2) : i * (width + 2) + width]
            assert np.array_equal(tile, images.to_numpy(drawn[label, 0])[i])
            assert (row[:, i * (width + 2) + width : (i + 1) * (width + 2)] == 255).all()


def test_a_sheet_only_of_samples_that_are_whole(tmp_path):
    paths = [write_arm(tmp_path, 0.1 * i, [None])[0] / "samples.npy" for i in range(1, 8)]
    images.save_samples(paths[0], torch.zeros(64, 1, 8, 8))
    images.save_samples(paths[1], torch.zeros(5, 1, 8, 8))
    images.save_samples(paths[2], torch.randn(50, 2))  # points
    paths[3].write_bytes(paths[0].read_bytes()[:200])
    np.save(paths[4], np.zeros((4, 8, 8, 1)))  # of another type
    np.save(paths[5], np.array([{}]), allow_pickle=True)
    shapes = {label: row.shape for label, row in found_in(tmp_path).sheet.items()}
    assert shapes == {"lr=0.1": (8, 78, 1), "lr=0.2": (8, 48, 1), "lr=0.30000000000000004": (240, 240, 3)}
    write_run(tmp_path, "other", ["optimizer.lr=9"], 8, {"optimizer.lr": 9}, started="2027")
    assert found_in(tmp_path).sheet == {}  # no seed that all arms have


POINTS = {"name": "swiss_roll", "count": 400, "sha256": "c0"}
ROLL = {"_target_": "ddpm.data.SwissRoll", "count": 400, "noise": 0.5, "split": "auto", "validation": 0.2}


def test_points_are_shown_over_the_data_in_the_window_of_all_arms(tmp_path, capsys):
    drawn = {}
    for lr in (0.1, 0.2):
        result = {"energy_distance_coordinates_9_train": {"value": lr, "real_vs_real": 0.0, "low": 0.0, "high": 0.3}}
        values = {"data": ROLL}
        for seed, path in enumerate(write_arm(tmp_path, lr, [result] * 5, values=values, data=POINTS)):
            drawn[lr, seed] = lr * torch.randn(50, 2)
            images.save_samples(path / "samples.npy", drawn[lr, seed])
    found = found_in(tmp_path, outline=studying._outline)
    assert found.sheet_of_points and found.measures[0].title == "Energy distance"
    assert formatting.context(found.measures[0])[1] == "Held-out points have 0.00."
    data = SwissRoll(400)
    for lr in (0.1, 0.2):
        assert np.array_equal(found.sheet[f"lr={lr}"], images.scatter(drawn[lr, 0], data.points[data.train], 240))
    assert np.array_equal(found_in(tmp_path).sheet["lr=0.1"], images.scatter(drawn[0.1, 0], None, 240))
    assert studying._outline({}) is None and studying._outline({"data": {"image_size": 8}}) is None
    assert capsys.readouterr().out == ""
    assert studying._outline({"data": ROLL | {"count": 1}}) is None
    assert "the points of the data are not shown behind the samples: data: count=1" in capsys.readouterr().out


def test_points_of_other_dimensions_have_no_sheet(tmp_path):
    for path in write_arm(tmp_path, 0.1, [None], data=POINTS):
        np.save(path / "samples.npy", np.zeros((9, 3), np.float32))
    assert found_in(tmp_path).sheet == {}


# ------------------------------------------------------------------------------------------------------ how it was made


def test_failures(tmp_path):
    write_arm(tmp_path, 0.1, [frechet(5 + s) for s in range(5)])
    typed, values = ["optimizer.lr=0.2"], {"optimizer.lr": 0.2}
    write_run(tmp_path, "f", typed, 0, values, "FAILED", reason="ValueError: no", traceback="Trace\n back")
    write_run(tmp_path, "g", typed, 1, values, "INTERRUPTED", reason="signal 15")
    write_run(tmp_path, "h", typed, 2, values, "RUNNING")
    found = found_in(tmp_path)
    assert [(f.arm, f.seed, f.path.name, f.state, f.reason, f.traceback) for f in found.failures] == [
        ("lr=0.2", 0, "f", "FAILED", "ValueError: no", "Trace\n back"),
        ("lr=0.2", 1, "g", "INTERRUPTED", "signal 15", None),
        ("lr=0.2", 2, "h", "INTERRUPTED", "the process ended without recording a reason", None),
    ]
    assert found.verdict[-1] == "3 runs are not done." and [arm.label for arm in found.arms] == ["lr=0.1"]
    assert "2 arms" in found.design[0] and "8 runs" in found.design[0]


def test_one_failure_is_one(tmp_path):
    write_arm(tmp_path, 0.1, [frechet(5), frechet(6)])
    write_run(tmp_path, "f", ["optimizer.lr=0.2"], 0, {"optimizer.lr": 0.2}, "FAILED")
    assert found_in(tmp_path).verdict[-1] == "1 run is not done."


def test_the_environment(tmp_path):
    write_arm(tmp_path, 0.1, [None, None], machine={"gpu": "H100", "torch": "2.6.0", "host": "no"})
    write_arm(tmp_path, 0.2, [None], commit="5d6e", host="there", threads=None)
    write_run(tmp_path, "f", seed=9, state="FAILED", commit="none of these")
    assert found_in(tmp_path).environment == {
        "commit": "1a2b3c, 5d6e", "host": "here, there", "device": "cpu", "precision": "fp32", "threads": "1",
        "gpu": "H100", "torch": "2.6.0",
    }  # fmt: skip


def test_commands_are_sweeps_where_runs_are_all_combinations_of_words(tmp_path):
    """As they are to be typed, without places; whatever sweeps they came from."""
    others = ["study=s", "question='Why not?'", "runs=/elsewhere", "device=cuda:1"]
    for schedule in ("linear", "cosine"):
        typed = [f"+ablation/schedule={schedule}", *others]
        write_arm(tmp_path, {"linear": 0.1, "cosine": 0.2}[schedule], [None, None], typed=typed)
    quoted = """study=s 'question='"'"'Why not?'"'"''"""
    sweep = f"ddpm-train -m +ablation/schedule=linear,cosine {quoted} seed=0,1"
    assert found_in(tmp_path).commands == (sweep,)
    write_arm(tmp_path, 0.3, [None], typed=["optimizer.lr=0.3"])
    assert found_in(tmp_path).commands == (sweep, "ddpm-train optimizer.lr=0.3 seed=0")
    write_run(tmp_path, "c", ["optimizer.lr=0.4"], 1, {"optimizer.lr": 0.4})  # of all four there are two
    expected = ("ddpm-train optimizer.lr=0.3 seed=0", "ddpm-train optimizer.lr=0.4 seed=1")
    assert found_in(tmp_path).commands == (sweep, *expected)


def test_nothing_is_done(tmp_path):
    write_run(tmp_path, "a", ["optimizer.lr=0.1"], 0, {"optimizer.lr": 0.1}, "FAILED", reason="no")
    write_run(tmp_path, "b", ["optimizer.lr=0.2"], 0, {"optimizer.lr": 0.2}, "INTERRUPTED", reason="signal 2")
    found = found_in(tmp_path)
    assert found.arms == found.measures == found.fronts == () and found.baseline == "lr=0.1"
    assert len(found.failures) == 2 and found.verdict[0].startswith("Nothing was measured")
    studying.report([str(tmp_path)])
    with pytest.raises(ValueError, match="baseline=x is no arm of the study; there: none that is done"):
        found_in(tmp_path, baseline="x")


def test_nothing_is_measured(tmp_path):
    write_arm(tmp_path, 0.1, [None] * 5)
    write_arm(tmp_path, 0.2, [None] * 5)
    found = found_in(tmp_path)
    assert len(found.arms) == 2 and found.measures == found.effects == found.fronts == ()
    assert found.verdict == ("Nothing was measured: see ddpm-evaluate, or evaluation= of ddpm-train.",)
    studying.report([str(tmp_path)])
    with pytest.raises(ValueError, match="there: none, see ddpm-evaluate"):
        found_in(tmp_path, measure="frechet")


# ------------------------------------------------------------------------------------------------------------ commands


@pytest.fixture
def study(tmp_path) -> Path:
    folder = tmp_path / "runs" / "rates"
    write_arm(folder, 0.1, [frechet(5 + s) for s in range(5)], losses=[3.0, 2.0, 1.0])
    write_arm(folder, 0.2, [frechet(4 + s + s % 2 / 8) for s in range(5)], losses=[3.0, 2.0, 1.0])
    return folder


@pytest.mark.slow
def test_a_report_is_written(study, tmp_path, capsys):
    studying.report([str(study)])
    text, report = (study / "report.html").read_text(), (study / "report.md").read_text()
    assert "lr=0.2 is better, by" in text and "lr=0.2 is better, by" in report and report.startswith("# rates\n")
    with Image.open(study / "report.png") as picture:
        assert picture.width == 1000
    said = capsys.readouterr().out
    assert "lr=0.2 is better, by −0.95" in said and "2 arms, 0 not done" in said
    out = tmp_path / "out"
    out.mkdir()
    studying.report([str(study), f"out={out}", "baseline=lr=0.2", "measure=held"])
    assert {path.name for path in out.iterdir()} == {"report.html", "report.md", "report.png"}
    assert "Held-out loss of the baseline, lr=0.2" in capsys.readouterr().out


def test_what_is_built_is_counted(study):
    """Parameters, floating point operations and the schedule, by the package's own functions."""
    arms, unread = arms_in(study)
    arm = findings(study, arms, unread, studying._network, studying._schedule).arms[0]
    assert arm.parameters > 1000 and 0 < arm.gflop < 0.1
    settings = arms[0].first.settings
    x, y = studying._schedule(settings)
    assert x == [t / 10 for t in range(11)] and y[0] == 1 and y[-1] < 0.1
    assert studying._network(settings | {"model": {"_target_": "os.getcwd"}}) is None
    assert studying._network({}) is studying._schedule({}) is None
    of_8x8 = {"image_size": 8, "in_channels": 1, "channels": 8}
    own = {"vae.VAE": {"groups": 4}, "vqvae.VQVAE": {}, "gan.Generator": {}}  # which are not called with x_t and t
    for name, more in own.items():
        model = of_8x8 | more | {"_target_": f"models.{name}"}
        parameters, gflop = studying._network({"data": settings["data"], "model": model})
        assert parameters > 1000 and gflop is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the folder of a study is missing, such as runs/default"),
        (["baseline=x"], "the folder of a study is missing"),
        (["{tmp}/none"], "holds no runs; a study is the folder"),
        (["{tmp}/runs/rates/report.html"], "holds no runs"),
        (["{study}", "colour=blue"], "colour=blue is not known here; allowed: baseline=, measure=, out="),
        (["{study}", "x y"], "'x y' is not known here"),
        (["{study}", "out={tmp}/none"], "out={tmp}/none is no folder"),
        (["{study}", "baseline=lr=9"], "baseline=lr=9 is no arm of the study; there: lr=0.1; lr=0.2"),
        (["{study}", "measure=colour"], "measure=colour: no run has it; there: frechet"),
    ],
)
def test_wrong_words(words, message, study, tmp_path):
    words, message = ([text.format(study=study, tmp=tmp_path) for text in given] for given in (words, [message]))
    with pytest.raises(InvalidInput) as error:
        studying.report(words)
    assert message[0] in str(error.value) and "\n" not in str(error.value)
    assert not list(study.glob("report*"))


def test_status_of_a_study(study, capsys):
    typed, values = ["optimizer.lr=0.3"], {"optimizer.lr": 0.3}
    write_run(study, "f", typed, 0, values, "FAILED", reason="ValueError: two\nlines", started="2026-02")
    write_run(study, "g", typed, 1, values, "INTERRUPTED", reason="signal 15", started="2026-02")
    write_run(study, "h", typed, 2, values, "RUNNING", started="2026-02")
    (write_run(study, "broken", seed=9) / "config.yaml").write_text("[")
    studying.status([str(study)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["arm", "seeds", "state"]
    assert [line.split() for line in lines[1:3]] == [["lr=0.1", "5", "5", "DONE"], ["lr=0.2", "5", "5", "DONE"]]
    assert lines[3].split()[:2] == ["lr=0.3", "3"] and lines[3].endswith("1 FAILED, 2 INTERRUPTED")
    assert f"FAILED {study / 'f'}: ValueError: two lines" in lines
    assert f"INTERRUPTED {study / 'g'}: signal 15" in lines
    assert f"INTERRUPTED {study / 'h'}: the process ended without recording a reason" in lines
    assert any(line.startswith("cannot be read: broken: ") for line in lines)
    assert lines[-1] == "13 runs: 10 DONE, 1 FAILED, 2 INTERRUPTED"
    with pytest.raises(InvalidInput, match="allowed: nothing but the folder"):
        studying.status([str(study), "measure=x"])


def test_status_of_a_run_that_is_held(tmp_path, capsys):
    from ddpm.runs.directory import Run

    path = write_run(tmp_path, "x", state="RUNNING", step=1234)
    with Run(path).locked():
        studying.status([str(tmp_path)])
        assert [failure.state for failure in found_in(tmp_path).failures] == ["RUNNING"]
    said = capsys.readouterr().out
    assert f"RUNNING {path}: step 1,234, here, process 7" in said and said.endswith("1 run: 1 RUNNING\n")


@pytest.mark.slow
def test_a_thousand_runs(tmp_path, capsys):
    luck = random.Random(0)
    for a in range(200):
        lr, size = 0.1 * (a % 20 + 1), 8 * (a // 20 + 1)
        for seed in range(5):
            losses = [math.exp(-i / 10) + luck.gauss(0, 0.01) for i in range(50)]
            result = frechet(luck.gauss(5, 1)) | {RECOGNITION: {"value": luck.random()}}
            write_run(tmp_path, f"{a:03}{seed}", [f"optimizer.lr={lr:g}", f"trainer.batch_size={size}"], seed,
                      {"optimizer.lr": lr, "trainer.batch_size": size}, losses=losses[::10], train=losses,
                      evaluation=result, started=f"{a:03}")  # fmt: skip
    studying.report([str(tmp_path)])
    assert "200 arms, 0 not done" in capsys.readouterr().out
    assert (tmp_path / "report.html").stat().st_size < 3_000_000
    found = found_in(tmp_path)
    assert [len(effect.levels) for effect in found.effects] == [20, 10] and len(found.measures) == 3
    assert json.dumps(found.design).count("200 arms") == 1


def test_trained_runs_that_are_not_measured_are_named(tmp_path, capsys):
    line = "metric=frechet"
    asked = {"values": {"evaluation": [line]}}
    write_arm(tmp_path, 0.1, [frechet(5 + s) for s in range(5)], evaluated=[line], **asked)
    *_, last = write_arm(tmp_path, 0.2, [*(frechet(4 + s) for s in range(4)), None], evaluated=[line], **asked)
    status = json.loads((last / "status.json").read_text())
    (last / "status.json").write_text(json.dumps(status | {"evaluated": []}))
    found = found_in(tmp_path)
    assert any("1 of 10 trained runs lack" in warning for warning in found.warnings)
    assert "1 of its 5 seeds lack requested measurements" in found.arms[1].flags
    studying.status([str(tmp_path)])
    said = capsys.readouterr().out
    assert f"not measured {last}: {line}" in said and "10 DONE, 1 of them lack" in said


def test_a_held_out_loss_that_is_not_of_the_last_step_is_left_out(tmp_path):
    paths = write_arm(tmp_path, 0.1, [None] * 3, losses=[0.3, 0.2])
    lines = (paths[1] / "metrics.jsonl").read_text().splitlines(keepends=True)
    (paths[1] / "metrics.jsonl").write_text(lines[0])
    (paths[2] / "metrics.jsonl").unlink()
    found = found_in(tmp_path)
    assert found.measures[0].arms["the run"].points == {0: 0.2}
    assert [warning.partition(":")[0] for warning in found.warnings] == ["0.1-1", "0.1-2"]


@pytest.mark.parametrize(
    ("other", "flag"),
    [
        ({"_target_": "z", "schedule": {"_target_": "l", "T": 10}}, ""),
        ({"_target_": "z", "schedule": {"_target_": "l", "T": 9}}, "T differs"),
        ({"_target_": "b", "beta": [0.1] * 10}, ""),
        ({"_target_": "b", "beta": [0.1] * 11}, "T differs"),
        ({"_target_": "own"}, ""),
    ],
)
def test_schedules_of_as_many_steps_are_paired(other, flag, tmp_path):
    for name, of in (("a", {"_target_": "l", "T": 10}), ("b", other)):
        write_run(tmp_path, name, [f"schedule={name}"], values={"schedule": of}, evaluation=frechet(1))
    flags = " ".join(found_in(tmp_path).arms[1].flags)
    assert flag in flags if flag else "not paired" not in flags


def test_quality_coverage_and_speed_are_set_against_each_other(tmp_path):
    """The speed is that of the sampler with which quality was drawn; runs and arms without all three are left out."""

    def result(value: float, evaluations: int | None, coverage: float | None, cost: Any) -> dict[str, Any]:
        covered = {} if coverage is None else {"coverage-k5_pixels_64_train": {"value": coverage}}
        return frechet(value, evaluations=evaluations) | covered | {"cost_cpu_fp32_b256": {"value": 0.1, **cost}}

    steps = {"evaluations": {"ddim 10": 10, "ddim 50": 50}, "sampling_images_per_s": {"ddim 10": 70.0, "ddim 50": 15.0}}
    once = {"evaluations": {"samples": 1}, "sampling_images_per_s": {"samples": 2000.0}}
    write_arm(tmp_path, 0.1, [result(5, 50, 0.5, steps), result(6, 10, 0.6, steps)])
    write_arm(tmp_path, 0.2, [result(2, None, 0.9, once), result(2, None, None, once)])
    write_arm(tmp_path, 0.3, [result(1, 50, 0.9, {})])  # whose sampling was not timed
    by_coverage, by_speed, covered = found_in(tmp_path).trade_offs
    slow, fast = by_coverage.runs
    assert by_coverage.runs == {slow: ((0.5, 5), (0.6, 6)), fast: ((0.9, 2),)}
    assert by_speed.runs == {slow: ((15, 5), (70, 6)), fast: ((2000, 2),)}
    assert covered.runs == {slow: ((15, 0.5), (70, 0.6)), fast: ((2000, 0.9),)}
    assert (by_coverage.y, covered.y) == ("Frechet distance, lower is better", "Coverage, higher is better")
    assert by_speed.x == covered.x == "Samples a second, higher is better"
    studying.report([str(tmp_path)])
    assert Image.open(tmp_path / "trade_offs.png").size[0] > 800
    assert 'id="trade-offs"' in (tmp_path / "report.html").read_text()
    assert "trade_offs.png" in (tmp_path / "report.md").read_text()


def test_without_speeds_nothing_is_set_against_them(tmp_path):
    assert two_arms(tmp_path).trade_offs == ()


def test_a_command_makes_all_runs_and_has_the_baseline_first(tmp_path):
    write_arm(tmp_path, 0.4, [frechet(5), frechet(6)])
    write_arm(tmp_path, 0.1, [frechet(5), frechet(6)])
    write_arm(tmp_path, 9.0, [None, None], state="FAILED")
    (command,) = found_in(tmp_path).commands
    assert command == "ddpm-train -m optimizer.lr=0.4,0.1,9.0 seed=0,1"


def test_a_study_of_which_nothing_is_done_says_so(tmp_path):
    write_arm(tmp_path, 0.1, [None, None], state="FAILED")
    found = found_in(tmp_path)
    assert found.design[0] == "1 arm, no training seed that is done, 2 runs."
    assert found.verdict[0].startswith("Nothing was measured") and found.verdict[1] == "2 runs are not done."


def test_held_out_losses_of_other_samples_are_another_measure(tmp_path):
    """Runs of an earlier version measured the first 512 samples; newer ones spread them and say how many they are."""
    write_arm(tmp_path, 0.1, [{}, {}], losses=[3.0, 1.0])
    for run in write_arm(tmp_path, 0.2, [{}, {}], losses=[2.0, 0.5]):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        lines[-1]["n"] = 512
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = found_in(tmp_path)
    assert {m.name: list(m.arms) for m in found.measures} == {HELD_OUT: ["lr=0.1"], f"{HELD_OUT}_512": ["lr=0.2"]}
    assert {m.title for m in found.measures} == {"Held-out loss", "Held-out loss (512)"}
    assert [m.arms["lr=0.2"].mean for m in found.measures if m.name != HELD_OUT] == [0.5]
