"""`ddpm-evaluate metric=augmentation`: what classifiers trained on few real images gain from generated ones."""

from typing import Any

from ddpm.commands.console import say
from ddpm.commands.evaluate.context import EvaluationContext, PlannedMeasure
from ddpm.commands.load import must_walk
from ddpm.commands.validate import must_be_whole
from ddpm.config import InvalidInput, plain

NAME = "augmentation"


def measure_augmentation(context: EvaluationContext) -> PlannedMeasure:
    """Check the counts of real and generated images and their classes; return the planned measure.

    Raises: InvalidInput.
    """
    from ddpm.metrics import denoising
    from ddpm.metrics.augmentation import must_have_enough

    config, source, data = context.config, context.source, context.data
    if source.sampler is not None:
        must_walk(source.sampler, source.diffusion)
    must_be_whole(config.augmentation, "times", "steps", least=1)
    real = plain(config.augmentation.real)
    real = real if isinstance(real, list) else [real]
    if not real or not all(type(k) is int and k >= 1 for k in real):
        raise InvalidInput(
            f"augmentation.real={real} must be whole numbers >= 1 of images a class, such as [10,30,100]"
        )
    if source.condition_data is not None:
        raise InvalidInput(
            f"metric={NAME}: these samples are made from held-out images, on which the classifiers are tested"
        )
    if data.labels is None:
        raise InvalidInput(f"{data.name} has no labels, and metric={NAME} needs them to train classifiers")
    classes = data.labels.cpu()[data.train.cpu()].unique().tolist()
    if len(classes) < 2:
        raise InvalidInput(
            f"metric={NAME}: {data.name} has training images of one class only: there is nothing to learn"
        )
    try:
        n = len(data.held_out) if config.n is None else config.n
        denoising.must_hold_out(data, NAME, n)
        must_have_enough(data.labels.cpu()[data.train.cpu()], classes, real, data.name)
    except ValueError as error:
        raise InvalidInput(f"{NAME}: {error}") from error
    real, by_judge = sorted(dict.fromkeys(real)), source.classes(range(1)) is None
    if by_judge:
        context.features("classifier")  # raises InvalidInput if the classifier cannot be trained
    most = real[-1] * config.augmentation.times * len(classes)
    plan = (
        f"{NAME}: {2 * len(real) * len(context.seeds)} classifiers of {real} real images a class, with "
        f"{config.augmentation.times} generated ones for each and without, {config.augmentation.steps} steps each, "
        f"tested on {n:,} held-out {data.units}; {most:,} samples for each of {len(context.seeds)} seeds"
        + (", whose classes the classifier names" if by_judge else "")
    )
    cost = most * len(context.seeds) * source.evaluations
    return PlannedMeasure(plan, cost, lambda: _carry_out(context, real, n), ("classifier",) if by_judge else ())


def _carry_out(context: EvaluationContext, real: list[int], n: int) -> None:
    """Train and test the classifiers of every seed; write the record of each count as soon as it is known."""
    from ddpm.metrics import augmentation, denoising, quality
    from ddpm.runs import results

    config, data, device = context.config, context.data, context.source.device
    times, steps = config.augmentation.times, config.augmentation.steps
    (train_x, train_y), _ = quality.parts(data)
    tested = data.batch(denoising.chosen(data, n))
    classes = len(train_y.unique())
    found: dict[int, dict[int, augmentation.Learned]] = {k: {} for k in real}
    judge = None if context.source.classes(range(1)) is not None else context.features("classifier")[1]()[0]
    for seed in context.seeds:
        generated = _generated(context, real[-1] * times * classes, seed, judge)
        for k in real:
            few, more = augmentation.few(train_y, k, seed), slice(k * times * classes)
            both = (train_x[few], train_y[few]), (generated[0][more], generated[1][more])
            found[k][seed] = augmentation.learned(context.new_judge, *both, (tested.x, tested.y), seed, steps, device)
            values = augmentation.record(found[k])
            values |= {
                "real": k,
                "times": times,
                "training_steps": steps,
                "labelled_by": "asked" if judge is None else "judge",
            }
            protocol = context.named(f"{NAME}_{k}x{times}_{n}_held_out")
            results.record(context.run.path, protocol, context.settings(n, context.source.sampler) | values)
            if seed == context.seeds[-1]:
                say(f"{protocol}:\n{augmentation.in_words(values, k, times)}")


def _generated(context: EvaluationContext, n: int, seed: int, judge: Any) -> tuple[Any, Any]:
    """Return n samples rounded to 8 bits, and their classes (n,): the requested ones, or the judge's predictions."""
    from ddpm.figures.images import to_float, to_uint8

    x, y = context.samples(list(range(n)), seed)
    if broken := int((~x.isfinite().flatten(1).all(1)).sum()):
        raise InvalidInput(f"metric={NAME}: {broken} of {n} samples hold NaN or infinity")
    x = to_float(to_uint8(x))
    return x, y if judge is None else judge.probabilities(judge(x)).argmax(1).cpu()
