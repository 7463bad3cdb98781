"""Run directories as arms of a study: what is read, what differs, and what each arm is called."""

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
"""Keys that change no result, and so tell no arms apart."""
MISSING = "(absent)"  # a key that an arm does not have
Science = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Recorded:
    """A run directory, read."""

    path: Path
    settings: dict[str, Any]  # config.yaml
    status: dict[str, Any]  # status.json; a RUNNING run that nobody holds is INTERRUPTED
    evaluation: dict[str, dict[str, Any]]  # evaluation.json
    science: dict[str, Any]  # what the result depends on, without the seed

    @property
    def state(self) -> str:
        return str(self.status["state"])

    @property
    def done(self) -> bool:
        return self.state == DONE

    @property
    def seed(self) -> int | None:
        """Of its configuration; of a run that has none, what was typed."""
        typed = [word.partition("=")[2] for word in self.typed if _key(word) == "seed"]
        seed = self.settings.get("seed", int(typed[-1]) if typed and typed[-1].isdecimal() else None)
        return seed if isinstance(seed, int) else None

    @property
    def typed(self) -> list[str]:
        """All words that were typed for it."""
        return self.status.get("overrides") or []

    @property
    def words(self) -> list[str]:
        """What was typed for it, as far as it changes results, without the seed."""
        return [
            word for word in self.typed if not (_key(word) in NO_SCIENCE | {"seed"} or _key(word).startswith("hydra"))
        ]

    @property
    def unmeasured(self) -> list[str]:
        """Of a run that is done, the lines of `evaluation` that were not carried out."""
        lines, done = self.settings.get("evaluation") or [], self.status.get("evaluated") or []
        asked_anew = not set(done) <= set(lines)  # by another command, whose lines config.yaml does not have
        return [line for line in lines if line not in done] if self.done and not asked_anew else []

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.path)


@dataclass(frozen=True)
class ArmRuns:
    """The runs of an arm, which differ in the seed alone."""

    label: str
    differs: Mapping[str, str]  # key of the configuration -> value, of what differs between arms
    levels: Mapping[str, str]  # factor -> level: the same, or of a grid with files of conf/ablation those
    runs: tuple[Recorded, ...]

    @property
    def done(self) -> dict[int, Recorded]:
        """Seed -> run, of those that are done, by seed; of two with one seed, the last that ended."""
        ended = sorted((run for run in self.runs if run.done), key=lambda run: str(run.status.get("ended")))
        last = {run.seed: run for run in ended if run.seed is not None}
        return dict(sorted(last.items()))

    @property
    def first(self) -> Recorded:
        return next(iter(self.done.values()), self.runs[0])


def run_directories(folder: Path) -> list[Path]:
    """The run directories in a study's folder, at any depth.

    Raises: ValueError if there is none.
    """
    folders = sorted(path.parent for path in folder.rglob("status.json")) if folder.is_dir() else []
    if not folders:
        raise ValueError(
            f"{folder} holds no runs; a study is the folder RUNS/STUDY that training makes, such as runs/default"
        )
    return folders


def read(folder: Path, science: Science) -> tuple[list[Recorded], list[str]]:
    """All runs of a study, and a line on each that cannot be read.

    Args:
        science: picks of a configuration what the result depends on.
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
    """Runs grouped into arms, in the order in which the arms were begun, with labels and levels."""
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
    """When a run was begun, for the first time; within a second, its place in the sweep."""
    begun = next((run.status[key] for key in ("begun", "started", "ended") if run.status.get(key)), "")
    job = run.status.get("job")
    return str(begun), job if isinstance(job, int) else 0, str(run.path)


# ------------------------------------------------------------------------------------------------------ what differs


def _evaluation(path: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The results of a run that are results, numbers where numbers belong, and what is said of others."""
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
    """Raises: ValueError where what was typed, or what is said of the data, is of another kind."""
    words, data = status.get("overrides") or [], status.get("data") or {}
    sound = isinstance(words, list) and all(isinstance(word, str) for word in words) and isinstance(data, dict)
    if not sound or (data and not (type(data.get("count")) is int and isinstance(data.get("image_size", []), list))):
        raise ValueError("its status.json is not that of a run")
    if status["state"] not in STATES:
        raise ValueError(f"its state {shortened(str(status['state']))} is none of {', '.join(STATES)}")


def _must_be_of_a_task(settings: dict[str, Any]) -> None:
    """Raises: ValueError where a group is no settings, or images have no size."""
    of_task = [] if isinstance(settings.get("task"), dict) else ["model", "schedule", "diffusion"]
    for group in ("data", *of_task, "optimizer", "trainer"):
        if not isinstance(settings.get(group), dict):
            raise ValueError(f"the {group} of its config.yaml are no settings")
    size = settings["data"].get("image_size", 1)
    if not (type(size) is int or (isinstance(size, list) and len(size) == 2 and all(type(n) is int for n in size))):
        raise ValueError(f"its config.yaml has data.image_size = {shortened(str(size))}")


def _without_seed(science: Science, settings: dict[str, Any]) -> dict[str, Any]:
    """What tells arms apart: the science of a run.

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
    """Of every arm, factor -> level, for what differs between arms.

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
    """Of every arm, factor -> level as typed, where files of conf/ablation and others are a full grid; [] if not.

    What such a file sets are several keys, which by themselves would be no grid.
    """
    arms = [{_key(word): word.partition("=")[2] for word in words} for words in own]
    keys = list(dict.fromkeys(key for arm in arms for key in arm))
    cells = {tuple(arm.get(key) for key in keys) for arm in arms}
    full = len(cells) == len(arms) == math.prod(len(set(levels)) for levels in zip(*cells, strict=True))
    if len(keys) < 2 or not any("/" in key for key in keys) or not full or any(None in cell for cell in cells):
        return []
    return [_with_short_keys({key.replace("/", "."): arm[key] for key in keys}) for arm in arms]


def _differing(values: Sequence[dict[str, Any]]) -> list[str]:
    """Keys of which not all have the same value."""
    keys = dict.fromkeys(key for value in values for key in value)
    return [key for key in keys if len({json.dumps(value.get(key, MISSING)) for value in values}) > 1]


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value; lists are values."""
    if not isinstance(node, dict):
        return {prefix: node}
    return {
        key: value for k, v in node.items() for key, value in _flat(v, f"{prefix}.{k}" if prefix else str(k)).items()
    }


def _with_short_keys(level: dict[str, str]) -> dict[str, str]:
    """Factors by the last part of their key, where that is unique."""
    last = Counter(key.rpartition(".")[2] for key in level)
    return {(short if last[short := key.rpartition(".")[2]] == 1 else key): value for key, value in level.items()}


def _short(value: Any) -> str:
    """A level for people: 1e-05 and 0.002, [8, 4] and lower-case true."""
    if isinstance(value, float):
        return f"{value:g}"
    return shortened(value if isinstance(value, str) else json.dumps(value), longest=60)


# ---------------------------------------------------------------------------------------------------- what it is called


def _own(typed: Sequence[list[str]]) -> list[list[str]]:
    """What was typed for each arm, and not for all."""
    alike = set.intersection(*map(set, typed)) if typed else set()
    return [[word for word in words if word not in alike] for words in typed]


def _labels(own: Sequence[list[str]], levels: Sequence[dict[str, str]]) -> list[str]:
    """A name for every arm: what was typed for it and not for the others; where that does not tell, what differs."""
    by_words = [_by_words(words, len({_key(word) for words in own for word in words}) == 1) for words in own]
    by_levels = [", ".join(f"{factor}={level}" for factor, level in level.items()) for level in levels]
    for labels in (by_words, by_levels):
        if all(labels) and len(set(labels)) == len(labels):
            return labels
    if len(own) == 1:
        return ["the run"]
    return [f"{label or 'arm'} ({number})" for number, label in enumerate(by_levels, 1)]


def _by_words(words: list[str], single: bool) -> str:
    """Typed words as a name; of a single key, or a file of conf/ablation, the value alone."""
    parts = []
    for word in words:
        key, _, value = word.partition("=")
        name = _key(word).rpartition(".")[2]
        parts.append(value if "ablation" in key or (single and "/" in key) else f"{name}={value}")
    return ", ".join(parts)


def _key(word: str) -> str:
    """The key of a word on the command line."""
    return re.sub(r"^[+~]*", "", word).partition("=")[0].partition("@")[0]
