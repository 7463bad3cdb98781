"""Checks of settings that raise a one-sentence error before any work starts."""

from collections.abc import Iterable
from typing import Any, TypeGuard


def is_whole(value: Any, least: int | None = None, most: int | None = None) -> TypeGuard[int]:
    """Whether a value is an integer, not below `least` and not above `most`; booleans do not count as integers."""
    if isinstance(value, bool) or not isinstance(value, int):
        return False
    return (least is None or value >= least) and (most is None or value <= most)


def check_whole(name: str, value: int, least: int, most: int | None = None) -> None:
    """Raise ValueError unless `value` is an integer >= `least` and at most `most`."""
    if not is_whole(value, least):
        raise ValueError(f"{name} = {value!r} must be an integer >= {least}")
    if most is not None and value > most:
        raise ValueError(f"{name} = {value} must be at most {most:,}")


def check_one_of(name: str, value: object, allowed: Iterable[object]) -> None:
    """Raise ValueError that lists the allowed values, unless `value` is one of them."""
    if value not in (allowed := tuple(allowed)):
        raise ValueError(f"{name} = {value!r} is not known; allowed: {', '.join(map(str, allowed))}")
