"""Safe reading of stored configurations: YAML of plain values alone, bounded in size, from untrusted files."""

from pathlib import Path
from typing import Any

import yaml

from ddpm.runs.files import regular_size

LARGEST_CONFIG = 256 * 1024  # bytes of a file: ours have 2,000, with 10,000 betas 250,000
DEEPEST, MOST, LONGEST = 20, 20_000, 4096  # levels of nesting, values, characters of a value
CADENCE = (  # of the trainer; changes no result
    "log_every", "checkpoint_every", "keep", "keep_every", "previews", "max_skipped", "ema_snapshots",
)  # fmt: skip
MEMORY = ("checkpointing",)  # of the model; changes no result either
MOVED = {"ddpm.trainer.Trainer": "ddpm.training.trainer.Trainer"}  # older `_target_`, still in hashes of runs
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, many times faster, where PyYAML has it


def read_settings(path: Path) -> dict[str, Any]:
    """Read a stored configuration as plain data.

    Raises: ValueError if it is not one, or contains more than plain values; FileNotFoundError.
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
        raise ValueError(f"{path} holds something other than settings")
    return with_moved(settings)


def with_moved(node: Any) -> Any:
    """Return plain data with moved `_target_` replaced by their current names."""
    if isinstance(node, list):
        return [with_moved(value) for value in node]
    if not isinstance(node, dict):
        return node
    moved = {key: with_moved(value) for key, value in node.items()}
    target = moved.get("_target_")
    return moved | {"_target_": MOVED[target]} if isinstance(target, str) and target in MOVED else moved


def must_be_plain(text: str) -> None:
    """Check YAML before it is parsed: aliases multiply, tags construct objects, and ${...} reads other values.

    Raises: ValueError, also for too many, too long or too deep values; yaml.YAMLError for text that is not YAML.
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
        if problems := [what for what, there in found.items() if there]:
            raise ValueError(f"line {event.start_mark.line + 1} has {problems[0]}, and a run's configuration has none")
