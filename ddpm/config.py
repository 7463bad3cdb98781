"""Configurations: composed by Hydra, checked, and built. Joins ddpm/ and models/ through the names in `_target_`."""

import contextlib
import importlib.util
import io
import math
import re
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException

from ddpm.runs import schema
from ddpm.runs.safe_yaml import CADENCE, LARGEST_CONFIG, MEMORY, MOVED, must_be_plain, with_moved

if TYPE_CHECKING:
    import torch

OPTIMIZERS = ("torch.optim.Adam", "torch.optim.AdamW", "torch.optim.SGD", "torch.optim.RMSprop")
SCIENCE = ("model", "schedule", "diffusion", "optimizer", "trainer", "seed")  # of a run of diffusion
NO_SCIENCE = ("data", "augment", "sampler", "task", "perceptual")  # groups that are hashed in part, or not at all
AUGMENTATION = "ddpm.data.augment.Augment"
NON_LEAKING = "ddpm.data.non_leaking.NonLeaking"  # the augmentation that the network is conditioned on
TASK = "ddpm.training.tasks.diffusion.Diffusion"  # of runs whose configuration names no task
HOLDS = {"task": ("model",)}  # group -> the groups that its own settings may build from
LATER: dict[str, dict[str, Any]] = {  # keys that runs of earlier versions lack -> the value that this implies
    "model": {
        "drop": 0.0,
        "condition_channels": 0,
        "class_channels": 0,
        "magnitude_preserving": False,
        "augment_dim": 0,
        "token_channels": 0,
        "transformer_layers": 1,
        "linear_projection": False,
        "only_cross_attention": False,
        "any_size": False,
        "scale_shift": False,
        "resample": "conv",
        "time": "sinusoidal",
        "fourier_scale": 0.016,
        "energy": False,
        "octaves": 0,
        "beside_z": False,
    },
    "diffusion": {"preconditioning": None, "sigma_data": 0.5},
    "task": {"drop": 0.0, "only": None, "parts": {}, "prior": 1.0},  # weights other than PARTS
    "optimizer": {"amsgrad": False},
    "adapter": {"without": []},
    "trainer": {"lr_cycles": 1},
    "data": {"condition": None, "labels": ["class"]},
}
PARTS = {"diffusion": 1.0}  # default weights of the parts of the diffusion loss; other parts have the weight 0
ADDED = ("perceptual",)  # parts of the loss that autoencoders of earlier versions lack, with the weight 0
LINKED = {  # key -> the key whose value it takes if it is null
    "task.time_sampling": "trainer.time_sampling",
    "task.offset_noise": "trainer.offset_noise",
    "model.drop": "task.drop",
}
OPTIONAL = ("text",)  # groups that a constructor receives if the run has them
SEVERAL = "ablation"  # the groups below it change one thing each, and several of one can be put together
AROUND = {"model": "adapter"}  # group -> the group, if the run has it, that wraps what the first one builds
WARPS = ("rotation", "scale", "translation", "elastic")  # transforms of the augmentation that need padding


REFUSALS = (  # what constructors raise for bad arguments, including torch for sizes beyond memory or 64 bits
    ValueError, TypeError, LookupError, OSError, ArithmeticError, MemoryError, RuntimeError,
    OmegaConfBaseException, HydraException,
)  # fmt: skip


def _condition_channels(kind: Any, channels: Any) -> int:
    """Return the channels of the image that data.condition=KIND gives the network; 0 for a KIND that is refused."""
    if kind is None:
        return 0
    from ddpm.data.conditions import KINDS, MEASURED, channels_of

    return channels_of(kind, channels) if kind in (*KINDS, *MEASURED) and isinstance(channels, int) else 0


def _augment_dim(target: Any) -> int:
    """Return how many parameters an augmentation of this `_target_` passes to the network; 0 if it passes none."""
    if target != NON_LEAKING:
        return 0
    from ddpm.data.non_leaking import PARAMETERS

    return PARAMETERS


def _target_channels(kind: Any, channels: Any) -> int | None:
    """Return the channels of the image that a network learns to predict; None, which is refused, if there are none."""
    return _condition_channels(kind, channels) or None


OmegaConf.register_new_resolver("condition_channels", _condition_channels, replace=True)
OmegaConf.register_new_resolver("told_channels", _target_channels, replace=True)
OmegaConf.register_new_resolver("augment_dim", _augment_dim, replace=True)


class InvalidInput(Exception):
    """Raised for invalid input; the message is one line that states what is allowed."""


@cache
def conf_dir() -> Path:
    """Return the folder of configurations: inside the installed package, or next to it in a checkout."""
    spec = importlib.util.find_spec("ddpm")
    assert spec is not None and spec.origin is not None  # this file is part of it
    package = Path(spec.origin).parent
    for candidate in (package / "conf", package.parent / "conf"):
        if (candidate / "train.yaml").is_file():
            return candidate
    raise FileNotFoundError(f"no conf/train.yaml in {package} or next to it: the installation is incomplete")


@cache
def targets() -> dict[str, frozenset[str]]:
    """Return group of conf/ -> the exact names that its configurations may build; `optimizer` has torch's as well."""
    names: dict[str, set[str]] = {"optimizer": set(OPTIMIZERS)}
    for path in conf_dir().rglob("*.yaml"):
        config, group = OmegaConf.load(path), path.relative_to(conf_dir()).parts[0]
        if isinstance(config, DictConfig) and isinstance(config.get(group), DictConfig):  # with its defaults list
            config = config[group]
        if isinstance(config, DictConfig) and "_target_" in config:
            names.setdefault(group, set()).add(plain(config)["_target_"])
    return {group: frozenset(allowed) for group, allowed in names.items()}


@cache
def allowed_targets() -> frozenset[str]:
    """Return the exact names that a configuration may build: those in conf/ and the optimizers."""
    return frozenset().union(*targets().values())


def in_quotes(word: str) -> str:
    """Return an override with its non-ASCII values quoted, as Hydra's grammar requires: study=é becomes study='é'.

    Quoted text stays as it is; in a list, a sweep or a mapping each element is quoted by itself.
    """
    key, equals, value = word.partition("=")
    if value.isascii():
        return word
    delimiters = r",\[\]{}()" + (":" if "{" in value else "")
    quoted, element = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", rf"[^\s{delimiters}'\"][^{delimiters}'\"]*"

    def mended(match: re.Match[str]) -> str:
        text = match[0]
        return text if text[0] in "'\"" or text.isascii() else f"'{text}'"

    return key + equals + re.sub(f"{quoted}|{element}", mended, value)


def compose(name: str, overrides: list[str]) -> DictConfig:
    """Return the configuration conf/NAME.yaml with command-line overrides; works within a running job too.

    Raises: InvalidInput for a group, choice, key or value that does not compose.
    """
    for word in overrides:
        _must_choose_one(word)
    running, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    try:
        with hydra.initialize_config_dir(str(conf_dir()), job_name=name, version_base="1.3"):
            return hydra.compose(name, list(map(in_quotes, overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        raise InvalidInput(_one_line(error)) from error
    except (ValueError, RecursionError) as error:  # model=null, say, or brackets without end
        raise InvalidInput(f"{' '.join(overrides)}: {_one_line(error)}") from error
    finally:
        GlobalHydra.instance().hydra = running


def _must_choose_one(word: str) -> None:
    """Raise InvalidInput for a list of choices of a group, such as tuning=[full,lora]: the last would win silently."""
    key, _, value = word.partition("=")
    group, listed = key.lstrip("+").partition("@")[0], re.fullmatch(r"\[(.*)\]", value.strip())
    choices = [choice.strip(" '\"") for choice in listed[1].split(",")] if listed else []
    if len(choices) < 2 or group.partition("/")[0] == SEVERAL or not (conf_dir() / group).is_dir():
        return
    raise InvalidInput(
        f"{word}: a run takes one choice of {group}, and of a list only the last would count; to try each, "
        f"sweep: -m {key}={','.join(choices)}"
    )


def jobs(name: str, overrides: list[str], multirun: bool) -> list[list[str]] | None:
    """Return the overrides of every job that Hydra would start from conf/NAME.yaml, with the sweep that it may define.

    Args:
        overrides: as typed; those of Hydra itself, such as hydra/launcher=joblib, are left out of the jobs.
        multirun: whether --multirun was typed; a configuration can set it too.
    Returns: a list of overrides for each job, or None for a single run.
    Raises: InvalidInput for what does not compose.
    """
    running, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    try:
        with hydra.initialize_config_dir(str(conf_dir()), job_name=name, version_base="1.3"):
            main = GlobalHydra.instance().hydra
            assert main is not None
            config = main.compose_config(
                name, list(map(in_quotes, overrides)), RunMode.MULTIRUN, validate_sweep_overrides=False
            )
            if not multirun and config.hydra.mode != RunMode.MULTIRUN:
                return None
            known: Any = OmegaConf.to_container(config.hydra, resolve=False)  # jobs resolve their own interpolations
            params = known["sweeper"].get("params") or {}
            words = [*(f"{key}={value}" for key, value in params.items()), *known["overrides"]["task"]]
            parsed = OverridesParser.create(main.config_loader).parse_overrides(words)
            composed = [job for batch in BasicSweeper.split_arguments(parsed, None) for job in batch]
            if not composed:
                sweeping = [override for override in parsed if override.is_sweep_override()]
                empty = [str(o.input_line) for o in sweeping if not list(o.sweep_string_iterator())]
                raise ValueError(f"the sweep has no jobs: {' and '.join(empty)} expand to no value")
            return composed
    except (HydraException, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise InvalidInput(_one_line(error)) from error
    finally:
        GlobalHydra.instance().hydra = running


def resolved(config: DictConfig) -> dict[str, Any]:
    """Return the configuration as plain data, with interpolations resolved.

    Raises: InvalidInput if a mandatory value is missing or an interpolation leads nowhere.
    """
    try:
        values: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except InterpolationKeyError as error:
        hint = "; model=unet takes images, model=mlp points" if "'data." in str(error) else ""
        raise InvalidInput(f"{_one_line(error)}{hint}") from error
    except OmegaConfBaseException as error:
        raise InvalidInput(_one_line(error)) from error
    return values


def build(config: DictConfig | dict[str, Any], name: str, trust: list[str] | None = None, **arguments: Any) -> Any:
    """Build what a configuration describes: `_target_` called with the other keys.

    Args:
        config: with `_target_`.
        name: for messages, such as "model".
        trust: names that the user adds to the allowed ones, on the command line only.
        arguments: passed on as they are.
    Raises: InvalidInput for a target that is not allowed, or where the constructor refuses its arguments.
    """
    allowed = allowed_targets() | set(trust or [])
    config = OmegaConf.create(config) if isinstance(config, dict) else config
    if not isinstance(config, DictConfig) or config._is_none() or "_target_" not in config:
        raise InvalidInput(f"{name}: nothing to build; a configuration with a _target_ is needed")
    check_targets(OmegaConf.to_container(config, resolve=False), name, allowed)
    try:
        settings: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise InvalidInput(_one_line(error)) from error
    check_targets(settings, name, allowed)  # an interpolation may lead anywhere
    _must_be_resolved(settings, name)
    try:
        schema.check(settings, list(arguments))
    except (ValueError, ImportError, AttributeError) as error:
        raise InvalidInput(f"{name}: {_one_line(error)}") from error
    try:
        return _built(partial(hydra.utils.instantiate, settings, _convert_="all", **arguments))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, REFUSALS):
            raise InvalidInput(f"{name}: {_one_line(cause)}") from error
        raise


def build_group(
    config: DictConfig,
    name: str,
    trust: list[str],
    made: dict[str, Any] | None = None,
    on: str = "cpu",
    **arguments: Any,
) -> Any:
    """Build a group of a run, and before it the groups that its constructor takes as arguments.

    Args:
        config: of the run.
        made: groups that are built already, by name; new ones are added to it.
        on: device of new networks; on "meta" they have no weights.
        arguments: passed to its constructor as they are.
    Raises: InvalidInput as `build`.
    """
    import torch

    made = {} if made is None else made
    if name not in made:
        needed = {other: build_group(config, other, trust, made, on) for other in _needed_groups(config, name, trust)}
        with torch.device(on) if name in ("model", *OPTIONAL) else contextlib.nullcontext():
            made[name] = build(config[name], name, trust, **needed, **arguments)
            if (around := AROUND.get(name)) is not None and config.get(around) is not None:
                made[name] = build(config[around], around, trust, **{name: made[name]})
    return made[name]


def _needed_groups(config: DictConfig, name: str, trust: list[str]) -> list[str]:
    """Return the names of the groups that the constructor of a group takes as arguments."""
    node = plain(config[name])
    target = node.get("_target_") if isinstance(node, dict) else None
    if not isinstance(target, str) or target not in allowed_targets() | set(trust):
        return []  # it is refused when it is built
    needed = schema.required(target) | {key for key in OPTIONAL if key in schema.accepted(target)}
    return [str(group) for group in config if group in needed - node.keys() and isinstance(config[group], DictConfig)]


_cached: dict[str, Any] = {}  # configuration -> its data; at most one entry, to save memory


def build_data(config: DictConfig | dict[str, Any], trust: list[str]) -> Any:
    """Build data as `build` does, or return those of the previous call if configuration and files are the same.

    So only the first of several runs in one process waits for its data. They stay on the device where that run put
    them. Only the sources of conf/ are cached: one that `trust` adds may read other files.

    Raises: InvalidInput.
    """
    settings: Any = resolved(config) if isinstance(config, DictConfig) else config
    key = repr(settings)
    if key in _cached and not _cached[key].origin.changed():
        return _cached[key]
    _cached.clear()  # frees memory before the next data are read
    data = build(config, "data", trust)
    if settings["_target_"] in targets()["data"] and data.origin is not None:
        _cached[key] = data
    return data


def _built(make: Callable[[], Any]) -> Any:
    """Return the result of `make`; the weights of a large network are counted before memory is allocated for them.

    Raises: ValueError if there is no room for them.
    """
    import torch

    from ddpm.runs import preflight

    random = torch.get_rng_state()
    try:
        with preflight.few_weights():
            return make()
    except HydraException as error:
        if not isinstance(error.__cause__, preflight.ManyWeights):
            raise
    with torch.device("meta"):
        preflight.must_have_room_for_weights(make())
    torch.set_rng_state(random)
    return make()


def check_targets(node: Any, name: str, allowed: frozenset[str] | set[str]) -> None:
    """Look every `_target_` of plain data up in a closed set of names, before anything is resolved or imported.

    If `name` is a group of conf/, names of other groups are not allowed in it, except those in `HOLDS`: a schedule, for
    example, must not read files.

    Raises: InvalidInput for a name outside the set, or any other key that steers Hydra's instantiation.
    """
    if name in targets():
        own = frozenset().union(*(targets()[group] for group in (name, *HOLDS.get(name, ()))))
        allowed = allowed - (allowed_targets() - own)
    for key, value in _pairs(node):
        if key == "_target_" and not (isinstance(value, str) and value in allowed):
            raise InvalidInput(f"{name}: _target_ {value!r} is not allowed; allowed: {', '.join(sorted(allowed))}")
        if key != "_target_" and re.fullmatch(r"_\w*_", str(key)):
            raise InvalidInput(f"{name}: the key {key} is not allowed")
        check_targets(value, name, allowed)


def _must_be_resolved(node: Any, name: str) -> None:
    """Raise InvalidInput for text that would be resolved once more: an escaped interpolation."""
    if isinstance(node, str) and "${" in node:
        raise InvalidInput(f"{name}: {node!r} is an interpolation within an interpolation, which is not allowed")
    for _, value in _pairs(node):
        _must_be_resolved(value, name)


def _pairs(node: Any) -> Iterable[tuple[Any, Any]]:
    """Yield keys and values of a dictionary, indices and values of a list; nothing for any other value."""
    return node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list | tuple) else ()


def resolve_device(name: str) -> "torch.device":
    """Return the device of a name: "auto" is a GPU if there is one, else the CPU.

    Raises: InvalidInput for a name that is not known, or a GPU that is not there.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError, ValueError, OverflowError):
        device = None
    if device is not None and device.type == "mps":
        raise InvalidInput(
            "device=mps has no float64, in which schedules are computed; allowed: auto, cpu, cuda, cuda:N"
        )
    if device is None or device.type not in ("cpu", "cuda"):
        raise InvalidInput(f"device={name} is not known; allowed: auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        there = f"PyTorch sees {count} of them" if count else "PyTorch sees none"
        raise InvalidInput(f"device={name}: no such CUDA device here, {there}; use device=cpu or device=auto")
    return device


def science(config: dict[str, Any], identity: dict[str, Any], parents: dict[str, str], numerics: int) -> dict[str, Any]:
    """Return everything that a run's result depends on, and nothing else: what the run's name is hashed from.

    Args:
        config: resolved.
        identity: of the data, independent of their path.
        parents: checksums of what the run starts from.
        numerics: `ddpm.NUMERICS`.
    """
    task = config.get("task") or {"_target_": TASK}
    groups = [key for key, node in config.items() if isinstance(node, dict) and "_target_" in node]
    hashed = SCIENCE if not isinstance(task, dict) or task.get("_target_") == TASK else ("optimizer", "trainer", "seed")
    chosen = {key: config[key] for key in (*hashed, *(group for group in groups if group not in NO_SCIENCE))}
    for group, keys in (("trainer", CADENCE), ("model", MEMORY)):
        if isinstance(chosen.get(group), dict):  # else it is refused when it is built
            chosen[group] = {k: v for k, v in chosen[group].items() if k not in keys}
    before = {now: then for then, now in MOVED.items()}
    for group, node in chosen.items():
        target = node.get("_target_") if isinstance(node, dict) else None
        if isinstance(target, str) and target in before:
            chosen[group] = node | {"_target_": before[target]}
    diffusion = chosen.get("diffusion")
    if isinstance(diffusion, dict):  # only one of preconditioning and target has an effect
        unused = "sigma_data" if diffusion.get("preconditioning") is None else "target"
        chosen["diffusion"] = {k: v for k, v in diffusion.items() if k != unused}
    for group, node in chosen.items():
        if group in LATER and isinstance(node, dict):
            chosen[group] = {k: v for k, v in node.items() if k not in LATER[group] or v != LATER[group][k]}
    options = chosen["diffusion"].get("loss_options") if isinstance(chosen.get("diffusion"), dict) else None
    if isinstance(options, dict):  # null stands for the default of the loss, like a missing key
        options_set = {k: v for k, v in options.items() if v is not None}
        chosen["diffusion"] = chosen["diffusion"] | {"loss_options": options_set}
    chosen |= _task(task)
    treatment = {k: v for k, v in config["data"].items() if k in ("validation", "flip")}
    treatment |= {k: v for k, v in config["data"].items() if k in LATER["data"] and v != LATER["data"][k]}
    chosen |= _augmentation(config.get("augment"))
    return chosen | {"data": identity | treatment, "parents": parents, "numerics": numerics}


def _task(settings: Any) -> dict[str, Any]:
    """Return the task's settings that a result depends on; none for a diffusion task as earlier versions had it."""
    if not isinstance(settings, dict) or settings.get("_target_") != TASK:
        if isinstance(settings, dict) and isinstance(parts := settings.get("parts"), dict):
            settings = settings | {"parts": {k: v for k, v in parts.items() if k not in ADDED or v != 0}}
        return {"task": settings}
    parts = PARTS if settings.get("parts") is None else settings["parts"]
    if isinstance(parts, dict):  # else it is refused when it is built
        parts = {k: v for k, v in (dict.fromkeys(PARTS, 0.0) | parts).items() if v != PARTS.get(k, 0)}
    settings = settings | {"parts": parts}
    linked = [key.removeprefix("task.") for key in LINKED if key.startswith("task.")]  # hashed where they are set
    used = {k: v for k, v in settings.items() if k != "_target_" and k not in linked and v != LATER["task"].get(k)}
    return {"task": used} if used else {}


def _augmentation(settings: Any) -> dict[str, Any]:
    """Return the augmentation's settings that a result depends on; none without one, as in earlier versions."""
    if not isinstance(settings, dict) or settings.get("_target_") != AUGMENTATION:
        return {} if settings is None else {"augment": settings}
    used = {k: v for k, v in settings.items() if v and k != "_target_"}  # a strength of 0 is none
    if not used.get("elastic"):
        used.pop("elastic_nodes", None)
    if not used.keys() & set(WARPS):
        used.pop("padding", None)
    return {"augment": used} if used else {}


def must_be_finite(node: Any, name: str) -> None:
    """Raise InvalidInput for NaN, infinity or integers beyond 64 bits anywhere in plain data.

    Raises: InvalidInput that names the key.
    """
    if isinstance(node, float) and not math.isfinite(node):
        raise InvalidInput(f"{name} = {node} must be a finite number")
    if isinstance(node, int) and abs(node) >= 2**63:
        raise InvalidInput(f"{name} is a whole number of more than 64 bits")
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        must_be_finite(value, f"{name}.{key}" if name else str(key))


def must_be_storable(settings: dict[str, Any]) -> None:
    """Raise InvalidInput if a run could not read the configuration back after storing it, see `read_config`.

    Raises: InvalidInput.
    """
    text = OmegaConf.to_yaml(OmegaConf.create(settings))
    try:
        if len(text.encode()) > LARGEST_CONFIG:
            raise ValueError(f"it has more than {LARGEST_CONFIG:,} bytes")
        must_be_plain(text)
    except (ValueError, yaml.YAMLError) as error:
        raise InvalidInput(f"this configuration cannot be stored: {_one_line(error)}") from error


def read_config(path: Path) -> DictConfig:
    """Return a run's config.yaml, which may come from anybody: it may contain plain values only, within bounds.

    Raises: InvalidInput if it is no configuration, or not one of a run, or has what ours never have: interpolations,
        tags, aliases, numbers beyond 64 bits.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST_CONFIG + 1)
        if len(content) > LARGEST_CONFIG:
            raise ValueError(f"it has more than {LARGEST_CONFIG:,} bytes")
        text = content.decode()
        must_be_plain(text)
        settings = with_moved(OmegaConf.to_container(OmegaConf.load(io.StringIO(text))))
        _must_fit_64_bits(settings)
    except Exception as error:  # the YAML parser has no common base class
        raise InvalidInput(f"{path} cannot be read as a configuration: {_one_line(error)}") from error
    config = OmegaConf.create(settings if isinstance(settings, dict) else {})
    needed = SCIENCE if config.get("task") is None else ("optimizer", "trainer", "seed")
    missing = [key for key in (*needed, "data") if key not in config]
    if missing:
        raise InvalidInput(f"{path} is not the configuration of a run: it lacks {', '.join(missing)}")
    return config


def _must_fit_64_bits(node: Any, key: str = "") -> None:
    """Raise ValueError for an integer beyond 64 bits, which torch cannot represent."""
    if isinstance(node, int) and abs(node) >= 2**63:
        raise ValueError(f"{key} is a whole number of more than 64 bits")
    for name, value in _pairs(node):
        _must_fit_64_bits(value, f"{key}.{name}" if key else str(name))


def with_known_keys(name: str, message: str, overrides: list[str]) -> str:
    """Replace Hydra's message on an unknown key by one that names the known keys."""
    match = re.match(r"Could not override '([\w.]+)'", message)
    key = match and match[1]
    if key is None:
        return message
    try:
        config = compose(name, [o for o in overrides if o.partition("=")[0] != key])
    except InvalidInput:
        return message
    parent, _, name = key.rpartition(".")
    while parent and OmegaConf.select(config, parent) is None:  # a group that is not there either
        key = parent
        parent, _, name = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    if not isinstance(node, DictConfig) or name in node:
        return message
    known = ", ".join(sorted(str(k) for k in node if k != "_target_"))
    return f"{key} is no key of this configuration; {parent or 'the top level'} has: {known}"


def plain(value: Any) -> Any:
    """Return lists and dictionaries of a configuration as Python's own."""
    return OmegaConf.to_container(value) if isinstance(value, DictConfig | ListConfig) else value


def _one_line(error: BaseException) -> str:
    """Return an error's message on one line, without Hydra's search path."""
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} must be given: {error.full_key}=..."
    if isinstance(error, OverrideParseException) and "LexerNoViableAlt" in str(error):
        return (
            f"{error.override} cannot be read as key=value; a value with other characters than letters, digits and "
            f"/-+.$%*@?| is put into quotes within quotes: \"{str(error.override).partition('=')[0]}='...'\""
        )
    text = str(error).split("Config search path:")[0].split("Set the environment variable")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip() and "object_type=" not in line]
    return "; ".join(lines) or type(error).__name__
