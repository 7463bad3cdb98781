"""`ddpm-evaluate metric=reading_sheet`: a page of samples and held-out images for a person to read, and its scores."""

import json
from pathlib import Path
from typing import Any

from ddpm.commands.console import say
from ddpm.commands.evaluate.context import EvaluationContext, PlannedMeasure
from ddpm.commands.launch import command, word
from ddpm.commands.load import must_match, must_walk
from ddpm.config import InvalidInput

PAGE, KEY = "reading_sheet.html", "reading_sheet.json"  # in the run directory
DEFAULT, MOST = 40, 500  # samples of a sheet, with as many held-out images
FIRST = 2**20  # number of its first sample; the first ones of a seed are in samples.png and may be familiar
LARGEST_PAGE = 2**26  # bytes of its pictures
LARGEST_ANSWERS = 2**22  # bytes


def measure_reading(context: EvaluationContext) -> PlannedMeasure:
    """Check the input of a reading sheet, or of its answers; return the planned measure that writes or scores it.

    Raises: InvalidInput.
    """
    answers = context.config.reading_sheet.answers
    if answers is None:
        return _planned_sheet(context)
    if not isinstance(answers, str) or not answers:
        raise InvalidInput(f"reading_sheet.answers={answers} must be the name of a file, or null to make a sheet")
    return _planned_scores(context, Path(answers))


# --------------------------------------------------------------------------------------------------------------- sheet


def _planned_sheet(context: EvaluationContext) -> PlannedMeasure:
    from ddpm.metrics import denoising, reading_sheet

    source, data = context.source, context.data
    must_walk(source.sampler, source.diffusion)
    must_match(source.model, data)
    channels, height, width = data.shape
    most = max(1, min(MOST, LARGEST_PAGE // (channels * height * width * 8 // 3)))  # in base64, three bytes are four
    n = min(DEFAULT, most) if context.config.n is None else context.config.n
    try:
        denoising.must_hold_out(data, reading_sheet.NAME, 1)
    except ValueError as error:
        raise InvalidInput(str(error)) from error
    if n > most:
        raise InvalidInput(
            f"n = {n}: {reading_sheet.NAME} takes at most {most} samples of this size, since a person reads them"
        )
    plan = (
        f"{reading_sheet.NAME}: a page of {n:,} samples, seed {source.seed}, {type(source.sampler).__name__} with "
        f"{len(source.sampler.times(source.diffusion.schedule)) - 1} steps, mixed with {min(n, len(data.held_out)):,} "
        "held-out images"
    )
    return PlannedMeasure(plan, n * source.sampler.evaluations(source.diffusion.schedule), lambda: _make(context, n))


def _make(context: EvaluationContext, n: int) -> None:
    """Draw the samples, mix them with held-out images, and write the page and its answer key."""
    import torch

    from ddpm.data.dataset import spread
    from ddpm.figures import reading_page
    from ddpm.figures.images import to_uint8
    from ddpm.metrics import reading_sheet
    from ddpm.runs.files import replacing

    data, folder, seed = context.data, context.run.path, context.source.seed
    numbers, classes = list(range(FIRST, FIRST + n)), _classes(data)
    x, y = context.samples(numbers, seed)
    held_out = data.held_out[spread(len(data.held_out), n)]
    real = data.batch(held_out)
    items = _items(True, numbers, y, len(classes)) + _items(False, held_out.tolist(), real.y, len(classes))
    order = reading_sheet.mixed(len(items), seed)
    pictures = to_uint8(torch.cat([x, real.x.cpu()]))[order]  # both kinds are treated alike from here to the page
    key = reading_sheet.Key(
        sheet=reading_sheet.identified(pictures, classes),
        protocol=context.named(f"{reading_sheet.NAME}_{n}"),
        settings=context.settings(n, context.source.sampler),
        classes=classes,
        items=[items[i] for i in order.tolist()],
    )
    file = f"reading_sheet_answers-{key.sheet[:8]}.json"
    score = f"{command('evaluate')} {word('run', folder)} metric={reading_sheet.NAME} reading_sheet.answers={file}"
    page = reading_page.page(data.name, pictures, classes, key.sheet, file, score)
    key_file, html = folder / KEY, folder / PAGE
    _set_aside(key_file, html, key.sheet)
    for path, text in ((key_file, json.dumps(key.as_json(), indent=1)), (html, page)):
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    say(
        f"wrote {html}: {len(items)} pictures to read; {key_file.name} is the answer key, and is not for the "
        f"reader\nnext:\n  open {html} in a browser, answer, and save the answers\n  {score}"
    )


def _classes(data: Any) -> list[list[str]]:
    """Return the answers accepted for each class of labelled data: its glyph, if known, and its name."""
    if data.labels is None:
        return []
    return [[*data.glyphs[y : y + 1], name] for y, name in enumerate(data.classes)]


def _items(sample: bool, numbers: list[int], labels: Any, classes: int) -> list[Any]:
    """Return the key's items of samples or held-out images; the class is None if the data do not have it."""
    from ddpm.metrics.reading_sheet import Item

    known = [None] * len(numbers) if labels is None else [y if y < classes else None for y in labels.tolist()]
    return [Item(sample, number, y) for number, y in zip(numbers, known, strict=True)]


def _set_aside(key_file: Path, html: Path, sheet: str) -> None:
    """Rename an earlier sheet and its key, so that its answers can still be scored."""
    try:
        before = _key(key_file).sheet
    except (FileNotFoundError, ValueError):
        return
    if before != sheet:
        for path in (key_file, html):
            if path.exists():
                path.replace(_own(path, before))
        say(f"the previous sheet was renamed to {_own(html, before)}; its answers can still be scored")


def _own(path: Path, sheet: str) -> Path:
    """Return the path of a file with the sheet's checksum in its name."""
    return path.with_name(f"{path.stem}-{sheet[:12]}{path.suffix}")


def _key(path: Path) -> Any:
    """Return the key of a sheet; raise FileNotFoundError, or ValueError for an invalid one."""
    from ddpm.metrics.reading_sheet import Key
    from ddpm.runs.files import read_json

    try:
        return Key.from_json(read_json(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


# -------------------------------------------------------------------------------------------------------------- scores


def _planned_scores(context: EvaluationContext, path: Path) -> PlannedMeasure:
    from ddpm.metrics import reading_sheet
    from ddpm.runs.files import read_json

    key_file = context.run.path / KEY
    try:
        found = read_json(path, LARGEST_ANSWERS)
        sheet = reading_sheet.sheet_of(found)
        own = _own(key_file, sheet)
        key = _key(own if own.exists() else key_file)
        answers = reading_sheet.answers_of(found, key)
    except FileNotFoundError as error:
        missing = (
            f"{key_file} does not exist: metric=reading_sheet makes a sheet"
            if path.exists()
            else "there is no such file"
        )
        raise InvalidInput(f"reading_sheet.answers={path}: {missing}") from error
    except ValueError as error:
        raise InvalidInput(f"reading_sheet.answers={path}: {error}") from error
    plan = f"reading_sheet: the answers of {path} are scored"
    return PlannedMeasure(plan, 0, lambda: _score(context, key, answers))


def _score(context: EvaluationContext, key: Any, answers: Any) -> None:
    """Record and print the scores, with the settings that the sheet's samples were drawn with."""
    from ddpm.metrics import quality, reading_sheet
    from ddpm.runs import results

    for name, result in reading_sheet.score(key, answers).items():
        protocol = f"{reading_sheet.NAME}-{name}{key.protocol.removeprefix(reading_sheet.NAME)}"
        results.record(context.run.path, protocol, key.settings | quality.together([result], key.settings["seeds"]))
        say(f"{protocol}:\n{result.words}")
    for line in reading_sheet.remarks(key, answers):
        say(line)
