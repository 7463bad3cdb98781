"""`ddpm-evaluate metric=depth` and `metric=masks`: agreement of samples with the depth or mask they are given."""

from typing import Any

from ddpm.commands.console import say
from ddpm.commands.evaluate.context import EvaluationContext, PlannedMeasure
from ddpm.commands.load import has, load_into, must_walk, open_run_at
from ddpm.commands.validate import trusted
from ddpm.config import InvalidInput, build_group, plain, read_config

METRICS = ("depth", "masks")  # kinds of images that a run is conditioned on
REGRESSION = "ddpm.training.tasks.regression.Regression"
MOST, COLUMNS, LEAST = 512, 10, 2  # default samples at most; columns of the picture; scenes at least


def measure_surfaces(context: EvaluationContext, kind: str) -> PlannedMeasure:
    """Check that the run is conditioned on such images of scenes, and the judge; return the planned measure.

    Raises: InvalidInput.
    """
    from ddpm.metrics import denoising

    config, source, data = context.config, context.source, context.every
    _must_be_conditioned(source, data, kind)
    must_walk(source.sampler, source.diffusion)
    try:
        denoising.must_hold_out(data, kind, LEAST)
    except ValueError as error:
        raise InvalidInput(str(error)) from error
    model, judge, trained_on = _judge(context, kind)
    n = config.n or min(MOST, len(data.held_out))
    if n < LEAST:
        raise InvalidInput(f"n = {n}: metric={kind} compares scenes with one another and needs at least {LEAST}")
    if trained_on not in (None, data.identity()["sha256"]):
        say(
            f"warning: judge_run={config.judge_run} was trained on other scenes, which may include held-out ones of "
            "these: its predictions of them would then be too good"
        )
    plan = f"{kind}: {n:,} samples, seeds {context.seeds}, {source.walk}; read by {judge}"
    cost = len(context.seeds) * n * source.evaluations
    return PlannedMeasure(plan, cost, lambda: _carry_out(context, kind, model, n))


def _must_be_conditioned(source: Any, data: Any, kind: str) -> None:
    """Raise InvalidInput unless the data are scenes and the run is conditioned on what is compared."""
    from ddpm.data.batch import takes
    from ddpm.data.scenes import Scenes

    condition = getattr(data, "condition", None)
    if not isinstance(data, Scenes) or source.codec is not None:
        raise InvalidInput(
            f"metric={kind} measures scenes of solids, which the run does not draw; train with data=scenes"
        )
    if "image" not in takes(source.model) or condition != kind:
        raise InvalidInput(
            f"metric={kind} compares samples with the {kind} that they were conditioned on, but the "
            "run was trained with "
            f"data.condition={'null' if condition is None else condition}; train one with experiment=scenes_from_{kind}"
        )


def _judge(context: EvaluationContext, kind: str) -> tuple[Any, str, Any]:
    """Return the regression network, its run's name, and the checksum of its training data, or None."""
    from ddpm.training.task import must_take_shape

    named, example = plain(context.config.judge_run), f"experiment=depth_of_scenes data.condition={kind}"
    if named is None:
        raise InvalidInput(
            f"metric={kind} reads samples by a regression run: give judge_run=RUN, trained with {example}"
        )
    if not isinstance(named, str) or not named:
        raise InvalidInput(f"judge_run={named} must be a run: RUN, RUN@STEP or RUN@best")
    run, folder = open_run_at(named, "judge_run")
    trained = read_config(run.path / "config.yaml")
    task = plain(trained.task) if trained.get("task") is not None else {}
    condition = trained.data.get("condition")
    if not has(trained, "model") or task.get("_target_") != REGRESSION or condition != kind:
        raise InvalidInput(f"judge_run={named}: it does not predict the {kind} of pictures; train one with {example}")
    model = build_group(trained, "model", trusted(context.config))
    load_into(model, folder / "ema.safetensors")
    try:
        must_take_shape(model, context.every)
        known = run.status().get("data")
    except ValueError as error:
        raise InvalidInput(f"judge_run={named}: {error}") from error
    trained_on = known.get("sha256") if isinstance(known, dict) else None
    return model.to(context.source.device), f"{run.path}@{folder.name}", trained_on


def _carry_out(context: EvaluationContext, kind: str, model: Any, n: int) -> None:
    """Draw samples of held-out conditions with every seed, predict the conditions from them, and record the results."""
    from ddpm.metrics import quality
    from ddpm.metrics.surfaces import results
    from ddpm.sources.predicted import predicted_in_batches
    from ddpm.training.task import checksum

    data, device, name = context.every, context.source.device, checksum(model)[:8]
    numbers = data.held_out[:n]
    batch = data.batch(numbers)
    target, M = batch.condition.image.cpu(), len(numbers)
    real = predicted_in_batches(model, batch.x, device)
    measured: dict[str, dict[int, quality.Result]] = {}
    for seed in context.seeds:
        x, _ = context.samples(list(range(n)), seed, conditions_of=numbers)
        if broken := int((~x.isfinite().flatten(1).all(1)).sum()):
            raise InvalidInput(f"metric={kind}: {broken} of {n} samples hold NaN or infinity")
        drawn = predicted_in_batches(model, x, device)
        for what, result in results(kind, drawn, real, target, [i % M for i in range(n)], data.condition_unit).items():
            measured.setdefault(what, {})[seed] = result
        if seed == context.seeds[0]:
            _draw(context, kind, target, x[:M], drawn, batch.x.cpu())
    for what, by_seed in measured.items():
        each = list(by_seed.values())
        values = context.settings(n, context.source.sampler) | quality.together(each, list(by_seed))
        context.record(f"{kind}_{what}_judge-{name}_{n}", values, quality.in_words(each, values))


def _draw(context: EvaluationContext, kind: str, conditions: Any, x: Any, drawn: Any, real: Any) -> None:
    """Draw rows of conditions, samples, predictions from these, and held-out pictures."""
    from ddpm.data.conditions import with_channels
    from ddpm.figures import plots

    path = context.run.path / f"{kind}.png"
    rows = [
        ("condition", with_channels(conditions, 3)),
        ("drawn", with_channels(x, 3)),
        ("predicted", with_channels(drawn, 3)),
    ]
    rows.append(("held out", with_channels(real, 3)))
    plots.labelled_rows(path, [(label, pictures[:COLUMNS]) for label, pictures in rows])
    say(f"wrote {path}: the given {kind}, the sample, the {kind} predicted from it, and the held-out picture")
