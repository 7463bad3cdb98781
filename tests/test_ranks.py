"""ddpm/training/ranks.py: several processes train as one, and go on after they were killed."""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forked import Forked

from ddpm.runs import checkpoint
from ddpm.runs.directory import Run, read_metrics
from ddpm.training.ranks import Ranks, join

REPOSITORY = Path(__file__).parents[1]
TINY = [
    "model.channels=8", "model.groups=4", "model.dropout=0.0", "trainer.steps=12", "trainer.seconds=null",
    "trainer.batch_size=32", "trainer.warmup=2", "trainer.log_every=1", "trainer.checkpoint_every=4", "data.flip=true",
    "trainer.accumulate=2", "trainer.previews=2", "sampler.steps=2", "recognition=false", "device=cpu", "schedule.T=20",
    "optimizer.eps=0.01",  # with a smaller one the sign of a gradient near 0 decides a whole step, and rounding that
]  # fmt: skip


def start(size: int, command: list[str], forked: bool = False, **pipes: object) -> list[subprocess.Popen | Forked]:
    """Processes with what torchrun tells each of its own; of scripts they may be forks, which import nothing anew."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    told = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    told |= {"GLOO_SOCKET_IFNAME": "lo"}
    environments = [
        os.environ | {k: str(v) for k, v in (told | {"RANK": rank, "LOCAL_RANK": rank}).items()} for rank in range(size)
    ]
    if forked:
        return [Forked(command[1:], environment) for environment in environments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | pipes
    return [subprocess.Popen(command, env=e | {"PYTHONPATH": str(REPOSITORY)}, **pipes) for e in environments]


def ended(processes: list[subprocess.Popen | Forked]) -> list[tuple[int, str, str]]:
    """(exit code, output, errors) of each."""
    try:
        told = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *out) for process, out in zip(processes, told, strict=True)]


def train(
    size: int, *words: str, without: tuple[str, ...] = (), forked: bool = True
) -> list[subprocess.Popen | Forked]:
    keys = {word.partition("=")[0] for word in words}
    kept = [word for word in TINY if word.partition("=")[0] not in keys and not word.startswith(without)]
    return start(size, [sys.executable, str(REPOSITORY / "experiments" / "train.py"), *words, *kept], forked)


def run_in(folder: Path) -> Run:
    (path,) = (path for path in folder.glob("default/*") if path.is_dir())
    return Run(path)


def test_one_process_is_alone():
    ranks, device = join(torch.device("cpu"))
    x = torch.arange(6.0)
    assert ranks.leads and ranks.size == 1 and device == torch.device("cpu")
    assert (
        ranks.share(x) is x and ranks.gathered(x) is x and ranks.broadcast(5) == 5 and ranks.largest(1, 2.5) == [1, 2.5]
    )
    ranks.average_([x])
    assert torch.equal(x, torch.arange(6.0))


def test_no_two_ranks_drop_the_same():
    drawn = []
    for rank in (0, 1, 1):
        Ranks(rank, 2).seed_dropout(0, 7)
        drawn.append(torch.rand(4))
    assert torch.equal(drawn[1], drawn[2]) and not torch.equal(drawn[0], drawn[1])


TALK = """
import json, torch
from ddpm.training.ranks import join
ranks, device = join(torch.device("cpu"))
rows, mean = torch.arange(12.0).reshape(6, 2), [torch.full((2, 2), float(ranks.rank)), torch.ones(3) * ranks.rank]
ranks.average_(mean)
print(json.dumps({
    "rank": [ranks.rank, ranks.size, ranks.leads],
    "share": ranks.share(rows).tolist(),
    "whole": torch.equal(ranks.gathered(ranks.share(rows)), rows),
    "mean": [x.tolist() for x in mean],
    "largest": ranks.largest(ranks.rank, 1.5, -ranks.rank),
    "told": ranks.broadcast({"a": ["b"]} if ranks.leads else None),
}))
"""


@pytest.mark.slow
def test_ranks_share_gather_average_and_agree():
    results = ended(start(3, [sys.executable, "-c", TALK]))
    assert [code for code, _, _ in results] == [0, 0, 0], results
    told = [json.loads(out.splitlines()[-1]) for _, out, _ in results]
    assert [t["rank"] for t in told] == [[0, 3, True], [1, 3, False], [2, 3, False]]
    assert [t["share"] for t in told] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10, 11]]]
    assert all(t["whole"] and t["told"] == {"a": ["b"]} and t["largest"] == [2, 1.5, 0] for t in told)
    assert all(t["mean"] == [[[1, 1], [1, 1]], [1, 1, 1]] for t in told)


PART = """
import atexit, os, torch
threads = lambda: len(os.listdir("/proc/self/task"))
before = threads()
atexit.register(lambda: print(threads() - before))  # called after what join registers
from ddpm.training.ranks import join
ranks, device = join(torch.device("cpu"))
p = torch.nn.Parameter(torch.ones(3))
(p * ranks.rank).sum().backward()
ranks.average_([p.grad])
torch.optim.AdamW([p]).step()
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted where Linux lists them")
def test_no_thread_of_the_group_outlives_it():
    """One that does may need Python when that has gone, and aborts the process."""
    assert [(code, out.split()) for code, out, _ in ended(start(2, [sys.executable, "-c", PART]))] == [(0, ["0"])] * 2


@pytest.mark.slow
def test_two_processes_give_the_run_of_one_within_rounding(tmp_path):
    """In processes that have nothing in common, not even the order of their sets of words."""
    changed = ["trainer.time_sampling=loss_aware", "trainer.batch_size=128"]
    for size in (1, 2):
        results = ended(train(size, *changed, f"runs={tmp_path / str(size)}", forked=False))
        assert [code for code, _, _ in results] == [0] * size, results
        assert "done: 12 steps" in results[0][1] and not any(out for _, out, _ in results[1:]), results
    one, two = (run_in(tmp_path / name) for name in "12")
    assert one.hash == two.hash and [run.status()["state"] for run in (one, two)] == ["DONE", "DONE"]
    for name in ("model", "ema"):
        a, b = (checkpoint.load_weights(run.checkpoints / "12" / f"{name}.safetensors") for run in (one, two))
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-4 * a[key].abs().max().item() + 1e-7)
    a, b = (read_metrics(run.path) for run in (one, two))
    assert [(line["step"], line["split"]) for line in a] == [(line["step"], line["split"]) for line in b]
    assert [line["loss"] for line in a] == pytest.approx([line["loss"] for line in b], rel=1e-4)
    assert {path.name for path in one.path.iterdir()} == {path.name for path in two.path.iterdir()}


@pytest.mark.slow
def test_two_processes_that_were_stopped_end_like_two_that_were_not(tmp_path):
    """To the bit, and with dropout, whose masks are keyed by the rank."""
    words = ["trainer.steps=28", "trainer.batch_size=8", "model.dropout=0.2", "trainer.precision=bf16"]
    assert [code for code, _, _ in ended(train(2, *words, f"runs={tmp_path / 'whole'}"))] == [0, 0]
    for kill, step, code in ((signal.SIGKILL, 8, -9), (signal.SIGTERM, 16, 143)):
        processes = train(2, *words, f"runs={tmp_path / 'parts'}")
        wait_for(lambda: any(tmp_path.glob(f"parts/*/*/checkpoints/{step}")), processes)  # noqa: B023
        for process in processes:
            process.send_signal(kill)
        assert [code for code, _, _ in ended(processes)] == [code] * 2
        parts = run_in(tmp_path / "parts")
        assert parts.status()["state"] == "INTERRUPTED" and parts.status()["step"] < 28
    assert [code for code, _, _ in ended(train(2, *words, f"runs={tmp_path / 'parts'}"))] == [0, 0]
    parts = run_in(tmp_path / "parts")
    differences = runpy.run_path(str(REPOSITORY / "experiments" / "stress.py"))["differences"]
    assert differences(run_in(tmp_path / "whole"), parts) == []


def wait_for(condition: Callable[[], bool], processes: list[subprocess.Popen | Forked]) -> None:
    while not condition():
        assert all(process.poll() is None for process in processes), ended(processes)
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trainer.batch_size=9", "trainer.accumulate=3"], "9 in 3 micro-batches is not divisible by the 2 processes"),
        (["trainer.batch_size=0"], "batch_size = 0 must be an integer >= 1"),
        (["-m"], "a sweep cannot run under torchrun"),
    ],
    ids=str,
)
def test_what_two_processes_refuse_is_told_once(words, told, tmp_path):
    results = ended(train(2, *words, f"runs={tmp_path / 'runs'}"))
    assert [code for code, _, _ in results] == [2, 2], results
    assert [err.count("\n") for _, _, err in results] == [1, 0] and told in results[0][2], results
    assert not (tmp_path / "runs").exists()
