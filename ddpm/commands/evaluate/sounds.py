"""Sound samples as WAV files and a web page; the measure `ddpm-evaluate metric=sound`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ddpm.commands.console import say
from ddpm.commands.evaluate.context import EvaluationContext, PlannedMeasure
from ddpm.commands.load import must_walk
from ddpm.config import InvalidInput, plain

NAME = "sound"
PAGE = "listen.html"
ON_PAGE = 64  # samples
HELD_OUT = 10  # held-out sounds on the page


def mel_of(trained: DictConfig) -> Any:
    """Return the mel transform of a run on sounds, from its configuration; None for other runs."""
    from ddpm.data.sound import mel_of_config

    try:
        return mel_of_config(plain(trained.get("data")))
    except (KeyError, ValueError, TypeError) as error:
        raise InvalidInput(f"the run's data: {error}") from error


def for_display(mel: Any, x: Any) -> Any:
    """Return pictures (n, 1, H, W) for display: spectrograms (mel is not None) with low frequencies at the bottom."""
    return x if mel is None else x.flip(-2)


def wavs_of(mel: Any, x: Any, references: Any = None) -> list[bytes]:
    """Return WAV files as bytes, one for each picture (n, 1, H, W) in [-1, 1]; references are those of `Mel.decode`."""
    import torch

    from ddpm.data.sound import AT_ONCE, wav_of
    from ddpm.figures.images import to_uint8

    parts = range(0, len(x), AT_ONCE)
    batches = [None if references is None else references[k : k + AT_ONCE] for k in parts]
    sounds = [mel.decode(to_uint8(x[k : k + AT_ONCE].cpu()), r) for k, r in zip(parts, batches, strict=True)]
    return [wav_of(y, mel.sample_rate) for y in (torch.cat(sounds) if sounds else ())]


def write_wav(path: Path, mel: Any, x: Any) -> None:
    """Write the sound of the first picture of x."""
    from ddpm.runs.files import replacing

    with replacing(path) as temporary:
        temporary.write_bytes(wavs_of(mel, x[:1])[0])


def write_page(path: Path, title: str, mel: Any, groups: Sequence[tuple[str, list[str], Any]]) -> None:
    """Write a web page that plays sounds next to their pictures.

    Args:
        groups: (heading, names, pictures (n, 1, H, W) in [-1, 1]) each.
    """
    from ddpm.figures.images import to_uint8
    from ddpm.figures.listen_page import Heard, page
    from ddpm.runs.files import replacing

    heard = []
    for heading, names, x in groups:
        pictures = to_uint8(for_display(mel, x).cpu())
        wavs = wavs_of(mel, x)
        heard.append((heading, [Heard(*one) for one in zip(names, pictures, wavs, strict=True)]))
    words = f"All sounds come from spectrograms of {mel.n_mels} mel bands, by {mel.n_iter} rounds of Griffin-Lim."
    with replacing(path) as temporary:
        temporary.write_text(page(title, words, heard, mel.seconds, mel.sample_rate / 2), encoding="utf-8")


def names_of(source: Any, classes: Sequence[str], numbers: Sequence[int]) -> list[str]:
    """Return the captions of samples with these numbers, with their class if the network has classes."""
    y = source.classes(list(numbers))
    if y is None:
        return [f"sample {i}" for i in numbers]
    labels = y.flatten(1)[:, 0] if y.ndim > 1 else y
    return [
        f"{classes[k] if 0 <= k < len(classes) else 'no class'}, sample {i}"
        for i, k in zip(numbers, labels.tolist(), strict=True)
    ]


def write_results(path: Path, source: Any, data: Any, samples: Any) -> None:
    """Write the web page at the end of a run on sounds: its samples, and some held-out sounds."""
    from ddpm.data.dataset import spread

    numbers = data.held_out if len(data.held_out) else data.train
    chosen = numbers[spread(len(numbers), HELD_OUT)]
    real = data.batch(chosen)
    names = [data.classes[k] for k in real.y.tolist()] if real.y is not None else [f"sound {i}" for i in chosen]
    drawn = samples[:ON_PAGE]
    groups = [
        ("Samples", names_of(source, data.classes, range(len(drawn))), drawn),
        ("Sounds of the data, through the same spectrograms", names, real.x),
    ]
    write_page(path, f"Samples of {data.name}", data.mel, groups)


# ------------------------------------------------------------------------------------------------------- metric=sound


def measure_sound(context: EvaluationContext) -> PlannedMeasure:
    """Check that the run draws sounds by class; return the planned measure.

    Raises: InvalidInput.
    """
    from ddpm.metrics import denoising, quality

    source, data = context.source, context.every
    if getattr(data, "mel", None) is None:
        raise InvalidInput(f"metric={NAME} needs sounds, and {data.name} has none; train with experiment=spoken_digits")
    if source.classes([0]) is None or not quality.has_classes(data):
        raise InvalidInput(
            f"metric={NAME} compares samples with the requested classes, and the network has none; train one "
            "with model.num_classes, on data with two classes or more"
        )
    if source.sampler is not None:
        must_walk(source.sampler, source.diffusion)
    try:
        denoising.must_hold_out(data, NAME, 1)
    except ValueError as error:
        raise InvalidInput(str(error)) from error
    n = context.config.n or min(512, len(context.data.held_out))
    context.features("classifier")
    plan = f"{NAME}: {n:,} samples, seeds {context.seeds}, {source.walk}, turned into sounds and classified"
    cost = len(context.seeds) * n * source.evaluations
    return PlannedMeasure(plan, cost, lambda: _carry_out(context, n), ("classifier",))


def _carry_out(context: EvaluationContext, n: int) -> None:
    """Draw with every seed; record the classifier's accuracy, the Frechet distance and the memorisation."""
    from ddpm.metrics import quality, sound

    source, data = context.source, context.data
    real, accuracy = context.real("classifier")
    protocols = {name: real.protocol(f"{NAME}_{name}", n) for name in ("frechet", "memorisation")}
    protocols |= {"heard": f"{NAME}_{real.features.name}_{n}"}
    found: dict[str, list[Any]] = {name: [] for name in protocols}
    few = _too_few(n, real)
    try:
        floor = sound.held_out(data, real)
        for seed in context.seeds:
            drawn = sound.Judged.of(*context.samples(list(range(n)), seed), data.mel, real)
            found["heard"].append(sound.as_heard(drawn, floor, real))
            found["frechet"] += [] if few else [sound.distance(drawn, floor, real)]
            found["memorisation"].append(sound.memorised(drawn, real))
    except ValueError as error:
        raise InvalidInput(f"metric={NAME}: {error}") from error
    for name in ("heard", "frechet", "memorisation"):
        if results := found[name]:
            values = context.settings(n, source.sampler) | quality.together(results, context.seeds)
            values |= {} if accuracy is None else {"judge_accuracy": accuracy}
            context.record(protocols[name], values, quality.in_words(results, values))
    ceiling = found["heard"][0].more["ceiling"]
    say(f"the ceiling, the classifier's accuracy on real sounds through the same spectrograms: {ceiling:.1%}")
    if few:
        say(few)


def _too_few(n: int, real: Any) -> str:
    """Return why there is no Frechet distance, or "" if there is one."""
    for what, count in (("samples", n), ("training sounds", len(real.train))):
        if count <= real.features.size:
            least = real.features.size + 1
            return f"no Frechet distance: {count} {what}, and {real.features.size} features need {least} or more"
    return ""
