"""What a run is going to need, counted before it begins: memory of a training step, disk of its checkpoints."""

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

FEW = 2**28  # bytes of weights that any machine has; what may be more is counted before it is allocated
UNITS = ("B", "kB", "MB", "GB", "TB", "PB", "EB")
PICTURES = 20 * 10**6  # bytes of a run's pictures, metrics and curves


class ManyWeights(Exception):
    """More than `few_weights` lets through."""


@contextmanager
def few_weights(limit: int = FEW) -> Iterator[None]:
    """Within it, making a network of more than `limit` bytes of weights raises ManyWeights on the way."""
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
    """Raise ValueError if the weights of a network, which may be on "meta", are more than this machine's memory."""
    needed, there = _bytes(network.parameters()), available(torch.device("cpu"))
    if there is not None and needed > there:
        count = sum(p.numel() for p in network.parameters())
        raise ValueError(
            f"the weights of {count:,} parameters take {in_words(needed)}, but {in_words(there)} of memory are "
            "available; make it smaller, by its channels, say"
        )


# ------------------------------------------------------------------------------------------------------------ memory


class Memory(NamedTuple):
    """Bytes that a training step holds at the same time, at its fullest: when the backward pass begins.

    What kernels use besides while they run is not in it.
    """

    weights: int
    gradients: int
    moments: int  # of the optimizer
    average: int  # the EMA weights, and what other averages are tracked
    data: int  # all of them, images as bytes
    batch: int  # x_0 and eps of the batch, and of a micro-batch
    activations: int  # of a micro-batch: what the backward pass reads, kept for it or computed again

    def __str__(self) -> str:
        return ", ".join(f"{in_words(value)} {name}" for name, value in self._asdict().items() if value)


class Held(Protocol):
    """Data as memory knows them, see `ddpm.data.dataset.Dataset`."""

    @property
    def nbytes(self) -> int: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


def memory(
    modules: Iterable[nn.Module],
    moments: float,
    data: Held,
    batch_size: int,
    accumulate: int,
    activations: int = 0,
    averages: int = 1,
    frozen: Iterable[nn.Module] = (),
) -> Memory:
    """The memory of a training step.

    Args:
        modules: what is trained.
        moments: what the optimizer keeps, as `moments_of` counts it.
        data: what is trained on.
        batch_size, accumulate: as the trainer's.
        activations: bytes of a micro-batch; without them the result is what any such network needs at least.
        averages: how many of the weights are kept.
        frozen: what is used beside them, and not trained.
    """
    modules = list(modules)
    weights = sum(_bytes(module.parameters()) for module in modules)
    batch = 2 * (batch_size + batch_size // accumulate) * math.prod(data.shape) * 4
    average = averages * weights + sum(_bytes(module.buffers()) for module in modules)
    still = sum(_bytes(module.state_dict().values()) for module in frozen)
    return Memory(weights + still, weights, round(moments * weights), average, data.nbytes, batch, activations)


def moments_of(optimizer: torch.optim.Optimizer) -> float:
    """Bytes of the state of an optimizer that has taken a step, for each byte of its parameters: 2 for Adam, say."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [x for p in parameters for x in optimizer.state[p].values() if isinstance(x, Tensor) and x.shape == p.shape]
    return _bytes(kept) / _bytes(parameters)


def activations(loss: Callable[[int], Tensor], parameters: Iterable[Tensor], n: int) -> int:
    """Bytes that autograd keeps of a loss for its backward pass, with n images: counted for 1 and 2, and extended.

    What is kept once, such as weights in another precision, is told from what is kept of every image by the difference.
    With `torch.utils.checkpoint` less is kept, and the largest part that is computed again at once comes on top.

    Args:
        loss: of so many images, on the device and in the precision of training.
        parameters: those of the network, which are not counted.
    """
    weights = list(parameters)
    one, two = _kept(loss, 1, weights), _kept(loss, 2, weights)
    return one + (n - 1) * (two - one)


def _kept(loss: Callable[[int], Tensor], n: int, weights: list[Tensor]) -> int:
    """Bytes of the distinct storages among the tensors that autograd saves, or computes again at the same time."""
    storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address is given out twice

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
    """The tensors that the graph behind a result keeps for its backward pass."""
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
    """What tells a tensor's storage from others, on the meta device too, where none has an address."""
    return x.untyped_storage()._cdata


class _ComputedAgain(TorchDispatchMode):
    """Counts what a backward pass computes of the forward pass once more: that alone has gradients enabled.

    Args:
        known: addresses of storages that are counted already.
    """

    def __init__(self, known: set[int]):
        super().__init__()
        self.known, self.most = known, 0  # `most`: bytes that were there at the same time
        self.there: dict[int, int] = {}  # address of a storage -> its bytes

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        if torch.is_grad_enabled():
            for x in (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)):
                storage, address = x.untyped_storage(), _identity(x)
                if address not in self.known and address not in self.there:
                    self.there[address] = storage.nbytes()
                    weakref.finalize(storage, self.there.pop, address)
            self.most = max(self.most, sum(self.there.values()))
        return result


def available(device: torch.device) -> int | None:
    """Bytes of memory that a process can still get on a device, or None where the system does not say."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    return available_on_linux()


def available_on_linux(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What the kernel calls available, or what the limits of this process's control groups leave, if that is less.

    Cached files count as free in both: the kernel gives them up.
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
    """Bytes of a checkpoint: weights, EMA weights and the optimizer's state."""
    return sum(2 * _bytes(m.state_dict().values()) + round(moments * _bytes(m.parameters())) for m in modules)


def snapshot(modules: Iterable[nn.Module], averages: int) -> int:
    """Bytes of a snapshot of so many averages."""
    return averages * sum(_bytes(m.parameters()) for m in modules)


def checkpoints(steps: int | None, every: int, keep: int, keep_every: int | None = None) -> int:
    """How many are on disk at the same time, at most: the last ones, the best, that being written, and staged ones.

    Fewer in a short run. Where time alone ends a run, nobody knows the staged ones, and they are not counted.

    Args:
        steps: of the run; None if time alone ends it.
        every: steps between two checkpoints.
        keep: how many of the last are kept.
        keep_every: steps between two staged ones, which stay; None for none.
    """
    if steps is None:
        return keep + 2
    staged = 0 if keep_every is None else steps // keep_every
    return min(staged + keep + 2, -(-steps // every))


def disk(one: int, count: int, folder: Path, besides: int = 0) -> int:
    """Bytes that a run is still going to write: `count` checkpoints of `one` bytes, pictures, and what is besides."""
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return max(one * count + PICTURES + besides - held, one)


def free(folder: Path) -> int:
    """Bytes that are free where a folder is, or is going to be."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free


def in_words(size: int) -> str:
    """Bytes for people: 1.2 GB."""
    power = 0
    while size >= 999.5 * 1000**power and power < len(UNITS) - 1:
        power += 1
    return f"{size / 1000**power:.3g} {UNITS[power]}"


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.nbytes for x in tensors)
