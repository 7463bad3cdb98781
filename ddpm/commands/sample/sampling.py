"""`ddpm-sample`: samples of a run's network, as pictures, arrays and figures."""

import inspect
import json
import re
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ddpm.checks import is_whole
from ddpm.commands.console import say, warn_of_range, with_bar
from ddpm.commands.evaluate.sounds import PAGE, for_display, mel_of, names_of, wavs_of, write_page, write_wav
from ddpm.commands.load import LABELS, NONE, STUDENT, data_of, label_names, must_walk
from ddpm.commands.sample import pipelines
from ddpm.commands.sample.pipelines import Drawn
from ddpm.commands.sample.points import draw_plane, is_plane
from ddpm.commands.sources import how_drawn_from, source_of
from ddpm.commands.validate import must_be_whole, must_be_writable, trusted
from ddpm.config import InvalidInput, build, plain, resolved

FRAMES = 40  # of the animation from noise to data
FEW_COLUMNS = 16  # values of a label up to which a grid has a column for each, however many samples there are
BETWEEN = 8  # pictures of an interpolation


def sample(config: DictConfig) -> None:
    """Draw samples, or one of the figures, and write them to `out`.

    Raises: InvalidInput.
    """
    from ddpm.figures import images, plots
    from ddpm.figures.images import as_pictures

    resolved(config)
    must_be_whole(config, "n", least=1)
    must_be_writable(config.out)
    source, run, trained, step = source_of(config)
    points = len(source.shape) == 1  # one picture shows many of them
    strip, process, between = plain(config.steps_strip), config.process, plain(config.between)
    if source.sampler is None and not (strip is None and process is None):
        raise InvalidInput("steps_strip and process need a sampler that walks from noise to data; this run has none")
    if isinstance(run, Drawn):
        _must_draw_alone(source, between)
    if strip is None and source.sampler is not None:  # a strip checks its own samplers
        must_walk(source.sampler, source.diffusion)
    out = Path(str(config.out)) if config.out is not None else run.path / f"samples_{_label(source, step, config)}.png"
    folder = config.out is not None and (str(config.out).endswith("/") or out.suffix == "")
    mel = run.mel if isinstance(run, Drawn) else mel_of(trained)
    if out.suffix == ".wav" and mel is None:
        what = "pipeline" if isinstance(run, Drawn) else "run"
        raise InvalidInput(
            f"out={config.out}: the {what} draws no sounds; allowed: FILE.png, FILE.npy, FILE.gif, FOLDER/"
        )
    columns, order = _columns(source, config.n)
    figures = [name for name in ("steps_strip", "process", "between") if config[name] is not None]
    if figures and (folder or out.suffix != ".png"):
        raise InvalidInput(f"out={config.out}: {figures[0]} is a figure, written to a .png file")
    if len(figures) > 1:
        raise InvalidInput(f"{' and '.join(figures)} are different figures; request one at a time")
    if folder and points and not is_plane(source):
        raise InvalidInput(f"out={config.out}: samples are points, which are written to one .npy, .png or .gif file")

    evaluations = None if strip is not None else source.evaluations
    summary = how_drawn_from(source, run, step, config, evaluations)
    if not (figures or folder):
        say(summary)
    if strip is not None:
        _steps_strip(config, source, strip, out)
    elif between is not None:
        _between(config, source, trained, between, out, mel)
    elif process is not None:
        if not is_whole(process, 2):
            raise InvalidInput(f"process={process} must be an integer >= 2: the number of pictures from noise to image")
        way = source.way(config.n if points else min(config.n, 8), process)
        conditions = source.condition_images(range(len(way[0][1])))
        panels = [("condition", conditions)] if conditions is not None else []
        panels += [(f"$t = {t:.4g}$", as_pictures(x_t)) for t, x_t in way]
        plots.labelled_columns(out, panels, _plane(source))
    elif folder and points:
        out.mkdir(parents=True, exist_ok=True)
        draw_plane(out, source, data_of(config, trained))
    elif folder:
        _write_numbered(config, source, run, step, out, mel)
        if mel is not None:
            _write_sounds(config, source, run, trained, out, mel)
    elif out.suffix == ".wav":
        write_wav(out, mel, source.samples(1))
        order = f": sample 0 of seed={config.seed}; out=FOLDER/ writes more" if config.n > 1 else ""
    elif out.suffix == ".gif" and source.sampler is None:
        raise InvalidInput(
            f"out={out}: samples drawn in one evaluation have no path from noise to data to show; take .png"
        )
    elif out.suffix == ".gif":
        save_way(out, source.way(config.n, FRAMES), columns)
    else:
        import torch

        parts = list(with_bar(source.batches(list(range(config.n)), config.batch), config.n))
        x = torch.cat([x for _, x in parts])
        images.save_samples(out, x if out.suffix == ".npy" else for_display(mel, x), columns)
    if figures or folder:  # their settings are checked while drawing
        say(summary)
    warn_of_range(source)
    say(f"wrote {out}" + (order if not (figures or folder or points) and out.suffix != ".npy" else ""))


def _must_draw_alone(source: Any, between: Any) -> None:
    """Raise InvalidInput unless a pipeline can draw from a prompt alone."""
    if between is not None:
        raise InvalidInput(f"between={between} needs held-out images, which a published pipeline does not have")
    try:
        source.condition([0])
    except ValueError as error:
        raise InvalidInput(f"{error}; experiments/edit.py gives it: mask=FILE or depth=FILE") from error


def _columns(source: Any, n: int) -> tuple[int | None, str]:
    """Return the columns of a grid that puts n samples in order of their labels, or None, and a note on the order.

    Only if there are several labels, and the first that varies has few values, or a second varies and n fills the rows.
    """
    turns = [] if source.condition_data is not None else source.turns
    varying = [(key, len(values)) for key, values in zip(LABELS, turns, strict=False) if len(values) > 1]
    if len(turns) < 2 or not varying:
        return None, ""
    (key, count), *others = varying
    if count > FEW_COLUMNS and (not others or n % count):
        return None, ""
    return min(count, n), f": a column a {key}" + "".join(f", a row a {other}" for other, _ in others)


def save_way(path: Path, way: Sequence[tuple[int | float, Any]], columns: int | None = None) -> None:
    """Write an animation of grids that shows samples on their way from noise to data."""
    from ddpm.figures import images
    from ddpm.figures.images import as_pictures

    frames = [images.grid(as_pictures(x_t, side=320), columns) for _, x_t in way]
    images.save_gif(path, frames, seconds_per_frame=0.08)


def _label(source: Any, step: int, config: DictConfig) -> str:
    """Return the part of a file name that states checkpoint, sampler, labels and seed; defaults are left out."""
    if config.get("pipeline") is not None:
        return f"{pipelines.label(config)}_seed{config.seed}"
    if source.sampler is None:
        requested = "" if source.requested is None else f"class{_short('-'.join(map(str, source.requested)))}_"
        requested += "" if config.temperature == 1.0 else f"temperature{config.temperature:g}_"
        return f"step{step}_{config.weights}_{requested}seed{config.seed}"
    sampler = type(source.sampler)
    several = config.steps_strip is not None
    steps = "_strip" if several else len(source.sampler.times(source.diffusion.schedule)) - 1
    walk = f"{sampler.__name__.lower()}{steps}"
    defaults = inspect.signature(type(source.guidance)).parameters
    for name, value in (plain(config.guidance) if str(source.guidance) else {}).items():
        if name == "w" or (name in defaults and value != defaults[name].default):
            number = isinstance(value, int | float)
            walk += f"_{name}{value:g}" if number else f"_{name}-{_short(value)}"
    if config.get("prompt") is not None:
        walk = f"{pipelines.label(config)}_{walk}"
    for key, requested in (("style", source.styles), ("class", source.requested)):
        if requested is not None:
            walk = f"{key}{_short('-'.join(map(str, requested)) or NONE)}_{walk}"
    for name, parameter in inspect.signature(sampler).parameters.items():
        value = plain(config.sampler.get(name, parameter.default))
        if name != "steps" and value != parameter.default:
            walk += f"_{name}-{re.sub(r'[^0-9A-Za-z.]+', '-', str(value)).strip('-')[:40]}"
    return f"step{step}_{config.weights.replace(':', '')}_{walk}_seed{config.seed}"


def _short(value: Any) -> str:
    """Return a value for a file name: shortened and sanitised values get a checksum."""
    text = str(value)
    plainly = re.sub(r"[^0-9A-Za-z.-]+", "-", text).strip("-")
    return plainly if plainly == text and len(text) <= 40 else f"{plainly[:32]}-{sha256(text.encode()).hexdigest()[:6]}"


def _steps_strip(config: DictConfig, source: Any, strip: list[Any], out: Path) -> None:
    """Draw samples of the same noise with several numbers of steps, one row each."""
    from ddpm.figures import plots
    from ddpm.figures.images import as_pictures

    if config.sampler["_target_"] == STUDENT:
        raise InvalidInput(
            f"steps_strip={strip}: the run was distilled to {source.sampler.steps} steps, and knows no others"
        )
    samplers = []
    for steps in strip if isinstance(strip, list) else [strip]:
        settings = resolved(config.sampler) | {"steps": steps, "times": None}
        sampler = strip_sampler(source, steps) or build(settings, f"steps_strip, {steps}", trusted(config))
        must_walk(sampler, source.diffusion)
        samplers.append((f"{steps} step{'s' * (steps != 1)}", sampler))
    points = len(source.shape) == 1
    n, figure = (config.n, plots.labelled_columns) if points else (min(config.n, 12), plots.labelled_rows)
    conditions = source.condition_images(range(n))
    rows = [("condition", conditions)] if conditions is not None else []
    rows += [(label, as_pictures(source.using(sampler).draw(range(n)))) for label, sampler in samplers]
    figure(out, rows, _plane(source))


def strip_sampler(source: Any, steps: Any) -> Any:
    """Return the pipeline's own sampler with this many steps, or None if the source does not use it."""
    own = getattr(source, "own", None)
    try:
        return None if own is None else own(steps)
    except ValueError as error:
        raise InvalidInput(f"steps_strip: {error}") from error


def _between(config: DictConfig, source: Any, trained: DictConfig, between: Any, out: Path, mel: Any) -> None:
    """Draw the interpolation between two held-out images in one row, with these at its ends; for sounds, a page too."""
    import torch

    from ddpm.figures import plots
    from ddpm.figures.images import as_pictures

    for key, requested in (("class", source.requested), ("style", source.styles)):
        if requested is not None:
            ends = f"whose images have the {LABELS[key]} of its ends"
            raise InvalidInput(f"{key}= has no effect on between, {ends}; leave it out")
    if str(source.guidance):
        raise InvalidInput("guidance= has no effect on between, which encodes and decodes without it; leave it out")
    if config.prompt is not None:
        raise InvalidInput(
            "prompt= has no effect on between, whose images are conditioned on the captions of its ends; leave it out"
        )
    if not hasattr(source, "between"):
        raise InvalidInput(f"between interpolates codings, and these samples are {source.walk}; leave it out")
    data = data_of(config, trained)
    pair = between if isinstance(between, list) else [between]
    legal = [is_whole(i, 0, len(data.held_out) - 1) for i in pair]
    if len(pair) != 2 or not all(legal):
        raise InvalidInput(
            f"between={between}: two of the {len(data.held_out)} held-out {data.units}, such as between=[0,1]"
        )
    ends = data.batch(data.held_out[pair])
    x = ends.x
    try:
        way = source.between(x, ends.condition, BETWEEN)
    except ValueError as error:
        raise InvalidInput(str(error)) from error
    labels = [f"{i / (BETWEEN - 1):.2f}" for i in range(BETWEEN)]
    one = data.units.removesuffix("s")
    row = [(f"{one} {pair[0]}", x[:1]), *zip(labels, torch.split(way, 1), strict=True), (f"{one} {pair[1]}", x[1:])]
    plots.labelled_columns(out, [(label, as_pictures(for_display(mel, x))) for label, x in row], _plane(source))
    if mel is not None:
        page = out.with_suffix(".html")
        write_page(
            page, "From sound to sound", mel, [("The way", [name for name, _ in row], torch.cat([x for _, x in row]))]
        )
        say(f"wrote {page}")


def _write_sounds(config: DictConfig, source: Any, run: Any, trained: DictConfig, out: Path, mel: Any) -> None:
    """Write a WAV file for each PNG file of a folder, with the same number, and a page that plays them."""
    import numpy as np
    import torch
    from PIL import Image

    from ddpm.figures.images import to_float
    from ddpm.runs.files import replacing

    numbers = list(range(config.n))
    pixels = [np.asarray(Image.open(out / f"{number:06}.png").convert("L")) for number in numbers]
    x = to_float(torch.from_numpy(np.stack(pixels))[:, None]).flip(-2)
    for number, wav in zip(numbers, wavs_of(mel, x), strict=True):
        with replacing(out / f"{number:06}.wav") as temporary:
            temporary.write_bytes(wav)
    classes = label_names("classes", config, run, trained) if source.classes([0]) is not None else ()
    names = names_of(source, classes, numbers)
    write_page(
        out / PAGE, f"Samples of {run.folder if isinstance(run, Drawn) else config.run}", mel, [("Samples", names, x)]
    )


def _plane(source: Any) -> str | None:
    """Return a note on the projection of points that do not lie in a plane; None for points that do, and for images."""
    from ddpm.figures.images import plane_of

    return plane_of(source.shape[0]) if len(source.shape) == 1 else None


def _write_numbered(config: DictConfig, source: Any, run: Any, step: int, out: Path, mel: Any) -> None:
    """Write one PNG file a sample; existing ones stay if they are of the same run and settings."""
    from ddpm.figures import images
    from ddpm.runs.files import replacing

    out.mkdir(exist_ok=True)
    settings = {
        **({"run": str(run.path.resolve())} if not isinstance(run, Drawn) else pipelines.settings(config, run)),
        "step": step,
        "weights": config.weights,
        "seed": config.seed,
        "sampler": OmegaConf.to_container(config.sampler),
    }
    labels = {"class": source.requested, "style": source.styles}
    settings |= {key: requested or NONE for key, requested in labels.items() if requested is not None}
    settings |= {"guidance": plain(config.guidance)} if str(source.guidance) else {}
    if not isinstance(run, Drawn):
        settings |= {key: plain(config[key]) for key in ("prompt", "negative") if config[key] not in (None, "")}
    settings |= {} if config.temperature == 1.0 else {"temperature": config.temperature}
    note = out / "samples.json"
    if note.exists() and _read_settings(note) != settings:
        raise InvalidInput(f"out={config.out} holds samples of other settings (see {note}); choose another folder")
    if not note.exists() and any(out.glob("[0-9]*.png")):
        raise InvalidInput(f"out={config.out} holds pictures that were not written here; choose another folder")
    with replacing(note) as temporary:
        temporary.write_text(json.dumps(settings, indent=1))
    missing = [i for i in range(config.n) if not (out / f"{i:06}.png").exists()]
    if len(missing) < config.n:
        say(f"{config.n - len(missing)} of {config.n} samples exist already")
    for numbers, x in with_bar(source.batches(missing, config.batch), len(missing)):
        for number, picture in zip(numbers, images.to_numpy(for_display(mel, x)), strict=True):
            images.save_png(out / f"{number:06}.png", picture)


def _read_settings(note: Path) -> Any:
    """Return the settings that a folder's samples were drawn with."""
    from ddpm.runs.files import read_json

    try:
        return read_json(note)
    except ValueError as error:
        raise InvalidInput(f"{error}; choose another folder") from error
