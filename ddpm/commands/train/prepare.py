"""Preparation of a training run: reads and builds all parts, and rejects what would fail later."""

import copy
import functools
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from ddpm.commands.evaluate import evaluating
from ddpm.commands.launch import job_number, multirun, overrides
from ddpm.commands.load import augmentation, load_into, must_walk, open_run_at, optimizer_of, split_step, task_of
from ddpm.commands.train import perceptual, text_encoder
from ddpm.commands.train.codec import FOLDER, codec_of, encoded, fill
from ddpm.commands.train.subject import begin_adapters, put_in, tuned_of, with_class
from ddpm.commands.train.teacher import student_of
from ddpm.commands.train.words import in_words, must_have_a_reader, must_read
from ddpm.commands.validate import must_be_whole, trusted, width_of_average
from ddpm.config import (
    AUGMENTATION,
    LINKED,
    InvalidInput,
    build,
    build_data,
    compose,
    conf_dir,
    must_be_finite,
    must_be_storable,
    read_config,
    resolved,
    science,
)

LONGEST_NAME = 255  # bytes, in every usual file system
GRAPH = ("auto", "off")  # whether a GPU replays the gradients of a step from a CUDA graph
STACKS = (None, "seed")  # which runs of a sweep are trained in a stack
IN_NO_NAME = "<>\"'`|?*\\$;&!~{}"  # of a study: special to a shell, a web page or another file system


class Parts(NamedTuple):
    """The parts that train: task, augmentation, sampler, optimizer and trainer."""

    augment: Any
    task: Any
    sampler: Any
    optimizer: Callable[..., Any]  # builds one from parameters
    trainer: Any
    moments: float  # bytes of optimizer state for each byte of weights

    @property
    def parameters(self) -> int:
        """The number of trained parameters."""
        return sum(p.numel() for p in self.weights)

    @property
    def weights(self) -> list[Any]:
        """The trained parameters of all modules."""
        return [p for module in self.task.modules.values() for p in module.parameters()]


class Plan(NamedTuple):
    """A training run that has been checked, and has not started."""

    run: Any
    config: DictConfig
    settings: dict[str, Any]  # the resolved configuration, as stored in the run directory
    data: Any
    parts: Parts
    device: Any
    parent: Path | None  # the checkpoint of the run that is extended
    codec: Any = None  # that encodes the data, see `ddpm.commands.train.codec.Found`
    text: Any = None  # that encodes captions, see `ddpm.commands.train.text_encoder.Found`
    lacks: str | None = None  # what must be trained or drawn first; until then the run's name is not known


class Origins(NamedTuple):
    """What a run takes from other runs or files: weights, codec and text encoder."""

    parent: Path | None  # the checkpoint of the run that is extended
    teacher: dict[str, Path]  # module -> averaged weights of a teacher
    initial: dict[str, Path]  # the same of `init`
    codec: Any  # as in `Plan`
    text: Any
    checksums: dict[str, str]  # of all of these; part of the run's name


def planned(config: DictConfig, device: Any, processes: int = 1, marking: bool = True, learning: bool = True) -> Plan:
    """Read and build all that a run needs, and raise InvalidInput for what would fail later.

    Args:
        marking: mark a refused run of a sweep as FAILED with the reason, unless it is done or running.
        learning: train the classifier of a perceptual loss, and draw the pictures of a subject's class, if they are
            missing; else the plan `lacks` them.
    Raises: InvalidInput.
    """
    import torch

    import ddpm
    from ddpm.randomness import generator
    from ddpm.runs.directory import Run, science_hash

    trust = trusted(config)
    config, origins = _origins(config, trust)
    settings = must_be_sound(config)
    must_have_a_reader(config, trust)
    perceptual.fill(config, settings)
    origins = _with_initial(config, origins)
    source, lacks = with_class(build_data(config.data, trust), config, trust, learning)
    text = origins.text
    data = in_words(source, config, trust, _start_of(config, origins), None if text is None else text.tokenizer)
    identity, folder, parents = data.identity(), _folder_of_runs(config), {**origins.checksums}

    def run() -> Run:  # named with the parents known so far
        return Run(folder / science_hash(science(settings, identity, parents, ddpm.NUMERICS)))

    try:
        if origins.codec is not None:
            data = encoded(data, origins.codec, device, Path(str(config.runs)), fit=not _tunes(config))
        torch.manual_seed(generator(config.seed, "initial weights").initial_seed())
        parts = built(config, trust, data, device, processes)
        if origins.codec is not None:
            parts.task.frozen["codec"] = origins.codec.codec.model
        must_be_measurable(config, settings, parts, data)
        _begin(parts.task, origins, config)
        if origins.parent is not None:
            _must_leave_a_budget(config, parts.trainer, data, origins.parent)
        if parts.task.perceives:  # last, because it may train a classifier
            found, unknown = perceptual.learned(parts.task, config, trust, data, folder.parent, device, learning)
            parents, lacks = parents | found, lacks or unknown
        if origins.parent is not None and lacks is None:
            _must_match_frozen(origins.parent, parts.task, config)
    except InvalidInput as error:
        if marking and multirun():
            parents |= perceptual.parents_of(config, trust, data, folder.parent, device) or {}
            _mark_refused(run(), settings, error)
        raise
    return Plan(run(), config, settings, data, parts, device, origins.parent, origins.codec, text, lacks)


def _origins(config: DictConfig, trust: list[str]) -> tuple[DictConfig, Origins]:
    """Return the configuration, completed from the runs that it builds on, and their `Origins` without `init`."""
    from ddpm.runs import checkpoint

    parents: dict[str, str] = {}
    parent = None
    if config.extend is not None:
        config, parent = _extended(config)
        parents |= checksums("extend", checkpoint.weights_of(parent))
    teacher: dict[str, Path] = {}
    if config.get("teacher") is not None:
        _, folder = open_run_at(str(config.teacher), "teacher")
        teacher = checkpoint.weights_of(folder, averaged=True)
        if parent is None:
            config = student_of(config)
            parents |= checksums("teacher", teacher)
    if _tunes(config) and parent is None:
        config = tuned_of(config)
    if (codec := codec_of(config, lambda: build_data(config.data, trust).shape)) is not None:
        fill(config, codec.codec)
        parents["init_codec"] = codec.sha256
    if (text := text_encoder.text_of(config)) is not None:
        parents["init_text"] = text.sha256
    return config, Origins(parent, teacher, {}, codec, text, parents)


def _tunes(config: DictConfig) -> bool:
    """Whether the run tunes a trained network to a subject."""
    return "subject" in config


def _with_initial(config: DictConfig, origins: Origins) -> Origins:
    """Add the weights that `init` names to the origins, if any; raise InvalidInput for files that are too large."""
    from ddpm.runs import checkpoint
    from ddpm.runs.files import regular_size

    if config.init is None:
        return origins
    initial = weights_of_init(str(config.init))
    try:
        for file in initial.values():
            regular_size(file, checkpoint.LARGEST)
    except ValueError as error:
        raise InvalidInput(f"init={config.init}: {error}") from error
    return origins._replace(initial=initial, checksums=origins.checksums | checksums("init", initial))


def _start_of(config: DictConfig, origins: Origins) -> Path | None:
    """Return the run or folder whose weights the network starts from; None for a new network."""
    if config.init is not None:
        return Path(split_step(str(config.init))[0])
    return None if origins.parent is None else origins.parent.parents[1]


def _begin(task: Any, origins: Origins, config: DictConfig) -> None:
    """Load the initial weights of a task from the origins."""
    from ddpm.runs import checkpoint

    if origins.initial:
        _load(task, origins.initial, f"init={config.init}", put_in if _tunes(config) else None)
        if _tunes(config):
            begin_adapters(task)
    if origins.text is not None:
        text_encoder.put(task, origins.text)
    if origins.teacher:
        _load(task, origins.teacher, f"teacher={config.teacher}")  # a student starts from its teacher's weights
        load_into(task.frozen["teacher"], origins.teacher["model"])
    if origins.parent is not None:
        _load(task, checkpoint.weights_of(origins.parent), f"extend={config.extend}")


def _mark_refused(run: Any, settings: dict[str, Any], error: InvalidInput) -> None:
    """Write FAILED with the reason into a run of a sweep, unless it is done or running."""
    from ddpm.runs.directory import DONE, FAILED, RUNNING, now

    if status_of(run).get("state") not in (DONE, RUNNING):
        run.path.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.create(settings), run.path / "config.yaml")
        run.write_status(FAILED, reason=str(error), ended=now(), overrides=overrides(), job=job_number())


def must_be_sound(config: DictConfig) -> dict[str, Any]:
    """Return the resolved configuration; raise InvalidInput for values that are invalid for every task."""
    settings = resolved(config)
    must_be_finite(settings, "")
    must_be_storable(settings)
    must_be_whole(config, "seed")
    for key in ("recognition", "compile", "retry"):
        if not isinstance(config.get(key, False), bool):  # runs of earlier versions lack some of them
            raise InvalidInput(f"{key}={config[key]} must be true or false")
    if config.get("graph", "off") not in GRAPH:
        raise InvalidInput(f"graph={config.graph} must be one of {', '.join(GRAPH)}")
    if config.get("stack") not in STACKS:
        raise InvalidInput(f"stack={config.stack} is not known; allowed: null, seed")
    for key, of in LINKED.items():
        value, linked = OmegaConf.select(config, key), OmegaConf.select(config, of)
        if value is not None and linked is not None and value != linked:
            raise InvalidInput(f"{key}={value} takes its value from {of}={linked}: set {of} alone")
    if config.data is not None and config.data.get("root", "") is None:
        raise InvalidInput("data.root must be given: data.root=FOLDER")
    evaluations(Path("run"), settings.get("evaluation", []), config)
    for key in ("question", "baseline"):
        if config.get(key) is not None and not isinstance(config[key], str):
            raise InvalidInput(f"{key}={config[key]} must be text, or null")
    return settings


def built(config: DictConfig, trust: list[str], data: Any, device: Any, processes: int = 1, on: str = "cpu") -> Parts:
    """Build the parts that train; raise InvalidInput if they do not fit one another, or the data.

    Args:
        data: whose shape, labels and images are checked.
        on: device of the network; on "meta" it has no weights.
    Raises: InvalidInput.
    """
    task = task_of(config, trust, on)
    must_read(task, data, config)
    try:
        task.check(data)
    except ValueError as error:
        raise InvalidInput(str(error)) from error
    if task.perceives:
        task.frozen[perceptual.PERCEPTUAL] = perceptual.distance_of(config, trust, data, on)
    augment = augmentation(config, trust, data)
    dim = getattr(augment, "tells", 0)
    for name, module in task.modules.items():
        if dim and getattr(module, "augment_dim", 0) not in (0, dim):
            raise InvalidInput(
                f"{name}.augment_dim = {module.augment_dim}, but the augmentation gives {dim} numbers; set "
                f"{name}.augment_dim={dim}, or 0 for no conditioning"
            )
    sampler = None if config.get("sampler") is None else build(config.sampler, "sampler", trust)
    if sampler is not None:
        if not hasattr(task, "diffusion"):
            raise InvalidInput(f"sampler: {type(task).__name__} draws no samples by a sampler; leave sampler out")
        must_walk(sampler, task.diffusion)
    trainer = build(config.trainer, "trainer", trust)
    _must_divide(trainer, processes)
    if task.couples_batch and trainer.accumulate > 1:
        raise InvalidInput(
            f"trainer.accumulate = {trainer.accumulate}: the loss of {type(task).__name__} needs the whole batch at "
            "once; set trainer.accumulate=1"
        )
    if trainer.batch_size < 2 and (task.couples_batch or data.prior_count):
        why = (
            "each picture of the subject is paired with one of its class"
            if data.prior_count
            else "a pair is compared with others"
        )
        raise InvalidInput(f"trainer.batch_size = {trainer.batch_size}: in a batch {why}; allowed: 2 and more")
    optimizer = optimizer_of(config, trust)
    parts = Parts(augment, task, sampler, optimizer, trainer, _must_step(optimizer, device))
    must_fit(parts, data, device)
    return parts


def must_be_measurable(config: DictConfig, settings: dict[str, Any], parts: Parts, data: Any) -> None:
    """Raise InvalidInput for lines of `evaluation` that could not be carried out at the run's end.

    Raises: InvalidInput.
    """
    lines = settings.get("evaluation", [])
    for line, evaluation in zip(lines, evaluations(Path("run"), lines, config), strict=True):
        try:
            evaluating.must_be_measurable(evaluation, config, parts.task, data)
            _must_remain(evaluation.checkpoint, parts.trainer, data)
            if width_of_average(evaluation) is not None and not parts.trainer.ema_snapshots:
                raise InvalidInput(f"weights={evaluation.weights} needs snapshots: set trainer.ema_snapshots=32")
        except InvalidInput as error:
            raise InvalidInput(f"evaluation, {line}: {error}") from error


def _must_remain(which: str | int, trainer: Any, data: Any) -> None:
    """Raise InvalidInput for a checkpoint that is never written, or deleted before training ends."""
    if which not in ("last", "best") and trainer.keeps(which, len(data.train)) is False:
        raise InvalidInput(
            f"checkpoint={which} will not exist when training ends at step "
            f"{trainer.last_step(len(data.train))}: trainer.checkpoint_every={trainer.checkpoint_every}, and "
            f"trainer.keep={trainer.keep} of the last stay, besides the best"
            + ("" if trainer.keep_every is None else f" and every trainer.keep_every={trainer.keep_every} steps")
        )


def evaluations(path: Path, lines: Any, config: DictConfig) -> list[DictConfig]:
    """Return ddpm-evaluate configurations of lines such as "metric=frechet n=1000"; raise InvalidInput for others."""
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise InvalidInput(f"evaluation={lines} must be a list of lines to ddpm-evaluate, such as ['metric=frechet']")
    try:
        composed = [copy.deepcopy(_composed(f"device={config.device}", line)) for line in lines]
    except (InvalidInput, ValueError) as error:  # a quotation mark that is not closed
        raise InvalidInput(f"evaluation: {error}") from error
    for one in composed:
        one.run, one.trust = str(path), trusted(config)
    return composed


@functools.lru_cache(maxsize=64)  # the runs of a sweep have the same lines
def _composed(device: str, line: str) -> DictConfig:
    """Return the configuration of ddpm-evaluate for a line."""
    words = shlex.split(line)
    for word in words:  # a stored configuration may come from anybody
        if "${" in word or not word[:1].isalpha() or word.startswith(("hydra", "trust", "run=")):
            raise ValueError(f"{word} is not allowed here; allowed are KEY=VALUE of ddpm-evaluate, as plain values")
    return compose("evaluate", [device, *words])


def _extended(config: DictConfig) -> tuple[DictConfig, Path]:
    """Return the configuration of the run that `extend` names, with the typed overrides, and its checkpoint."""
    from ddpm.runs.directory import open_run

    try:
        parent, path = open_run(str(config.extend), key="extend")
    except FileNotFoundError as error:
        raise InvalidInput(str(error)) from error
    base = read_config(parent.path / "config.yaml")
    words = overrides()
    groups = sorted(p.name for p in conf_dir().iterdir() if p.is_dir())
    for word in words:
        key = word.partition("=")[0]
        if key in groups or key.startswith(("+", "~")):
            raise InvalidInput(
                f"{word}: a run that extends another keeps its configuration; only values may be changed, "
                "such as trainer.steps=2000"
            )
    if not any(word.startswith(("trainer.steps=", "trainer.epochs=", "trainer.seconds=")) for word in words):
        raise InvalidInput("extend needs a larger budget: add trainer.steps=N, trainer.epochs=N or trainer.seconds=N")
    merged = OmegaConf.merge(
        {} if "augment" in base else {"augment": {"_target_": AUGMENTATION}},  # runs of earlier versions lack it
        {} if "task" in base else {"task": config.task},
        base,
        {"trainer": {"steps": None, "epochs": None, "seconds": None}, "init": None},
        _place(base, config, parent.path),
        OmegaConf.from_dotlist(words),
        {"trust": trusted(config), "compile": config.get("compile", False), "graph": config.get("graph", "off")},
    )
    assert isinstance(merged, DictConfig)  # as its first argument is
    if merged.get("init_codec") is not None:
        merged.init_codec = str(parent.path / FOLDER)
    if merged.get("init_text") is not None:
        merged.init_text = str(parent.path / text_encoder.FOLDER)
    typed = {word.partition("=")[0] for word in words}
    for key, of in LINKED.items():  # stored configurations are resolved: restore the links that the parent had
        before = OmegaConf.select(base, key), OmegaConf.select(base, of)
        if key not in typed and of in typed and before[0] == before[1] and before[0] is not None:
            OmegaConf.update(merged, key, OmegaConf.select(merged, of))
    return merged, path


def _place(base: DictConfig, config: DictConfig, parent: Path) -> dict[str, Any]:
    """Return `runs` and `study` of a child: the parent's, or the command line's if the parent was moved."""
    stored = Path(str(base.get("runs"))) / str(base.get("study"))
    at_home = os.path.abspath(stored) == os.path.abspath(parent.parent)
    return {key: (base if at_home else config).get(key) for key in ("runs", "study")}


def checksums(key: str, files: dict[str, Path]) -> dict[str, str]:
    """Return the checksums of weight files: that of "model" by the key itself, those of other modules by key.NAME."""
    from ddpm.runs import checkpoint

    return {key if name == "model" else f"{key}.{name}": checkpoint.sha256(file) for name, file in files.items()}


def _load(task: Any, files: dict[str, Path], word: str, lacking: Callable[[str], bool] | None = None) -> None:
    """Load the weights of a task's modules; raise InvalidInput if the modules differ, or names are missing."""
    if files.keys() != task.modules.keys():
        theirs, own = ", ".join(files), ", ".join(task.modules)
        raise InvalidInput(f"{word}: it has the modules {theirs}, but {type(task).__name__} trains {own}")
    for name, file in files.items():
        load_into(task.modules[name], file, *([] if lacking is None else [lacking]))


def weights_of_init(named: str) -> dict[str, Path]:
    """Return module -> file of averaged weights, of a run's checkpoint (see `split_step`) or of a folder."""
    from ddpm.runs import checkpoint

    path, _ = split_step(named)
    folder = Path(path)
    if path != named or (folder / "config.yaml").is_file():
        _, folder = open_run_at(named, "init")
    if (folder / "manifest.json").is_file():
        return checkpoint.weights_of(folder, averaged=True)
    for name in ("ema.safetensors", "model.safetensors"):
        if (folder / name).is_file():
            return {"model": folder / name}
    raise InvalidInput(
        f"init={named}: neither a run directory with a checkpoint nor a folder with ema.safetensors or "
        "model.safetensors"
    )


def _folder_of_runs(config: DictConfig) -> Path:
    """Return <runs>/<study>; raise InvalidInput if it cannot be created, or leads out of `runs`."""
    from ddpm.runs.files import shortened

    for key in ("runs", "study"):
        if config[key] is not None and type(config[key]) not in (str, int):
            raise InvalidInput(f"{key}={config[key]} must be text: the name of a folder")
    if not config.runs or not config.study or "\0" in str(config.runs):
        raise InvalidInput(f"runs={config.runs} study={config.study}: both must be names of folders")
    study = str(config.study)
    parts = study.removesuffix("/").split("/")
    if not study.isprintable() or set(study) & set(IN_NO_NAME) or {"", ".."} & set(parts):
        raise InvalidInput(
            f"study={study!r} must be a name, or several separated by /, none of them empty or .., without control "
            f"characters and without {' '.join(IN_NO_NAME)}"
        )
    folder = Path(str(config.runs)) / study
    for part in folder.parts:
        if len(part.encode()) > LONGEST_NAME:
            raise InvalidInput(
                f"runs= and study=: {shortened(part)} is longer than the {LONGEST_NAME} bytes of a folder's name"
            )
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InvalidInput(f"runs={config.runs}: {there} is not a folder that can be written to")
    return folder


def status_of(run: Any) -> dict[str, Any]:
    """Return a run's status.json, {} before there is one; raise InvalidInput for that of a newer version."""
    try:
        return run.status()
    except ValueError as error:
        raise InvalidInput(str(error)) from error


# ----------------------------------------------------------------------------------------------- what training requires


def _must_divide(trainer: Any, processes: int) -> None:
    """Raise InvalidInput if the processes cannot share a micro-batch evenly."""
    micro = trainer.batch_size // trainer.accumulate
    if micro % processes:
        raise InvalidInput(
            f"trainer.batch_size = {trainer.batch_size} in {trainer.accumulate} micro-batches is not divisible by the "
            f"{processes} processes that torchrun started; the next that is: "
            f"{-(-micro // processes) * processes * trainer.accumulate}"
        )


def _must_step(optimizer: Callable[..., Any], device: Any) -> float:
    """Try a step of the optimizer on the device; return its state per byte of weights, see `preflight.moments_of`."""
    import torch

    from ddpm.runs import preflight

    weight = torch.nn.Parameter(torch.ones(2, device=device))
    weight.grad = torch.tensor([0.0, 1.0], device=device)
    trial = optimizer([weight])
    try:
        trial.step()
    except (RuntimeError, ValueError, AssertionError, TypeError, ArithmeticError) as error:
        raise InvalidInput(f"optimizer: it cannot take a step on {device}: {' '.join(str(error).split())}") from error
    if not weight.isfinite().all():
        raise InvalidInput(
            f"optimizer: from weights of 1 with gradients of 0 and 1 its first step makes {weight.tolist()}; choose "
            "another eps, lr or momentum"
        )
    return preflight.moments_of(trial)


def must_fit(parts: Parts, data: Any, device: Any, activations: int = 0) -> tuple[Any, int | None]:
    """Return the memory that a training step needs and the bytes available; raise InvalidInput if they do not suffice.

    Without activations, which take a moment to count, this is a lower bound.
    """
    from ddpm.runs import preflight
    from ddpm.training.post_hoc import tracked

    trainer, modules = parts.trainer, parts.task.modules.values()
    batch = trainer.batch_size, trainer.accumulate
    averages = 1 + tracked(trainer.ema_snapshots)
    still = parts.task.frozen.values()
    needed = preflight.memory(modules, parts.moments, data, *batch, activations, averages, still)
    there = preflight.available(device)
    if there is not None:
        weights = [p.nbytes for p in parts.weights if p.device.type == device.type]
        there += sum(weights) + (data.nbytes if data.device.type == device.type else 0)
    if there is not None and sum(needed) > there:
        raise InvalidInput(
            f"a training step needs {preflight.in_words(sum(needed))} of memory on {device} ({needed}), but "
            f"{preflight.in_words(there)} are available; raise trainer.accumulate, or lower trainer.batch_size or "
            "model.channels"
        )
    return needed, there


def _must_leave_a_budget(config: DictConfig, trainer: Any, data: Any, parent: Path) -> None:
    """Raise InvalidInput for extending a run by a budget that it has used up already."""
    from ddpm.runs import checkpoint

    try:
        state = checkpoint.load_state(parent)
        must_be_tracked(trainer, parent, state)
    except ValueError as error:
        raise InvalidInput(f"extend={config.extend}: {error}") from error
    if trainer.is_used_up(len(data.train), state["step"], state["seconds"]):
        limit = ", ".join(
            f"trainer.{key}={config.trainer[key]}" for key in ("steps", "epochs", "seconds") if config.trainer[key]
        )
        raise InvalidInput(
            f"{limit} is not more than the {state['step']} steps and {state['seconds']:.0f} s that {config.extend} has "
            "used already"
        )


def _must_match_frozen(parent: Path, task: Any, config: DictConfig) -> None:
    """Raise InvalidInput for extending a run that was trained with other frozen networks, or none."""
    from ddpm.runs import checkpoint
    from ddpm.training.task import checksum

    try:
        checkpoint.must_be_frozen(parent, {name: checksum(module) for name, module in task.frozen.items()})
    except ValueError as error:
        raise InvalidInput(f"extend={config.extend}: {error}") from error


def must_be_tracked(trainer: Any, path: Path, state: dict[str, Any]) -> None:
    """Raise ValueError if snapshots are requested, and the averages were not tracked up to this checkpoint."""
    if trainer.ema_snapshots and "tracked" not in state:
        raise ValueError(
            f"trainer.ema_snapshots={trainer.ema_snapshots}: {path} was trained without, and the averages of its steps "
            "are not known; set trainer.ema_snapshots=0, or train another run under study=NAME"
        )


# ---------------------------------------------------------------------------------------------------- what a plan costs


def disk(plan: Plan) -> tuple[int, int, str]:
    """Return the bytes that the run will write, the free bytes on that disk, and a description of what is written."""
    from ddpm.runs import preflight
    from ddpm.training.post_hoc import tracked

    trainer, path, modules = plan.parts.trainer, plan.run.path, plan.parts.task.modules.values()
    snapshot = preflight.snapshot(modules, tracked(trainer.ema_snapshots))
    one = preflight.checkpoint(modules, plan.parts.moments) + snapshot  # a checkpoint includes the tracked averages
    last = trainer.last_step(len(plan.data.train))
    count = preflight.checkpoints(last, trainer.checkpoint_every, trainer.keep, trainer.keep_every)
    parts = f"{count:,} checkpoints of {preflight.in_words(one)}, {preflight.in_words(preflight.PICTURES)} of pictures"
    if snapshots := trainer.ema_snapshots:
        parts += f", {snapshots:,} snapshots of averages of {preflight.in_words(snapshot)}"
    return preflight.disk(one, count, path, snapshots * snapshot), preflight.free(path), parts


def no_room(plan: Plan) -> str:
    """Return the message for a disk that is too small for a run."""
    from ddpm.runs import preflight

    room, free, parts = disk(plan)
    lower = "trainer.keep, trainer.ema_snapshots" if plan.parts.trainer.ema_snapshots else "trainer.keep"
    return (
        f"the run needs {preflight.in_words(room)} of disk ({parts}), but {preflight.in_words(free)} are free at "
        f"{plan.run.path.parent}; lower {lower} or model.channels, "
        + ("" if plan.parts.trainer.keep_every is None else "raise trainer.keep_every, ")
        + "or set runs= to a folder on another disk"
    )


def trial_loss(plan: Plan, n: int, phase: int = 0) -> Any:
    """Return the mean loss of n copies of a sample, computed as in training."""
    from ddpm.runs.precision import computing, resolve
    from ddpm.training import task

    device = plan.device
    precision = resolve(plan.parts.trainer.precision, device, plan.parts.parameters)
    with computing(device, precision):
        return task.trial_loss(plan.parts.task.to(device), plan.data, n, device, phase)
