"""Computation of findings from arms: measures, differences, effects of a grid, fronts, curves and the verdict."""

import itertools
import json
import math
import shlex
import statistics
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ddpm.figures import images
from ddpm.runs.directory import FAILED, held_out_lines
from ddpm.runs.results import SETTINGS
from ddpm.study.findings import Arm, Blocks, Curve, Effect, Failure, Findings, Front, Interaction, Measure, TradeOff
from ddpm.study.formatting import MARKED, aim, counted, interval, number
from ddpm.study.reading import ArmRuns, Recorded
from ddpm.study.statistics import (
    BETTER,
    ENOUGH,
    HIGHER,
    LOWER,
    NEITHER,
    NO_DIFFERENCE,
    NOT_DECIDED,
    WORSE,
    compare,
    estimate,
    front,
)

SHOWN = 8  # samples of an arm on the contact sheet
SIDE = 240  # pixels of an arm's points
CURVE_POINTS = 3  # least points of held-out loss for a curve; a shorter run has the training loss instead
SMOOTH = 5  # lines of training loss averaged for a point of its curve
MOST_INTERACTIONS = 6
MOST_NAMED, MOST_COMMANDS = 12, 20  # arms in a sentence, or levels in a verdict; commands of runs that form no sweep
PLACES = ("runs=", "data.root=", "device=", "slots=")  # words that apply to one machine only


class Kind(NamedTuple):
    """A kind of measure: results of evaluation.json whose protocols share a prefix."""

    title: str
    better: str  # "lower", "higher" or "neither"
    unit: str = ""
    scale: float = 1.0
    chosen: str = "samples"  # the random choice behind each run's interval


HELD_OUT = "held_out_loss"  # the measure that metrics.jsonl has of every run
KINDS = {  # prefix of a protocol -> kind, in the order of a report; the first present one decides the verdict
    "frechet": Kind("Frechet distance", "lower"),
    "kernel": Kind("Kernel distance (KID)", "lower"),
    "sliced_wasserstein": Kind("Sliced Wasserstein distance", "lower"),
    "energy_distance": Kind("Energy distance", "lower"),
    "recognition": Kind("Recognised samples", "higher", "%", 100.0),
    "asked": Kind("Samples classified as requested", "higher", "%", 100.0),
    "augmentation": Kind("Accuracy gained by generated images", "higher", "%", 100.0, "held-out images"),
    "precision": Kind("Precision", "higher"),
    "recall": Kind("Recall", "higher"),
    "density": Kind("Density", "higher"),
    "coverage": Kind("Coverage", "higher"),
    "variety": Kind("Variety within classes", "higher"),
    "reading_sheet-right": Kind("Samples read as requested", "higher", "%", 100.0),
    "reading_sheet-read": Kind("Samples read by a person", "higher", "%", 100.0),
    "reading_sheet-real": Kind("Samples taken for real", "higher", "%", 100.0),
    "sound_classifier": Kind("Samples heard as requested", "higher", "%", 100.0),
    "sound_frechet": Kind("Frechet distance of sounds", "lower"),
    "scenes_seen-all": Kind("Prompts matched in full", "higher", "%", 100.0),
    "scenes_composed-all": Kind("Matched in full, of combinations held out", "higher", "%", 100.0),
    "scenes_seen-pairs": Kind("Prompts with all colours and shapes", "higher", "%", 100.0),
    "scenes_composed-pairs": Kind("All colours and shapes, of combinations held out", "higher", "%", 100.0),
    "scenes_seen-relation": Kind("Correct relations of solids", "higher", "%", 100.0),
    "scenes_composed-relation": Kind("Relations, of combinations held out", "higher", "%", 100.0),
    "scenes_seen-size": Kind("Correct sizes of solids", "higher", "%", 100.0),
    "scenes_composed-size": Kind("Sizes, of combinations held out", "higher", "%", 100.0),
    "scenes_seen-material": Kind("Correct materials of solids", "higher", "%", 100.0),
    "scenes_composed-material": Kind("Materials, of combinations held out", "higher", "%", 100.0),
    **{
        f"retrieval_{part}-{way}-{what}": Kind(f"{title}{of}, {among}", better, unit, scale, chosen)
        for part, of in (("held_out", ""), ("composed", " of held-out pairs"), ("trained", " trained on"))
        for way, title, chosen in (
            ("drawn", "Prompts of samples", "samples"),
            ("name", "Names of pictures", "held-out images"),
            ("picture", "Pictures of names", "held-out images"),
        )
        for what, among, better, unit, scale in (
            ("first", "first of all", "higher", "%", 100.0),
            ("top5", "among the first 5", "higher", "%", 100.0),
            ("top10", "among the first 10", "higher", "%", 100.0),
            ("rank", "median rank", "lower", "", 1.0),
        )
    },
    "depth_error": Kind("Error of the requested depth", "lower"),
    "depth_correlation": Kind("Correlation with the requested depth", "higher"),
    "masks_overlap": Kind("Solids where they were requested: IoU", "higher", "%", 100.0),
    "bits_per_dim": Kind("Variational bound", "lower", "bits/dim", chosen="held-out images"),
    "nats_iwae": Kind("-log p by importance weights", "lower", "nats", chosen="held-out images"),
    "elbo": Kind("-ELBO", "lower", "nats", chosen="held-out images"),
    "psnr": Kind("Reconstruction (PSNR)", "higher", "dB", chosen="held-out images"),
    "bits_per_code": Kind("Bits that a code needs", "lower", "bits", chosen="held-out images"),
    "score_error": Kind("Relative error of the score", "lower", "%", 100.0, chosen="draws of the density"),
    "loss_by_snr": Kind("Error of eps over log-SNR", "lower", chosen="held-out images"),
    HELD_OUT: Kind("Held-out loss", "lower"),
    # neither way is better for the structure of codings: last, so that no verdict is about it unless requested
    "latent_purity": Kind("Class structure of codings: purity", NEITHER, "%", 100.0, "held-out images"),
    "latent_silhouette": Kind("Class structure of codings: silhouette", NEITHER, chosen="held-out images"),
}
STEPS = "steps_"  # prefix of the protocols of grids of samplers and steps
Network = Callable[[dict[str, Any]], tuple[int, float | None] | None]  # settings -> parameters, GFLOP of a forward pass
Points = tuple[list[float], list[float]]
SchedulePoints = Callable[[dict[str, Any]], Points | None]  # settings -> t / T, sqrt(alpha_bar)
Settings = Mapping[str, Mapping[str, str]]  # label -> factor -> level
Outline = Callable[[dict[str, Any]], torch.Tensor | None]  # settings -> points (n, 2) of the data


def findings(
    folder: Path,
    arms: Sequence[ArmRuns],
    unread: Sequence[str],
    network: Network,
    schedule: SchedulePoints,
    baseline: str | None = None,
    measure: str | None = None,
    outline: Outline = lambda settings: None,
) -> Findings:
    """Compute the findings of a study.

    Args:
        folder: of the study.
        arms: see `ddpm.study.reading.arms_of`.
        unread: messages on runs that could not be read.
        network: parameters and GFLOP of the network of a configuration; None where it cannot be built.
        schedule: t / T and sqrt(alpha_bar) of a configuration, likewise.
        baseline: an arm's label; or, in a full grid, a level of one factor, LEVEL or FACTOR=LEVEL, with which arms of
            the same levels of all other factors are compared; None for the one that the study names, else the arm
            begun first.
        measure: prefix of the measure that the verdict is about; None for the first of `KINDS`.
        outline: points (n, 2) of a configuration's data, to draw behind samples; None if they are not points.
    Raises: ValueError for an unknown baseline or measure, with the known ones.
    """
    failures, all_arms = _failures(arms), arms
    arms = [arm for arm in arms if arm.done]
    of_samplers = len(all_arms) == 1 and len(arms) == 1 and any(_cells(run) for run in arms[0].done.values())
    values = _values_by_sampler(arms[0]) if of_samplers else _values(arms)
    ways = _sampler_arms(arms[0], network) if of_samplers else {}
    names = list(ways) or [arm.label for arm in arms]
    settings = {arm.label: arm.levels for arm in all_arms if arm.levels or arm.done}
    settings = {label: way.settings for label, way in ways.items()} or settings
    base, blocks = _baseline(names, [arm.label for arm in all_arms], settings, arms, baseline)
    against = dict.fromkeys(names, base) if blocks is None else blocks.against
    places = list(dict.fromkeys(against[name] for name in names))
    order = sorted(names, key=lambda name: (places.index(against[name]), against[name] != name))  # baselines first
    ordered = _ordered(values, measure)
    measures = _with_unique_titles([_measure(name, of, arms, against, order) for name, of in ordered.items()])
    by_label = {arm.label: arm for arm in arms}
    in_report = [ways.get(label) or _arm(by_label[label], by_label.get(against[label]), network) for label in order]
    first = measures[0] if measures else None
    effects = _effects(in_report, first, blocks, _survivors(arms, against))
    losses_of, losses = _losses(arms)
    warnings = [*unread, *_warnings(all_arms)]
    requested = baseline if baseline is not None else _common_value(all_arms, "baseline")
    if requested is not None and requested != base and blocks is None:
        reason = _no_baseline(requested, [arm.label for arm in all_arms], settings, "it")
        warnings.append(f"the requested baseline, {requested}, {reason}: {base} is used instead")
    for key in ("baseline", "question"):
        if len(named := _values_of(all_arms, key)) > 1:
            warnings.append(f"its runs name different {key}s: {'; '.join(named)}")
    return Findings(
        study=folder.name,
        question=_common_value(all_arms, "question"),
        design=_design(all_arms, in_report, of_samplers, base, blocks),
        baseline=base,
        arms=tuple(in_report),
        measures=tuple(measures),
        verdict=_verdict(first, base, failures, blocks, effects),
        effects=effects,
        interactions=_interactions(in_report, first),
        fronts=_fronts(in_report, first, arms[0] if of_samplers else None, arms),
        trade_offs=() if of_samplers else _trade_offs(values, measures, arms),
        losses=losses,
        losses_of=losses_of,
        by_snr={arm.label: curve for arm in arms if (curve := _errors(arm)) is not None},
        by_steps=_by_steps(arms),
        schedules=_schedules(arms, schedule),
        sheet=_sheet(arms, order, outline),
        sheet_of_points=any(_is_of_points(run) for arm in arms for run in arm.done.values()),
        environment=_environment(arms),
        commands=_commands(all_arms),
        failures=failures,
        warnings=tuple(dict.fromkeys(warnings)),
        blocks=blocks,
    )


# ------------------------------------------------------------------------------------------------------------ measures


def _values(arms: Sequence[ArmRuns]) -> dict[str, dict[str, dict[int, float]]]:
    """Return measure -> label -> seed -> value; held-out losses only where arms predict and weigh alike."""
    by_protocol: dict[str, dict[str, dict[int, float]]] = {}
    common = _common_bins(arms)
    for arm in arms:
        for seed, run in arm.done.items():
            for protocol, result in run.evaluation.items():
                kind, value = _kind(protocol), result.get("value")
                if kind is None or protocol.startswith(STEPS):  # a best of a grid, of another cell for each seed
                    continue
                value = math.nan if value is None else value
                if protocol in common:
                    errors = _by_bin(result)
                    if not common[protocol] or not errors:  # another or unknown range of log-SNR
                        continue
                    value = statistics.fmean(errors[x] for x in common[protocol])
                by_protocol.setdefault(protocol, {}).setdefault(arm.label, {})[seed] = kind.scale * value
                if protocol.startswith("recognition") and isinstance(accuracy := result.get("accuracy"), float):
                    name = f"asked{protocol.removeprefix('recognition')}"
                    by_protocol.setdefault(name, {}).setdefault(arm.label, {})[seed] = KINDS["asked"].scale * accuracy
    if len({_loss_settings(arm.first) for arm in arms}) == 1:
        for arm in arms:
            for seed, run in arm.done.items():
                lines = held_out_lines(run.metrics)
                if lines and not _is_cut(run):
                    last = math.nan if lines[-1]["loss"] is None else lines[-1]["loss"]
                    n = lines[-1].get("n")
                    protocol = HELD_OUT if n is None else f"{HELD_OUT}_{n}"
                    by_protocol.setdefault(protocol, {}).setdefault(arm.label, {})[seed] = last
    return by_protocol


def _is_cut(run: Recorded) -> bool:
    """Whether metrics.jsonl lacks the end of a run that is done."""
    last = run.status.get("step")
    return isinstance(last, int) and max((line["step"] for line in run.metrics), default=0) < last


def _values_by_sampler(arm: ArmRuns) -> dict[str, dict[str, dict[int, float]]]:
    """Return the same as `_values` where the arms are several ways of sampling one trained network."""
    by_protocol: dict[str, dict[str, dict[int, float]]] = {}
    for seed, run in arm.done.items():
        for protocol, cells in _cells(run).items():
            for cell in cells:
                by_protocol.setdefault(protocol, {}).setdefault(_way(cell), {})[seed] = cell["value"]
    return by_protocol


def _cells(run: Recorded) -> dict[str, list[dict[str, Any]]]:
    """Return protocol -> results of a grid of samplers and steps."""
    grids = {name: result.get("cells") for name, result in run.evaluation.items() if name.startswith(STEPS)}
    return {name: list(filter(_is_cell, cells)) for name, cells in grids.items() if isinstance(cells, list)}


def _is_cell(cell: Any) -> bool:
    names, numbers = ("sampler", "spacing"), ("steps", "evaluations", "value")
    return (
        isinstance(cell, dict)
        and all(isinstance(cell.get(key), str) for key in names)
        and all(isinstance(cell.get(key), int | float) for key in numbers)
    )


def _way(cell: Mapping[str, Any]) -> str:
    spacing = "" if cell["spacing"] == "uniform" else f" {cell['spacing']}"
    return f"{cell['sampler']} {cell['steps']}{spacing}"


def _kind(protocol: str) -> Kind | None:
    protocol = protocol.removeprefix(STEPS)
    return next((kind for name, kind in KINDS.items() if protocol.startswith(name)), None)


def _ordered(values: dict[str, Any], measure: str | None) -> dict[str, Any]:
    """Return the measures in the order of `KINDS`, after the requested one; of a kind, the one with most runs first."""
    if measure is not None and not any(name.removeprefix(STEPS).startswith(measure) for name in values):
        raise ValueError(f"measure={measure}: no run has it; there: {', '.join(values) or 'none, see ddpm-evaluate'}")
    kinds = list(KINDS)

    def rank(name: str) -> tuple[bool, int, int]:
        plain = name.removeprefix(STEPS)
        number = next((i for i, kind in enumerate(kinds) if plain.startswith(kind)), len(kinds))
        return measure is None or not plain.startswith(measure), number, -sum(map(len, values[name].values()))

    return {name: values[name] for name in sorted(values, key=rank)}


def _measure(
    name: str,
    values: dict[str, dict[int, float]],
    arms: Sequence[ArmRuns],
    against: Mapping[str, str],
    order: Sequence[str],
) -> Measure:
    """Return a measure with its intervals and differences."""
    kind = _kind(name)
    assert kind is not None  # see `_values`
    results = [run.evaluation[name] for arm in arms for run in arm.done.values() if name in run.evaluation]
    values = {label: values[label] for label in order if label in values}
    reals = [r["real_vs_real"] for r in results if isinstance(r.get("real_vs_real"), int | float)]
    widths = [
        kind.scale * (r["high"] - r["low"]) / 2
        for r in results
        if isinstance(r.get("low"), int | float) and isinstance(r.get("high"), int | float)
    ]
    others = {label: points for label, points in values.items() if label != against[label] in values}
    baselines = {label: values[against[label]] for label in others}
    units = "points" if any(_is_of_points(run) for arm in arms for run in arm.done.values()) else "images"
    return Measure(
        name=name,
        title=kind.title,
        unit=kind.unit,
        better=kind.better,
        arms={label: estimate(points) for label, points in values.items()},
        differences=compare(others, baselines, kind.better, survivors=_survivors(arms, against)),
        real=kind.scale * statistics.mean(reals) if reals else None,
        noise=max(widths) if widths else None,
        noise_of=kind.chosen.replace("images", units),
        units=units,
        note=_note(name, results, arms),
    )


def _with_unique_titles(measures: Sequence[Measure]) -> list[Measure]:
    """Return the measures, with the rest of the protocol added to titles that several of them share."""
    titles = Counter(measure.title for measure in measures)

    def title(measure: Measure) -> str:
        plain = measure.name.removeprefix(STEPS)
        rest = next(plain.removeprefix(kind) for kind in KINDS if plain.startswith(kind)).lstrip("_-")
        return f"{measure.title} ({rest})" if rest else measure.title

    return [replace(m, title=title(m)) if titles[m.title] > 1 else m for m in measures]


def _survivors(arms: Sequence[ArmRuns], against: Mapping[str, str]) -> set[str]:
    """Return the labels of arms with failed seeds, of their own or of their baseline."""
    failed = {arm.label for arm in arms if any(run.state == FAILED for run in arm.runs)}
    return failed | {label for label, base in against.items() if base in failed}


def _note(name: str, results: Sequence[Mapping[str, Any]], arms: Sequence[ArmRuns]) -> str:
    """Return a note on a measure: its protocol, and caveats."""
    notes = [] if name == HELD_OUT else [f"measured as {name}"]
    ways = {json.dumps([r.get(key) for key in SETTINGS if key != "checkpoint"], sort_keys=True) for r in results}
    if len(ways) > 1:
        notes.append("runs were sampled or measured by different settings")
    bins = _common_bins(arms).get(name)
    if bins:
        notes.append(f"the mean over log-SNR {min(bins) - 0.5:g} to {max(bins) + 0.5:g}, which all arms reach")
    return "; ".join(notes)


def _common_bins(arms: Sequence[ArmRuns]) -> dict[str, list[float]]:
    """Return protocol of loss_by_snr -> bins of log-SNR within its range that all runs with bins have in common."""
    by_protocol: dict[str, list[set[float]]] = {}
    for arm in arms:
        for run in arm.done.values():
            for protocol, result in run.evaluation.items():
                if errors := _by_bin(result):
                    low, high = result.get("value_log_snr") or (min(errors), max(errors))
                    by_protocol.setdefault(protocol, []).append({x for x in errors if low <= x <= high})
    return {protocol: sorted(set.intersection(*bins)) for protocol, bins in by_protocol.items()}


def _by_bin(result: Mapping[str, Any]) -> dict[float, float]:
    """Return log-SNR -> error of eps, where the schedule reaches it."""
    bins, errors = result.get("log_snr"), result.get("eps")
    if not isinstance(bins, list) or not isinstance(errors, list) or len(bins) != len(errors):
        return {}
    return {x: error for x, error in zip(bins, errors, strict=True) if error is not None}


def _loss_settings(run: Recorded) -> str:
    """Return the settings that the scale of a loss depends on, as text."""
    return json.dumps([run.science.get(key) for key in ("diffusion", "schedule", "data")], sort_keys=True)


# ---------------------------------------------------------------------------------------------------------------- arms


def _baseline(
    names: Sequence[str], known: Sequence[str], settings: Settings, arms: Sequence[ArmRuns], requested: str | None
) -> tuple[str, Blocks | None]:
    """Return the baseline arm; or, in a grid, the baseline level with the blocks of arms compared at it."""
    named = requested if requested is not None else _common_value(arms, "baseline")
    if named in names:
        return str(named), None
    meant = _matching_levels(named, settings)
    grid = _grid(settings.values())
    if named not in known and len(meant) == 1 and grid:
        blocks = _blocks(settings, list(grid), *meant[0])
        if done := [base for base in blocks.against.values() if base in names]:
            return blocks.levels[done[0]], blocks
    elif requested is not None and requested not in known:
        levels = "; ".join(f"{factor}: {', '.join(values)}" for factor, values in grid.items())
        there = f"{'; '.join(names) or 'none that is done'}{f'; or a level of {levels}' if levels else ''}"
        reason = _no_baseline(requested, known, settings, "the study")
        raise ValueError(f"baseline={requested} {reason}; there: {there}")
    return names[0] if names else (known[0] if known else ""), None


def _matching_levels(name: str | None, settings: Settings) -> list[tuple[str, str]]:
    """Return the (factor, level) pairs that the name of a baseline matches."""
    factors = _factors(settings.values())
    pairs = [(factor, level) for factor, levels in factors.items() if len(levels) > 1 for level in levels]
    return [(factor, level) for factor, level in pairs if name in (level, f"{factor}={level}")]


def _no_baseline(name: str, known: Sequence[str], settings: Settings, study: str) -> str:
    """Return the reason why there is no baseline of this name."""
    meant = _matching_levels(name, settings)
    if name in known or (len(meant) == 1 and _grid(settings.values())):
        return "has no run that is done"
    reason = f"is no arm of {study}"
    if len(meant) > 1:
        return f"{reason}, but a level of several factors ({', '.join(map('='.join, meant))})"
    return f"{reason}, but a level, and the factors form no full grid" if meant else reason


def _blocks(settings: Settings, factors: Sequence[str], factor: str, level: str) -> Blocks:
    """Group the arms of a grid into blocks by the levels of all factors but one."""
    others = tuple(other for other in factors if other != factor)
    named = {  # factors named in labels, or with numbers as levels
        key for key in factors if any(f"{key}=" in x or of[key][:1].isdigit() for x, of in settings.items())
    }

    def words(label: str, of: Sequence[str]) -> str:
        return ", ".join(f"{key}={settings[label][key]}" if key in named else settings[label][key] for key in of)

    cells = {label: tuple(of[other] for other in others) for label, of in settings.items()}
    bases = {cells[label]: label for label, of in settings.items() if of[factor] == level}
    return Blocks(
        factor=factor,
        level=level,
        others=others,
        levels={label: words(label, [factor]) for label in settings},
        names={label: words(label, others) for label in settings},
        against={label: bases[cell] for label, cell in cells.items()},
    )


def _values_of(arms: Sequence[ArmRuns], key: str) -> list[str]:
    """Return the distinct values of a key in the runs' configurations, sorted."""
    return sorted({str(run.settings[key]) for arm in arms for run in arm.runs if run.settings.get(key) is not None})


def _common_value(arms: Sequence[ArmRuns], key: str) -> str | None:
    """Return the value of a key in the runs' configurations, if they agree; else None."""
    values = _values_of(arms, key)
    return values[0] if len(values) == 1 else None


def _arm(arm: ArmRuns, base: ArmRuns | None, network: Network) -> Arm:
    """Return an arm, flagged against its baseline if that is done."""
    runs = arm.done
    parameters, gflop = network(arm.first.settings) or (None, None)
    seconds = [run.status["seconds"] for run in runs.values() if isinstance(run.status.get("seconds"), int | float)]
    return Arm(
        label=arm.label,
        settings=arm.levels,
        runs=tuple(run.path for run in runs.values()),
        seeds=tuple(sorted(runs)),
        parameters=parameters,
        gflop=gflop,
        seconds=statistics.fmean(seconds) if seconds else None,
        flags=tuple(_flags(arm, base or arm)),
        commands=tuple(dict.fromkeys(_command(run.typed) for run in runs.values())),
    )


def _sampler_arms(arm: ArmRuns, network: Network) -> dict[str, Arm]:
    """Return label -> arm, of the ways of sampling one network."""
    trained = _arm(arm, arm, network)
    by_way = {}
    for run in arm.done.values():
        for cell in itertools.chain.from_iterable(_cells(run).values()):
            levels = {"sampler": str(cell["sampler"]), "steps": str(cell["steps"])}
            levels |= {} if cell["spacing"] == "uniform" else {"spacing": str(cell["spacing"])}
            gflop = None if trained.gflop is None else trained.gflop * cell["evaluations"]
            by_way[_way(cell)] = Arm(
                _way(cell), levels, trained.runs, trained.seeds, trained.parameters, gflop, trained.seconds
            )
    return by_way


def _flags(arm: ArmRuns, base: ArmRuns) -> list[str]:
    """Return the reasons why an arm may not be comparable with its baseline."""
    runs, others, flags = list(arm.done.values()), list(base.done.values()), []
    for key, name in (("commit", "code of another commit"), ("precision", "another precision"),
                      ("device", "another device"), ("threads", "another number of threads")):  # fmt: skip
        here, there = ({str(known) for run in side if (known := run.status.get(key)) is not None}
                       for side in (runs, others))  # fmt: skip
        if len(here | there) > 1:
            words = ", ".join(sorted(f"{value[:12]}{'+' if value.endswith('+') else ''}" for value in here | there))
            flags.append(f"{name}: {words}")
    if any((run.status.get("data") or {}).get("sha256") != (others[0].status.get("data") or {}).get("sha256")
           for run in runs):  # fmt: skip
        flags.append("other data")
    if failed := sum(run.state == FAILED for run in arm.runs):
        flags.append(f"{failed} of its {len(arm.runs)} seeds failed: the remaining ones are a lucky selection")
    if unmeasured := sum(bool(run.unmeasured) for run in runs):
        flags.append(f"{unmeasured} of its {len(arm.runs)} seeds lack requested measurements")
    if arm.label != base.label and (unpaired := _unpaired(arm, base)):
        flags.append(f"not paired with the baseline ({unpaired}): its differences are valid, but noisier")
    return flags


def _unpaired(arm: ArmRuns, base: ArmRuns) -> str:
    """Return the reason why arms do not share data order, times and noise; "" if they do."""
    if any(run.status.get("paired") is False for run in (*arm.done.values(), *base.done.values())):
        return "ended by a time budget"
    here, there = arm.first.science, base.first.science
    if not here or not there:
        return ""
    keys = [("trainer", "batch_size"), ("trainer", "time_sampling"), ("model", "image_size")]
    differing = [key for group, key in keys if (here.get(group) or {}).get(key) != (there.get(group) or {}).get(key)]
    differing += ["T"] if len({_T(science.get("schedule")) for science in (here, there)} - {None}) > 1 else []
    return f"{', '.join(differing)} differ{'s' if len(differing) == 1 else ''}" if differing else ""


def _T(schedule: Any) -> int | None:
    """Return T of a schedule's configuration, or of the nested one that it modifies; None if not stated."""
    if not isinstance(schedule, dict):
        return None
    if isinstance(schedule.get("beta"), list):
        return len(schedule["beta"])
    return schedule.get("T") or next((T for value in schedule.values() if (T := _T(value)) is not None), None)


def _failures(arms: Sequence[ArmRuns]) -> tuple[Failure, ...]:
    """Return the runs that are not done."""
    return tuple(
        Failure(arm.label, run.seed, run.path, run.state, str(run.status.get("reason") or "it runs"),
                run.status.get("traceback"))
        for arm in arms
        for run in arm.runs
        if not run.done
    )  # fmt: skip


def _warnings(arms: Sequence[ArmRuns]) -> list[str]:
    """Return warnings that concern the study as a whole."""
    commits = {str(run.status.get("commit")) for arm in arms for run in arm.done.values()}
    warnings = []
    if len(commits) > 1:
        warnings.append(f"its runs come from {len(commits)} commits")
    if any(commit.endswith("+") for commit in commits):
        warnings.append("some runs used code that was changed after its commit")
    seeds = {tuple(sorted(arm.done)) for arm in arms if arm.done}
    if len(seeds) > 1:
        warnings.append("the arms have different seeds: an arm is compared on those that the baseline has too")
    runs = [run for arm in arms for run in arm.done.values()]
    if unmeasured := sum(bool(run.unmeasured) for run in runs):
        warnings.append(
            f"{unmeasured} of {counted(len(runs), 'trained run')} lack requested measurements: "
            "repeat the sweep, or ddpm-study retry"
        )
    for run in runs:
        if _is_cut(run):
            warnings.append(
                f"{run.path.name}: its metrics.jsonl ends before its last step; its held-out loss is left out"
            )
    return warnings


# ------------------------------------------------------------------------------------------------ design and verdict


def _design(
    arms: Sequence[ArmRuns], in_report: Sequence[Arm], of_samplers: bool, base: str, blocks: Blocks | None
) -> tuple[str, ...]:
    """Return sentences on the design: factors, seeds, fixed settings and comparisons."""
    levels = _factors([arm.settings for arm in in_report] if of_samplers else [arm.differs for arm in arms])
    varied = "; ".join(f"{factor}: {', '.join(values)}" for factor, values in levels.items() if len(values) > 1)
    seeds = sorted({seed for arm in in_report for seed in arm.seeds})
    runs = sum(len(arm.runs) for arm in arms)
    number = f"{len(in_report)} ways to sample one network" if of_samplers else counted(len(arms), "arm")
    trained = f"{len(seeds)} training seeds ({_range(seeds)})" if seeds else "no training seed that is done"
    trained = f"one training seed ({seeds[0]})" if len(seeds) == 1 else trained
    sentences = [f"{number}, {trained}, {counted(runs, 'run')}."]
    if varied:
        sentences.append(f"Varied: {varied}.")
    if fixed := _fixed(arms):
        sentences.append(f"The same in all: {fixed}.")
    if blocks is not None:
        same = " and ".join(blocks.others)
        sentences.append(f"Compared: every {blocks.factor} with {base}, always at the same {same}.")
    sentences.append(
        "Arms of one seed see the same order of the data, the same times and noise, and are sampled from the same x_T, "
        "unless they are marked as not paired."
    )
    return tuple(sentences)


def _range(seeds: Sequence[int]) -> str:
    if seeds and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))


def _fixed(arms: Sequence[ArmRuns]) -> str:
    """Describe the data and the training settings that all arms share."""

    def same(group: str, key: str) -> Any:
        values = {json.dumps((arm.first.science.get(group) or {}).get(key)) for arm in arms if arm.first.science}
        return json.loads(values.pop()) if len(values) == 1 else None

    parts = []
    data = next((known for arm in arms for run in arm.runs if (known := run.status.get("data"))), None)
    if data is not None and same("data", "_target_"):
        size = data.get("image_size")
        of = f"images of {'x'.join(map(str, size))}" if size else "points"
        parts.append(f"{data['name']}, {data['count']:,} {of}")
    for key, unit in (("steps", "steps"), ("epochs", "epochs"), ("seconds", "s")):
        if (budget := same("trainer", key)) is not None:
            parts.append(f"{budget:,} {unit}")
    for group, key, name in (("trainer", "batch_size", "batches of"), ("optimizer", "lr", "learning rate"),
                             ("diffusion", "target", "target")):  # fmt: skip
        if (value := same(group, key)) is not None:
            parts.append(f"{name} {value}")
    schedule = same("schedule", "_target_")
    parts += [f"{str(schedule).rpartition('.')[2]} schedule"] if schedule else []
    return "; ".join(parts)


def _verdict(
    measure: Measure | None, base: str, failures: Sequence[Failure], blocks: Blocks | None, effects: Sequence[Effect]
) -> tuple[str, ...]:
    """Return the sentences of the verdict, by the first measure."""
    undone = [f"{counted(len(failures), 'run')} {'is' if len(failures) == 1 else 'are'} not done."] if failures else []
    if measure is None:
        return ("Nothing was measured: see ddpm-evaluate, or evaluation= of ddpm-train.", *undone)
    sentences = _by_arm(measure, base) if blocks is None else _by_level(measure, base, blocks, effects)
    undecided = [label for label, of in measure.differences.items() if of.verdict == NOT_DECIDED]
    if undecided:
        sentences.append(
            f"Not decided, for fewer than {ENOUGH} seeds in which both are measured, or because some failed: "
            f"{_some(undecided)}."
        )
    return (*sentences, *undone)


def _by_arm(measure: Measure, base: str) -> list[str]:
    """Return the verdict on arms with one common baseline."""
    name, sentences = measure.title, []
    differences = measure.differences
    sign = 1 if measure.better == LOWER else -1
    results = (label for label, of in differences.items() if of.verdict in MARKED)
    ordered = sorted(results, key=lambda x: sign * differences[x].mean)
    better = [label for label in ordered if differences[label].verdict == BETTER]
    unit = f" {measure.unit}" if measure.unit else ""
    if base in measure.arms:
        of_base = measure.arms[base]
        sentences.append(
            f"{name} of the baseline, {base}: {interval(of_base.mean, of_base.low, of_base.high)}{unit} "
            f"({aim(measure)})."
        )
    else:
        sentences.append(f"{name} was not measured for the baseline, {base}: nothing is compared with it.")
    for label in better[:3]:
        c = differences[label]
        sentences.append(f"{label} is better, by {interval(c.mean, c.low, c.high, signed=True)}{unit}.")
    if len(better) > 3:
        sentences.append(f"So are {_some(better[3:])}.")
    for verdict in (WORSE, HIGHER, LOWER):
        there = [label for label in ordered if differences[label].verdict == verdict]
        if listed := [f"{x} ({interval(differences[x].mean, None, None, signed=True)})" for x in there]:
            sentences.append(f"{verdict.capitalize()}: {_some(listed)}.")
    neither = [label for label in differences if differences[label].verdict == NO_DIFFERENCE]
    if neither:
        sentences.append(f"No difference to it is shown for {_some(neither)}.")
    return sentences


def _by_level(measure: Measure, base: str, blocks: Blocks, effects: Sequence[Effect]) -> list[str]:
    """Return the verdict on arms in blocks: a sentence for each level, those that win most blocks first."""
    of, same = measure.differences, " and ".join(blocks.others)
    bases = [label for label in measure.arms if blocks.against[label] == label]
    if not bases:
        return [f"{measure.title} was not measured for the baseline, {base}: nothing is compared with it."]
    means = [(blocks.names[label], measure.arms[label]) for label in bases]
    listed = _some([f"{name} {interval(mean.mean, mean.low, mean.high)}" for name, mean in means])
    unit = f"{measure.unit}, " if measure.unit else ""
    sentences = [f"{measure.title} of the baseline, {base}, by {same} ({unit}{aim(measure)}): {listed}."]
    averages = {level: average for effect in effects for level, average in effect.differences.items()}
    count, lines = len(set(blocks.against.values())), []
    for level in dict.fromkeys(blocks.levels[label] for label in of):
        by_verdict = {verdict: [label for label in of if blocks.levels[label] == level and of[label].verdict == verdict]
                      for verdict in (BETTER, WORSE, HIGHER, LOWER, NO_DIFFERENCE)}  # fmt: skip
        parts = []
        for verdict, labels in by_verdict.items():
            words, where = f"no difference to {base} shown", [blocks.names[label] for label in labels]
            if verdict != NO_DIFFERENCE:
                words = f"{verdict} than {base}"
                where = [f"{blocks.names[label]} {number(of[label].mean, signed=True)}" for label in labels]
            parts += [f"{words} on {len(labels)} of {count} ({_some(where)})"] if labels else []
        average = averages.get(level.removeprefix(f"{blocks.factor}="))
        if parts and average is not None and average.verdict != NOT_DECIDED:
            parts.append(f"on average {interval(average.mean, average.low, average.high, signed=True)}")
        if parts:
            lines.append((len(by_verdict[WORSE]) - len(by_verdict[BETTER]), f"{level}: {'; '.join(parts)}."))
    sentences += [line for _, line in sorted(lines, key=lambda line: line[0])[:MOST_NAMED]]
    if len(lines) > MOST_NAMED:
        sentences.append(f"{len(lines) - MOST_NAMED} more of {blocks.factor} are in the table of differences.")
    if without := [label for label in measure.arms if label not in (*bases, *of)]:
        sentences.append(f"Not compared, for no result of {base} with the same {same} and seed: {_some(without)}.")
    return sentences


def _some(labels: Sequence[str]) -> str:
    """Join at most `MOST_NAMED` labels, with the number of further ones."""
    more = f" and {len(labels) - MOST_NAMED} more" if len(labels) > MOST_NAMED else ""
    return ("; " if any("," in label for label in labels) else ", ").join(labels[:MOST_NAMED]) + more


# --------------------------------------------------------------------------------------------------- grids and fronts


def _factors(settings: Iterable[Mapping[str, str]]) -> dict[str, list[str]]:
    """Return factor -> its levels; numbers ascending, others in the order of the arms."""
    factors: dict[str, dict[str, None]] = {}
    for of_arm in settings:
        for factor, level in of_arm.items():
            factors.setdefault(factor, {})[level] = None
    return {factor: _in_order(list(levels)) for factor, levels in factors.items()}


def _in_order(levels: list[str]) -> list[str]:
    """Sort levels that are numbers; leave others in their order."""
    try:
        return sorted(levels, key=float)
    except ValueError:
        return levels


def _grid(settings: Collection[Mapping[str, str]]) -> dict[str, list[str]]:
    """Return factors and levels of a full grid of at least two factors; {} for any other design."""
    factors = {factor: levels for factor, levels in _factors(settings).items() if len(levels) > 1}
    cells = {tuple(of_arm.get(factor) for factor in factors) for of_arm in settings}
    full = math.prod(len(levels) for levels in factors.values()) == len(cells) == len(settings)
    return factors if len(factors) > 1 and full else {}


def _effects(
    arms: Sequence[Arm], measure: Measure | None, blocks: Blocks | None, survivors: Collection[str]
) -> tuple[Effect, ...]:
    """Return main effects of a grid: the mean at every level of a factor, over seeds that all arms have.

    With blocks also the differences of the compared factor's levels, paired by seed: a seed's value is the mean over
    blocks.
    """
    grid = _grid([arm.settings for arm in arms])
    if not grid or measure is None or any(arm.label not in measure.arms for arm in arms):
        return ()
    seeds = set.intersection(*(set(measure.arms[arm.label].points) for arm in arms))
    if not seeds:
        return ()
    effects = []
    for factor, levels in grid.items():
        at = {level: [measure.arms[arm.label] for arm in arms if arm.settings[factor] == level] for level in levels}
        means = {
            level: estimate({seed: statistics.fmean(arm.points[seed] for arm in estimates) for seed in sorted(seeds)})
            for level, estimates in at.items()
        }
        differences = {}
        if blocks is not None and factor == blocks.factor:
            points = {level: of.points for level, of in means.items() if level != blocks.level}
            baselines = dict.fromkeys(points, means[blocks.level].points)
            failed = {arm.settings[factor] for arm in arms if arm.label in survivors}
            differences = compare(points, baselines, measure.better, survivors=failed)
        effects.append(Effect(factor, means, differences))
    return tuple(effects)


def _interactions(arms: Sequence[Arm], measure: Measure | None) -> tuple[Interaction, ...]:
    """Return the interaction of every two factors of a grid: means over the others."""
    grid = _grid([arm.settings for arm in arms])
    if not grid or measure is None:
        return ()
    interactions = []
    for rows, columns in itertools.islice(itertools.combinations(grid, 2), MOST_INTERACTIONS):
        means = []
        for row in grid[rows]:
            line = []
            for column in grid[columns]:
                labels = [arm.label for arm in arms if arm.settings[rows] == row and arm.settings[columns] == column]
                values = [measure.arms[label].mean for label in labels if label in measure.arms]
                line.append(statistics.fmean(values) if len(values) == len(labels) else None)
            means.append(tuple(line))
        interactions.append(Interaction(rows, columns, tuple(grid[rows]), tuple(grid[columns]), tuple(means)))
    return tuple(interactions)


def _differ_in_work(sampled: ArmRuns | None, measured: Sequence[ArmRuns]) -> bool:
    """Whether arms differ in training compute, by their networks, budgets or data."""
    groups = [[arm.first.science.get(group) for group in ("model", "trainer", "data")] for arm in measured]
    return sampled is None and len({json.dumps(group, sort_keys=True) for group in groups}) > 1


def _fronts(
    arms: Sequence[Arm], measure: Measure | None, sampled: ArmRuns | None, measured: Sequence[ArmRuns]
) -> tuple[Front, ...]:
    """Return the Pareto fronts of quality against each cost that differs between arms."""
    if measure is None or measure.better == NEITHER:
        return ()
    costs: dict[str, dict[str, float | None]] = {
        "parameters": {arm.label: arm.parameters for arm in arms},
        "GFLOP an image": {arm.label: arm.gflop for arm in arms},
        "seconds of training": {arm.label: arm.seconds for arm in arms},
    }
    if sampled is not None:
        cells = [cell for run in sampled.done.values() for grid in _cells(run).values() for cell in grid]
        costs = {"evaluations a sample": {_way(cell): cell["evaluations"] for cell in cells}}
    if not _differ_in_work(sampled, measured):
        costs.pop("seconds of training", None)  # they differ then only by the load of the machine
    fronts = []
    for cost, of in costs.items():
        points = {
            label: (float(value), measure.arms[label].mean)
            for label, value in of.items()
            if value is not None and label in measure.arms
        }
        values = [value for value, _ in points.values()]
        if len(points) > 1 and max(values) > 1.01 * min(values):
            fronts.append(Front(cost, points, front(points, measure.better)))
    return tuple(fronts)


def _trade_offs(
    values: Mapping[str, Mapping[str, Mapping[int, float]]], measures: Sequence[Measure], arms: Sequence[ArmRuns]
) -> tuple[TradeOff, ...]:
    """Return each pair of quality (the first measure), coverage (or recall) and samples a second, of runs with all."""
    quality = next(iter(measures), None)
    coverage = next((m for name in ("coverage", "recall") for m in measures if m.name.startswith(name)), None)
    if quality is None or quality.better == NEITHER or coverage is None or quality is coverage:
        return ()
    runs: dict[str, tuple[tuple[float, float, float], ...]] = {}  # label -> (quality, coverage, speed) of each seed
    for arm in arms:
        of_quality, of_coverage = (values[measure.name].get(arm.label, {}) for measure in (quality, coverage))
        rows = (
            (of_quality.get(seed), of_coverage.get(seed), _speed(run, quality.name)) for seed, run in arm.done.items()
        )
        if whole := tuple((a, b, c) for a, b, c in rows if a is not None and b is not None and c is not None):
            runs[arm.label] = whole
    if len(runs) < 2:
        return ()
    titles = [f"{measure.title}, {measure.better} is better" for measure in (quality, coverage)]
    titles.append("Samples a second, higher is better")
    return tuple(
        TradeOff(titles[x], titles[y], {label: tuple((row[x], row[y]) for row in rows) for label, rows in runs.items()})
        for x, y in ((1, 0), (2, 0), (2, 1))
    )


def _speed(run: Recorded, protocol: str) -> float | None:
    """Return samples a second as `metric=cost` timed them, with as many evaluations as a measure was taken with."""
    cost = next((result for name, result in run.evaluation.items() if name.startswith("cost")), {})
    speeds, evaluations = cost.get("sampling_images_per_s"), cost.get("evaluations")
    if not isinstance(speeds, dict) or not isinstance(evaluations, dict):
        return None
    drawn_with = run.evaluation.get(protocol, {}).get("evaluations") or 1  # what has no sampler is evaluated once
    return next((float(speeds[name]) for name, count in evaluations.items() if count == drawn_with), None)


# -------------------------------------------------------------------------------------------------- curves and pictures


def _curve(lines: Sequence[Mapping[float, float]]) -> Curve | None:
    """Return mean and range over seeds, where all of them have a value."""
    if not lines:
        return None
    x = sorted(set.intersection(*(set(line) for line in lines)))
    values = np.array([[line[at] for at in x] for line in lines])  # (seeds, points)
    if len(x) < 2:
        return None
    return Curve(tuple(x), *(tuple(statistic(values, 0).tolist()) for statistic in (np.mean, np.min, np.max)))


def _losses(arms: Sequence[ArmRuns]) -> tuple[str, dict[str, Curve]]:
    """Return title and curves of the held-out loss over steps; of the smoothed training loss where runs are short."""
    for title, split, smooth in (("Held-out loss", "held_out", 1), ("Training loss, smoothed", "train", SMOOTH)):
        curves = {arm.label: _curve([_smoothed(run, split, smooth) for run in arm.done.values()]) for arm in arms}
        enough = {label: curve for label, curve in curves.items() if curve is not None and len(curve.x) >= CURVE_POINTS}
        if enough:
            return title, enough
    return "Held-out loss", {}


def _smoothed(run: Recorded, split: str, smooth: int) -> dict[float, float]:
    """Return step -> the mean of the last `smooth` losses up to it."""
    lines = held_out_lines(run.metrics) if split == "held_out" else run.metrics
    points = [(line["step"], line["loss"]) for line in lines if line["split"] == split and line["loss"] is not None]
    losses = [loss for _, loss in points]
    return {float(step): statistics.fmean(losses[max(0, i + 1 - smooth) : i + 1]) for i, (step, _) in enumerate(points)}


def _errors(arm: ArmRuns) -> Curve | None:
    """Return the curve of the error of eps over log-SNR."""
    lines = []
    for run in arm.done.values():
        lines += [errors for result in run.evaluation.values() if (errors := _by_bin(result))][:1]
    return _curve(lines)


def _by_steps(arms: Sequence[ArmRuns]) -> dict[str, Curve]:
    """Return "arm, sampler" -> curve of the Frechet distance over evaluations."""
    by_name: dict[str, dict[int, dict[float, float]]] = {}
    for arm in arms:
        for seed, run in arm.done.items():
            for cells in _cells(run).values():
                for cell in cells:
                    name = cell["sampler"] if cell["spacing"] == "uniform" else f"{cell['sampler']} {cell['spacing']}"
                    name = name if len(arms) == 1 else f"{arm.label}, {name}"
                    by_name.setdefault(name, {}).setdefault(seed, {})[float(cell["evaluations"])] = cell["value"]
    curves = {name: _curve(list(lines.values())) for name, lines in by_name.items()}
    return {name: curve for name, curve in curves.items() if curve is not None}


def _schedules(arms: Sequence[ArmRuns], points: SchedulePoints) -> dict[str, Curve]:
    """Return label -> sqrt(alpha_bar) over t / T, if schedules differ."""
    if len({json.dumps(arm.first.science.get("schedule"), sort_keys=True) for arm in arms}) < 2:
        return {}
    curves = {arm.label: points(arm.first.settings) for arm in arms}
    return {label: Curve(tuple(xy[0]), tuple(xy[1]), (), ()) for label, xy in curves.items() if xy is not None}


def _sheet(arms: Sequence[ArmRuns], order: Sequence[str], outline: Outline) -> dict[str, Any]:
    """Return label -> samples, of one seed that all arms have, from the same x_T."""
    seeds = set.intersection(*(set(arm.done) for arm in arms)) if arms else set()
    if not seeds:
        return {}
    rows = {arm.label: _row(arm.done[min(seeds)], outline) for arm in arms}
    return {label: rows[label] for label in order if rows.get(label) is not None}


def _is_of_points(run: Recorded) -> bool:
    """Whether the data of a run are points rather than images."""
    data = run.status.get("data")
    return isinstance(data, dict) and not data.get("image_size")


def _row(run: Recorded, outline: Outline) -> Any | None:
    """Return the first samples of a run side by side, (H, W, C), or its points over the data's; None if not stored.

    Only two-dimensional points are drawn, always in the same window.
    """
    samples = images.load_samples(run.path / "samples.npy")
    if samples is None or len(samples) == 0:
        return None
    x = torch.from_numpy(samples.copy())
    if x.ndim == 2:
        return images.scatter(x, outline(run.settings), SIDE) if x.shape[1] == 2 else None
    x = x[:SHOWN].permute(0, 3, 1, 2)
    return images.grid(x, columns=len(x), scale=1, background=255)[2:-2, 2:-2]


# ------------------------------------------------------------------------------------------------------ how it was made


def _environment(arms: Sequence[ArmRuns]) -> dict[str, str]:
    """Return commit, machine, device and versions of the runs, each with all its values."""
    runs = [run for arm in arms for run in arm.done.values()]
    known: dict[str, dict[str, None]] = {}
    for run in runs:
        machine = run.status.get("machine")
        facts = {key: run.status.get(key) for key in ("commit", "host", "device", "precision", "threads")}
        machine = machine if isinstance(machine, dict) else {}
        facts |= {"processor" if k == "name" else k: v for k, v in machine.items() if k not in facts}
        for key, value in facts.items():
            if value is not None:
                known.setdefault(key, {})[str(value)] = None
    return {key: ", ".join(values) for key, values in known.items()}


def _commands(arms: Sequence[ArmRuns]) -> tuple[str, ...]:
    """Return the commands that make the runs, without paths and devices; full combinations become one sweep."""
    runs = [[word for word in run.typed if not word.startswith(PLACES)] for arm in arms for run in arm.runs]
    groups: dict[tuple[str, ...], list[list[str]]] = {}  # by keys: the values of each run
    for words in runs:
        pairs = [word.partition("=")[::2] for word in words]
        groups.setdefault(tuple(key for key, _ in pairs), []).append([value for _, value in pairs])
    commands = []
    for keys, rows in groups.items():
        values = [list(dict.fromkeys(column)) for column in zip(*rows, strict=True)]  # the first is the baseline
        distinct = {tuple(row) for row in rows}
        if len(distinct) > 1 and math.prod(map(len, values)) == len(distinct):
            words = [f"{key}={','.join(of)}" for key, of in zip(keys, values, strict=True)]
            commands.append(_command(["-m", *words]))
        else:
            commands += [_command([f"{k}={v}" for k, v in zip(keys, row, strict=True)]) for row in sorted(distinct)]
    return tuple(commands)[:MOST_COMMANDS]


def _command(words: Sequence[str]) -> str:
    return shlex.join(["ddpm-train", *(word for word in words if not word.startswith(PLACES))])
