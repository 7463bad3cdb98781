"""Atomically written checkpoints that contain no code.

A checkpoint is a folder `checkpoints/STEP`: the weights and averaged weights of every trained module, as
safetensors (see `files_of`); state.pt (optimizers and counters, loaded with weights_only=True); and manifest.json
(format, step, held-out loss, modules, checksums of the frozen modules, sha256 of each file).

A version reads the checkpoints of every format up to its own FORMAT and refuses newer ones. Format 1 had one module,
"model", with one optimizer.
"""

import functools
import hashlib
import io
import json
import math
import os
import pickle
import pickletools
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ddpm.runs.files import flush, read_json, regular_size, replacing, shortened

FORMAT = 2
NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")  # of a module
LARGEST = 16 * 2**30  # bytes of one file: the optimizer state of a network of two thousand million parameters
LARGEST_MANIFEST = 64 * 1024  # bytes
LARGEST_PICKLE = 4 * 2**20  # bytes of the pickle that lists a state's tensors, without their values
MOST = 10**6  # values in a state
REAL = {torch.float64, torch.float32, torch.float16, torch.bfloat16}  # weights of one load into any other
PLAIN = re.compile(  # the names in the pickle of a state: a tensor, its storage, its (empty) dictionary of hooks
    r"torch\._utils _rebuild_tensor_v2|collections OrderedDict"
    r"|torch (Double|Float|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage"
)


def files_of(module: str) -> tuple[str, str]:
    """Return the file names of a module's weights and averages: model.safetensors, ema.safetensors for "model"."""
    return f"{module}.safetensors", "ema.safetensors" if module == "model" else f"{module}.ema.safetensors"


def modules_of(path: Path) -> list[str]:
    """Return the names of the modules in a checkpoint.

    Raises: ValueError for a manifest that does not list them.
    """
    return _modules(read_json(path / "manifest.json", LARGEST_MANIFEST))


def weights_of(path: Path, averaged: bool = False) -> dict[str, Path]:
    """Return module -> the file of its weights in a checkpoint, or of its averaged weights."""
    return {name: path / files_of(name)[averaged] for name in modules_of(path)}


def _modules(manifest: Any) -> list[str]:
    if manifest["format"] == 1:
        return ["model"]
    modules = manifest["modules"]
    if (
        not isinstance(modules, list)
        or not modules
        or not all(isinstance(m, str) and NAME.fullmatch(m) for m in modules)
    ):
        raise ValueError("its manifest names no modules")
    return modules


def _parts(manifest: Any) -> list[str]:
    """Return the file names of a checkpoint, without the manifest."""
    return [*(name for module in _modules(manifest) for name in files_of(module)), "state.pt"]


def save(
    folder: Path,
    step: int,
    modules: Mapping[str, nn.Module],
    averages: Mapping[str, nn.Module],
    state: dict[str, Any],
    held_out: float | None,
    frozen: Mapping[str, str] = MappingProxyType({}),
    n: float | None = None,
) -> Path:
    """Write the checkpoint folder/step: under a temporary name, flushed to disk, read back, then renamed.

    Args:
        folder: the run's `checkpoints` folder.
        modules, averages: the trained modules by name, and their averaged weights by the same names.
        state: everything else that resuming needs; tensors, numbers, strings and containers of them.
        held_out: the held-out loss of the averaged weights, if it was measured.
        frozen: the checksums of modules that were used but not trained.
        n: number of held-out samples behind `held_out`; None for all.
    Returns: the checkpoint's folder.
    Raises: OSError if it cannot be written, or reads back differently. Nothing of it remains then, and earlier
        checkpoints are untouched.
    """
    final, temporary = folder / str(step), folder / f".{step}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    makers: dict[str, Callable[[], bytes | memoryview]] = {}
    for name, module in modules.items():
        weights, average = files_of(name)
        makers[weights] = functools.partial(_weights, module)
        makers[average] = functools.partial(_weights, averages[name])
    makers["state.pt"] = functools.partial(_plain_data, state)
    try:
        checksums = {}
        for name, make in makers.items():
            content = make()
            checksums[name] = hashlib.sha256(content).hexdigest()  # of the content in memory, not of the file
            (temporary / name).write_bytes(content)
        measured = held_out if held_out is not None and math.isfinite(held_out) else None
        manifest: dict[str, Any] = {"format": FORMAT, "step": step, "held_out": measured, "modules": list(modules)}
        manifest |= {} if n is None else {"n": n}
        manifest |= {"frozen": dict(frozen), "sha256": checksums}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for path in (*temporary.iterdir(), temporary):
            flush(path)
        if damage := verify(temporary):
            raise OSError(f"checkpoint {final} does not read back as it was written: {damage}")
        _put(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _put(temporary: Path, final: Path) -> None:
    """Rename a checkpoint into place; one that has the name is moved aside, and restored if the renaming fails."""
    aside = final.with_name(f".{final.name}.before")
    if final.exists():
        os.rename(final, aside)
    try:
        os.rename(temporary, final)
    except BaseException:
        if aside.exists():
            os.rename(aside, final)
        raise
    flush(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _remove(path: Path) -> None:
    """Delete a checkpoint; if killed half-way, a hidden folder is left and no damaged checkpoint."""
    if path.is_symlink():  # to a folder outside this run
        path.unlink()
        return
    hidden = path.with_name(f".{path.name}.removed")
    os.rename(path, hidden)
    shutil.rmtree(hidden)


def keep(path: Path, folder: Path) -> Path:
    """Hard-link (or copy) a checkpoint's files to folder/STEP, so that rotation deletes none of them; return it.

    Other files in its folder are not taken along.
    """
    linked = folder / path.name
    if not linked.exists():
        linked.mkdir(parents=True)
        manifest = read_json(path / "manifest.json", LARGEST_MANIFEST)
        for name in (*_parts(manifest), "manifest.json"):
            try:
                os.link(path / name, linked / name)
            except OSError:  # a file system without links
                shutil.copy2(path / name, linked / name)
    return linked


def rotate(folder: Path, keep: int, every: int | None = None) -> None:
    """Delete all checkpoints but the last `keep`, the best one and those of each multiple of `every` steps.

    Half-written checkpoints of killed processes are deleted too.
    """
    for left in folder.glob(".[0-9]*.*"):
        shutil.rmtree(left, ignore_errors=True)
    found = steps(folder)
    remaining = {*found[-keep:], best(folder), *(step for step in found if every is not None and step % every == 0)}
    for step in found:
        if step not in remaining:
            _remove(folder / str(step))


def best(folder: Path) -> int | None:
    """Return the step with the lowest held-out loss, among those measured on the same samples as the last one.

    Return the last step if none was measured, and None without checkpoints.
    """
    found = steps(folder)
    measured = {step: loss for step in found if (loss := _held_out(folder / str(step))) is not None}
    if not measured:
        return max(found, default=None)
    _, of_last = measured[max(measured)]
    return min((step for step, (_, n) in measured.items() if n == of_last), key=lambda step: measured[step][0])


def drop_after(folder: Path, step: int) -> None:
    """Delete the checkpoints after `step`, at which a run resumes because later ones are damaged.

    Raises: ValueError, before any is deleted, if one is of a newer format rather than damaged.
    """
    later = [folder / str(n) for n in steps(folder) if n > step]
    for path in later:
        _must_be_known(path, verify(path))
    for path in later:
        _remove(path)


def last_whole(folder: Path) -> Path | None:
    """Return the newest checkpoint whose files match their checksums, or None; damaged ones are reported and skipped.

    Raises: ValueError if one of a newer format would be skipped.
    """
    for step in reversed(steps(folder)):
        path = folder / str(step)
        damage = verify(path)
        if damage is None:
            return path
        _must_be_known(path, damage)
        print(f"checkpoint {path} is damaged ({damage}); going back to the one before")
    return None


NEWER = "newer than"


def _must_be_known(path: Path, damage: str | None) -> None:
    if damage and NEWER in damage:
        raise ValueError(f"checkpoint {path} was written by a newer version ({damage}); use that, or move it away")


def verify(path: Path) -> str | None:
    """Return a description of what is wrong with a checkpoint, or None if it is intact."""
    try:
        manifest = read_json(path / "manifest.json", LARGEST_MANIFEST)
        if manifest["format"] > FORMAT:
            return f"its format {manifest['format']} is {NEWER} {FORMAT}, the newest that this version knows"
        parts, named = _parts(manifest), manifest["sha256"].keys()
        if missing := set(parts) - named:
            return f"its manifest does not name {', '.join(sorted(missing))}"
        if unknown := sorted(named - set(parts)):
            return f"its manifest names {shortened(repr(unknown[0]))}, which is no file of a checkpoint"
        for name in parts:
            regular_size(path / name, LARGEST)
            if sha256(path / name) != manifest["sha256"][name]:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def save_weights(network: nn.Module, path: Path) -> None:
    """Write a network's parameters and buffers as safetensors; the folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, durable=True) as temporary:
        temporary.write_bytes(_weights(network))


def _weights(network: nn.Module) -> bytes:
    """Return parameters and buffers as safetensors bytes, in which tied weights are stored twice."""
    tensors: dict[str, Tensor] = {}
    places = set[int]()
    for name, x in network.state_dict().items():
        tensors[name] = x.contiguous() if x.data_ptr() not in places else x.clone(memory_format=torch.contiguous_format)
        places.add(x.data_ptr())
    return safetensors.torch.save(tensors)


def must_be_plain(state: Any, name: str) -> None:
    """Raise ValueError for a state that could be saved but not read back: `load_plain` accepts plain data alone."""
    if isinstance(state, dict) and type(state) is dict:
        for key, value in state.items():
            must_be_plain(key, f"a key of {name}")
            must_be_plain(value, f"{name}, {key}")
    elif type(state) in (list, tuple):
        for number, value in enumerate(state):
            must_be_plain(value, f"{name}, {number}")
    elif type(state) not in (Tensor, int, float, str, bool, type(None)):
        raise ValueError(
            f"{name} is a {type(state).__name__}: only tensors, numbers, text, lists and dictionaries can be stored"
        )


def _plain_data(state: dict[str, Any]) -> memoryview:
    """Return the state in the format of torch.save."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getbuffer()


def load_weights(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return the tensors of a .safetensors file; ValueError if it is not one."""
    regular_size(path, LARGEST)
    try:
        return safetensors.torch.load_file(path, device=str(device))
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {shortened(str(error))}") from error


def load_state(path: Path) -> dict[str, Any]:
    """Return the `state` of a saved checkpoint, with tensors on the CPU.

    Raises: ValueError for a file that contains anything but plain data; nothing in it is executed.
    """
    state = load_plain(path / "state.pt")
    step, seconds = [state.get(key) for key in ("step", "seconds")] if isinstance(state, dict) else [None, None]
    counted = type(step) is int and 0 <= step < 2**63
    if not counted or not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
        raise ValueError(f"{path / 'state.pt'} is not the state of a run: it lacks its step and seconds")
    return state if "phases" in state else _of_format_1(state)


def _of_format_1(state: dict[str, Any]) -> dict[str, Any]:
    """Convert a state of format 1, of one network with one optimizer, to the current format."""
    counts = {"counts": torch.zeros(3, dtype=torch.long)}  # format 1 skipped no steps
    phase = {key: state[key] for key in ("optimizer", "scaler") if key in state} | {"guard": state.get("guard", counts)}
    times = {"times": state["times"]} if state.get("times") else {}
    common = {key: value for key, value in state.items() if key in ("step", "seconds", "precision")}
    updates = {"model": state["ema_updates"]} if "ema_updates" in state else {}
    return common | {"ema_updates": updates, "phases": {"all": phase}, "task": times}


def must_be_frozen(path: Path, frozen: Mapping[str, str]) -> None:
    """Raise ValueError if a checkpoint was trained with other frozen modules than these, by their checksums."""
    before = read_json(path / "manifest.json", LARGEST_MANIFEST).get("frozen", {})
    if not isinstance(before, dict):
        raise ValueError(f"{path}: its manifest names no frozen modules")
    if before != dict(frozen):
        changed = sorted(name for name in {*before, *frozen} if before.get(name) != frozen.get(name))
        raise ValueError(f"{path} was trained with another {' and another '.join(map(shortened, changed))}")


def load_plain(path: Path) -> Any:
    """Return tensors, numbers, strings and containers of them from a torch.save file; ValueError for anything else."""
    size = regular_size(path, LARGEST)
    try:
        plain = torch.load(_checked_archive(path, size), map_location="cpu", weights_only=True)
        _must_fit_its_file(plain, size)
    except pickle.UnpicklingError as error:  # whose message advises to execute it
        raise ValueError(f"{path} holds more than plain data, such as code, and was not loaded") from error
    except Exception as error:  # zipfile, pickletools and torch.load raise nearly anything on damaged files
        words = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{path} is no whole file of torch.save: {shortened(words[0])}") from error
    return plain


def _checked_archive(path: Path, size: int) -> io.BytesIO:
    """Check a torch.save archive and copy it member by member, so that torch.load reads exactly what was checked.

    torch.load unpacks members of any size, and some functions that it lets a pickle call, such as bytearray, can take
    any amount of memory.

    Raises: UnpicklingError for a name that tensors do not need; ValueError for a compressed archive.
    """
    copy = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as checked:
        members = archive.infolist()
        packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
        if packed or sum(member.file_size for member in members) > size:
            raise ValueError("it is compressed, which torch.save never does")
        if len({member.filename.lower() for member in members}) < len(members):  # to torch, a and A are the same
            raise ValueError("it has two members of one name")
        for member in members:
            content = archive.read(member)
            if member.filename.lower().endswith(".pkl"):
                _must_be_plain(content)
            checked.writestr(member.filename, content)
    copy.seek(0)
    return copy


def _must_be_plain(pickled: bytes) -> None:
    """Raise UnpicklingError for a pickle that names anything but the parts of tensors, before any of it is loaded."""
    if len(pickled) > LARGEST_PICKLE:
        raise ValueError(f"its pickle has more than {LARGEST_PICKLE:,} bytes")
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in ("INST", "STACK_GLOBAL") or (opcode.name == "GLOBAL" and not PLAIN.fullmatch(str(argument))):
            raise pickle.UnpicklingError(opcode.name)


def _must_fit_its_file(plain: Any, size: int) -> None:
    """Raise ValueError for data that expand when walked or copied: repeated lists, one number as a large tensor."""
    left, values, of_tensors = [plain], 1, 0
    while left:
        node = left.pop()
        inside = [*node.keys(), *node.values()] if isinstance(node, dict) else node
        inside = inside if isinstance(inside, list | tuple) else []
        values += len(inside)
        of_tensors += node.nbytes if isinstance(node, Tensor) else 0
        if values > MOST or of_tensors > size:
            raise ValueError("it unpacks to more than the file contains")
        left += inside


def load_into(network: nn.Module, path: Path, lacking: Callable[[str], bool] = lambda name: False) -> None:
    """Load the weights of a .safetensors file into a network.

    Args:
        lacking: predicate of the names that the file may lack; such a tensor is left unchanged.
    Raises: ValueError that lists the names, shapes and types that do not fit.
    """
    theirs, mine = load_weights(path), network.state_dict()
    theirs = {name: x for name, x in mine.items() if lacking(name)} | theirs
    missing, unknown = sorted(mine.keys() - theirs.keys()), sorted(theirs.keys() - mine.keys())
    shapes = [
        f"{k} {tuple(theirs[k].shape)}, the network's is {tuple(mine[k].shape)}"
        for k in sorted(mine.keys() & theirs.keys())
        if mine[k].shape != theirs[k].shape
    ]
    types = [
        f"{k} {theirs[k].dtype}, the network's is {mine[k].dtype}"
        for k in sorted(mine.keys() & theirs.keys())
        if theirs[k].dtype != mine[k].dtype and not {theirs[k].dtype, mine[k].dtype} <= REAL
    ]
    wrong = {"missing": missing, "unknown": unknown, "of another shape": shapes, "of another type": types}
    if any(wrong.values()):
        problems = "; ".join(
            f"{len(v)} {k}: {', '.join(shortened(name) for name in v[:3])}{', ...' if len(v) > 3 else ''}"
            for k, v in wrong.items()
            if v
        )
        raise ValueError(f"{path} does not fit the network: {problems}")
    network.load_state_dict(theirs)


def _held_out(path: Path) -> tuple[float, Any] | None:
    """Return the held-out loss in a checkpoint's manifest and its number of samples; None if there is none."""
    try:
        manifest = read_json(path / "manifest.json", LARGEST_MANIFEST)
        held_out, n = manifest["held_out"], manifest.get("n")
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return (held_out, n) if isinstance(held_out, int | float) and math.isfinite(held_out) else None


def steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in a folder, ascending; subfolders with other names are ignored."""
    names = [path.name for path in folder.glob("*") if path.is_dir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))


def sha256(path: Path) -> str:
    """Return the SHA-256 checksum of a file, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
