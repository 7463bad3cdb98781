"""ddpm/runs/schema.py: what annotations admit, and what is said of the rest."""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
from torch import Tensor

from ddpm.config import InvalidInput, allowed_targets, build
from ddpm.runs.schema import _hints, check
from ddpm.schedules import NoiseSchedule


def anything(
    whole: int = 1,
    number: float = 1.0,
    switch: bool = True,
    text: str = "",
    perhaps: float | None = None,
    one_or_many: int | Sequence[int] = 1,
    pair: tuple[float | Tensor, float | Tensor] = (0.0, 0.0),
    some: tuple[int, ...] = (),
    times: Sequence[int | float] | None = None,
    options: dict[str, float] | None = None,
    place: str | Path = "",
    alone: Path = Path(),
    bare: list = [],  # noqa: B006
    schedule: NoiseSchedule | None = None,
    free: Any = None,
    call: Callable[[int], int] | None = None,
    unannotated=None,
) -> float:
    return 0.0


def demanding(first: int, second: int = 2) -> None: ...


TARGET = f"{__name__}.anything"
COSINE = {"_target_": "ddpm.schedules.cosine", "T": 3}
ADMITTED = [
    ("whole", [1, -5, 2**63 - 1]), ("number", [1, 0.5, float("nan")]), ("switch", [True, False]), ("text", ["", "abc"]),
    ("perhaps", [None, 1, 0.5]), ("one_or_many", [1, [], [1, 2]]), ("pair", [[0, 0.9]]), ("some", [[], [1, 2, 3]]),
    ("times", [None, [], [1, 0.5]]), ("options", [None, {}, {"a": 1}]), ("place", ["x"]), ("alone", ["x"]),
    ("bare", [[], [1, "a"]]), ("schedule", [None, COSINE]), ("free", [1, "a", [None], COSINE]), ("call", [None, "f"]),
    ("unannotated", [1, "a"]),
]  # fmt: skip
REFUSED = [
    ("whole", [True, 1.0, "1", None, [1], {}, 2**63, COSINE], "an integer"),
    ("number", [True, "1", None, [1], 10**400], "a number"),
    ("switch", [0, 1, "true", None], "true or false"),
    ("text", [1, None, ["a"]], "text"),
    ("perhaps", ["abc", True, []], "a number or null"),
    ("one_or_many", ["abc", 0.5, ["a"], [[1]], [True], None], "an integer or a list of integers"),
    ("pair", [[1], [1, 2, 3], 5, ["a", 1], [None, 1]], "a list of 2 numbers"),
    ("some", [1, [0.5]], "a list of integers"),
    ("times", [5, "abc", [None]], "a list of numbers or null"),
    ("options", [[5], 5, {"a": "b"}, {1: 1}], "a mapping of names to numbers or null"),
    ("place", [5], "text"),
    ("alone", [5], "text"),
    ("bare", [5, {}], "a list"),
    ("schedule", [5, {}, {"_target_": "ddpm.training.trainer.Trainer"}], "a configuration of a NoiseSchedule or null"),
]


@pytest.mark.parametrize(("key", "values"), ADMITTED, ids=[key for key, _ in ADMITTED])
def test_what_is_admitted(key, values):
    for value in values:
        check({"_target_": TARGET, key: value})


@pytest.mark.parametrize(("key", "values", "words"), REFUSED, ids=[key for key, _, _ in REFUSED])
def test_what_is_refused_says_what_was_given_and_what_is_allowed(key, values, words):
    for value in values:
        with pytest.raises(ValueError, match=rf"^{key} = .* must be {words}$") as raised:
            check({"_target_": TARGET, key: value})
        assert len(str(raised.value)) < 400


def test_names_that_are_none_and_names_that_are_missing():
    target = f"{__name__}.demanding"
    check({"_target_": target, "first": 1})
    check({"_target_": target}, given=["first"])
    with pytest.raises(ValueError, match=rf"third is no argument of {target}; it has: first, second"):
        check({"_target_": target, "first": 1, "third": 1})
    with pytest.raises(ValueError, match=r"first is no argument of .* it has: second"):  # it is for others to say
        check({"_target_": target, "first": 1}, given=["first"])
    with pytest.raises(ValueError, match="first must be given to"):
        check({"_target_": target})
    with pytest.raises((ImportError, AttributeError)):
        check({"_target_": f"{__name__}.nothing"})


def test_what_is_within_is_looked_at_too():
    nested = {"_target_": "ddpm.schedules.zero_terminal_snr", "schedule": COSINE | {"T": "abc"}}
    with pytest.raises(ValueError, match="T = 'abc' must be an integer"):
        check(nested)
    with pytest.raises(InvalidInput, match="schedule = 5 must be a configuration of a NoiseSchedule"):
        build(nested | {"schedule": 5}, "schedule")


@pytest.mark.parametrize("name", sorted(allowed_targets()))
def test_every_argument_that_a_configuration_can_give_has_a_type(name):
    """Else nothing is checked of it."""
    make = resolve_name(name)
    assert inspect.signature(make).parameters.keys() <= _hints(make).keys()
