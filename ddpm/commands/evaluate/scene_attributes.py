"""`ddpm-evaluate metric=scenes` and `metric=subject`: agreement of samples with prompts, as a network reads it."""

import textwrap
from typing import Any, NamedTuple

from ddpm.commands.console import say
from ddpm.commands.evaluate.context import EvaluationContext, PlannedMeasure
from ddpm.commands.load import must_walk
from ddpm.commands.train.subject import scenes_of
from ddpm.commands.validate import must_be_whole, trusted
from ddpm.config import InvalidInput, build

NAME, SUBJECT = "scenes", "subject"
READ = (2,)  # numbers of solids in the scenes that the reader of a subject is trained on
PICTURE, OF_SUBJECT = "scenes.png", "subject.png"  # in the run directory
ROWS, COLUMNS = 4, 4  # prompts of each part in a figure, and samples of each
MOST = 512  # samples of each part by default
IN_WORDS = {"seen": "pairs that were trained on", "composed": "pairs that no training scene shows"}


class Prompts(NamedTuple):
    """Held-out samples whose captions are the prompts, in turn."""

    numbers: Any  # (M,)
    scenes: list[Any]  # parsed from each caption


def measure_scenes(context: EvaluationContext) -> PlannedMeasure:
    """Check that the run is conditioned on captions of scenes, and find the prompts; return the planned measure.

    Raises: InvalidInput.
    """
    from ddpm.data.scenes import parse
    from ddpm.metrics import denoising
    from ddpm.metrics.reader import reader_path
    from ddpm.metrics.scenes import parts_of

    context = _of_scenes(context)
    config, source, data = context.config, context.source, context.every
    _must_be_conditioned_on_scenes(source, data)
    must_walk(source.sampler, source.diffusion)
    must_be_whole(config, "scenes.count", "scenes.epochs", least=1)
    try:
        denoising.must_hold_out(data, NAME, 1)
    except ValueError as error:
        raise InvalidInput(str(error)) from error
    parts = {
        part: Prompts(numbers, [parse(data.captions[i]) for i in numbers.tolist()])
        for part, numbers in parts_of(data.held_out, data.composed).items()
    }
    n = config.n or min(MOST, len(data.held_out))
    reader = _untrained(context)
    size, learning = data.shape[1:], (config.scenes.count, config.scenes.epochs)
    found = reader_path(reader, size, data.numbers, context.cache, *learning).exists()
    count = len(context.seeds) * n * len(parts) + sum(ROWS * COLUMNS for _ in parts)
    of_each = " and ".join(f"{n:,} samples of {IN_WORDS[part]}" for part in parts)
    plan = f"{NAME}: {of_each}, seeds {context.seeds}, {source.walk}" + (
        "" if found else f"; their reader is trained first, on {config.scenes.count:,} scenes, and stored"
    )
    return PlannedMeasure(plan, count * source.evaluations, lambda: _carry_out(context, reader, parts, n))


def _of_scenes(context: EvaluationContext) -> EvaluationContext:
    """Return the context; for a run tuned to a subject, with the scenes of the run before, to measure forgetting."""
    before = scenes_of(context.trained, trusted(context.config), context.run.path)
    if before is None:
        return context
    source = context.source.of_data(before)
    return EvaluationContext(context.config, source, context.run, context.trained, context.step, before)


def _must_be_conditioned_on_scenes(source: Any, data: Any) -> None:
    """Raise InvalidInput unless the data are scenes in colour and the run is conditioned on their captions."""
    from ddpm.data.batch import takes
    from ddpm.data.scenes import Scenes

    if not isinstance(data, Scenes):
        raise InvalidInput(f"metric={NAME} reads scenes of solids, and {data.name} has none; train with data=scenes")
    if "tokens" not in takes(source.model) or source.condition_data is None:
        raise InvalidInput(
            f"metric={NAME} compares samples with their prompts, and the run was trained without words; train one with "
            "experiment=text_scenes data=scenes"
        )
    if data.shape[0] != 3:
        raise InvalidInput(f"metric={NAME} reads colours, and data.channels={data.shape[0]} has none; allowed: 3")


def _untrained(context: EvaluationContext) -> Any:
    """Build the network that reads scenes, with its initial weights."""
    import torch

    from ddpm.data.scenes import PAIRS
    from ddpm.metrics.reader import FACTS
    from ddpm.randomness import generator

    torch.manual_seed(generator(0, "reader").initial_seed())
    size, shape = tuple(context.every.shape[1:]), {"things": PAIRS, "facts": FACTS}
    return build(context.config.reader, "reader", trusted(context.config), image_size=size, in_channels=3, **shape)


def _carry_out(context: EvaluationContext, reader: Any, parts: dict[str, Prompts], n: int) -> None:
    """Draw samples of the prompts of each part with every seed, read them, and record the results."""
    from ddpm.metrics import quality, scenes
    from ddpm.metrics.reader import read, reader_of

    config, data, device = context.config, context.every, context.source.device
    count, epochs = config.scenes.count, config.scenes.epochs
    try:
        name = reader_of(reader, data.shape[1:], data.numbers, context.cache, count, epochs, device, say)
    except (ValueError, OSError) as error:
        raise InvalidInput(f"metric={NAME}: {error}") from error
    for part, prompts in parts.items():
        real = scenes.judge_all(read(reader, data.batch(prompts.numbers[:n]).x, device), prompts.scenes)
        chance = scenes.chance_of_pairs(prompts.scenes[:n])
        measured: dict[str, dict[int, quality.Result]] = {}
        for seed in context.seeds:
            x = _samples(context, list(range(n)), seed, prompts)
            drawn = scenes.judge_all(read(reader, x, device), prompts.scenes)
            for what, result in scenes.results(drawn, real, chance).items():
                measured.setdefault(what, {})[seed] = result
        for what, by_seed in measured.items():
            each = list(by_seed.values())
            values = context.settings(n, context.source.sampler) | quality.together(each, list(by_seed))
            protocol = f"{NAME}_{part}-{what}_reader-{name}_{n}"
            context.record(protocol, values, f"{IN_WORDS[part]}: {quality.in_words(each, values)}")
    _draw(context, reader, parts)


def _samples(context: EvaluationContext, numbers: list[int], seed: int, prompts: Prompts) -> Any:
    """Draw samples of these numbers; number i has the caption of prompt i modulo the number of prompts."""
    x, _ = context.samples(numbers, seed, conditions_of=prompts.numbers)
    if broken := int((~x.isfinite().flatten(1).all(1)).sum()):
        raise InvalidInput(f"metric={NAME}: {broken} of {len(x)} samples hold NaN or infinity")
    return x


def _draw(context: EvaluationContext, reader: Any, parts: dict[str, Prompts]) -> None:
    """Draw a figure of prompts with held-out pictures and samples of each; wrong ones are framed."""
    from ddpm.data.dataset import spread
    from ddpm.figures import plots
    from ddpm.metrics.reader import read
    from ddpm.metrics.scenes import judge_all

    rows, data, device = [], context.every, context.source.device
    for prompts in parts.values():
        M = len(prompts.numbers)
        places = spread(M, ROWS).tolist()
        real = data.batch(prompts.numbers[places]).x.cpu()
        x = _samples(context, [p + M * k for p in places for k in range(COLUMNS)], context.seeds[0], prompts)
        for row, place in enumerate(places):
            pictures = [real[row : row + 1], *x[COLUMNS * row : COLUMNS * (row + 1)].split(1)]
            right = [judge_all(read(reader, picture, device), [prompts.scenes[place]])[0].all for picture in pictures]
            caption = data.captions[int(prompts.numbers[place])]
            rows.append((caption, [(picture[0], good) for picture, good in zip(pictures, right, strict=True)]))
    path = context.run.path / PICTURE
    plots.prompted(path, rows)
    say(f"wrote {path}: prompts, a held-out picture of each, and {COLUMNS} samples; wrong samples are framed")


# -------------------------------------------------------------------------------------------------------------- subject


def measure_subject(context: EvaluationContext) -> PlannedMeasure:
    """Check that the run was tuned to a subject; return the planned measure of samples of its held-out captions.

    Raises: InvalidInput.
    """
    from ddpm.metrics import denoising
    from ddpm.metrics.reader import reader_path

    config, source, data = context.config, context.source, context.every
    if context.trained.get("subject") is None or source.condition_data is None:
        raise InvalidInput(
            f"metric={SUBJECT} needs a run that was tuned to a subject; train one with experiment=subject"
        )
    if data.shape[0] != 3:
        raise InvalidInput(f"metric={SUBJECT} reads colours, and data.channels={data.shape[0]} has none; allowed: 3")
    must_walk(source.sampler, source.diffusion)
    must_be_whole(config, "scenes.count", "scenes.epochs", least=1)
    try:
        denoising.must_hold_out(data, SUBJECT, 1)
    except ValueError as error:
        raise InvalidInput(str(error)) from error
    n, reader = config.n or len(data.held_out), _untrained(context)
    found = reader_path(reader, data.shape[1:], READ, context.cache, config.scenes.count, config.scenes.epochs).exists()
    plan = f"{SUBJECT}: {n:,} samples of held-out captions, seeds {context.seeds}, {source.walk}" + (
        "" if found else f"; their reader is trained first, on {config.scenes.count:,} scenes, and stored"
    )
    count = len(context.seeds) * n + ROWS * COLUMNS
    return PlannedMeasure(plan, count * source.evaluations, lambda: _compare(context, reader, n))


def _compare(context: EvaluationContext, reader: Any, n: int) -> None:
    """Draw the subject with every seed, and record how similar it is to its pictures."""
    from ddpm.figures.images import to_float
    from ddpm.metrics import quality, subject
    from ddpm.metrics.reader import read, reader_of

    config, data, device = context.config, context.every, context.source.device
    learning = (config.scenes.count, config.scenes.epochs)
    try:
        name = reader_of(reader, data.shape[1:], READ, context.cache, *learning, device, say)
    except (ValueError, OSError) as error:
        raise InvalidInput(f"metric={SUBJECT}: {error}") from error

    def features(x: Any) -> Any:
        return subject.seen(read(reader, x, device).presence)

    few, views = (features(data.batch(part).x.cpu()) for part in (data.train, data.held_out))
    others = features(to_float(data.others(data.held_out))) if hasattr(data, "others") else None
    measured = {}
    for seed in context.seeds:
        x = _samples(context, list(range(n)), seed, Prompts(data.held_out, []))
        measured[seed] = subject.result(features(x), few, views, others)
    each = list(measured.values())
    values = context.settings(n, context.source.sampler) | quality.together(each, list(measured))
    context.record(f"{SUBJECT}_reader-{name}_{n}", values, quality.in_words(each, values))
    _draw_subject(context)


def _draw_subject(context: EvaluationContext) -> None:
    """Draw a figure of the training pictures; then held-out captions, a view and samples of each."""
    import torch

    from ddpm.data.dataset import spread
    from ddpm.figures import plots

    data, prompts, M = context.every, Prompts(context.every.held_out, []), len(context.every.held_out)
    places = spread(M, ROWS).tolist()
    few, views = (data.batch(part).x.cpu() for part in (data.train[: COLUMNS + 1], data.held_out[places]))
    x = _samples(context, [p + M * k for p in places for k in range(COLUMNS)], context.seeds[0], prompts)
    white = torch.ones(COLUMNS + 1 - len(few), *few.shape[1:])
    rows = [("learned from these", torch.cat([few, white]))]
    for view, samples, place in zip(views.split(1), x.split(COLUMNS), places, strict=True):
        caption = "\n".join(textwrap.wrap(data.captions[int(data.held_out[place])], plots.LINE))
        rows.append((caption, torch.cat([view, samples.cpu()])))
    path = context.run.path / OF_SUBJECT
    plots.labelled_rows(path, rows, title="below: a held-out view, then samples of its caption")
    say(f"wrote {path}: the subject's pictures; then for each held-out caption a view and {COLUMNS} samples")
