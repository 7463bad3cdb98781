"""Sweeps on a cluster, tried on a SLURM of one node: `python experiments/cluster.py [TRIAL ...]`.

    sweep       a multirun of 2 x 2, and `ddpm-study status` while it runs
    limit       a run whose job reaches its time limit goes on in the same job
    cancelled   a job that is ended by scancel while it trains, and one before its run began
    drained     a node that is drained while one run trains and another waits
    ranks       two torchrun of one run, as on two machines

SLURM is taken as found; where there is none that answers, slurmctld, slurmd and munged are started in a temporary
folder, from what is installed, and ended in the end. Each trial prints what came of it; exit code 1 if one did not
hold.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

from ddpm.runs.checkpoint import load_weights
from ddpm.runs.directory import DONE, Run, read_metrics

ROOT = Path(__file__).resolve().parents[1]
DAEMONS = ("munged", "slurmctld", "slurmd")
SMALL = [
    "model.channels=8", "model.channel_mults=[1]", "model.groups=4", "model.blocks=1", "model.middle_attention=false",
    "model.attention_resolutions=[]", "schedule.T=10", "sampler.steps=2", "data.validation=0.02", "trainer.steps=30",
    "trainer.seconds=null", "trainer.batch_size=8", "trainer.warmup=0", "trainer.previews=0", "trainer.log_every=1",
    "trainer.checkpoint_every=10", "recognition=false", "device=cpu",
]  # fmt: skip
ENDLESS = ["trainer.steps=100000000", "trainer.checkpoint_every=100000000"]
QUEUED = [
    "hydra/launcher=slurm", "hydra.launcher.gpus_per_node=null", "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.timeout_min=10",
]  # fmt: skip
CONFIG = """ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={port}
SlurmdPort={other}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SwitchType=switch/none
MpiDefault=none
KillWait=20
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=60 State=UP
"""  # cred_expire: a job that is queued again waits so long, by default two minutes


# ---------------------------------------------------------------------------------------------- SLURM of one node


def answers() -> bool:
    """Whether there is a SLURM already."""
    return shutil.which("sinfo") is not None and subprocess.run(["sinfo"], capture_output=True).returncode == 0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@contextlib.contextmanager
def one_node(folder: Path, cpus: int = 2) -> Iterator[None]:
    """A SLURM that answers within it: the one that is there, or one of this machine alone.

    Args:
        folder: for its files, if it has to be started; on the machine's own disk.
    Raises: FileNotFoundError if it is not installed.
    """
    if answers():
        yield
        return
    if missing := [name for name in DAEMONS if shutil.which(name) is None]:
        raise FileNotFoundError(f"{', '.join(missing)}: not installed (of Debian: apt install slurm-wlm munge)")
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    key, config = folder / "munge.key", folder / "slurm.conf"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    host, user = socket.gethostname().partition(".")[0], os.environ.get("USER") or "root"
    ports = free_port(), free_port()
    config.write_text(CONFIG.format(folder=folder, host=host, user=user, cpus=cpus, port=ports[0], other=ports[1]))
    own = [f"--{name}-file={folder}/munged.{name}" for name in ("pid", "log", "seed")]
    commands = [
        ["munged", "--force", "--foreground", f"--socket={folder}/munge.socket", f"--key-file={key}", *own],
        ["slurmctld", "-D", "-f", str(config)],
        ["slurmd", "-D", "-f", str(config)],
    ]
    before, started = os.environ.get("SLURM_CONF"), []
    os.environ["SLURM_CONF"] = str(config)
    try:
        for command in commands:
            log = open(folder / f"{command[0]}.out", "w")  # noqa: SIM115  # the daemon's, as long as it lives
            started.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))
            time.sleep(1)
        until(lambda: "idle" in slurm("sinfo", "--noheader", "--format=%T"), 60)
        yield
    finally:
        slurm("scancel", f"--user={user}")  # or what jobs have started outlives the daemons
        with contextlib.suppress(TimeoutError):
            until(lambda: not slurm("squeue", "--noheader"), 60)
        for process in reversed(started):
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
        if before is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = before


def slurm(*command: str) -> str:
    """Return what a SLURM command prints; nothing if it fails."""
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def until(come: Callable[[], object], seconds: float) -> None:
    """Look each half second whether something has come.

    Raises: TimeoutError.
    """
    end = time.monotonic() + seconds
    while not come():
        if time.monotonic() > end:
            raise TimeoutError(f"it has not come in {seconds:.0f} s")
        time.sleep(0.5)


# ------------------------------------------------------------------------------------------------------ the trials


class Sweep:
    """A command that trains on the cluster, in a folder of its own.

    Args:
        folder: where it is started.
        words: that are typed.
    """

    def __init__(self, folder: Path, *words: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.words, self.log = folder, words, folder / "log"
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(ROOT / "experiments" / "train.py"), "-m", *SMALL, *QUEUED, *words]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)

    @property
    def runs(self) -> dict[int, Run]:
        """Seed of each run that began -> it."""
        found = self.all_runs
        seeds = [re.search(r"^seed: (\d+)", (run.path / "config.yaml").read_text(), re.M) for run in found]
        return {int(seed[1]): run for seed, run in zip(seeds, found, strict=True) if seed}

    @property
    def all_runs(self) -> list[Run]:
        return [Run(path.parent) for path in sorted(self.folder.glob("runs/default/*/status.json"))]

    def states(self) -> list[str]:
        return [run.status()["state"] for run in self.all_runs]

    def training(self, seed: int) -> bool:
        """Whether the run of this seed has taken some steps."""
        run = self.runs.get(seed)
        return run is not None and run.status()["state"] == "RUNNING" and len(read_metrics(run.path)) > 5

    def job(self, seed: int) -> str:
        return str(self.runs[seed].status()["cluster_job"])

    def ended(self, seconds: float = 300) -> tuple[int, str, float]:
        """Waits for the command: its exit code, what it printed, and how long after the last run it came back."""
        code = self.process.wait(seconds)
        back, last = time.time(), [run.status().get("ended") for run in self.all_runs]
        since = [back - datetime.fromisoformat(moment).timestamp() for moment in last if moment]
        return code, self.log.read_text(), min(since, default=0.0)

    def study(self) -> str:
        """Return the output of `ddpm-study status`."""
        command = [sys.executable, str(ROOT / "experiments" / "study.py"), "status", "runs/default"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True).stdout


def sweep(folder: Path) -> dict[str, object]:
    """A multirun of 2 x 2."""
    tried = Sweep(folder, "schedule=cosine,sigmoid", "seed=0,1", "trainer.steps=300", "trainer.checkpoint_every=100")
    until(lambda: "RUNNING" in tried.states(), 120)
    status = tried.study()
    code, log, after = tried.ended()
    again = Sweep(folder, "schedule=cosine", "seed=0,1", "trainer.steps=300").ended()
    return {
        "exit codes": [code, again[0]],
        "states": tried.states(),
        "seconds from the last run to the prompt": round(after, 1),
        "status says running, and the job": bool(re.search(r"^RUNNING .*job \d+_\d+", status, re.M)),
        "held": code == again[0] == 0 and tried.states() == ["DONE"] * 4 and after < 15 and "job " in status,
        "log": log.splitlines()[-1:],
    }


def limit(folder: Path) -> dict[str, object]:
    """A run that needs longer than its job's time limit, of a minute."""
    words = ["trainer.steps=null", "trainer.seconds=60", "trainer.checkpoint_every=100000000"]
    tried = Sweep(folder, *words, "hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=5", "seed=0")
    code, log, after = tried.ended(580)
    (run,) = tried.runs.values()
    told = "".join(path.read_text() for path in folder.glob("runs/default/.submitit/*/*_log.err"))
    outputs = "".join(path.read_text() for path in folder.glob("runs/default/.submitit/*/*_log.out"))
    anew = len(re.findall("SIGUSR2: writing a checkpoint", told))
    return {
        "exit code": code,
        "state": run.status()["state"],
        "times that it was queued again": anew,
        "went on from a checkpoint": len(re.findall("going on from", outputs)),
        "seconds from the last run to the prompt": round(after, 1),
        "held": code == 0 and run.status()["state"] == "DONE" and anew > 0 and "going on from" in outputs,
        "log": log.splitlines()[-1:],
    }


def cancelled(folder: Path) -> dict[str, object]:
    """One job is ended while it trains, one while it waits in the queue; the third ends by itself."""
    words = ["seed=0,1,2", "hydra.launcher.array_parallelism=1", *ENDLESS]
    tried = Sweep(folder, *words)
    until(lambda: tried.training(0), 120)
    array = tried.job(0).partition("_")[0]
    slurm("scancel", f"{array}_2")
    slurm("scancel", f"{array}_0")
    until(lambda: tried.training(1), 120)
    slurm("scancel", f"{array}_1")
    moment = time.monotonic()
    code, log, _ = tried.ended()
    took = time.monotonic() - moment
    return {
        "exit code": code,
        "states": tried.states(),
        "seconds from scancel to the prompt": round(took, 1),
        "held": code == 1
        and tried.states() == ["INTERRUPTED"] * 2
        and "3 runs are not done" in log
        and log.count("SIGTERM") == 2
        and "ended before its run began" in log,
        "log": log.splitlines()[-4:],
    }


def drained(folder: Path) -> dict[str, object]:
    """The node takes no more jobs while one run trains: that one ends, the other waits until the node is back."""
    node = slurm("sinfo", "--noheader", "--Node", "--format=%N").split()[0]
    words = ["seed=0,1", "hydra.launcher.array_parallelism=1", "trainer.steps=600", "trainer.checkpoint_every=100"]
    tried = Sweep(folder, *words)
    until(lambda: tried.training(0), 120)
    slurm("scontrol", "update", f"nodename={node}", "state=drain", "reason=trial")
    try:
        until(lambda: tried.states() == ["DONE"], 120)
        time.sleep(15)
        waited = tried.process.poll() is None and tried.states() == ["DONE"]
    finally:
        slurm("scontrol", "update", f"nodename={node}", "state=resume")
    code, log, after = tried.ended()
    return {
        "exit code": code,
        "states": tried.states(),
        "waited while the node was drained": waited,
        "seconds from the last run to the prompt": round(after, 1),
        "held": waited and code == 0 and tried.states() == ["DONE"] * 2,
        "log": log.splitlines()[-1:],
    }


def ranks(folder: Path) -> dict[str, object]:
    """One run by two torchrun that find each other, each with one process, and the same by one process alone."""
    folder.mkdir(parents=True, exist_ok=True)
    port, environment = free_port(), os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    meet = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *meet, "--rdzv-id=trial"]
    script = [str(ROOT / "experiments" / "train.py"), *SMALL, "model.dropout=0", "optimizer.eps=0.01"]
    machines = [
        subprocess.Popen(
            [*torchrun, *script, "runs=two"], cwd=folder, env=environment | {"GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    told = [process.communicate(timeout=240)[0] for process in machines]
    subprocess.run([sys.executable, *script, "runs=one"], cwd=folder, env=environment, capture_output=True)
    one, two = (
        Run(next(path for path in folder.glob(f"{name}/default/*") if path.is_dir())) for name in ("one", "two")
    )
    losses = ([line["loss"] for line in read_metrics(run.path)] for run in (two, one))
    apart = max((abs(a - b) / abs(b) for a, b in zip(*losses, strict=True)), default=float("inf"))
    a, b = (load_weights(run.checkpoints / "30" / "model.safetensors") for run in (two, one))
    moved = max((a[name] - b[name]).abs().max().item() for name in b)
    codes = [process.returncode for process in machines]
    return {
        "exit codes": codes,
        "two processes were told": "2 processes" in "".join(told),
        "states": [run.status()["state"] for run in (two, one)],
        "largest relative difference of a loss to one process": apart,
        "largest difference of a weight": moved,
        "held": codes == [0, 0]
        and "2 processes" in "".join(told)
        and two.hash == one.hash
        and all(run.status()["state"] == DONE for run in (two, one))
        and max(apart, moved) < 1e-4,
    }


TRIALS = {trial.__name__: trial for trial in (sweep, limit, cancelled, drained, ranks)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trials", nargs="*", choices=[*TRIALS, []], help=f"of {', '.join(TRIALS)}; without any, all")
    chosen = parser.parse_args().trials or list(TRIALS)
    signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))  # after the daemons have ended
    failed = 0
    with tempfile.TemporaryDirectory(prefix="cluster_") as scratch:
        folder = Path(scratch)
        with one_node(folder / "slurm") if set(chosen) - {"ranks"} else contextlib.nullcontext():
            for name in chosen:
                told = TRIALS[name](folder / name)
                failed += not told["held"]
                print(json.dumps({name: told}, indent=1), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
