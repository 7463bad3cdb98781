"""`ddpm-evaluate metric=guidance_sweep`: sample quality and agreement with the class over guidance weights."""

import math
from pathlib import Path
from typing import Any

from ddpm.commands.console import say
from ddpm.commands.evaluate.context import EvaluationContext, PlannedMeasure
from ddpm.commands.load import guidance_of, must_walk
from ddpm.commands.validate import trusted
from ddpm.config import InvalidInput, plain

PROTOCOL = "guidance_frechet"  # prefix of the protocol
AGREED = ("n", "seeds", "weights", "checkpoint", "precision", "sampler", "sampler_settings", "guidance")


def measure_guidance(context: EvaluationContext, n: int) -> PlannedMeasure:
    """Check every weight; return the planned measure of those not yet recorded.

    Args:
        n: samples of each weight.
    Raises: InvalidInput.
    """
    config, source = context.config, context.source
    must_walk(source.sampler, source.diffusion)
    if "w" not in config.guidance:
        raise InvalidInput("metric=guidance_sweep needs a guidance with a weight, such as guidance=classifier_free")
    weights = plain(config.guidance_sweep.w)
    weights = weights if isinstance(weights, list) else [weights]
    real = [isinstance(w, int | float) and not isinstance(w, bool) and math.isfinite(w) for w in weights]
    if not weights or not all(real):
        raise InvalidInput(f"guidance_sweep.w={weights} must be a list of numbers, such as [0,1,2,4]")
    weights = sorted(dict.fromkeys(map(float, weights)))
    cost = len(weights) * len(context.seeds) * n * source.sampler.evaluations(source.diffusion.schedule)
    plan = (
        f"guidance_sweep: {n:,} samples, seeds from {context.seeds[0]}, {len(context.seeds)} of them, at each of "
        f"{len(weights)} weights, except those that are stored already; features by {config.features}"
    )
    return PlannedMeasure(plan, cost, lambda: _carry_out(context, weights, n), (str(config.features),))


def _carry_out(context: EvaluationContext, weights: list[float], n: int) -> None:
    """Measure Frechet distance, precision, recall and agreement of every weight; record each as soon as it is known."""
    from ddpm.figures import plots
    from ddpm.metrics import quality
    from ddpm.runs import results

    path, config, source = context.run.path, context.config, context.source
    real, _ = context.real(config.features)
    judge = context.real("classifier")[0] if source.classes(range(1)) is not None and _is_labelled(context) else None
    protocol = context.named(real.protocol(PROTOCOL, n))
    settings = context.settings(n, source.sampler) | {"seeds": context.seeds}
    settings["guidance"] = {key: value for key, value in settings["guidance"].items() if key != "w"}
    cells = {cell["w"]: cell for cell in _known(path / "evaluation.json", protocol, settings)}
    for w in weights:
        if w in cells:
            continue
        measured: dict[str, list[quality.Result]] = {}
        try:
            for seed in context.seeds:
                x, y = context.samples(list(range(n)), seed, guidance=_weighing(context, w))
                drawn = quality.Samples(x, real.features(x), y)
                found = quality.frechet(drawn, real) | quality.precision(drawn, real)
                if judge is not None:
                    found |= quality.by_classifier(quality.Samples(x, judge.features(x), y), judge)
                for name, result in found.items():
                    measured.setdefault(name.partition("-")[0], []).append(result)
        except ValueError as error:
            raise InvalidInput(f"metric=guidance_sweep: {error}") from error
        records = {name: quality.together(each, context.seeds) for name, each in measured.items()}
        distance = records["frechet"]
        cells[w] = {"w": w, **{key: distance[key] for key in ("value", "low", "high", "relative")}}
        cells[w] |= {name: records[name]["value"] for name in ("precision", "recall")}
        if judge is not None:
            cells[w]["agreement"] = records["recognition"].get("accuracy")
        in_order = [cells[key] for key in sorted(cells)]
        best = {"value": min(cell["value"] for cell in in_order), "real_vs_real": distance["real_vs_real"]}
        results.record(path, protocol, settings | best | {"cells": in_order})
        numbers = ", ".join(
            f"{key} {cells[w][key]:.3f}" for key in ("precision", "recall", "agreement") if key in cells[w]
        )
        say(f"w = {w:g}: Frechet distance {distance['value']:.3f}, {numbers}")
    in_order = [cells[key] for key in sorted(cells)]
    reference = results.recorded(path / "evaluation.json")[protocol]["real_vs_real"]
    plots.guidance_sweep(path / "guidance_sweep.png", in_order, reference, protocol)
    say(f"{protocol}: {len(in_order)} weights\nwrote {path / 'guidance_sweep.png'}")


def _weighing(context: EvaluationContext, w: float) -> Any:
    """Return the configured guidance with another weight."""
    config = context.config.copy()
    config.guidance.w = w
    return guidance_of(config, trusted(config), context.source.device)


def _is_labelled(context: EvaluationContext) -> bool:
    from ddpm.metrics import quality

    return quality.has_classes(context.every)


def _known(path: Path, protocol: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the records of weights measured earlier with the same settings; [] if any is damaged."""
    from ddpm.runs import results

    try:
        known = results.earlier(results.recorded(path), protocol)
    except ValueError:  # `record` reports it
        return []
    before = next((r for r in known if all(r.get(key) == settings.get(key) for key in AGREED)), {})
    cells = before.get("cells")
    numbers = ("w", "value", "precision", "recall")
    sound = isinstance(cells, list) and all(
        isinstance(cell, dict) and all(type(cell.get(key)) in (int, float) for key in numbers) for cell in cells
    )
    return cells if sound and isinstance(cells, list) else []
