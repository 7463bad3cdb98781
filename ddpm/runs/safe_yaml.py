"""Stored configurations: YAML that says values and nothing else, within bounds, whoever wrote it."""

from pathlib import Path
from typing import Any

import yaml

from ddpm.runs.files import regular_size

LARGEST_CONFIG = 256 * 1024  # bytes of a stored one: those that we write have 2,000, with 10,000 betas 250,000
DEEPEST, MOST, LONGEST = 20, 20_000, 4096  # levels of it, values in it, characters of a value
CADENCE = (  # of the trainer; changes no result
    "log_every", "checkpoint_every", "keep", "keep_every", "previews", "max_skipped", "ema_snapshots",
)  # fmt: skip
MEMORY = ("checkpointing",)  # of the model; neither does it
MOVED = {"ddpm.trainer.Trainer": "ddpm.training.trainer.Trainer"}  # older `_target_`, which names of runs still hold
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, many times faster, where PyYAML has it


def read_settings(path: Path) -> dict[str, Any]:
    """A stored configuration as plain data.

    Raises: ValueError if it is none, or says more than values; FileNotFoundError.
    """
    size = regular_size(path, LARGEST_CONFIG)
    with open(path, "rb") as file:
        content = file.read(size)
    try:
        text = content.decode()
        must_be_plain(text)
        settings = LOADER(text).get_single_data()
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as a configuration: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds other than settings")
    return with_moved(settings)


def with_moved(node: Any) -> Any:
    """Plain data whose `_target_` are where they are now."""
    if isinstance(node, list):
        return [with_moved(value) for value in node]
    if not isinstance(node, dict):
        return node
    moved = {key: with_moved(value) for key, value in node.items()}
    target = moved.get("_target_")
    return moved | {"_target_": MOVED[target]} if isinstance(target, str) and target in MOVED else moved


def must_be_plain(text: str) -> None:
    """Look through YAML before anything is made of it: an alias multiplies, a tag constructs, a ${...} reads.

    Raises: ValueError, or yaml.YAMLError for what is no YAML.
    """
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=LOADER)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        value = event.value if isinstance(event, yaml.ScalarEvent) else ""
        found = {
            "an alias or an anchor": getattr(event, "anchor", None) is not None,
            "a tag": getattr(event, "tag", None) is not None,
            "an interpolation": "${" in value,
            "a merge key": value == "<<",
            f"a value of more than {LONGEST:,} characters": len(value) > LONGEST,
            f"more than {DEEPEST} levels": depth > DEEPEST,
            f"more than {MOST:,} values": count > MOST,
        }
        if said := [what for what, there in found.items() if there]:
            raise ValueError(f"line {event.start_mark.line + 1} has {said[0]}, and a run's configuration has none")
