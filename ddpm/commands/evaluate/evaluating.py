"""`ddpm-evaluate`: measures of a run's network by its samples, by held-out images and by time."""

from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ddpm.commands.console import progress_bar, say
from ddpm.commands.evaluate.augmentation import measure_augmentation
from ddpm.commands.evaluate.blind_reading import measure_reading
from ddpm.commands.evaluate.codes import measure_codings
from ddpm.commands.evaluate.context import EvaluationContext, PlannedMeasure
from ddpm.commands.evaluate.depth_and_masks import METRICS as OF_SURFACES
from ddpm.commands.evaluate.depth_and_masks import measure_surfaces
from ddpm.commands.evaluate.guidance_sweep import measure_guidance
from ddpm.commands.evaluate.retrieval import measure_retrieval
from ddpm.commands.evaluate.scene_attributes import measure_scenes, measure_subject
from ddpm.commands.evaluate.sounds import measure_sound
from ddpm.commands.load import (
    augmentation,
    data_of,
    must_match,
    must_walk,
    optimizer_of,
    requested_labels,
    task_of,
)
from ddpm.commands.sources import drawn_by_sampler, must_draw_itself, source_of
from ddpm.commands.validate import must_be_drawable, must_be_one_of, must_be_whole, trusted
from ddpm.config import InvalidInput, build, compose, plain, resolve_device, resolved

OF_ANY = ("sliced_wasserstein", "energy_distance")  # samples, pictures or not
BY_CLASSIFIER = ("recognition", "variety")  # always by features of the classifier
OF_FEATURES = ("frechet", "kernel", "precision_recall", "density_coverage", "memorisation")
OF_SAMPLES = ("recognition", *OF_FEATURES, "variety", *OF_ANY)
OF_IMAGES = ("bits_per_dim", "log_likelihood", "loss_by_snr")  # held-out ones
OF_NETWORK = (*OF_IMAGES, "score_error")  # of the network itself, without sampler and guidance
OF_CODINGS = ("elbo", "latent_structure", "reconstruction", "codes")  # of latents or codes of held-out images
OF_PIXELS = ("bits_per_dim", "log_likelihood")  # undefined for latents
OF_ANY_SOURCE = (*OF_SAMPLES, "augmentation", "cost")  # with a sampler or without
OF_CONDITIONS = ("reading_sheet", "scenes", "subject", "retrieval", *OF_SURFACES, "sound")  # of given conditions
METRICS = (*OF_ANY_SOURCE, *OF_CONDITIONS, *OF_NETWORK, *OF_CODINGS, "steps", "guidance_sweep")
FEATURES = ("classifier", "inception", "pca", "pixels")
RECOGNISERS = ("auto", "classifier", "logistic")
OF_PICTURES = (
    *(metric for metric in OF_ANY_SOURCE if metric not in (*OF_ANY, "cost")),
    *OF_CONDITIONS,
    "steps",
    "guidance_sweep",
)
NEEDS = dict.fromkeys(OF_PICTURES, "pictures")  # what the data must contain
LEAST = {"frechet": 2, "kernel": 3, "precision_recall": 4, "density_coverage": 6, "memorisation": 2}  # samples at least
LEAST |= {"sliced_wasserstein": 2, "energy_distance": 3}
FEW_PIXELS = 256  # up to which logistic regression is accurate and fast
EXAMPLES = {"samplers": "[ddim,heun]", "steps": "[10,50]", "spacing": "[uniform,karras]"}


def evaluate(config: DictConfig, opened: tuple[Any, Any, DictConfig, int] | None = None) -> None:
    """Check the input of every requested metric, print the plan, then carry it out.

    Args:
        opened: the result of `source_of`, if it is open already.
    Raises: InvalidInput.
    """
    metrics = _metrics(config)
    source, run, trained, step = source_of(config, to_draw=False) if opened is None else opened
    data = data_of(config, trained)
    _warn_of_other_data(run, data)
    if data.labels is None and "recognition" in metrics and len(metrics) > 1:
        say(f"{data.name} has no labels: nothing is recognised")
    context = EvaluationContext(config, source, run, trained, step, data)
    measures = _measures(context, metrics)
    _print_plan(context, measures)
    for measure in measures:  # after the input of all has been checked
        measure.carry_out()


def must_be_measurable(config: DictConfig, trained: DictConfig, task: Any, data: Any) -> None:
    """Raise InvalidInput for metrics that could not be measured of a run that is not trained yet.

    Args:
        config: of ddpm-evaluate; its run is ignored.
        trained: the run's configuration.
        task: of the run; its networks with any weights, or on the meta device, which has none.
    Raises: InvalidInput.
    """
    from ddpm.runs.directory import Run

    metrics = _metrics(config)
    must_be_drawable(config)
    if config.checkpoint not in ("last", "best"):
        must_be_whole(config, "checkpoint", least=1)
    resolve_device(config.device)
    data = data if config.data.root is None else data_of(config, trained)
    model = task.model
    device = next(model.parameters()).device
    if getattr(task, "diffusion", None) is None:
        must_draw_itself(config, task)
        try:
            source = task.source(data, config.seed, device, requested=requested_labels(config, lambda: data.classes))
        except ValueError as error:
            raise InvalidInput(str(error)) from error
        if source is None:
            raise InvalidInput(f"{type(task).__name__} draws no samples, so only its losses can be measured")
        source = source.decoded_by(data.codec)
        _measures(EvaluationContext(config, source, Run(str(config.run)), trained, 0, data), metrics)
        return
    names = partial(getattr, data)
    source = drawn_by_sampler(config, trained, task.diffusion, model, data.shape, device, names, data=data)
    source = source.decoded_by(data.codec)
    _measures(EvaluationContext(config, source, Run(str(config.run)), trained, 0, data), metrics)


def _metrics(config: DictConfig) -> list[str]:
    """Return the requested metrics, each once; raise InvalidInput for settings that are invalid for every run."""
    resolved(config)
    metrics = plain(config.metric)
    metrics = metrics if isinstance(metrics, list) else [metrics]
    if not metrics or not set(map(str, metrics)) <= set(METRICS):
        raise InvalidInput(f"metric={','.join(map(str, metrics))} is not known; allowed: {', '.join(METRICS)}")
    settings = (
        "data",
        "inception",
        "frechet",
        "reading_sheet",
        "steps",
        "guidance_sweep",
        "guidance",
        "cost",
        "augmentation",
        "scenes",
    )
    for key in (*settings, *OF_IMAGES[:2]):
        if not isinstance(config[key], DictConfig):
            raise InvalidInput(f"{key}={config[key]} must hold settings, such as {key}.KEY=VALUE")
    for key, known in (("features", FEATURES), ("recogniser", RECOGNISERS)):
        must_be_one_of(config, key, known)
    if not isinstance(config.frechet.bias, bool):
        raise InvalidInput(f"frechet.bias={config.frechet.bias} must be true or false")
    if config.n is not None:
        must_be_whole(config, "n", least=1)
    must_be_whole(config, "seeds", least=1)
    return list(dict.fromkeys(metrics))


def _measures(context: EvaluationContext, metrics: list[str]) -> list[PlannedMeasure]:
    """Return the planned measures; recognition is dropped if it is one of several and the data have no labels.

    Raises: InvalidInput for a measure that needs what the data do not contain.
    """
    _must_hold(context.data, metrics)
    of_source = OF_ANY_SOURCE if context.source.sampler is None else tuple(m for m in METRICS if m not in OF_CODINGS)
    of_source = (of_source if context.source.like_data else ()) + context.source.measures
    for metric in metrics:
        if metric not in of_source:
            raise InvalidInput(f"metric={metric} does not apply to this run; allowed: {', '.join(of_source)}")
    for metric in metrics:
        if metric in OF_PIXELS and context.source.codec is not None:
            raise InvalidInput(f"metric={metric} is measured on pixels, but this network works on latents only")
    for metric in set(metrics) & set(OF_NETWORK):
        if str(context.source.guidance):
            raise InvalidInput(f"metric={metric} measures the network itself, without guidance; leave guidance out")
    if context.data.labels is None and len(metrics) > 1:
        metrics = [metric for metric in metrics if metric != "recognition"]
    of_samples = [metric for metric in metrics if metric in OF_SAMPLES]
    measures = [_measure_samples(context, of_samples)] if of_samples else []
    measures += [measure_augmentation(context)] if "augmentation" in metrics else []
    measures += [measure_reading(context)] if "reading_sheet" in metrics else []
    measures += [measure_scenes(context)] if "scenes" in metrics else []
    measures += [measure_subject(context)] if "subject" in metrics else []
    measures += [measure_retrieval(context)] if "retrieval" in metrics else []
    measures += [measure_surfaces(context, metric) for metric in metrics if metric in OF_SURFACES]
    measures += [measure_sound(context)] if "sound" in metrics else []
    of_images = _measure_images if context.source.sampler is not None else measure_codings
    measures += [of_images(context, metric) for metric in metrics if metric in (*OF_IMAGES, *OF_CODINGS)]
    measures += [_measure_score(context)] if "score_error" in metrics else []
    measures += [_measure_steps(context)] if "steps" in metrics else []
    if "guidance_sweep" in metrics:
        _must_hold_enough_images(context.data, ["frechet", "precision_recall"])
        measures.append(measure_guidance(context, _number(context, of_covariance=True)))
    measures += [_measure_cost(context)] if "cost" in metrics else []
    return measures


def _must_hold(data: Any, metrics: list[str]) -> None:
    """Raise InvalidInput for measures of pictures if the data contain none."""
    for metric in metrics:
        if NEEDS.get(metric, "") not in ("", *data.holds):
            allowed = [m for m in METRICS if NEEDS.get(m, "") in ("", *data.holds)]
            raise InvalidInput(
                f"metric={metric} needs {NEEDS[metric]}, but {data.name} holds {data.units} of shape "
                f"{data.shape}; allowed: {', '.join(allowed)}"
            )


def _warn_of_other_data(run: Any, data: Any) -> None:
    """Warn if the data are not those of training: held-out images may have been trained on."""
    try:
        known = run.status().get("data")
    except ValueError:  # status.json of a newer version
        return
    identity = data.identity()
    if isinstance(known, dict) and known.get("sha256") not in (None, identity["sha256"]):
        say(
            f"warning: {data.name} is not what was trained on: {identity['count']:,} images of sha256 "
            f"{str(identity['sha256'])[:12]}, not {known.get('count')} of {str(known['sha256'])[:12]}; held-out images "
            "may have been seen"
        )


def _print_plan(context: EvaluationContext, measures: list[PlannedMeasure]) -> None:
    """Print what will be measured, and the network's time for it, extrapolated from one batch."""
    from ddpm.training import cost

    config, source = context.config, context.source
    batch, evaluations = min(config.batch, config.n or 256, 256), sum(measure.evaluations for measure in measures)
    lines = [f"  {measure.plan}" for measure in measures]
    features = {kind for measure in measures for kind in measure.features}
    if "inception" in features:  # 300x300 pixels are slow
        extractor, _ = context.features("inception")[1]()
        x = context.data.batch(context.data.held_out[:8]).x
        of_one = cost.seconds(lambda: extractor(x), source.device) / len(x)
        lines.append(f"  features of Inception: {_duration(1000 * of_one)} for 1,000 images")
    if "classifier" in features and not context.has_judge:
        lines.append(f"  the classifier is trained first, on {len(context.every.train):,} images, and stored")
    if evaluations:
        took = cost.evaluation_seconds(source, batch) / batch
        lines.append(
            f"  the network: {evaluations:,} evaluations, counted by {context.data.units.removesuffix('s')}; about "
            f"{_duration(evaluations * took)} on {source.device} ({1 / took:,.0f} {context.data.units}/s)"
        )
    say("\n".join(["plan:", *lines]))


# -------------------------------------------------------------------------------------------------------------- samples


def _measure_samples(context: EvaluationContext, metrics: list[str]) -> PlannedMeasure:
    """Check the input of measures of samples; return the planned measure."""
    config, source, data = context.config, context.source, context.data
    if source.sampler is not None:
        must_walk(source.sampler, source.diffusion)
    logistic = "recognition" in metrics and _by_regression(context)
    _must_hold_enough_images(data, metrics)
    n = _number(context, "frechet" in metrics)
    by_features = [metric for metric in metrics if not (metric == "recognition" and logistic)]
    kinds = [_kind(context, metric) for metric in by_features]
    for kind in kinds:
        context.features(kind)  # raises InvalidInput for features that cannot be computed
    if n < (least := max(LEAST.get(metric, 1) for metric in metrics)):
        raise InvalidInput(f"n = {n}: {', '.join(metrics)} need at least {least} samples")
    if (
        "frechet" in metrics
        and config.frechet.bias
        and len(data.held_out) <= (size := context.features(config.features)[0])
    ):
        raise InvalidInput(
            f"frechet.bias=true: {len(data.held_out)} held-out images are too few for the covariance of {size} "
            f"features: at least {size + 1}"
        )
    cost = config.seeds * n * source.evaluations
    plan = f"{', '.join(metrics)}: {n:,} samples, {_listed(context.seeds)}, {source.walk}" + (
        f"; features of them and of {len(data):,} {data.units} by {' and '.join(dict.fromkeys(kinds))}" if kinds else ""
    )
    return PlannedMeasure(plan, cost, lambda: _carry_out_samples(context, by_features, logistic, n), tuple(kinds))


def _by_regression(context: EvaluationContext) -> bool:
    """Whether a logistic regression recognises samples; raise InvalidInput for data without labels, or of one class."""
    from ddpm.metrics import quality

    recogniser, (_, height, width) = context.config.recogniser, context.data.shape
    if context.data.labels is None:
        raise InvalidInput(f"{context.data.name} has no labels, and recognition needs them")
    if not quality.has_classes(context.every):
        raise InvalidInput(f"{context.data.name} has training images of one class only: there is nothing to recognise")
    return recogniser == "logistic" or (recogniser == "auto" and height * width <= FEW_PIXELS)


def _must_hold_enough_images(data: Any, metrics: list[str]) -> None:
    """Raise InvalidInput if too few images are held out, or trained on, for measures of samples."""
    from ddpm.metrics import denoising

    try:
        denoising.must_hold_out(data, metrics[0], 1)
    except ValueError as error:
        raise InvalidInput(str(error)) from error
    least = max(LEAST.get(metric, 1) for metric in metrics)
    for part, numbers in (("held out", data.held_out), ("trained on", data.train)):
        if len(numbers) < least:
            few = f"of {data.name} {len(numbers)} {data.units} are {part}"
            raise InvalidInput(f"{few}, but {', '.join(metrics)} need at least {least}")


def _number(context: EvaluationContext, of_covariance: bool) -> int:
    """Return how many samples are measured: the requested number, else 512 or the number held out if that suffices."""
    few = min(512, len(context.data.held_out))
    if not of_covariance:
        return context.config.n or few
    size, _ = context.features(context.config.features)
    if len(context.data.train) <= size:
        raise InvalidInput(
            f"{len(context.data.train)} training images are too few for the covariance of {size} features, which "
            "frechet needs: take features=pca with fewer components (pca=...), or metric=kernel"
        )
    n: int = context.config.n or max(few, size + 1)
    if n <= size:
        raise InvalidInput(
            f"n = {n} samples are too few for the covariance of {size} features, which frechet needs: n is at least "
            f"{size + 1}, or take features=pca with fewer components (pca=...), or metric=kernel"
        )
    return n


def _kind(context: EvaluationContext, metric: str) -> str:
    """Return the kind of features of a metric: the classifier's, or coordinates for data without pictures."""
    if "pictures" not in context.data.holds:
        return "coordinates"
    return "classifier" if metric in BY_CLASSIFIER else str(context.config.features)


def _carry_out_samples(context: EvaluationContext, metrics: list[str], logistic: bool, n: int) -> None:
    """Draw the samples of every seed, measure them, and record each result at once."""
    from ddpm.metrics import quality

    kinds = {metric: _kind(context, metric) for metric in metrics}
    reals: dict[str, quality.Real] = {kind: context.real(kind)[0] for kind in dict.fromkeys(kinds.values())}
    measured: dict[str, dict[int, quality.Result]] = {}  # by protocol and seed
    failed, copies = [], None
    for seed in context.seeds:
        x, y = context.samples(list(range(n)), seed)
        try:
            drawn = {kind: quality.Samples(x, real.features(x), y) for kind, real in reals.items()}
        except ValueError as error:
            raise InvalidInput(f"metric={','.join(metrics)}: {error}") from error
        for metric in [*["logistic"] * logistic, *metrics]:
            try:
                if metric == "logistic":
                    samples = quality.Samples(x, x[:, :0], y)
                    by_regression = quality.by_regression(samples, context.every, context.data.held_out)
                    results = {f"recognition_logistic_{n}_train": by_regression}
                else:
                    real = reals[kinds[metric]]
                    named = quality.MEASURES[metric](drawn[kinds[metric]], real)
                    results = {real.protocol(name, n): result for name, result in named.items()}
            except ValueError as error:  # results of the other metrics are still recorded
                failed.append(f"{'recognition' if metric == 'logistic' else metric}: {error}")
                continue
            for protocol, result in results.items():
                measured.setdefault(protocol, {})[seed] = result
                _record(context, protocol, measured[protocol], n)
                copies = copies or (result.detail and (x, result.detail))
    if copies:
        _draw_copies(context, *copies)
    if "frechet" in metrics and context.config.frechet.bias:
        _draw_bias(context, reals[kinds["frechet"]], measured, n)
    if failed:
        raise InvalidInput(f"metric={'; '.join(dict.fromkeys(failed))}")


def _record(context: EvaluationContext, protocol: str, measured: dict[int, Any], n: int) -> None:
    """Record the results of the seeds so far, and print them with the last one."""
    from ddpm.metrics import quality
    from ddpm.runs import results

    each = list(measured.values())
    values = context.settings(n, context.source.sampler) | quality.together(each, list(measured))
    judged, protocol = "_classifier-" in protocol, context.named(protocol)
    if judged:
        values["judge_accuracy"] = context.real("classifier")[1]
    results.record(context.run.path, protocol, values)
    if context.seeds[-1] in measured:
        say(f"{protocol}:\n{quality.in_words(each, values)}")


def _draw_bias(context: EvaluationContext, real: Any, measured: dict[str, dict[int, Any]], n: int) -> None:
    """Plot the Frechet distance over the number of images."""
    from ddpm.figures import plots
    from ddpm.metrics import quality

    path, samples = context.run.path / "frechet_bias.png", measured.get(real.protocol("frechet", n))
    if samples:
        plots.bias(path, quality.bias_curve(real), n, next(iter(samples.values())).value)
        say(f"wrote {path}: the distance of held-out images, for growing numbers of them")


def _draw_copies(context: EvaluationContext, x: Any, measured: Any) -> None:
    """Draw the samples that are closest to training images, with these, by features and by pixels."""
    from ddpm.figures import plots

    data, path, groups = context.data, context.run.path / "memorisation.png", {}
    for name, result in measured.items():
        closest = result.relative.argsort()[:10]
        real = data.batch(data.train[result.index[closest].cpu()]).x
        of_held_out = result.held_out_relative.sort().values[: len(closest)]
        groups[f"by {name}"] = (x[closest], real.cpu(), result.relative[closest].tolist(), of_held_out.tolist())
    plots.copies(path, groups)
    say(f"wrote {path}: the samples that are closest to a training image, above it")


# ------------------------------------------------------------------------------------------------------ held-out images


def _measure_images(context: EvaluationContext, metric: str) -> PlannedMeasure:
    """Check the input of a measure of held-out images; return the planned measure."""
    from ddpm.likelihood import flow_times
    from ddpm.metrics import denoising

    config, source, data = context.config, context.source, context.trained_on
    schedule, options = source.diffusion.schedule, config.get(metric)
    n = config.n or min(512, len(data.held_out))
    must_match(source.model, data)
    times: list[int] = []
    try:
        denoising.must_hold_out(data, metric, n)
        if metric == "bits_per_dim":
            times = denoising.bound_times(schedule.T, options.steps)
            cost = len(times) * n
        elif metric == "loss_by_snr":
            cost = len(denoising.snr_bins(schedule)) * n
        else:
            flow_times(schedule, options.steps, options.start)
            must_be_whole(options, "probes", least=1)
            cost = 4 * options.steps * n
    except (ValueError, InvalidInput) as error:
        raise InvalidInput(f"{metric}: {error}") from error
    derivatives = f", {options.probes * cost:,} derivatives of the network" if metric == "log_likelihood" else ""
    plan = f"{metric}: {n:,} held-out {data.units}, {cost:,} evaluations{derivatives}"
    return PlannedMeasure(plan, cost, lambda: _carry_out_images(context, metric, n, cost, times))


def _carry_out_images(context: EvaluationContext, metric: str, n: int, cost: int, times: list[int]) -> None:
    """Measure held-out images, record the result, and plot it."""
    from ddpm.figures import plots
    from ddpm.metrics import denoising

    config, source, data, path = context.config, context.source, context.trained_on, context.run.path
    options, drawn = config.get(metric), ""
    with progress_bar(cost) as bar:
        try:
            if metric == "bits_per_dim":
                protocol, summary, values, bound = denoising.measure_bits_per_dim(
                    source, data, n, times, config.batch, bar.update
                )
                denoising.write_terms(path / "bits_per_dim.csv", bound)
                plots.bits_per_dim(path / "bits_per_dim.png", bound.times, bound.terms, bound.L_T, data.units)
                drawn = f"wrote {path / 'bits_per_dim.png'} and bits_per_dim.csv: the bits of each t"
            elif metric == "loss_by_snr":
                protocol, summary, values, curve = denoising.measure_loss_by_snr(
                    source, data, n, config.batch, bar.update
                )
                denoising.write_loss_by_snr(path / "loss_by_snr.csv", curve)
                plots.loss_by_snr(path / "loss_by_snr.png", {path.name: curve})
                drawn = f"wrote {path / 'loss_by_snr.png'} and loss_by_snr.csv: the errors in each bin"
            else:
                flow = (options.steps, options.probes, options.start)
                protocol, summary, values = denoising.measure_log_likelihood(
                    source, data, n, *flow, config.batch, bar.update
                )
        except ValueError as error:
            raise InvalidInput(f"metric={metric}: {error}") from error
    settings = context.settings(n) | {
        "variance": source.diffusion.variance,
        "clip_x_0": source.diffusion.clip_x_0,
        "steps": cost // n,
        "evaluations": cost // n,
    }
    if metric == "loss_by_snr":  # its noise has no seed, and its predictions are not clipped
        settings |= {"seeds": [], "clip_x_0": False}
    context.record(protocol, settings | values, summary)
    if drawn:
        say(drawn)


# ---------------------------------------------------------------------------------------------------------------- score


def _measure_score(context: EvaluationContext) -> PlannedMeasure:
    """Check the noise levels; return the planned measure of the score's error at each."""
    from ddpm.metrics.score import score_levels
    from ddpm.oracle import JointMixture

    source, sigma = context.source, plain(context.config.score_error.sigma)
    levels = sigma if isinstance(sigma, list) or sigma is None else [sigma]
    if levels is not None and not (levels and all(type(level) in (int, float) and level > 0 for level in levels)):
        raise InvalidInput(f"score_error.sigma={sigma} must be a list of noise levels > 0, such as [0.1,1]")
    must_match(source.model, context.data)
    n = context.config.n or 10_000
    try:
        JointMixture.of(source.diffusion.schedule, context.data)
        times = score_levels(source.diffusion.schedule, levels)
    except ValueError as error:
        raise InvalidInput(f"score_error: {error}") from error
    plan = f"score_error: {n:,} draws of the density at each of {len(times)} levels of noise"
    return PlannedMeasure(plan, n * len(times), lambda: _carry_out_score(context, n, times))


def _carry_out_score(context: EvaluationContext, n: int, times: list[float]) -> None:
    from ddpm.metrics.score import measure_score_error

    with progress_bar(n * len(times)) as bar:
        try:
            protocol, summary, values = measure_score_error(
                context.source, context.data, n, times, context.config.batch, bar.update
            )
        except ValueError as error:
            raise InvalidInput(f"metric=score_error: {error}") from error
    context.record(protocol, context.settings(n) | values, summary)


# ---------------------------------------------------------------------------------------------------------------- steps


def _measure_steps(context: EvaluationContext) -> PlannedMeasure:
    """Check a grid of samplers, steps and spacings; return the planned measure of combinations not yet recorded."""
    options, schedule = context.config.steps, context.source.diffusion.schedule
    grid = _samplers(context, "steps", *(plain(options[key]) for key in ("samplers", "steps", "spacing")))
    _must_hold_enough_images(context.data, ["frechet"])
    n = _number(context, of_covariance=True)
    cost = len(context.seeds) * n * sum(sampler.evaluations(schedule) for _, sampler in grid)
    plan = (
        f"steps: {n:,} samples, {_listed(context.seeds)}, in each of {len(grid)} ways, except those that are "
        f"stored already; features by {context.config.features}"
    )
    return PlannedMeasure(plan, cost, lambda: _carry_out_steps(context, grid, n))


def _carry_out_steps(context: EvaluationContext, grid: list[tuple[dict[str, Any], Any]], n: int) -> None:
    """Measure the Frechet distance of every combination; record each as soon as it is known."""
    from ddpm.figures import plots
    from ddpm.metrics import quality
    from ddpm.runs import results

    path, schedule = context.run.path, context.source.diffusion.schedule
    real, accuracy = context.real(context.config.features)
    protocol = context.named(real.protocol("steps_frechet", n))
    settings = context.settings(n) | {"seeds": context.seeds}
    best = _measured(path / "evaluation.json", protocol, settings)
    cells = list(best.get("cells", []))
    for choice, sampler in grid:
        if any(choice.items() <= cell.items() for cell in cells):
            continue
        try:
            measured: list[quality.Result] = []
            for seed in context.seeds:
                x, y = context.samples(list(range(n)), seed, sampler)
                measured += quality.frechet(quality.Samples(x, real.features(x), y), real).values()
        except ValueError as error:
            raise InvalidInput(f"metric=steps: {error}") from error
        record = quality.together(measured, context.seeds)
        summary = {key: record[key] for key in ("value", "low", "high", "relative")}
        cells.append(choice | {"evaluations": sampler.evaluations(schedule)} | summary)
        best = {"value": min(cell["value"] for cell in cells), "real_vs_real": record["real_vs_real"], "cells": cells}
        best |= {} if accuracy is None else {"judge_accuracy": accuracy}
        results.record(path, protocol, settings | best)
        name = f"{choice['sampler']}, {choice['steps']} steps, {choice['spacing']}"
        say(f"{name}: {quality.in_words(measured, record)}")
    plots.steps_quality(path / "steps.png", cells, best["real_vs_real"], protocol)
    say(f"{protocol}: {len(cells)} combinations\nwrote {path / 'steps.png'}")


def _measured(path: Path, protocol: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the record of combinations measured earlier with the same settings; {} if none, or if damaged."""
    from ddpm.runs import results

    try:
        known = results.earlier(results.recorded(path), protocol)
    except ValueError:  # `record` reports it
        return {}
    requested = ("n", "seeds", "weights", "checkpoint", "precision", "guidance")
    before = next((r for r in known if all(r.get(key) == settings.get(key) for key in requested)), {})
    cells, numbers = before.get("cells"), [before.get("real_vs_real")]
    if not isinstance(cells, list) or not cells or not all(isinstance(cell, dict) for cell in cells):
        return {}
    numbers += [cell.get(key) for cell in cells for key in ("evaluations", "value")]
    named = all(isinstance(cell.get(key), str) for cell in cells for key in ("sampler", "spacing"))
    return before if named and all(type(number) in (int, float) for number in numbers) else {}


# ----------------------------------------------------------------------------------------------------------------- cost


def _measure_cost(context: EvaluationContext) -> PlannedMeasure:
    """Check the parts that training and sampling are timed with; return the planned measure."""
    from ddpm.training import cost

    config, trained, trust = context.config, context.trained, trusted(context.config)
    data = context.trained_on
    names, steps = (plain(config.cost[key]) for key in ("samplers", "steps"))
    walks = context.source.sampler is not None
    samplers = {
        f"{choice['sampler']} {choice['steps']}": sampler
        for choice, sampler in (_samplers(context, "cost", names, steps, [None]) if walks else [])
    }
    trainer = build(trained.trainer, "trainer", trust)
    made = {"model": context.source.model} | ({"diffusion": context.source.diffusion} if walks else {})
    task, augment = task_of(trained, trust, made=made), augmentation(trained, trust, data)
    try:
        task.check(data)
    except ValueError as error:
        raise InvalidInput(str(error)) from error
    optimizer = optimizer_of(trained, trust)

    def carry_out() -> None:
        try:
            protocol, words, values = cost.measure_cost(
                context.source, task, data, trainer, optimizer, samplers, config.batch, augment=augment
            )
        except ValueError as error:
            raise InvalidInput(f"metric=cost: {error}") from error
        settings = context.settings(config.batch)
        if (first := next(iter(samplers), None)) is not None:
            steps = len(samplers[first].times(context.source.diffusion.schedule)) - 1
            settings |= {"sampler": first, "steps": steps}
        context.record(protocol, settings | values, words)

    plan = f"cost: training steps of {trainer.batch_size} images, and one evaluation of {config.batch}, timed"
    return PlannedMeasure(plan, 4 * config.batch, carry_out)


def _samplers(
    context: EvaluationContext, key: str, names: Any, steps: Any, spacings: Any
) -> list[tuple[dict[str, Any], Any]]:
    """Return (settings of the combination, sampler) for every one, in order; raise InvalidInput for invalid steps."""
    config, pairs = context.config, []
    for option, values in (("samplers", names), ("steps", steps), ("spacing", spacings)):
        if not isinstance(values, list) or not values:
            raise InvalidInput(f"{key}.{option}={values} must be a list, such as {key}.{option}={EXAMPLES[option]}")
    for name in names:
        settings = plain(compose("evaluate", [f"sampler={name}"]).sampler)
        for spacing in spacings:
            for count in steps:
                choice = {"sampler": name, "spacing": spacing or settings["spacing"], "steps": count}
                built = settings | {"steps": count, "spacing": choice["spacing"], "times": None}
                sampler = build(built, f"{key}, {name}", trusted(config))
                must_walk(sampler, context.source.diffusion, f"{key}, {name}")
                pairs.append((choice, sampler))
    return pairs


# ------------------------------------------------------------------------------------------------------------- in words


def _listed(seeds: list[int]) -> str:
    """Return consecutive seeds in words."""
    return f"seeds {seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"seed {seeds[0]}"


def _duration(seconds: float) -> str:
    """Return seconds as h:mm:ss, or as "m:ss min" below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02} min"
