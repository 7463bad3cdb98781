"""`ddpm-edit`: edit an image with a run's network or a published pipeline."""

import contextlib
import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig

from ddpm.commands.console import say, warn_of_range, with_bar
from ddpm.commands.evaluate.sounds import for_display, mel_of, write_page, write_wav
from ddpm.commands.load import LABELS, label_names, must_walk, requested_labels
from ddpm.commands.sample import pipelines
from ddpm.commands.sample.given_image import FITS, HELD_OUT, depth_of, image_of, mask_of
from ddpm.commands.sample.pipelines import Drawn
from ddpm.commands.sources import how_drawn_from, source_of
from ddpm.commands.validate import must_be_numbers, must_be_one_of, must_be_whole, must_be_writable
from ddpm.config import InvalidInput, plain, resolved

KINDS = ("strength", "mask", "operator", "redraw")
OPERATORS = ("super_resolution", "blur", "inpainting")
MOST = 12  # results in a strip


class Edit(NamedTuple):
    """A function that draws the results, and the images that a strip shows before them."""

    draw: Callable[[list[int]], Any]
    """Numbers of samples -> images (n, C, H, W), on the CPU."""
    before: list[tuple[str, Any]]
    """(label, images (1, C, H, W)) of the inputs that the results come from."""


def edit(config: DictConfig) -> None:
    """Edit an image; write a strip of input and results, or the results alone.

    Raises: InvalidInput.
    """
    from ddpm.data.batch import takes

    resolved(config)
    kind = _kind(config)
    _check(config)
    source, run, trained, step = source_of(config)
    drawn_from = f"pipeline={config.pipeline}" if isinstance(run, Drawn) else f"run={config.run}"
    if source.sampler is None:
        raise InvalidInput(f"{drawn_from}: editing needs a sampler that walks from noise to images, and this has none")
    if source.codec is not None and kind == "operator":
        raise InvalidInput(
            f"{drawn_from} draws latents, to which operator={config.operator} does not apply; allowed: "
            "strength=, mask=" + ("" if isinstance(run, Drawn) else ", redraw=true")
        )
    must_walk(source.sampler, source.diffusion)
    if len(source.decoded_shape) != 3 or source.decoded_shape[0] not in (1, 3):
        raise InvalidInput(f"{drawn_from} draws no pictures, and only pictures are edited")
    if source.condition_data is not None and "tokens" in takes(source.model) and source.prompts is None:
        raise InvalidInput(f"{drawn_from} is conditioned on words: give prompt=TEXT")
    if source.condition_data is not None and (kind != "mask" or source.condition_data.condition != "mask"):
        raise InvalidInput(
            f"{drawn_from} is conditioned on an image (data.condition={source.condition_data.condition}): "
            "of these networks only those with data.condition=mask can edit, with mask=FILE"
        )
    if isinstance(run, Drawn) and run.mel is not None:
        raise InvalidInput(f"{drawn_from} draws sounds, and edits none; experiments/sample.py draws them")
    if isinstance(run, Drawn):
        source = _of_pipeline(config, source, kind)
    if kind == "redraw" and str(source.guidance):
        raise InvalidInput("guidance= has no effect on redraw, which encodes and decodes along one flow; leave it out")
    names = _names(config, source, run, trained)
    mel = mel_of(trained)
    x, size, labels = image_of(config, trained, _shape(config, source), mel)
    kinds: dict[str, Callable[..., Any]] = {
        "strength": _img2img,
        "mask": partial(inpainting, mel=mel),
        "operator": partial(_measured, mel=mel),
        "redraw": _redraw,
    }
    edited = kinds[kind]
    if kind == "redraw":
        labels = _own(config, names, labels)
        if len(labels) > 1 and config.style is None:  # in the same style
            source.styles = labels[1:2]
    else:
        own = {key: labels[k : k + 1] for k, key in enumerate(LABELS)}
        for key in names:
            if config[key] is None and not own[key]:
                several = f"{LABELS[key]}: {', '.join(names[key])}"
                without = ", none" if getattr(source.model, "drop", 0) else ""
                raise InvalidInput(f"{key}= is needed, since the network has {several}{without}, or all")
        source.requested = own["class"] if "class" in names and config["class"] is None else source.requested
        source.styles = own["style"] if "style" in names and config.style is None else source.styles
        source.condition_data = (
            None if source.condition_data is None else source.condition_data.of_labels(source.requested, source.styles)
        )
    each = math.prod(max(1, len(values)) for values in source.turns[: len(LABELS)])
    n = config.n if config.n is not None else each if kind == "redraw" else 4
    if str(config.out).endswith(".wav"):
        if mel is None:
            raise InvalidInput(f"out={config.out}: the run draws no sounds; allowed: FILE.png, FILE.npy")
        if config.n not in (None, 1):
            raise InvalidInput(f"n={config.n}: a .wav file holds one result, n=1; out=FILE.png comes with a page")
        n = 1
    out = Path(str(config.out)) if config.out is not None else run.path / f"edit_{_name(config, kind)}.png"
    if out.suffix == ".png" and n > MOST:
        raise InvalidInput(f"n={n}: a strip shows up to {MOST} results; out=FILE.npy holds more")
    try:
        draw, before = edited(config, source, x, size, labels)
        say(how_drawn_from(source, run, step, config))
        parts = list(with_bar(((part, draw(part)) for part in _batches(n, config.batch)), n))
    except ValueError as error:
        raise InvalidInput(str(error)) from error
    _write(out, parts, before, _labels(source, names, n), mel)
    warn_of_range(source)
    say(f"wrote {out}")


def _of_pipeline(config: DictConfig, source: Any, kind: str) -> Any:
    """Return a pipeline's source for editing, conditioned on depth= if its network takes it; check the requests."""
    from ddpm.sources.prompted import deep, kind_of

    of_network = kind_of(source.model)
    if kind == "redraw":
        raise InvalidInput(
            "redraw=true needs a network with classes; with a pipeline take strength= and another prompt="
        )
    if str(plain(config.image)).startswith(HELD_OUT):
        raise InvalidInput(f"image={config.image} refers to a run's data; a pipeline edits an image file")
    if (config.depth is not None) != (of_network == "depth"):
        allowed = "depth=FILE is needed" if of_network == "depth" else "leave depth= out"
        raise InvalidInput(f"the network is conditioned on {of_network}: {allowed}")
    if of_network == "inpainting" and kind != "mask":
        raise InvalidInput("the network is conditioned on a mask and edits with mask=FILE only")
    if of_network != "depth":
        return source
    try:
        return source.conditioned_on_image(deep(source.codec, depth_of(config, source)))
    except ValueError as error:
        raise InvalidInput(f"depth={config.depth}: {error}") from error


def _kind(config: DictConfig) -> str:
    """Return the requested one of KINDS."""
    redraw = plain(config.redraw)
    if not isinstance(redraw, bool):
        raise InvalidInput(f"redraw={redraw} must be true or false")
    requested = [name for name in KINDS if config[name] is not None and (name != "redraw" or redraw)]
    if not requested and config.depth is not None:  # redraws the image with the same depth
        config.strength, requested = 1.0, ["strength"]
    if requested == ["strength", "redraw"]:
        return "redraw"
    if requested == ["mask", "operator"] and config.operator == "inpainting":
        return "operator"
    if len(requested) != 1:
        problem = f"{' and '.join(requested)} are different edits" if requested else "the edit is missing"
        raise InvalidInput(f"{problem}; give one of strength=0.6, mask=FILE, operator=NAME, redraw=true")
    if config.operator == "inpainting":
        raise InvalidInput("operator=inpainting needs mask=FILE")
    for key in (f"from_{label}" for label in LABELS):
        if config[key] is not None and not redraw:
            raise InvalidInput(f"{key}={plain(config[key])} has an effect only with redraw=true; leave it out")
    return requested[0]


def _check(config: DictConfig) -> None:
    """Raise InvalidInput for values out of range, whatever the run."""
    must_be_one_of(config, "fit", FITS)
    must_be_writable(config.out)
    if config.out is not None and Path(str(config.out)).suffix not in (".png", ".npy", ".wav"):
        raise InvalidInput(
            f"out={config.out}: an edit is written to FILE.png (a strip), FILE.npy (the results) or, "
            "of a sound, FILE.wav"
        )
    if config.n is not None:
        must_be_whole(config, "n", least=1)
    if config.strength is not None:
        must_be_numbers(config, "strength")
        if not 0 <= config.strength <= 1:
            raise InvalidInput(f"strength={config.strength} must lie in [0, 1]: 0 keeps the image, 1 draws a new one")
    must_be_whole(config, "resamples", "jump", "factor", least=1)
    if config.operator is not None:
        must_be_one_of(config, "operator", OPERATORS)
    must_be_one_of(config, "method", ("pigdm", "dps"))
    must_be_numbers(config, "std", "sigma_y", "scale")
    for key, beyond in (("sigma_y", ">= 0"), ("scale", ">= 0"), ("std", "> 0")):
        if config[key] < 0 or (config[key] == 0 and beyond == "> 0"):
            raise InvalidInput(f"{key}={config[key]} must be a number {beyond}")
    if not isinstance(config.observed, bool):
        raise InvalidInput(f"observed={config.observed} must be true or false")


def _img2img(config: DictConfig, source: Any, x: Any, size: str, labels: list[int]) -> Edit:
    from ddpm.editing import img2img

    def draw(numbers: list[int]) -> Any:
        denoise, noise, x_0 = _bound(source, numbers, x)
        return img2img(source.sampler, source.diffusion.schedule, denoise, x_0, config.strength, noise)

    return Edit(_computing(source, draw), [("input", x)])


def inpainting(config: DictConfig, source: Any, x: Any, size: str, labels: list[int], mel: Any = None) -> Edit:
    """Redraw what is white in `mask=`: by a network conditioned on masks, else by replacement or RePaint.

    Args:
        x: the image (1, C, H, W) in [-1, 1]; or one for each sample of a batch.
        size: original size of the image, as WIDTHxHEIGHT, which the mask must have too.
        labels: of the image; unused here.
        mel: of a run on sounds, whose mask may be a gap in seconds.
    Raises: InvalidInput for a mask that cannot be read, or of another size.
    """
    import torch

    from ddpm.editing import inpaint, mask_of_latents

    mask = mask_of(config, source, size, mel)
    of_drawn = mask if source.codec is None else mask_of_latents(mask, source.shape[1:])

    def conditioned(numbers: list[int]) -> Any:
        """Draw with a network that takes the mask and the known pixels as input at every step."""
        if source.codec is not None:
            return of_latents(numbers)
        _, noise, x_0 = _bound(source, numbers, x)
        hole = mask.to(source.device).expand(len(numbers), 1, -1, -1)
        image = torch.cat([x_0.masked_fill(hole, 0), hole.to(x_0.dtype)], dim=1)
        denoise = source.denoiser(replace(source.condition(numbers), image=image))
        drawn = source.sampler(
            source.diffusion.schedule, denoise, noise.x_T(source.shape, source.device), generator=noise
        )
        return drawn.where(hole, x_0)

    def of_latents(numbers: list[int]) -> Any:
        from ddpm.sources.prompted import masked

        there = source.conditioned_on_image(masked(source.codec, x.to(source.device), mask.to(source.device)))
        denoise, noise = there.denoiser(there.condition(numbers)), there.noise(numbers)
        x_T = noise.x_T(there.shape, there.device)
        return there.sampler(there.diffusion.schedule, denoise, x_T, generator=noise)

    def draw(numbers: list[int]) -> Any:
        denoise, noise, x_0 = _bound(source, numbers, known)
        options = {"resamples": config.resamples, "jump": config.jump, "generator": noise}
        return inpaint(source.sampler, source.diffusion.schedule, denoise, x_0, of_drawn.to(source.device), **options)

    known = x.where(~mask, x.new_zeros(()))
    drawing = _computing(source, conditioned if _takes_masks(source) else draw)
    return Edit(lambda numbers: drawing(numbers).where(mask, x), [("input", x), ("kept", known)])


def _takes_masks(source: Any) -> bool:
    """Whether the network takes the mask and the known pixels as input."""
    from ddpm.data.batch import takes
    from ddpm.sources.prompted import Prompted, kind_of

    if isinstance(source, Prompted):
        return kind_of(source.model) == "inpainting"
    return "image" in takes(source.model)


def _measured(config: DictConfig, source: Any, x: Any, size: str, labels: list[int], mel: Any = None) -> Edit:
    from ddpm.editing import Blur, Inpainting, Operator, SuperResolution, dps, pigdm
    from ddpm.randomness import SampleNoise

    schedule = source.diffusion.schedule
    makers: dict[str, Callable[[], Operator]] = {
        "super_resolution": lambda: SuperResolution(config.factor),
        "blur": lambda: Blur.gaussian(float(config.std)),
        "inpainting": lambda: Inpainting(mask_of(config, source, size, mel)),
    }
    A = makers[config.operator]()
    y = x if config.observed else A(x)
    if not config.observed:
        y = y + config.sigma_y * SampleNoise(config.seed, [0], "measured")(0, tuple(y.shape[1:]))
    if config.operator == "inpainting":
        y = A(y)
    displayed = A.transpose(y) * config.factor**2 if config.operator == "super_resolution" else y

    def draw(numbers: list[int]) -> Any:
        noise = SampleNoise(source.seed, numbers)
        raw, measured = source.predictor(source.condition(numbers)), y.to(source.device)
        if config.method == "dps":
            guided = dps(schedule, raw, A, measured, config.scale)
        else:
            guided = pigdm(schedule, raw, A, measured, config.sigma_y)
        x_T = noise.x_T(source.shape, source.device)
        return source.sampler(schedule, source.diffusion.clipped(guided), x_T, generator=noise)

    before = [] if config.observed else [("input", x)]
    return Edit(_computing(source, draw), [*before, ("measured", displayed)])


def _redraw(config: DictConfig, source: Any, x: Any, size: str, labels: list[int]) -> Edit:
    from ddpm.editing import redraw

    def draw(numbers: list[int]) -> Any:
        import torch

        predictor, model = source.diffusion.predictor, source.model
        own = torch.tensor(labels if len(labels) > 1 else labels[0], device=source.device)
        own = own.expand(len(numbers), *own.shape)
        ways = predictor(model, own), predictor(model, source.condition(numbers).for_network(model))
        x_0 = source.encode(x).expand(len(numbers), -1, -1, -1)
        strength = 1.0 if config.strength is None else config.strength
        redrawn = redraw(source.sampler, source.diffusion.schedule, ways[0], x_0, ways[1], strength)
        if source.codec is not None:
            return redrawn
        return redrawn.clamp(-1, 1)  # only at the end: clipped predictions would leave the flow

    return Edit(_computing(source, draw), [("input", x)])


def _bound(source: Any, numbers: list[int], x: Any) -> tuple[Any, Any, Any]:
    """Return the denoiser, the noise and the images, or their latents, of samples with these numbers."""
    denoise = source.denoiser(source.condition(numbers))
    return denoise, source.noise(numbers), source.encode(x).expand(len(numbers), -1, -1, -1)


def _computing(source: Any, draw: Callable[[list[int]], Any]) -> Callable[[list[int]], Any]:
    """Wrap `draw` to compute in the source's precision, decode the results, and note their range in `source.range`."""
    from ddpm.runs.precision import computing

    def drawn(numbers: list[int]) -> Any:
        with computing(source.device, source.precision):
            x = source.decode(draw(numbers))
        source.range.note(x)
        return x

    return drawn


def _batches(n: int, batch: int) -> list[list[int]]:
    return [list(range(start, min(start + batch, n))) for start in range(0, n, batch)]


def _shape(config: DictConfig, source: Any) -> tuple[int, int, int]:
    """Return the shape (C, H, W) that the image is resized to: the network's, or that of the measurement."""
    channels, height, width = source.decoded_shape
    if config.operator != "super_resolution":
        return channels, height, width
    if height % config.factor or width % config.factor:
        raise InvalidInput(f"factor={config.factor} does not divide {width}x{height}, the size of the network's images")
    small = config.factor if config.observed else 1
    return channels, height // small, width // small


def _names(config: DictConfig, source: Any, run: Any, trained: DictConfig) -> dict[str, tuple[str, ...]]:
    """Return the names of the values of each label of a network; numbers, if its data cannot be read."""
    from ddpm.data.batch import labels_of

    called = {}
    for (one, several), count in zip(LABELS.items(), labels_of(source.model), strict=False):
        names: tuple[str, ...] = ()
        with contextlib.suppress(InvalidInput):
            names = tuple(label_names(several, config, run, trained))
        called[one] = names if len(names) == count else tuple(map(str, range(count)))
    return called


def _own(config: DictConfig, names: dict[str, tuple[str, ...]], labels: list[int]) -> list[int]:
    """Return the labels that an image is encoded with: the requested ones, else its own."""
    if not names:
        raise InvalidInput("redraw: the network was trained without classes, so there is nothing to redraw an image as")
    if config.from_style is not None and "style" not in names:
        raise InvalidInput(f"from_style={plain(config.from_style)}: the network was trained without styles")
    own = []
    for k, (label, called) in enumerate(names.items()):
        key = f"from_{label}"
        requested = requested_labels(config, partial(names.__getitem__, label), key)
        if requested is None and k >= len(labels):
            raise InvalidInput(f"redraw needs {key}=, the {label} of the image: {', '.join(called)}")
        chosen = labels[k : k + 1] if requested is None else requested
        if len(chosen) != 1 or not 0 <= chosen[0] < len(called):
            raise InvalidInput(f"{key}={plain(config[key])} must be one of the {LABELS[label]}: {', '.join(called)}")
        own += chosen
    return own + labels[len(own) :]


# --- What is written


def _name(config: DictConfig, kind: str) -> str:
    """Return the part of the output's name: image, edit, prompt and seed."""
    image = Path(str(config.image)).stem.replace(":", "")
    value = config[kind] if kind in ("strength", "operator") else kind
    prompt = [] if config.prompt is None else [pipelines.label(config)]
    parts = (image, value, *prompt, config.seed)
    return "_".join(re.sub(r"[^0-9A-Za-z.-]+", "-", str(part)).strip("-")[:40] for part in parts)


def _labels(source: Any, names: dict[str, tuple[str, ...]], n: int) -> list[str]:
    """Return the captions of the results: their numbers if they share their labels, or the labels, or both."""
    each = zip(names.items(), source.labels(range(n)), strict=False)
    labels = [(one, called, y.tolist()) for (one, called), y in each if y is not None]
    if not labels:
        return [f"sample {i}" for i in range(n)]
    headings = ["\n".join(f"{one} {called[y[i]]}" for one, called, y in labels) for i in range(n)]
    several = len(set(headings)) < n
    return [heading + f"\nsample {i}" * several for i, heading in enumerate(headings)]


def _write(
    out: Path, parts: list[tuple[list[int], Any]], before: list[tuple[str, Any]], labels: list[str], mel: Any = None
) -> None:
    """Write the results with their inputs; for sounds, a strip comes with a page that plays them."""
    import torch

    from ddpm.figures import images, plots

    x = torch.cat([part for _, part in parts])
    if out.suffix == ".npy":
        images.save_samples(out, x)
    elif out.suffix == ".wav":
        write_wav(out, mel, x)
    else:
        columns = [*before, *zip(labels, torch.split(x, 1), strict=True)]
        plots.labelled_columns(out, [(label, for_display(mel, column)) for label, column in columns])
        if mel is not None:
            names = [label.replace("\n", ", ") for label, _ in columns]
            everything = torch.cat([column.cpu() for _, column in columns])
            write_page(out.with_suffix(".html"), "A sound, edited", mel, [("Before and after", names, everything)])
            say(f"wrote {out.with_suffix('.html')}")
