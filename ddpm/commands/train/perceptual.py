"""Runs whose loss compares pictures by the features of a network: which one it is, and where its weights come from."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ddpm.commands.console import say
from ddpm.commands.load import untrained_judge
from ddpm.config import InvalidInput, build, conf_dir, plain, resolved

PERCEPTUAL = "perceptual"  # the part of the loss, the frozen network, the group that chooses it, the parent of the run
KEY = f"task.parts.{PERCEPTUAL}"
PUBLISHED = "models.lpips.load_lpips"  # what has weights from the beginning; all others are classifiers to be trained
JUDGES = "judges"  # of the folder of all runs: where evaluation keeps its classifiers too
ELSE = f"; give published weights of LPIPS, {PERCEPTUAL}=lpips {PERCEPTUAL}.files=[FEATURES,CHANNELS], or set {KEY}=0"


def chosen(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The network that a resolved configuration chooses to compare pictures by; without a choice it is the classifier.

    Its files are named from the root on: a run may go on from elsewhere.
    """
    network = settings.get(PERCEPTUAL)
    if not isinstance(network, dict):
        return dict(plain(OmegaConf.load(conf_dir() / PERCEPTUAL / "classifier.yaml")))
    files = network.get("files")
    if isinstance(files, list) and all(isinstance(file, str) for file in files):
        return network | {"files": [os.path.abspath(file) for file in files]}
    return dict(network)


def is_asked_for(settings: Mapping[str, Any]) -> bool:
    """Whether the loss of a resolved configuration has the part."""
    task = settings.get("task")
    parts = task.get("parts") if isinstance(task, dict) else None
    return isinstance(parts, dict) and bool(parts.get(PERCEPTUAL))


def fill(config: DictConfig, settings: dict[str, Any]) -> None:
    """Write the network that a run compares by into its configuration, and into the same as plain data."""
    if is_asked_for(settings):
        settings[PERCEPTUAL] = chosen(settings)
        OmegaConf.update(config, PERCEPTUAL, settings[PERCEPTUAL], merge=False, force_add=True)


def distance_of(config: DictConfig, trust: list[str], data: Any, on: str = "cpu") -> Any:
    """The perceptual distance of a run, a `Perceptual`: of published weights, or of a classifier that has none yet.

    Args:
        on: where the classifier is made; on "meta" it has no weights.
    Raises: InvalidInput for a network that cannot be built, or that takes no such pictures, and for data without labels
        where they are needed.
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
            with torch.random.fork_rng([]), torch.device(on):  # what the run draws itself is not changed by it
                classifier = untrained_judge(network, PERCEPTUAL, data.original, trust)
            distance = Perceptual(classifier)
        distance.must_take(data.shape)
    except (ValueError, AttributeError) as error:  # the latter of a network without maps
        raise InvalidInput(f"{KEY}: {error}") from error
    return distance


def learned(
    task: Any, config: DictConfig, trust: list[str], data: Any, runs: Path, device: Any, learning: bool = True
) -> tuple[dict[str, str], str | None]:
    """Give the distance of a task its weights: those of a classifier are trained, once for the data, and kept.

    Args:
        runs: the folder of all runs.
        device: where a classifier is trained.
        learning: whether it is, if it must be.
    Returns: what the run has of it among its parents; and, where it was not trained, that in words.
    Raises: InvalidInput for data of one class, and for weights that cannot be read or kept.
    """
    from ddpm.training.task import checksum

    distance = task.frozen[PERCEPTUAL]
    if not learning and not _is_at_hand(config, data, distance, runs):
        return {}, "its name is known when the classifier that pictures are compared by is trained, which comes first"
    _learn(config, trust, data, distance, runs, device)
    return {PERCEPTUAL: checksum(distance)}, None


def parents_of(
    config: DictConfig, trust: list[str], data: Any, runs: Path, device: Any = None
) -> dict[str, str] | None:
    """What a run has of such a network among its parents, without its task; None where that is not known.

    Args:
        runs: the folder of all runs.
        device: where a classifier is trained, if it must be; None if it is not to be.
    """
    from ddpm.training.task import checksum

    if not is_asked_for(resolved(config)):
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
    """Whether the weights of a distance are published, or were trained before."""
    from ddpm.metrics import quality

    published = chosen(resolved(config)).get("_target_") == PUBLISHED
    return published or quality.judge_path(data.original, distance.network, runs / JUDGES).exists()


def _learn(config: DictConfig, trust: list[str], data: Any, distance: Any, runs: Path, device: Any) -> None:
    """Give a distance its weights; InvalidInput as `learned`."""
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
