"""The perceptual loss of a run: its network, and where the weights come from."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ddpm.commands.console import say
from ddpm.commands.load import untrained_judge
from ddpm.config import InvalidInput, build, conf_dir, plain, resolved

PERCEPTUAL = "perceptual"  # name of the part of the loss, of the frozen network, of its group, and of the parent
KEY = f"task.parts.{PERCEPTUAL}"
PUBLISHED = "models.lpips.load_lpips"  # the only network with published weights; others are classifiers to be trained
JUDGES = "judges"  # subfolder of the folder of all runs: classifiers, those of evaluation too
ELSE = f"; give published weights of LPIPS, {PERCEPTUAL}=lpips {PERCEPTUAL}.files=[FEATURES,CHANNELS], or set {KEY}=0"


def chosen(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the perceptual network in a resolved configuration; the default is the classifier.

    Paths of its files are absolute, for a run may be resumed from another folder.
    """
    network = settings.get(PERCEPTUAL)
    if not isinstance(network, dict):
        return dict(plain(OmegaConf.load(conf_dir() / PERCEPTUAL / "classifier.yaml")))
    files = network.get("files")
    if isinstance(files, list) and all(isinstance(file, str) for file in files):
        return network | {"files": [os.path.abspath(file) for file in files]}
    return dict(network)


def is_requested(settings: Mapping[str, Any]) -> bool:
    """Whether the loss of a resolved configuration has a perceptual part."""
    task = settings.get("task")
    parts = task.get("parts") if isinstance(task, dict) else None
    return isinstance(parts, dict) and bool(parts.get(PERCEPTUAL))


def fill(config: DictConfig, settings: dict[str, Any]) -> None:
    """Write the perceptual network of a run into its configuration, and into the resolved settings."""
    if is_requested(settings):
        settings[PERCEPTUAL] = chosen(settings)
        OmegaConf.update(config, PERCEPTUAL, settings[PERCEPTUAL], merge=False, force_add=True)


def distance_of(config: DictConfig, trust: list[str], data: Any, on: str = "cpu") -> Any:
    """Build the `Perceptual` distance of a run: with published weights, or with a classifier that is not trained yet.

    Args:
        on: device of the classifier; on "meta" it has no weights.
    Raises: InvalidInput for a network that cannot be built, or does not take such pictures, and for data without
        labels if it is a classifier.
    """
    import torch

    from ddpm.latent.perceptual import Perceptual

    network = chosen(resolved(config))
    try:
        if network.get("_target_") == PUBLISHED:
            distance = Perceptual(*build(network, PERCEPTUAL, trust))
        else:
            if data.original.labels is None:
                raise ValueError(f"{data.name} has no labels, by which the classifier is trained{ELSE}")
            with torch.random.fork_rng([]), torch.device(on):  # leaves the run's own random draws unchanged
                classifier = untrained_judge(network, PERCEPTUAL, data.original, trust)
            distance = Perceptual(classifier)
        distance.must_take(data.shape)
    except (ValueError, AttributeError) as error:  # AttributeError for a network without feature maps
        raise InvalidInput(f"{KEY}: {error}") from error
    return distance


def learned(
    task: Any, config: DictConfig, trust: list[str], data: Any, runs: Path, device: Any, learning: bool = True
) -> tuple[dict[str, str], str | None]:
    """Load the weights of a task's perceptual distance; a classifier is trained once for the data, and stored.

    Args:
        runs: the folder of all runs.
        device: where a classifier is trained.
        learning: whether it may be trained.
    Returns: its checksum by parent name, or {} and a note if it would have to be trained first.
    Raises: InvalidInput for data of one class, and for weights that cannot be read or stored.
    """
    from ddpm.training.task import checksum

    distance = task.frozen[PERCEPTUAL]
    if not learning and not _is_at_hand(config, data, distance, runs):
        return {}, "its name is known once the classifier that compares pictures is trained, which happens first"
    _learn(config, trust, data, distance, runs, device)
    return {PERCEPTUAL: checksum(distance)}, None


def parents_of(
    config: DictConfig, trust: list[str], data: Any, runs: Path, device: Any = None
) -> dict[str, str] | None:
    """Return the checksum of the perceptual network by parent name, without building the task; None if it is not known.

    Args:
        runs: the folder of all runs.
        device: where a classifier is trained if needed; None if it must not be trained.
    """
    from ddpm.training.task import checksum

    if not is_requested(resolved(config)):
        return {}
    try:
        distance = distance_of(config, trust, data)
        if device is None and not _is_at_hand(config, data, distance, runs):
            return None
        _learn(config, trust, data, distance, runs, device)
    except InvalidInput:
        return None
    return {PERCEPTUAL: checksum(distance)}


def _is_at_hand(config: DictConfig, data: Any, distance: Any, runs: Path) -> bool:
    """Whether the weights of a distance are published, or stored already."""
    from ddpm.metrics import quality

    published = chosen(resolved(config)).get("_target_") == PUBLISHED
    return published or quality.judge_path(data.original, distance.network, runs / JUDGES).exists()


def _learn(config: DictConfig, trust: list[str], data: Any, distance: Any, runs: Path, device: Any) -> None:
    """Load the weights of a distance, and train the classifier first if needed; raise InvalidInput as `learned`."""
    import torch

    from ddpm.metrics import quality
    from ddpm.runs import checkpoint

    network, original = chosen(resolved(config)), data.original
    if network.get("_target_") == PUBLISHED:
        return
    if not quality.has_classes(original):
        raise InvalidInput(f"{KEY}: {data.name} has one class, and a classifier needs several to tell apart{ELSE}")
    try:
        with torch.random.fork_rng([]):
            classifier = untrained_judge(network, PERCEPTUAL, original, trust)
        file = quality.trained_judge(original, classifier, runs / JUDGES, device or "cpu", say)
        checkpoint.load_into(distance.network, file)
    except (ValueError, OSError) as error:
        raise InvalidInput(f"{KEY}: {error}") from error
