"""Reading of a study: run directories grouped into arms, with differing settings and labels."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ddpm.runs.directory import DONE, STATES, Run, read_metrics
from ddpm.runs.files import is_number, shortened
from ddpm.runs.results import recorded
from ddpm.runs.safe_yaml import CADENCE, MEMORY, read_settings

NO_SCIENCE = {
    "runs", "study", "device", "trust", "slots", "retry", "compile", "graph", "evaluation", "question",
    "baseline", "recognition", "data.root", "data.download", *(f"trainer.{key}" for key in CADENCE),
    *(f"model.{key}" for key in MEMORY),
}  # fmt: skip
"""Keys that change no result, and so do not distinguish arms."""
MISSING = "(absent)"  # a key that an arm does not have
Science = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Recorded:
    """The content of a run directory."""

    path: Path
    settings: dict[str, Any]  # config.yaml
    status: dict[str, Any]  # status.json; a RUNNING run whose lock is free is INTERRUPTED
    evaluation: dict[str, dict[str, Any]]  # evaluation.json
    science: dict[str, Any]  # settings that the result depends on, without the seed

    @property
    def state(self) -> str:
        return str(self.status["state"])

    @property
    def done(self) -> bool:
        return self.state == DONE

    @property
    def seed(self) -> int | None:
        """The seed in its configuration, or on its command line if it has none."""
        typed = [word.partition("=")[2] for word in self.typed if _key(word) == "seed"]
        seed = self.settings.get("seed", int(typed[-1]) if typed and typed[-1].isdecimal() else None)
        return seed if isinstance(seed, int) else None

    @property
    def typed(self) -> list[str]:
        """All command-line overrides of the run."""
        return self.status.get("overrides") or []

    @property
    def words(self) -> list[str]:
        """The command-line overrides that change results, without the seed."""
        return [
            word for word in self.typed if not (_key(word) in NO_SCIENCE | {"seed"} or _key(word).startswith("hydra"))
        ]

    @property
    def unmeasured(self) -> list[str]:
        """The lines of `evaluation` that a finished run has not carried out."""
        lines, done = self.settings.get("evaluation") or [], self.status.get("evaluated") or []
        by_other_lines = not set(done) <= set(lines)  # of a later command, which config.yaml does not have
        return [line for line in lines if line not in done] if self.done and not by_other_lines else []

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.path)


@dataclass(frozen=True)
class ArmRuns:
    """The runs of an arm, which differ only in the seed."""

    label: str
    differs: Mapping[str, str]  # key of the configuration -> value, of the keys that differ between arms
    levels: Mapping[str, str]  # factor -> level: the same, or the files of conf/ablation where these form a grid
    runs: tuple[Recorded, ...]

    @property
    def done(self) -> dict[int, Recorded]:
        """Seed -> finished run, ordered by seed; of two with the same seed, the one that ended last."""
        ended = sorted((run for run in self.runs if run.done), key=lambda run: str(run.status.get("ended")))
        last = {run.seed: run for run in ended if run.seed is not None}
        return dict(sorted(last.items()))

    @property
    def first(self) -> Recorded:
        return next(iter(self.done.values()), self.runs[0])


def run_directories(folder: Path) -> list[Path]:
    """Return the run directories in a study's folder, at any depth.

    Raises: ValueError if there is none.
    """
    folders = sorted(path.parent for path in folder.rglob("status.json")) if folder.is_dir() else []
    if not folders:
        raise ValueError(
            f"{folder} holds no runs; a study is the folder RUNS/STUDY that training makes, such as runs/default"
        )
    return folders


def read(folder: Path, science: Science) -> tuple[list[Recorded], list[str]]:
    """Read all runs of a study; return them, and a message on each that cannot be read.

    Args:
        science: selects from a configuration the settings that the result depends on.
    Raises: ValueError if there are no runs.
    """
    records, unread = [], []
    for path in run_directories(folder):
        try:
            status = Run(path).status()
            if not status:
                raise ValueError("its status.json cannot be read")
            _must_be_of_a_run(status)
            settings = read_settings(path / "config.yaml") if (path / "config.yaml").exists() else {}
            if settings:
                _must_be_of_a_task(settings)
            evaluation, problems = _evaluation(path)
            records.append(Recorded(path, settings, status, evaluation, _without_seed(science, settings)))
            unread += [f"{path.name}: {problem}" for problem in problems]
        except (ValueError, OSError) as error:
            unread.append(f"{path.name}: {error}")
    return records, unread


def arms_of(runs: Iterable[Recorded]) -> list[ArmRuns]:
    """Group runs into arms, ordered by their first start, with labels and levels."""
    groups: dict[str, list[Recorded]] = {}
    for run in sorted(runs, key=_first_begun):
        key = json.dumps(run.science or ["no config.yaml", *(run.words or [run.path.name])], sort_keys=True)
        groups.setdefault(key, []).append(run)
    arms = list(groups.values())
    differs = _levels([arm[0].science for arm in arms])
    own = _own([arm[0].words for arm in arms])
    grid = iter(_grid_of_files([words for words, arm in zip(own, arms, strict=True) if arm[0].science]))
    levels = [next(grid, level) if arm[0].science else level for level, arm in zip(differs, arms, strict=True)]
    labels = _labels(own, differs)
    return [
        ArmRuns(label, own_keys, level, tuple(arm))
        for label, own_keys, level, arm in zip(labels, differs, levels, arms, strict=True)
    ]


def _first_begun(run: Recorded) -> tuple[str, int, str]:
    """Return the sort key of a run: when it first began, then its place in the sweep."""
    begun = next((run.status[key] for key in ("begun", "started", "ended") if run.status.get(key)), "")
    job = run.status.get("job")
    return str(begun), job if isinstance(job, int) else 0, str(run.path)


# ------------------------------------------------------------------------------------------------ differing settings


def _evaluation(path: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return the valid results of a run's evaluation.json, and messages on invalid ones."""
    try:
        known = recorded(path / "evaluation.json")
    except ValueError as error:
        return {}, [f"{error}; it is left out"]
    sound = {name: result for name, result in known.items() if _is_result(result)}
    wrong = ", ".join(name for name in known if name not in sound)
    return sound, [f"evaluation.json: {wrong}: no results, which are left out"] if wrong else []


def _is_result(result: dict[str, Any]) -> bool:
    numbers = [result.get(key) for key in ("value", "low", "high", "real_vs_real")]
    for key in ("log_snr", "eps", "value_log_snr"):
        line = result.get(key)
        if line is not None and not isinstance(line, list):
            return False
        numbers += line or []
    return all(value is None or is_number(value) for value in numbers)


def _must_be_of_a_run(status: dict[str, Any]) -> None:
    """Raise ValueError if a status has overrides, data or a state of the wrong type."""
    words, data = status.get("overrides") or [], status.get("data") or {}
    sound = isinstance(words, list) and all(isinstance(word, str) for word in words) and isinstance(data, dict)
    if not sound or (data and not (type(data.get("count")) is int and isinstance(data.get("image_size", []), list))):
        raise ValueError("its status.json is not that of a run")
    if status["state"] not in STATES:
        raise ValueError(f"its state {shortened(str(status['state']))} is none of {', '.join(STATES)}")


def _must_be_of_a_task(settings: dict[str, Any]) -> None:
    """Raise ValueError if a group of a configuration is not a mapping, or the image size is invalid."""
    of_task = [] if isinstance(settings.get("task"), dict) else ["model", "schedule", "diffusion"]
    for group in ("data", *of_task, "optimizer", "trainer"):
        if not isinstance(settings.get(group), dict):
            raise ValueError(f"the {group} of its config.yaml are no settings")
    size = settings["data"].get("image_size", 1)
    if not (type(size) is int or (isinstance(size, list) and len(size) == 2 and all(type(n) is int for n in size))):
        raise ValueError(f"its config.yaml has data.image_size = {shortened(str(size))}")


def _without_seed(science: Science, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that identify a run's arm: all that its result depends on, without the seed.

    Raises: ValueError for settings that are not those of a run.
    """
    if not settings:
        return {}
    try:
        facts = {key: value for key, value in science(settings).items() if key != "seed"}
        json.dumps(facts, sort_keys=True)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its config.yaml is not that of a run ({type(error).__name__}: {error})") from error
    return facts


def _levels(sciences: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Return factor -> level of every arm, for the settings that differ between arms.

    Where a group is built by different functions, such as schedules, the group is one factor, and its level names the
    function and the arguments in which arms of the same function differ. Arms without a configuration have none.
    """
    if not all(sciences):
        of_known = iter(_levels([science for science in sciences if science]))
        return [next(of_known) if science else {} for science in sciences]
    groups = sorted({group for science in sciences for group in science})
    levels: list[dict[str, str]] = [{} for _ in sciences]
    for group in groups:
        values = [_flat(science.get(group)) for science in sciences]
        makers = [value.get("_target_", "") for value in values]
        if len(set(makers)) > 1:
            for level, value, maker in zip(levels, values, makers, strict=True):
                alike = [other for other in values if other.get("_target_", "") == maker]
                arguments = [f"{key}={_short(value.get(key))}" for key in _differing(alike) if key in value]
                level[group] = " ".join([str(maker).rpartition(".")[2] or MISSING, *arguments])
            continue
        for key in _differing(values):
            for level, value in zip(levels, values, strict=True):
                level[f"{group}.{key}" if key else group] = _short(value[key]) if key in value else MISSING
    return [_with_short_keys(level) for level in levels]


def _grid_of_files(own: Sequence[list[str]]) -> list[dict[str, str]]:
    """Return factor -> typed level of every arm where files of conf/ablation and other words form a full grid, else [].

    Such a file sets several keys, which on their own would not form a grid.
    """
    arms = [{_key(word): word.partition("=")[2] for word in words} for words in own]
    keys = list(dict.fromkeys(key for arm in arms for key in arm))
    cells = {tuple(arm.get(key) for key in keys) for arm in arms}
    full = len(cells) == len(arms) == math.prod(len(set(levels)) for levels in zip(*cells, strict=True))
    if len(keys) < 2 or not any("/" in key for key in keys) or not full or any(None in cell for cell in cells):
        return []
    return [_with_short_keys({key.replace("/", "."): arm[key] for key in keys}) for arm in arms]


def _differing(values: Sequence[dict[str, Any]]) -> list[str]:
    """Return the keys whose values are not all equal."""
    keys = dict.fromkeys(key for value in values for key in value)
    return [key for key in keys if len({json.dumps(value.get(key, MISSING)) for value in values}) > 1]


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to dotted key -> value; lists are values."""
    if not isinstance(node, dict):
        return {prefix: node}
    return {
        key: value for k, v in node.items() for key, value in _flat(v, f"{prefix}.{k}" if prefix else str(k)).items()
    }


def _with_short_keys(level: dict[str, str]) -> dict[str, str]:
    """Shorten factors to the last part of their key, where that is unique."""
    last = Counter(key.rpartition(".")[2] for key in level)
    return {(short if last[short := key.rpartition(".")[2]] == 1 else key): value for key, value in level.items()}


def _short(value: Any) -> str:
    """Format a level: 1e-05 and 0.002, [8, 4] and lower-case true."""
    if isinstance(value, float):
        return f"{value:g}"
    return shortened(value if isinstance(value, str) else json.dumps(value), longest=60)


# --------------------------------------------------------------------------------------------------------------- labels


def _own(typed: Sequence[list[str]]) -> list[list[str]]:
    """Return the words that were typed for each arm but not for all."""
    alike = set.intersection(*map(set, typed)) if typed else set()
    return [[word for word in words if word not in alike] for words in typed]


def _labels(own: Sequence[list[str]], levels: Sequence[dict[str, str]]) -> list[str]:
    """Return a label for every arm: its own typed words, or the differing settings where these are not unique."""
    by_words = [_by_words(words, len({_key(word) for words in own for word in words}) == 1) for words in own]
    by_levels = [", ".join(f"{factor}={level}" for factor, level in level.items()) for level in levels]
    for labels in (by_words, by_levels):
        if all(labels) and len(set(labels)) == len(labels):
            return labels
    if len(own) == 1:
        return ["the run"]
    return [f"{label or 'arm'} ({number})" for number, label in enumerate(by_levels, 1)]


def _by_words(words: list[str], single: bool) -> str:
    """Format typed words as a label; for a single key, or a file of conf/ablation, the value alone."""
    parts = []
    for word in words:
        key, _, value = word.partition("=")
        name = _key(word).rpartition(".")[2]
        parts.append(value if "ablation" in key or (single and "/" in key) else f"{name}={value}")
    return ", ".join(parts)


def _key(word: str) -> str:
    """Return the key of a word on the command line."""
    return re.sub(r"^[+~]*", "", word).partition("=")[0].partition("@")[0]
