"""Sources of samples: a run's network bound to its weights, sampler, guidance, labels and seed."""

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ddpm.commands.console import how_walked, say
from ddpm.commands.load import (
    LABELS,
    by_default,
    data_of,
    guidance_of,
    has,
    label_names,
    load_into,
    open_run,
    put_average,
    requested_labels,
    sampler_of,
    task_of,
)
from ddpm.commands.sample import pipelines
from ddpm.commands.train.codec import FOLDER, stored_in
from ddpm.commands.train.words import prompts_of
from ddpm.commands.validate import must_be_drawable, trusted, width_of_average
from ddpm.config import InvalidInput, build_group, plain, read_config, resolve_device


def source_of(config: DictConfig, to_draw: bool = True) -> tuple[Any, Any, DictConfig, int]:
    """Open the source of samples that `run=` names: (source, run, the run's configuration, step of the checkpoint).

    Or the one that `pipeline=` names in place of a run, see `ddpm.commands.sample.pipelines`.

    Args:
        to_draw: refuse runs that draw no samples.
    """
    from ddpm.data.batch import takes
    from ddpm.training.task import shape_of

    if pipelines.is_requested(config):
        source, drawn = pipelines.source_of(config)
        return source, drawn, OmegaConf.create(), 0
    must_be_drawable(config)
    device = resolve_device(config.device)
    run, folder = open_run(str(config.run), config.checkpoint)
    trained, trust = read_config(run.path / "config.yaml"), trusted(config)
    if not has(trained, "model", "diffusion"):
        source = _source_of_task(config, run, folder, trained, device, to_draw)
        return _finished(source, config, run, trained), run, trained, int(folder.name)
    model, diffusion = (build_group(trained, group, trust) for group in ("model", "diffusion"))
    load_into(model, folder / ("model.safetensors" if config.weights == "raw" else "ema.safetensors"))
    if (width := width_of_average(config)) is not None:
        put_average(model, run, folder, width)
    prompts, negative = (prompts_of(config, run.path, key, say) for key in ("prompt", "negative"))
    of_data = "image" in takes(model) or ("tokens" in takes(model) and prompts is None)
    drawing = {
        "precision": _precision_of(config, run, device),
        "data": data_of(config, trained) if of_data else None,
        "prompts": prompts,
        "negative": negative,
    }
    names = partial(label_names, config=config, run=run, trained=trained)
    source = drawn_by_sampler(config, trained, diffusion, model, shape_of(model) or (), device, names, **drawing)
    return _finished(source, config, run, trained), run, trained, int(folder.name)


def drawn_by_sampler(
    config: DictConfig,
    trained: DictConfig,
    diffusion: Any,
    model: Any,
    shape: tuple[int, ...],
    device: Any,
    names: Callable[[str], Any],
    **drawing: Any,
) -> Any:
    """Build the source that draws from a diffusion network with the requested sampler, guidance and labels.

    Args:
        config: of the command.
        trained: the run's configuration.
        diffusion, model, shape, device: as `TrainedSampler` takes them.
        names: "classes" or "styles" -> their names, called if a label is requested by name.
        drawing: other arguments of `TrainedSampler`.
    Raises: InvalidInput for requests that the network cannot meet.
    """
    from ddpm.data.batch import classes_of, labels_of
    from ddpm.sources.trained import TrainedSampler

    trust = trusted(config)
    sampler, guidance = sampler_of(config, trained, trust), guidance_of(config, trust, device)
    if classes_of(model) is None and guidance.num_classes is None and config["class"] is not None:
        raise InvalidInput(f"class={plain(config['class'])}: the network was trained without classes")
    if len(labels_of(model)) < 2 and config.style is not None:
        raise InvalidInput(
            f"style={plain(config.style)}: the network was trained without styles; train one with data=devanagari "
            "data.labels=[class,style] model.num_classes=[46,FONTS]"
        )
    requested, styles = (requested_labels(config, partial(names, several), key) for key, several in LABELS.items())
    if drawing.get("negative") is not None and type(guidance).__name__ != "ClassifierFree":
        raise InvalidInput("negative= is what guidance=classifier_free leads away from; give that guidance, too")
    drawing |= {"requested": requested, "styles": styles, "guidance": guidance}
    try:
        return TrainedSampler(diffusion, model, sampler, shape, config.seed, device, **drawing)
    except ValueError as error:
        raise InvalidInput(str(error)) from error


def how_drawn_from(source: Any, run: Any, step: int, config: DictConfig, evaluations: int | None = None) -> str:
    """Return the terminal line that names the run or pipeline, and the sampler."""
    if isinstance(run, pipelines.Drawn):
        return pipelines.how_prompted(source, run, config, evaluations)
    return how_walked(source, run, step, config, evaluations)


def _finished(source: Any, config: DictConfig, run: Any, trained: DictConfig) -> Any:
    """Return the source at the requested temperature, decoded by the codec in the run's folder, if there is one."""
    if (temperature := config.get("temperature", 1.0)) != 1.0:
        if not hasattr(source, "at"):
            raise InvalidInput(f"temperature={temperature} is for runs that draw code by code; leave temperature out")
        try:
            source = source.at(temperature)
        except ValueError as error:
            raise InvalidInput(str(error)) from error
    if trained.get("init_codec") is None:
        return source
    return source.decoded_by(stored_in(run.path / FOLDER, trusted(config)).codec)


def _source_of_task(config: DictConfig, run: Any, folder: Path, trained: DictConfig, device: Any, to_draw: bool) -> Any:
    """Build the source of a run that draws without a sampler, such as a variational autoencoder."""
    from ddpm.runs import checkpoint

    if width_of_average(config) is not None:
        raise InvalidInput(
            f"run={config.run} weights={config.weights}: only diffusion runs have such averages; allowed: ema, raw"
        )
    task = task_of(trained, trusted(config))
    for name, file in checkpoint.weights_of(folder, averaged=config.weights == "ema").items():
        load_into(task.modules[name], file)
    must_draw_itself(config, task)
    requested = requested_labels(config, partial(label_names, "classes", config, run, trained))
    try:
        data = data_of(config, trained) if task.draws_of_data else None
        source = task.to(device).source(data, config.seed, device, _precision_of(config, run, device), requested)
    except ValueError as error:
        raise InvalidInput(str(error)) from error
    if source is None:
        raise InvalidInput(f"run={config.run}: {type(task).__name__} trained no network that a sampler draws from")
    if to_draw and not source.draws:
        raise InvalidInput(f"run={config.run}: {type(task).__name__} draws no samples; {task.instead}")
    return source


def must_draw_itself(config: DictConfig, task: Any) -> None:
    """Raise InvalidInput for diffusion settings of a task that draws without a sampler."""
    if isinstance(config.sampler, DictConfig) and plain(config.sampler) != by_default():
        raise InvalidInput(f"sampler: {type(task).__name__} draws no samples by a sampler; leave sampler out")
    if config.get("style") is not None:
        raise InvalidInput(f"style={plain(config.style)}: {type(task).__name__} is not conditioned on styles")
    guidance = config.get("guidance")
    if isinstance(guidance, DictConfig) and not str(guidance.get("_target_")).endswith(".Guidance"):
        raise InvalidInput(f"guidance is for diffusion only, not for {type(task).__name__}; leave guidance out")


def _precision_of(config: DictConfig, run: Any, device: Any) -> str:
    """Return the precision for sampling: the requested one, or for "auto" that of the training."""
    from ddpm.runs.precision import PRECISIONS, as_trained

    precision = config.precision
    if precision == "auto":
        with contextlib.suppress(ValueError):  # a newer version's status; its weights may be readable
            precision = run.status().get("precision")
        precision = as_trained(precision if precision in tuple(PRECISIONS) else "fp32", device)
    return str(precision)
