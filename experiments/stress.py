"""What a run survives: `kills` kills training at random moments and compares, `long` watches a long run grow.

    python experiments/stress.py kills --kills 200 --out runs/stress
    python experiments/stress.py long --steps 20000 --out runs/stress

Each prints a table, writes it as JSON beside the runs, and exits with 1 if something did not hold.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddpm import checkpoint
from ddpm.runs import Run, read_metrics

TRAIN = Path(__file__).parent / "train.py"
# One thread: two are hardly faster with such networks, and several times slower where something else wants a core.
PATHS = filter(None, [str(TRAIN.parents[1]), os.environ.get("PYTHONPATH")])
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(PATHS)}
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
        """What somebody who looks at the run now could not read."""
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


def differences(one: Run, other: Run) -> list[str]:
    """In what two runs differ that should be the same: weights, averages, optimizer, metrics, pictures; not in time."""
    found = []
    last, same = checkpoint.last_whole(one.checkpoints), checkpoint.last_whole(other.checkpoints)
    for name in ("model.safetensors", "ema.safetensors"):
        if (last / name).read_bytes() != (same / name).read_bytes():
            found.append(name)
    states = [{k: v for k, v in checkpoint.load_state(path).items() if k != "seconds"} for path in (last, same)]
    found += [
        f"state, {key}" for key in states[0].keys() | states[1].keys() if not equal(*(s.get(key) for s in states))
    ]
    lines = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(run.path)] for run in (one, other)
    ]
    found += ["metrics.jsonl"] * (lines[0] != lines[1])
    names = [sorted(path.name for path in run.checkpoints.iterdir()) for run in (one, other)]
    found += ["names of checkpoints"] * (names[0] != names[1])
    pictures = [
        {path.name: path.read_bytes() for path in run.path.iterdir() if path.suffix in (".png", ".gif")}
        for run in (one, other)
    ]
    found += [name for name in sorted(pictures[0] | pictures[1]) if pictures[0].get(name) != pictures[1].get(name)]
    return found


def equal(one: Any, other: Any) -> bool:
    """Whether nested containers of tensors and numbers are the same to the bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    return type(one) is type(other) and one == other


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
    words = list({word.partition("=")[0]: word for word in words}.values())  # the last of a key counts
    process = subprocess.Popen([sys.executable, str(TRAIN), *words], env=ENVIRONMENT)
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["kills", "long"])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2, help="runs that are killed side by side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two looks at a long run")
    parser.add_argument("--out", type=Path, default=Path("runs/stress"))
    given = parser.parse_args()
    if given.what == "kills":
        told = kills(given.out, given.kills, given.workers, given.seed)
        held = not told["differences"] and not told["unreadable"]
    else:
        told = long(given.out, given.steps, given.every)
        least, most = told["open files, least and most"]
        held = abs(told["MiB per 1,000 steps"]) < 1 and most <= least + 2  # a checkpoint that is being written, say
    text = json.dumps(told, indent=1)
    (given.out / f"{given.what}.json").write_text(text)
    print(text)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
