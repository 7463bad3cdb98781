"""Stress tests of a run: kills at random moments (`kills`), many steps (`long`), a change of the code (`same`).

    python experiments/stress.py kills --kills 200 --out runs/stress
    python experiments/stress.py long --steps 20000 --out runs/stress
    python experiments/stress.py same --revision HEAD --out runs/stress [--mnist FOLDER]

Each prints a table, writes it as JSON beside the runs, and exits with 1 if something did not hold.
"""

import argparse
import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddpm.runs import checkpoint
from ddpm.runs.directory import Run, git_commit, read_metrics

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "experiments" / "train.py"


def environment(root: Path) -> dict[str, str]:
    """Return the environment of processes that run the code in a folder, each with one thread.

    Two are hardly faster with such networks, and several times slower where something else wants a core.
    """
    paths = filter(None, [str(root), os.environ.get("PYTHONPATH")])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


def last_of_each(words: list[str]) -> list[str]:
    """Return the last of the words for each key."""
    return list({word.partition("=")[0]: word for word in words}.values())


ENVIRONMENT = environment(ROOT)
SHORT = [
    "model.channels=8", "model.groups=4", "model.dropout=0.1", "trainer.steps=180", "trainer.seconds=null",
    "trainer.batch_size=32", "trainer.warmup=5", "trainer.log_every=1", "trainer.checkpoint_every=3",
    "trainer.previews=3", "sampler.steps=3", "recognition=false", "device=cpu",
]  # fmt: skip
VARIANTS = {  # each is killed in turn
    "fp32": [],
    "bf16, accumulation": ["trainer.precision=bf16", "trainer.accumulate=2"],
    "fp16, flips": ["trainer.precision=fp16", "data.flip=true"],
    "loss-aware times, offset noise": ["trainer.time_sampling=loss_aware", "trainer.offset_noise=0.1", "schedule.T=20"],
    "SGD, accumulation, flips": ["optimizer._target_=torch.optim.SGD", "~optimizer.betas", "~optimizer.eps",
                                 "trainer.accumulate=4", "data.flip=true"],
}  # fmt: skip
LONG = ["trainer.seconds=null", "trainer.previews=40"]  # beside the default job
MOMENTS = ("anywhere", "training", "writing")  # of a kill: whenever; between two steps; while a checkpoint is written
KILLS_A_RUN = 10


# ------------------------------------------------------------------------------------------------------- comparison


def differences(one: Run, other: Run) -> list[str]:
    """In what two runs differ that should be the same: name, weights, averages, optimizer, metrics, results, pictures.

    Time and the commit of the code do not count.
    """
    found = [f"hash: {one.hash}, {other.hash}"] * (one.hash != other.hash)
    names = [sorted(path.name for path in run.checkpoints.iterdir()) for run in (one, other)]
    found += ["names of checkpoints"] * (names[0] != names[1])
    found += ["no checkpoints"] * (not any(names))
    for step in sorted({*names[0]} & {*names[1]}):
        found += [f"checkpoint {step}, {what}" for what in _between(one.checkpoints / step, other.checkpoints / step)]
    lines = [
        {f"line {number}": line for number, line in enumerate(without("seconds", read_metrics(run.path)), 1)}
        for run in (one, other)
    ]
    found += _listed("metrics.jsonl", unequal(*lines))
    results = [without("commit", _json(run.path / "evaluation.json")) for run in (one, other)]
    found += _listed("evaluation.json", unequal(*results))
    pictures = [
        {path.name: path.read_bytes() for path in run.path.iterdir() if path.suffix in (".png", ".gif")}
        for run in (one, other)
    ]
    return found + unequal(*pictures)


def _between(one: Path, other: Path) -> Iterator[str]:
    """In what two checkpoints of one step differ."""
    damaged = [f"{path} is damaged: {damage}" for path in (one, other) if (damage := checkpoint.verify(path))]
    if damaged:
        yield from damaged
        return
    files = [{path.name: path for path in folder.glob("*.safetensors")} for folder in (one, other)]
    for name in sorted(files[0] | files[1]):
        paths = [found[name] for found in files if name in found]
        if len(paths) < 2:
            yield f"{name}: in one only"
        elif paths[0].read_bytes() != paths[1].read_bytes():
            yield from _listed(name, unequal(*map(checkpoint.load_weights, paths)) or ["not in its tensors"])
    yield from _listed("state", unequal(*(without("seconds", checkpoint.load_state(path)) for path in (one, other))))
    manifests = [_json(path / "manifest.json") for path in (one, other)]
    yield from _listed("manifest", [key for key in ("step", "held_out") if not equal(*(m[key] for m in manifests))])


def unequal(one: Any, other: Any, name: str = "") -> list[str]:
    """The names of what differs to the bit, in nested dictionaries of lists, tensors, numbers and words."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return [] if equal(one, other) else [name]
    found = []
    for key in sorted(one.keys() | other.keys(), key=str):
        inner = f"{name}, {key}" if name else str(key)
        found += unequal(one[key], other[key], inner) if key in one and key in other else [f"{inner} (in one only)"]
    return found


def equal(one: Any, other: Any) -> bool:
    """Whether nested containers of tensors, numbers and words are the same to the bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        alike = one.dtype == other.dtype and one.shape == other.shape
        return alike and torch.equal(*(x.contiguous().reshape(-1).view(torch.uint8) for x in (one, other)))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return repr(one) == repr(other) if isinstance(one, float) else one == other  # of nan and -0.0 too


def without(key: str, node: Any) -> Any:
    """Nested dictionaries and lists without what has this key, wherever it is."""
    if isinstance(node, dict):
        return {k: without(key, value) for k, value in node.items() if k != key}
    return [without(key, value) for value in node] if isinstance(node, list) else node


def _listed(what: str, names: list[str]) -> list[str]:
    """One line on what differs, where anything does."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"{what}: {'; '.join(names[:3])}{more}"] if names else []


def _json(path: Path) -> dict[str, Any]:
    """Return the contents of a JSON file; {} if there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


# ------------------------------------------------------------------------------------------------------------ kills


class Victim:
    """A run that is killed and started again until it is done.

    Args:
        folder: for its run directory.
        words: of the command line.
        seconds: that an undisturbed process takes.
    """

    def __init__(self, folder: Path, words: list[str], seconds: float, chance: random.Random):
        self.folder, self.seconds, self.chance = folder, seconds, chance
        self.command = [sys.executable, str(TRAIN), *words, f"runs={folder}"]
        self.kills: Counter[str] = Counter()
        self.unreadable: list[str] = []

    @property
    def run(self) -> Run | None:
        """The run directory, once there is one."""
        found = [path for path in self.folder.glob("*/*") if path.is_dir()]
        return Run(found[0]) if found else None

    def start(self) -> subprocess.Popen:
        return subprocess.Popen(
            self.command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def kill_once(self) -> bool:
        """Start it, and kill it at a random moment; False if it came to its end before."""
        process, moment = self.start(), self.chance.choice(MOMENTS)
        if moment == "anywhere":
            self._wait(process, self.chance.uniform(0, 0.5 * self.seconds))
        else:
            self._until(process, lambda: self.run is not None and self.run.status().get("pid") == process.pid)
            self._wait(process, self.chance.uniform(0, 0.1 * self.seconds))
        if moment == "writing":
            self._until(process, lambda: self._writes(process.pid))
            time.sleep(self.chance.uniform(0, 0.01))
        process.kill()
        told, _ = process.communicate()
        if process.returncode >= 0:
            if process.returncode:
                raise RuntimeError(f"{' '.join(self.command)} ended with {process.returncode}: {told}")
            return False
        self.kills[f"{moment}, inside a checkpoint write" if self._writes(process.pid) else moment] += 1
        self.unreadable += self._unreadable()
        return True

    def finish(self) -> None:
        process = self.start()
        told, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{' '.join(self.command)} ended with {process.returncode}: {told}")

    def _writes(self, pid: int) -> bool:
        """Whether a process has written half a checkpoint."""
        return self.run is not None and any(self.run.checkpoints.glob(f".*.{pid}"))

    def _unreadable(self) -> list[str]:
        """Return what a reader of the run could not read at this moment."""
        if self.run is None:
            return []
        found = [
            f"{path}: {damage}" for path in self.run.checkpoints.glob("[0-9]*") if (damage := checkpoint.verify(path))
        ]
        for name in ("status.json", "evaluation.json"):
            path = self.run.path / name
            try:
                json.loads(path.read_text()) if path.exists() else None
            except ValueError as error:
                found.append(f"{path}: {error}")
        state = self.run.status().get("state")
        if state not in (None, "INTERRUPTED", "DONE"):
            found.append(f"{self.run.path}: {state}, though nobody trains it")
        return found

    @staticmethod
    def _wait(process: subprocess.Popen, seconds: float) -> None:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            return

    @staticmethod
    def _until(process: subprocess.Popen, there: Any) -> None:
        while process.poll() is None and not there():
            time.sleep(0.0005)


def kills(out: Path, kills: int, workers: int, seed: int) -> dict[str, Any]:
    """Kill so many times, in runs of up to ten kills, each compared with an undisturbed one of the same settings."""
    variants = list(VARIANTS)[: -(-kills // KILLS_A_RUN)]
    twins = {}
    for name in variants:
        twins[name] = Victim(out / f"whole_{variants.index(name)}", [*SHORT, *VARIANTS[name]], 0, random.Random())
        start = time.monotonic()
        twins[name].finish()
        twins[name].seconds = time.monotonic() - start
        print(f"{name}: undisturbed in {twins[name].seconds:.1f} s", flush=True)

    def one(number: int) -> dict[str, Any]:
        name, left = variants[number % len(variants)], min(KILLS_A_RUN, kills - number * KILLS_A_RUN)
        twin, chance = twins[name], random.Random(f"{seed} {number}")
        total, rounds, differing, unreadable = Counter[str](), 0, [], []
        while left > 0:  # a run that ends before all of its kills is compared, and another one begun
            victim = Victim(out / f"killed_{number}.{rounds}", [*SHORT, *VARIANTS[name]], twin.seconds, chance)
            while left > 0 and victim.kill_once():
                left -= 1
            victim.finish()
            rounds += 1
            total += victim.kills
            unreadable += victim.unreadable
            assert victim.run is not None and twin.run is not None
            differing += [f"{victim.run.path}: {what}" for what in differences(victim.run, twin.run)]
        print(f"{name}: {sum(total.values())} kills in {rounds} runs, {len(differing)} differences", flush=True)
        return {"variant": name, "runs": rounds, "kills": total, "differences": differing, "unreadable": unreadable}

    with ThreadPoolExecutor(workers) as pool:
        rows = list(pool.map(one, range(-(-kills // KILLS_A_RUN))))
    moments = sum((row["kills"] for row in rows), Counter[str]())
    return {
        "kills": sum(moments.values()),
        "runs": sum(row["runs"] for row in rows),
        "moments": dict(sorted(moments.items())),
        "differences": [what for row in rows for what in row["differences"]],
        "unreadable": [what for row in rows for what in row["unreadable"]],
    }


# ------------------------------------------------------------------------------------------------------------- long


def long(out: Path, steps: int, every: float) -> dict[str, Any]:
    """Train for long, with held-out losses and previews, and watch memory, open files and what is written."""
    words = [
        *LONG,
        f"trainer.steps={steps}",
        f"trainer.checkpoint_every={max(1, steps // 100)}",
        f"runs={out / 'long'}",
    ]
    process = subprocess.Popen([sys.executable, str(TRAIN), *last_of_each(words)], env=ENVIRONMENT)
    rows: list[dict[str, float]] = []
    while process.poll() is None:
        time.sleep(every)
        found = [path for path in (out / "long").glob("*/*") if path.is_dir()]
        lines = read_metrics(found[0]) if found else []
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            files = len(os.listdir(f"/proc/{process.pid}/fd"))
        except OSError:  # it has ended
            break
        kib = next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")), None)
        if lines and kib is not None:
            rows.append({"step": lines[-1]["step"], "mib": kib / 1024, "files": files})
    if process.wait():
        raise RuntimeError(f"training ended with {process.returncode}")
    run = found[0]
    later = [row for row in rows if steps / 4 <= row["step"] < steps]  # the end draws pictures
    slope, _ = np.polyfit([row["step"] for row in later], [row["mib"] for row in later], 1)
    patterns = ("metrics.jsonl", "tensorboard/*", "previews.pt", "checkpoints/*/*", "**/*")
    sizes = {pattern: sum(path.stat().st_size for path in run.glob(pattern) if path.is_file()) for pattern in patterns}
    return {
        "steps": steps,
        "looks": len(rows),
        "MiB at a quarter, at the end, most": [later[0]["mib"], later[-1]["mib"], max(row["mib"] for row in rows)],
        "MiB per 1,000 steps": 1000 * slope,
        "open files, least and most": [min(row["files"] for row in later), max(row["files"] for row in later)],
        "bytes": sizes,
        "checkpoints": len(list((run / "checkpoints").iterdir())),
    }


# ------------------------------------------------------------------------------------------------------------- same


QUICK = last_of_each([*SHORT, "trainer.steps=24", "trainer.checkpoint_every=6", "trainer.previews=2"])
EVALUATION = """evaluation=[
    "metric=[frechet,kernel] n=64 features=pca pca=8 sampler.steps=5",
    "metric=loss_by_snr n=32",
    "metric=bits_per_dim n=8 bits_per_dim.steps=5"]""".replace("\n    ", "")
CASES = {  # each is trained by both codes
    "plain": ["model.dropout=0", "recognition=true"],
    "learned variance": ["diffusion.variance=learned", "diffusion.loss=hybrid", "model.out_channels=2"],
    "accumulation, bf16": ["trainer.accumulate=4", "trainer.precision=bf16"],
    "accumulation, fp32": ["trainer.accumulate=4", "trainer.precision=fp32"],
    "flips, fp16": ["data.flip=true", "trainer.precision=fp16"],
    "augmentation": ["augment=script"],
    "offset noise, target eps": ["trainer.offset_noise=0.1", "diffusion.target=eps"],
    "loss-aware times": ["trainer.time_sampling=loss_aware", "schedule.T=20"],
    "stratified times": ["trainer.time_sampling=stratified"],
    "classes": ["model.num_classes=10"],
    "SGD": ["optimizer._target_=torch.optim.SGD", "~optimizer.betas", "~optimizer.eps", "+optimizer.momentum=0.9"],
    "no EMA": ["trainer.ema_decay=0"],
    "min_snr, target x_0": ["diffusion.loss=min_snr", "diffusion.target=x_0"],
    "min_snr, target v": ["diffusion.loss=min_snr", "diffusion.target=v"],
}  # fmt: skip
INTERRUPTED = "plain"  # by both codes, which then go on
HANDED_OVER = ("plain", "flips, fp16", "loss-aware times", "SGD")  # begun by the revision, ended by the working tree
SAMPLES = {  # the run's case, words
    "ancestral": ("plain", "sampler=ancestral sampler.steps=20"),
    "ancestral, learned variance": ("learned variance", "sampler=ancestral sampler.steps=20"),
    "DDIM, eta 1": ("plain", "sampler=ddim sampler.eta=1 sampler.steps=10"),
    "DDIM, classes": ("classes", "sampler=ddim sampler.steps=10"),
    "DPM-Solver++ 2M": ("plain", "sampler=dpmpp_2m sampler.steps=10"),
    "DPM-Solver++ SDE": ("plain", "sampler=dpmpp_sde sampler.steps=10"),
    "Heun": ("plain", "sampler=heun sampler.steps=10"),
    "UniPC": ("plain", "sampler=unipc sampler.steps=10"),
    "LMS": ("plain", "sampler=lms sampler.steps=10"),
}
# Imports everything once and carries out each command in a child of its own: imports take longer than these commands.
SERVER = """
import importlib, json, os, runpy, sys

import ddpm.cli, ddpm.config, models

for name in ("matplotlib.figure", "matplotlib.backends.backend_agg", "scipy.linalg", "sklearn.linear_model",
             "torch._dynamo", "torch.utils.tensorboard"):
    importlib.import_module(name)
print(json.dumps([ddpm.__file__, models.__file__, str(ddpm.config.conf_dir())]), flush=True)
for line in sys.stdin:
    log, *sys.argv = json.loads(line)
    child = os.fork()
    if not child:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.dup2(1, 2)
        runpy.run_path(sys.argv[0], run_name="__main__")
        sys.exit()
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Code:
    """The code in a folder, and a process of it that carries out commands, one at a time.

    Args:
        root: with ddpm, models, conf and experiments.
        out: for runs, samples and logs.
    Raises: RuntimeError if that process does not start, or imports the code of another folder.
    """

    def __init__(self, root: Path, out: Path):
        self.root, self.out, self.lock = root.resolve(), out, threading.Lock()
        self.environment = environment(self.root) | {"GLOO_SOCKET_IFNAME": "lo"}
        out.mkdir(parents=True)
        command = [sys.executable, "-P", "-c", SERVER]  # -P: nothing is imported from the current folder
        self.server = subprocess.Popen(
            command, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        origins = self._answer()
        foreign = [path for path in origins if not Path(path).resolve().is_relative_to(self.root)]
        if foreign:
            self.__exit__()
            raise RuntimeError(f"{self.root} would run the code of {', '.join(foreign)}")

    def __enter__(self) -> "Code":
        return self

    def __exit__(self, *error: object) -> None:
        self.server.stdin.close()
        self.server.wait()

    def _answer(self) -> Any:
        line = self.server.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.root} ended with {self.server.wait()}")
        return json.loads(line)

    def folder(self, name: str) -> Path:
        """Return the folder for this name."""
        return self.out / re.sub(r"\W+", "_", name)

    def carry_out(
        self, script: str, words: list[str], name: str, code: int = 0, meanwhile: Callable[[int], None] | None = None
    ) -> None:
        """Run experiments/SCRIPT.py.

        Args:
            name: of the log.
            code: the exit code that is expected.
            meanwhile: called with the process's id.
        Raises: RuntimeError if it ends with another exit code.
        """
        log = self.folder(name).with_suffix(".log")
        with self.lock:
            command = [str(log), str(self.root / "experiments" / f"{script}.py"), *words]
            self.server.stdin.write(json.dumps(command) + "\n")
            self.server.stdin.flush()
            pid = self._answer()
            if meanwhile is not None:
                meanwhile(pid)
            ended = self._answer()
        if ended != code:
            last = (log.read_text().strip().splitlines() or [""])[-1]
            raise RuntimeError(f"{script} ended with {ended} instead of {code}; the last line of {log}: {last}")


def run_in(folder: Path) -> Path:
    """The one run directory in a folder of runs; RuntimeError if there is none, or another one."""
    found = [path for path in folder.glob("*/*") if path.is_dir()]
    if len(found) != 1:
        raise RuntimeError(f"{len(found)} runs in {folder} instead of one")
    return found[0]


def trained(name: str, words: list[str], code: Code) -> Path:
    """A run, in the folder of its name."""
    code.carry_out("train", [*words, f"runs={code.folder(name)}"], name)
    return run_in(code.folder(name))


def evaluated(code: Code) -> Path:
    """The plain run, measured: its command again with what is to be measured."""
    return trained("plain", [*QUICK, *CASES["plain"], EVALUATION], code)


def sampled(case: str, words: list[str], code: Code) -> Path:
    """A file of samples from a case's run."""
    name = "samples " + " ".join([case, *words])
    out = code.folder(name).with_suffix(".npy")
    run = run_in(code.folder(case))
    code.carry_out("sample", [f"run={run}", "n=16", "seed=1", "device=cpu", *words, f"out={out}"], name)
    return out


def extended(name: str, by: Code, code: Code) -> Path:
    """The plain run of one code, copied and extended by another."""
    parent, folder = run_in(by.folder("plain")), code.folder(name)
    shutil.copytree(parent, folder / "default" / parent.name)
    words = [f"extend={folder / 'default' / parent.name}", "trainer.steps=36", "device=cpu", f"runs={folder}"]
    code.carry_out("train", words, name)
    shutil.rmtree(folder / "default" / parent.name)
    return run_in(folder)


def interrupted(name: str, words: list[str], begins: Code, ends: Code) -> Path:
    """A run that gets SIGTERM after a few steps, and is ended by the same command, perhaps of another code.

    Raises: RuntimeError if it is not stopped by that, or begins anew afterwards.
    """
    folder = ends.folder(name)
    words = [*words, f"runs={folder}"]

    def interrupt(pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            while not any(path.read_bytes().count(b"\n") >= 4 for path in folder.glob("*/*/metrics.jsonl")):
                os.kill(pid, 0)
                time.sleep(0.001)
            os.kill(pid, signal.SIGTERM)

    begins.carry_out("train", words, name, 128 + signal.SIGTERM, interrupt)
    run = run_in(folder)
    before = read_metrics(run)
    ends.carry_out("train", words, name)
    if not before or read_metrics(run)[: len(before)] != before:  # with the time used, which no two runs share
        raise RuntimeError(f"{run} was started anew instead of resumed")
    return run


def of_two_ranks(name: str, words: list[str], code: Code) -> Path:
    """A run of two processes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks = ["--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    script = str(code.root / "experiments" / "train.py")
    command = [sys.executable, "-m", "torch.distributed.run", *ranks, script, *words, f"runs={code.folder(name)}"]
    done = subprocess.run(command, env=code.environment, cwd=code.out, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stdout}{done.stderr}")
    return run_in(code.folder(name))


def between(one: Path, other: Path) -> list[str]:
    """In what two run directories, or two files, differ."""
    if one.is_dir():
        return differences(Run(one), Run(other))
    return [] if one.read_bytes() == other.read_bytes() else [f"{other.name}: its bytes"]


def commit_of(revision: str) -> str | None:
    """The full name of a revision; None if there is none."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def unpack(commit: str, folder: Path) -> None:
    """Put the files of a commit into a folder."""
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", commit], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")


def same(out: Path, commit: str, mnist: Path | None) -> dict[str, Any]:
    """Train, interrupt, extend, measure and sample by the code of a commit and by the working tree, and compare.

    Args:
        out: what an earlier call left in its folder `same` is deleted.
        mnist: the folder `data.root` of MNIST; without it that case is left out.
    """
    out, rows, start = (out / "same").resolve(), [], time.monotonic()
    shutil.rmtree(out, ignore_errors=True)
    cases = {name: [*QUICK, *words] for name, words in CASES.items()}
    if mnist is not None:
        root = [f"data.root={mnist.resolve()}", "data.download=false"]
        cases["MNIST"] = last_of_each([*QUICK, "trainer.steps=12", "experiment=mnist", *root])

    def row(name: str, compare: Callable[[], list[str]]) -> None:
        began = time.monotonic()
        try:
            found = compare()
        except (RuntimeError, OSError, ValueError) as error:
            found = [f"failed: {error}"]
        print(f"{name:<44}{'; '.join(found) or 'the same'}", flush=True)
        rows.append({"case": name, "seconds": round(time.monotonic() - began, 1), "differences": found})

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool, contextlib.ExitStack() as stack:
        unpack(commit, Path(folder))
        both = list(pool.map(Code, (Path(folder), ROOT), (out / "revision", out / "working_tree")))
        then, now = [stack.enter_context(code) for code in both]

        def undisturbed(name: str) -> Path:
            return run_in(now.folder(name))

        def by_both(make: Callable[[Code], Path]) -> list[str]:
            return between(*pool.map(make, both))

        def interrupted_by_both() -> list[str]:
            words, name = cases[INTERRUPTED], f"interrupted {INTERRUPTED}"
            runs = pool.map(lambda code: interrupted(name, words, code, code), both)
            return [what for run in runs for what in between(undisturbed(INTERRUPTED), run)]

        def handed_over(name: str) -> list[str]:
            return between(undisturbed(name), interrupted(f"handed over {name}", cases[name], then, now))

        for name, words in cases.items():
            row(name, partial(by_both, partial(trained, name, words)))
        for name, (case, words) in SAMPLES.items():
            row(f"samples: {name}", partial(by_both, partial(sampled, case, words.split())))
        row("extended", partial(by_both, lambda code: extended("extended", code, code)))
        row("extended, a run of the revision", lambda: between(
            run_in(now.folder("extended")), extended("extended of the revision", then, now)
        ))  # fmt: skip
        row(f"interrupted: {INTERRUPTED}", interrupted_by_both)
        list(pool.map(lambda name: row(f"begun by the revision: {name}", partial(handed_over, name)), HANDED_OVER))
        row("evaluation", partial(by_both, evaluated))  # changes the plain run, which others are compared with
        row("two ranks", lambda: between(*(of_two_ranks("two ranks", cases["augmentation"], code) for code in both)))
    return {
        "revision": commit,
        "working tree": git_commit(),
        "seconds": round(time.monotonic() - start),
        "cases": rows,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["kills", "long", "same"])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2, help="runs that are killed side by side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two looks at a long run")
    parser.add_argument("--revision", default="HEAD", help="the commit that the working tree is compared with")
    parser.add_argument("--mnist", type=Path, help="data.root of MNIST, which is left out without it")
    parser.add_argument("--out", type=Path, default=Path("runs/stress"))
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))  # after temporary folders are removed
    if given.what == "kills":
        told = kills(given.out, given.kills, given.workers, given.seed)
        held = not told["differences"] and not told["unreadable"]
    elif given.what == "long":
        told = long(given.out, given.steps, given.every)
        least, most = told["open files, least and most"]
        held = abs(told["MiB per 1,000 steps"]) < 1 and most <= least + 2  # a checkpoint that is being written, say
    else:
        commit = commit_of(given.revision)
        if commit is None:
            parser.error(f"--revision {given.revision}: there is no such commit")
        told = same(given.out, commit, given.mnist)
        held = not any(row["differences"] for row in told["cases"])
    text = json.dumps(told, indent=1)
    (given.out / f"{given.what}.json").write_text(text)
    if given.what == "same":  # which has printed its table
        differing = sum(bool(row["differences"]) for row in told["cases"])
        print(f"{differing} of {len(told['cases'])} cases differ, in {told['seconds']} s")
    else:
        print(text)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
