"""Estimates, made before a run begins, of the memory of a training step and the disk space of its checkpoints."""

import math
import shutil
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FEW = 2**28  # bytes of weights that fit on any machine; more are counted before they are allocated
UNITS = ("B", "kB", "MB", "GB", "TB", "PB", "EB")
PICTURES = 20 * 10**6  # bytes of a run's pictures, metrics and curves


class ManyWeights(Exception):
    """Raised when a network has more weights than `few_weights` allows."""


@contextmanager
def few_weights(limit: int = FEW) -> Iterator[None]:
    """Context in which constructing a network with more than `limit` bytes of weights raises ManyWeights."""
    total = 0

    def count(module: nn.Module, name: str, weight: nn.Parameter) -> None:
        nonlocal total
        total += weight.nbytes
        if total > limit:
            raise ManyWeights

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def must_have_room_for_weights(network: nn.Module) -> None:
    """Raise ValueError if the weights of a network, possibly on "meta", exceed this machine's available memory."""
    needed, there = _bytes(network.parameters()), available(torch.device("cpu"))
    if there is not None and needed > there:
        count = sum(p.numel() for p in network.parameters())
        raise ValueError(
            f"the weights of {count:,} parameters take {in_words(needed)}, but {in_words(there)} of memory are "
            "available; make it smaller, for example by fewer channels"
        )


# ------------------------------------------------------------------------------------------------------------ memory


class Memory(NamedTuple):
    """Bytes of a training step at its peak, when the backward pass begins, by what they are used for.

    Temporary memory of kernels is not included.
    """

    weights: int
    gradients: int
    moments: int  # of the optimizer
    average: int  # the EMA weights, and other tracked averages
    data: int  # the whole data set, images as bytes
    batch: int  # x_0 and eps of the batch, and of a micro-batch
    activations: int  # of a micro-batch: tensors that the backward pass reads, saved for it or recomputed

    def __str__(self) -> str:
        return ", ".join(f"{in_words(value)} {name}" for name, value in self._asdict().items() if value)


class SizedData(Protocol):
    """Data with a shape and a size in memory, see `ddpm.data.dataset.Dataset`."""

    @property
    def nbytes(self) -> int: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


def memory(
    modules: Iterable[nn.Module],
    moments: float,
    data: SizedData,
    batch_size: int,
    accumulate: int,
    activations: int = 0,
    averages: int = 1,
    frozen: Iterable[nn.Module] = (),
) -> Memory:
    """Return the memory of a training step.

    Args:
        modules: the trained modules.
        moments: optimizer state per byte of parameters, as `moments_of` counts it.
        data: the training data.
        batch_size, accumulate: as the trainer's.
        activations: bytes of a micro-batch; with 0 the result is a lower bound.
        averages: number of averages of the weights.
        frozen: modules that are used but not trained.
    """
    modules = list(modules)
    weights = sum(_bytes(module.parameters()) for module in modules)
    batch = 2 * (batch_size + batch_size // accumulate) * math.prod(data.shape) * 4
    average = averages * weights + sum(_bytes(module.buffers()) for module in modules)
    of_frozen = sum(_bytes(module.state_dict().values()) for module in frozen)
    return Memory(weights + of_frozen, weights, round(moments * weights), average, data.nbytes, batch, activations)


def moments_of(optimizer: torch.optim.Optimizer) -> float:
    """Return the bytes of optimizer state per byte of parameters, of an optimizer that has taken a step: 2 for Adam."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = [x for p in parameters for x in optimizer.state[p].values() if isinstance(x, Tensor) and x.shape == p.shape]
    return _bytes(state) / _bytes(parameters)


def activations(loss: Callable[[int], Tensor], parameters: Iterable[Tensor], n: int) -> int:
    """Return the bytes that autograd saves for the backward pass of a loss of n images, extrapolated from 1 and 2.

    The difference separates tensors saved once, such as weights in another precision, from those saved per image. With
    `torch.utils.checkpoint` less is saved, and the largest part that is recomputed at once is added.

    Args:
        loss: number of images -> loss, on the device and in the precision of training.
        parameters: the network's parameters, which are not counted.
    """
    weights = list(parameters)
    one, two = _saved(loss, 1, weights), _saved(loss, 2, weights)
    return one + (n - 1) * (two - one)


def _saved(loss: Callable[[int], Tensor], n: int, weights: list[Tensor]) -> int:
    """Return the bytes of the distinct storages of tensors that autograd saves, or recomputes at the same time."""
    storages: dict[int, torch.UntypedStorage] = {}  # kept alive, so that no address is reused

    def pack(x: Tensor) -> Tensor:
        storages[_identity(x)] = x.untyped_storage()
        return x

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            result = loss(n)
    except RuntimeError as error:
        if "saved tensor hooks" not in str(error):
            raise
        result = loss(n)  # which differentiates by torch.func, where no hook is called
        storages = {_identity(x): x.untyped_storage() for x in _saved_by(result)}
    own = {_identity(p) for p in weights}  # only now: the first loss may lay them out anew
    seed = torch.ones_like(result)
    with _ComputedAgain(own | storages.keys()) as again:
        torch.autograd.grad(result, [p for p in weights if p.requires_grad], seed, allow_unused=True)
    return sum(storage.nbytes() for address, storage in storages.items() if address not in own) + again.most


def _saved_by(result: Tensor) -> Iterator[Tensor]:
    """Yield the tensors that the autograd graph of a result has saved for its backward pass."""
    nodes, seen = [result.grad_fn], set[Any]()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names = (name for name in dir(node) if name.startswith("_saved_") or name == "saved_tensors")
        for name in names:
            yield from (x for x in tree_leaves(getattr(node, name)) if isinstance(x, Tensor))
        nodes += [before for before, _ in node.next_functions]


def _identity(x: Tensor) -> int:
    """Return a number that identifies a tensor's storage, on the meta device too, where storages have no address."""
    return x.untyped_storage()._cdata


class _ComputedAgain(TorchDispatchMode):
    """Counter of the bytes that a backward pass recomputes of the forward pass: only there are gradients enabled.

    Args:
        known: identities of storages that are counted already.
    """

    def __init__(self, known: set[int]):
        super().__init__()
        self.known, self.most = known, 0  # `most`: peak bytes alive at the same time
        self.alive: dict[int, int] = {}  # identity of a storage -> its bytes

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        if torch.is_grad_enabled():
            for x in (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)):
                storage, address = x.untyped_storage(), _identity(x)
                if address not in self.known and address not in self.alive:
                    self.alive[address] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, address)
            self.most = max(self.most, sum(self.alive.values()))
        return result


def available(device: torch.device) -> int | None:
    """Return the bytes of memory that a process can still allocate on a device, or None if unknown."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    return available_on_linux()


def available_on_linux(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the kernel's MemAvailable, or what this process's control groups leave, if that is less; None if unknown.

    Cached files count as free in both, for the kernel can drop them.
    """
    try:
        lines = (proc / "meminfo").read_text().splitlines()
        (found,) = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        lines = (proc / "self" / "cgroup").read_text().splitlines()
        groups = [(controllers, path) for _, controllers, path in (line.split(":", 2) for line in lines)]
    except (OSError, ValueError):
        return None
    left = [found]
    for controllers, path in groups:
        if controllers == "":  # version 2
            folder, limit, used, prefix = cgroups / path.strip("/"), "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            folder = cgroups / "memory" / path.strip("/")
            limit, used, prefix = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        else:
            continue
        for group in (folder, *folder.parents):
            try:
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                numbers = [int((group / name).read_text()) for name in (limit, used)]
                cached = sum(int(stat[f"{prefix}{kind}_file"]) for kind in ("inactive", "active"))
                left.append(numbers[0] - numbers[1] + cached)
            except (OSError, ValueError, LookupError):  # no such group, or "max": no limit
                continue
    return max(0, min(left))


# -------------------------------------------------------------------------------------------------------------- disk


def checkpoint(modules: Iterable[nn.Module], moments: float) -> int:
    """Return the bytes of a checkpoint: weights, EMA weights and optimizer state."""
    return sum(2 * _bytes(m.state_dict().values()) + round(moments * _bytes(m.parameters())) for m in modules)


def snapshot(modules: Iterable[nn.Module], averages: int) -> int:
    """Return the bytes of a snapshot of a number of averages."""
    return averages * sum(_bytes(m.parameters()) for m in modules)


def checkpoints(steps: int | None, every: int, keep: int, keep_every: int | None = None) -> int:
    """Return the most checkpoints on disk at a time: the last ones, the best, the one being written, and staged ones.

    Fewer in a short run. Where time alone ends a run, the number of staged ones is unknown, and they are not counted.

    Args:
        steps: of the run; None if time alone ends it.
        every: steps between two checkpoints.
        keep: number of last checkpoints that rotation retains.
        keep_every: steps between two staged checkpoints, which rotation never deletes; None for none.
    """
    if steps is None:
        return keep + 2
    staged = 0 if keep_every is None else steps // keep_every
    return min(staged + keep + 2, -(-steps // every))


def disk(one: int, count: int, folder: Path, besides: int = 0) -> int:
    """Return the bytes that a run will still write: `count` checkpoints of `one` bytes, pictures and `besides`."""
    present = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return max(one * count + PICTURES + besides - present, one)


def free(folder: Path) -> int:
    """Return the free bytes on the disk of a folder, which need not exist yet."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free


def in_words(size: int) -> str:
    """Return a number of bytes formatted with its unit, such as 1.2 GB."""
    power = 0
    while size >= 999.5 * 1000**power and power < len(UNITS) - 1:
        power += 1
    return f"{size / 1000**power:.3g} {UNITS[power]}"


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.nbytes for x in tensors)
