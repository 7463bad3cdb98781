"""Validation of configurations against the annotations of the constructors that they call."""

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from pkgutil import resolve_name
from typing import Any, Union, get_args, get_origin

from ddpm.runs.files import shortened

PLAIN = {int: "an integer", float: "a number", str: "text", bool: "true or false", type(None): "null"}
MANY = {int: "integers", float: "numbers", str: "texts", bool: "true or false"}
LARGEST = 2**63  # of whole numbers: torch counts in 64 bits


def check(settings: Mapping[str, Any], given: Sequence[str] = ()) -> None:
    """Check the arguments of `_target_`, and of every nested node that has one, before anything is called.

    Args:
        settings: plain data with `_target_`.
        given: arguments that the caller passes itself, and that no configuration may set.
    Raises:
        ValueError: a name that is not an argument, a missing argument, or a value of another type than annotated.
        ImportError, AttributeError: there is no such `_target_`.
    """
    target = settings["_target_"]
    make = resolve_name(target)
    try:
        parameters = inspect.signature(make).parameters
    except ValueError:  # not written in Python
        return
    variadic = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {k: p for k, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    hints = _hints(make)
    for key, value in settings.items():
        if key == "_target_":
            continue
        if key in given or (key not in named and not variadic):
            known = ", ".join(k for k in named if k not in given)
            raise ValueError(f"{shortened(str(key))} is no argument of {target}; it has: {known}")
        if key in hints and not _admits(hints[key], value):
            raise ValueError(f"{key} = {shortened(repr(value))} must be {_words(hints[key])}")
        _check_within(value)
    for key, parameter in named.items():
        if parameter.default is parameter.empty and key not in settings and key not in given:
            raise ValueError(f"{key} must be given to {target}")


def required(target: str) -> set[str]:
    """Return the names of the required arguments of a constructor; none for one not written in Python.

    Raises: ImportError, AttributeError: there is no such `_target_`.
    """
    return {name for name, p in _named(target).items() if p.default is p.empty}


def accepted(target: str) -> set[str]:
    """Return the names of all arguments of a constructor; none for one not written in Python.

    Raises: as `required`.
    """
    return set(_named(target))


def _named(target: str) -> dict[str, inspect.Parameter]:
    """Return the arguments of a constructor that can be passed by keyword."""
    try:
        parameters = inspect.signature(resolve_name(target)).parameters
    except ValueError:
        return {}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: p for name, p in parameters.items() if p.kind in named}


def _check_within(node: Any) -> None:
    if isinstance(node, dict) and "_target_" in node:
        check(node)
    elif isinstance(node, dict | list):
        for value in node.values() if isinstance(node, dict) else node:
            _check_within(value)


def _hints(make: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotations of a function or of a class's constructor; none if they cannot be resolved."""
    try:
        return typing.get_type_hints(make.__init__ if inspect.isclass(make) else make)
    except (NameError, TypeError, AttributeError):
        return {}


def _admits(hint: Any, value: Any) -> bool:
    """Whether plain data match an annotated type; a list matches a tuple, an integer a float.

    Annotations that no configuration can express, such as protocols, match anything.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if isinstance(value, dict) and "_target_" in value:
        return _admits_target(hint, value["_target_"])
    if origin in (Union, types.UnionType):
        return any(_admits(one, value) for one in inner)
    if hint in PLAIN:
        number = isinstance(value, int) and not isinstance(value, bool)
        return abs(value) < LARGEST if number and hint in (int, float) else type(value) is hint
    kind = origin or hint
    if kind in (list, tuple, Sequence):
        if kind is tuple and inner and inner[1:] != (...,):
            return isinstance(value, list) and len(value) == len(inner) and all(map(_admits, inner, value))
        return isinstance(value, list) and all(_admits(inner[0], one) for one in value if inner)
    if kind is dict:
        pairs = value.items() if isinstance(value, dict) and inner else ()
        return isinstance(value, dict) and all(_admits(inner[0], k) and _admits(inner[1], v) for k, v in pairs)
    if inspect.isclass(kind) and issubclass(kind, PurePath):
        return isinstance(value, str)
    return hint in (Any, object) or not inspect.isclass(hint)  # no plain value is of any other class


def _is_plain(hint: Any) -> bool:
    """Whether a type has plain values only, so that no `_target_` can build one."""
    inner = get_args(hint)
    return hint in PLAIN or (bool(inner) and all(map(_is_plain, inner)))


def _admits_target(hint: Any, target: str) -> bool:
    """Whether the object that a `_target_` builds, by its own annotations, matches an annotated type."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(_admits_target(one, target) for one in get_args(hint))
    if _is_plain(hint) or hint in (Any, object):
        return hint in (Any, object)
    make = resolve_name(target)
    made = make if inspect.isclass(make) else _hints(make).get("return")
    return not inspect.isclass(hint) or not inspect.isclass(made) or issubclass(made, hint)


def _words(hint: Any, many: bool = False) -> str:
    """Return a readable description of a type for messages."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        members = [one for one in inner if _has_plain_values(one)]
        members = members if set(members) - {type(None)} else list(inner)
        members = [one for one in members if one is not int or float not in members]
        *words, last = dict.fromkeys(_words(one, many) for one in members)
        return f"{', '.join(words)} or {last}" if words else last
    if hint in PLAIN:
        return MANY.get(hint, "null") if many else PLAIN[hint]
    kind, lists = origin or hint, "lists" if many else "a list"
    if kind in (list, Sequence):
        return f"{lists} of {_words(inner[0], many=True)}" if inner else lists
    if kind is tuple:
        count = "" if inner[1:] in ((), (...,)) else f"{len(inner)} "
        return f"{lists} of {count}{_words(inner[0], many=True)}" if inner else lists
    if kind is dict:
        return f"a mapping of names to {_words(inner[1], many=True) if inner else 'values'}"
    if inspect.isclass(kind) and issubclass(kind, PurePath):
        return PLAIN[str]
    return f"a configuration of a {getattr(hint, '__name__', hint)}"


def _has_plain_values(hint: Any) -> bool:
    """Whether a type has plain values."""
    return not inspect.isclass(hint) or hint in (*PLAIN, list, tuple, dict)
