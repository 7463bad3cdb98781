"""Data-parallel training: several processes, started by torchrun, each on its share of every batch."""

import atexit
import importlib
import os
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ddpm.randomness import generator


class Ranks:
    """The rank of this process among those that train together; a single one unless torchrun started it.

    All ranks draw the same global batch and take their share of it, so that the run is that of one process but for
    rounding. Rank 0 leads: it alone owns the run directory and writes.

    Args:
        rank, size: this process, 0..size-1.
    """

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, rows: Tensor) -> Tensor:
        """Return this rank's share of rows whose number `size` divides."""
        return rows if self.size == 1 else rows.chunk(self.size)[self.rank]

    def seed_dropout(self, seed: int, step: int) -> None:
        """Seed dropout, which takes no generator, by the step; each rank drops other units."""
        stream = "dropout" if self.leads else f"dropout of rank {self.rank}"
        torch.manual_seed(generator(seed, stream, step).initial_seed())

    def gathered(self, rows: Tensor) -> Tensor:
        """Gather the rows of all ranks, in the order of their shares."""
        if self.size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def average_(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its mean over ranks, all in one message."""
        if self.size == 1:
            return
        flat = torch.cat([x.reshape(-1) for x in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        for x, mean in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
            x.copy_(mean.view_as(x))

    def largest(self, *values: float) -> list[float]:
        """Return the largest of each value over ranks, so that all ranks agree."""
        if self.size == 1:
            return list(values)
        agreed = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
        return agreed.tolist()

    def broadcast(self, value: Any = None) -> Any:
        """Return the leader's value, on every rank."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]


def started() -> bool:
    """Whether torchrun started this process together with others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join(device: torch.device) -> tuple[Ranks, torch.device]:
    """Return this process's rank under torchrun, and its device: of several GPUs, that of the local rank.

    Raises: ValueError if there are fewer GPUs than processes on this machine.
    """
    if not started():
        return Ranks(), device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise ValueError(
                f"torchrun started process {device.index} here, but PyTorch sees {torch.cuda.device_count()} CUDA "
                "devices; start one process a device, or use device=cpu"
            )
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # Threads that outlive Python abort it, so that the group must go before. But this module, which optimizers
        # import, keeps in its functions' defaults whatever group there is: it must meet none.
        importlib.import_module("torch.distributed.nn")
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        atexit.register(_leave)
    return Ranks(dist.get_rank(), dist.get_world_size()), device


def _leave() -> None:
    """Destroy the process group, after its threads have released what they last used: they need Python for that."""
    time.sleep(0.5)
    dist.destroy_process_group()
