"""Evaluation results of a run: evaluation.json, by protocol."""

import json
from pathlib import Path
from typing import Any

from filelock import FileLock

from ddpm.runs.files import read_json, replacing

SETTINGS = ("weights", "checkpoint", "precision", "sampler", "sampler_settings", "guidance")
"""Keys that, with the seeds, distinguish results of one protocol."""
MOST_BEFORE = 50  # earlier results of one protocol that are stored


def record(folder: Path, protocol: str, values: dict[str, Any]) -> None:
    """Add a result to the run's evaluation.json, next to those of other protocols.

    An earlier result of the same protocol with other settings, such as another sampler or other weights, moves to the
    list `before`. A file that is no valid evaluation.json is renamed to evaluation.damaged.json.
    """
    path = folder / "evaluation.json"
    with FileLock(folder / "evaluation.lock"):
        try:
            known = recorded(path)
            text = json.dumps(known | {protocol: values | _before(known.get(protocol), values)}, indent=1)
        except (ValueError, RecursionError) as error:
            aside = path.with_name("evaluation.damaged.json")
            path.replace(aside)
            print(f"{error}; it was renamed to {aside}")
            text = json.dumps({protocol: values}, indent=1)
        with replacing(path) as temporary:
            temporary.write_text(text)


def earlier(known: dict[str, Any], protocol: str) -> list[dict[str, Any]]:
    """Return the results of a protocol under all settings, the last one first."""
    last = known.get(protocol, {})
    before = last.get("before")
    others = before if isinstance(before, list) else []
    return [last, *(values for values in others if isinstance(values, dict))] if last else []


def _before(last: dict[str, Any] | None, values: dict[str, Any]) -> dict[str, Any]:
    """Return {"before": earlier results that a new one does not replace}, or {}."""
    found = []
    for old in earlier({"": last or {}}, ""):
        same = all(old.get(key) == values.get(key) for key in SETTINGS)
        fewer = set(map(str, old.get("seeds") or [])) <= set(map(str, values.get("seeds") or []))
        alike = "cells" not in values or old.get("seeds") == values.get("seeds")  # else its cells are in the new one's
        if not (same and fewer and alike):
            found.append({key: value for key, value in old.items() if key != "before"})
    return {"before": found[:MOST_BEFORE]} if found else {}


def recorded(path: Path) -> dict[str, Any]:
    """Read evaluation.json as protocol -> result; ValueError if it contains anything else."""
    known = read_json(path) if path.exists() else {}
    if not isinstance(known, dict) or not all(isinstance(values, dict) for values in known.values()):
        raise ValueError(f"{path} holds something other than results")
    return known
