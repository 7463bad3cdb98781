"""ddpm/commands/train/cluster.py: jobs of a queue are awaited by their runs' files, on SLURM itself too."""

import pickle
import runpy
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from ddpm import config
from ddpm.commands.train import cluster
from ddpm.commands.train.cluster import GONE, GRACE, PATIENCE, SOON, Awaited, Outcome, Queue
from ddpm.runs.directory import DONE, FAILED, INTERRUPTED, RUNNING, Run

SCRIPT = Path(__file__).parents[1] / "experiments" / "cluster.py"


class Answer(NamedTuple):
    """What a job of Hydra's returns."""

    overrides: list[str]
    return_value: object


class Job:
    """A job as submitit has it, whose folder is what the test writes."""

    def __init__(self, folder: Path, done: bool = False):
        folder.mkdir()
        self.job_id = "7_1"
        self.paths = SimpleNamespace(folder=folder, result_pickle=folder / "result.pkl", stderr=folder / "err")
        self.says_done = done

    def done(self) -> bool:
        return self.says_done

    def results(self) -> list[Answer]:
        outcome, value = pickle.loads(self.paths.result_pickle.read_bytes())
        if outcome == "error":
            raise RuntimeError(value)
        return [value]


class Waited:
    """A job and the time that passes while it is awaited: at each moment something may happen.

    Args:
        answers: of the queue, by the second from which on each is given.
        happens: what is done at a second.
    """

    def __init__(self, tmp_path, answers=None, happens=None, done=False, queued=True):
        self.now, self.answers, self.happens, self.asked = 0.0, answers or {}, dict(happens or {}), 0
        self.job, self.run = Job(tmp_path / "job", done), Run(tmp_path / "runs" / "0123456789ab")
        queue = Queue(self.ask, lambda: self.now) if queued else None
        self.awaited = Awaited(self.job, ["seed=1"], queue, self.pause, lambda: self.now)

    def ask(self):
        self.asked += 1
        state = [answer for since, answer in self.answers.items() if since <= self.now]
        return None if not state or state[-1] is None else {} if state[-1] == GONE else {"7_1": state[-1]}

    def pause(self, seconds):
        self.now += seconds
        assert self.now < 1000, "it waits for ever"
        for moment in sorted(moment for moment in self.happens if moment <= self.now):
            self.happens.pop(moment)(self)

    def result(self):
        (returned,) = self.awaited.results()
        return returned.return_value


def begins(waited):
    waited.run.path.mkdir(parents=True)
    (waited.job.paths.folder / "7_1_run.txt").write_text(str(waited.run.path))
    waited.run.write_status(INTERRUPTED, step=0)  # nobody holds its lock


def becomes(state, **fields):
    return lambda waited: waited.run.write_status(state, **fields)


def answers(value, outcome="success"):
    return lambda waited: waited.job.paths.result_pickle.write_bytes(pickle.dumps((outcome, value)))


def test_a_result_is_the_answer_at_once_and_the_queue_is_asked_rarely(tmp_path):
    waited = Waited(tmp_path, {0: "RUNNING"}, {60: answers(Answer(["seed=1"], None))})
    assert waited.result() is None and waited.now == 60 and waited.asked == 6


def test_a_job_that_is_killed_is_told_by_its_status_within_seconds(tmp_path):
    killed = becomes(INTERRUPTED, step=40, reason="interrupted by SIGTERM")
    waited = Waited(tmp_path, {0: "RUNNING", 50: "CANCELLED"}, {1: begins, 50: killed})
    outcome = waited.result()
    assert outcome.reason.endswith(
        "job 7_1 (CANCELLED) ended at step 40 (interrupted by SIGTERM); the same command resumes"
    )
    assert not outcome.held and waited.now <= 50 + SOON + GRACE + 1


def test_a_job_that_is_queued_again_is_awaited(tmp_path):
    """At its time limit, or after its node failed: the queue has it still, whatever the files say meanwhile."""
    at_limit = becomes(INTERRUPTED, reason="interrupted by SIGUSR2")
    again = {1: begins, 50: at_limit, 300: answers(Answer(["seed=1"], None))}
    waited = Waited(tmp_path, {0: "RUNNING", 50: "NODE_FAIL", 51: "PENDING", 200: "RUNNING"}, again)
    assert waited.result() is None and waited.now == 300


@pytest.mark.parametrize(("state", "named"), [("CANCELLED", "CANCELLED"), (GONE, "no longer in the queue")])
def test_a_job_that_never_began_a_run_is_one_line(state, named, tmp_path):
    waited = Waited(tmp_path, {0: "PENDING", 40: state})
    told = f"job 7_1 ({named}) ended before its run began; its log is {tmp_path / 'job' / 'err'}"
    assert waited.result() == Outcome(told) and 40 <= waited.now <= 40 + cluster.SELDOM + GRACE + 1


def test_without_an_answer_of_the_queue_a_status_decides_after_patience(tmp_path):
    stopped = becomes(INTERRUPTED, step=3, reason="interrupted by SIGTERM")
    waited = Waited(tmp_path, {}, {1: begins, 2: becomes(INTERRUPTED, reason="interrupted by SIGUSR2"), 100: stopped})
    assert "ended at step 3 (interrupted by SIGTERM)" in waited.result().reason
    assert 100 + PATIENCE <= waited.now <= 100 + PATIENCE + 2, "a run that is to go on anew was not given up"


def test_without_an_answer_and_a_status_submitit_is_asked(tmp_path):
    waited = Waited(tmp_path, {}, {70: lambda waited: setattr(waited.job, "says_done", True)})
    assert waited.result().reason.startswith("job 7_1 ended before its run began")
    assert 70 + GRACE <= waited.now <= 75


def test_a_process_of_this_machine_is_known_to_submitit(tmp_path):
    waited = Waited(tmp_path, happens={1: begins, 9: becomes(FAILED, reason="no memory")}, done=False, queued=False)
    waited.happens[20] = lambda waited: setattr(waited.job, "says_done", True)
    assert waited.result().reason.startswith(f"{waited.run.path}: no memory; job 7_1 ended") and waited.now >= 20


@pytest.mark.parametrize("evaluation", [[], ["metric=cost"]])
def test_a_run_that_is_done_needs_no_answer_unless_it_was_to_be_measured(evaluation, tmp_path):
    waited = Waited(tmp_path, {0: "RUNNING", 9: "FAILED"}, {1: begins, 8: becomes(DONE)})
    waited.happens[2] = lambda waited: (waited.run.path / "config.yaml").write_text(
        f"evaluation: {evaluation}\nseed: 0\n"
    )
    outcome = waited.result()
    assert outcome is None if not evaluation else "ended before it was measured" in outcome.reason


def test_what_a_job_raised_stands_in_the_list_and_stops_no_other(tmp_path):
    trace = "Traceback\n  File\nValueError: not whole\n------\nYou can check full logs with 'job.stderr(0)'"
    waited = Waited(tmp_path, {0: "RUNNING"}, {3: answers(trace, "error")})
    assert waited.result() == Outcome(f"ValueError: not whole; its log is {tmp_path / 'job' / 'err'}")


def test_a_run_that_a_process_holds_is_not_over(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "LOOK", 2 * PATIENCE)  # for each look waits a moment for the lock
    waited = Waited(tmp_path, {}, {1: begins, 3: becomes(RUNNING), 240: answers(Answer(["seed=1"], None))})
    waited.happens[2] = lambda waited: held.__enter__()
    held = waited.run.locked()
    try:
        assert waited.result() is None and waited.now == 240
    finally:
        held.__exit__(None, None, None)


def test_the_queue_is_read_without_accounting(tmp_path, monkeypatch):
    command = tmp_path / "squeue"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cluster.squeue() is None
    command.write_text("#!/bin/sh\necho \"$*\" > $0.words\necho '7_0 RUNNING'\necho '7_1 CANCELLED'\n")
    command.chmod(0o755)
    assert cluster.squeue() == {"7_0": "RUNNING", "7_1": "CANCELLED"}
    words = (tmp_path / "squeue.words").read_text()
    assert "--array" in words and "--states=all" in words and "sacct" not in words
    command.write_text("#!/bin/sh\nexit 1\n")
    assert cluster.squeue() is None


def test_a_run_is_noted_in_a_job_alone(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.delenv("SUBMITIT_FOLDER", raising=False)
    assert cluster.note_run(tmp_path) is None
    told = {"SUBMITIT_EXECUTOR": "slurm", "SUBMITIT_FOLDER": str(tmp_path), "SLURM_JOB_ID": "8"}
    told |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert cluster.note_run(tmp_path / "runs") == "7_1"
    assert Path((tmp_path / "7_1_run.txt").read_text()) == tmp_path / "runs"


class SlurmLauncher:
    pass


def test_where_no_job_can_be_submitted_it_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    with cluster.awaiting(SlurmLauncher()):  # another's, of that name
        pass
    monkeypatch.setattr(SlurmLauncher, "__module__", "hydra_plugins.hydra_submitit_launcher.submitit_launcher")
    with pytest.raises(SystemExit, match="2"), cluster.awaiting(SlurmLauncher()):
        pytest.fail("it went on")
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "sbatch, srun, squeue is not on this machine" in told


def test_the_preset_is_submitits_launcher_with_requeues():
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    assert config.jobs("train", ["hydra/launcher=slurm", "hydra.launcher.partition=gpu", "seed=0,1"], True) == [
        ["seed=0"],
        ["seed=1"],
    ]


@pytest.mark.slow
@pytest.mark.skipif(
    any(shutil.which(name) is None for name in ("munged", "slurmctld", "slurmd")), reason="SLURM is not installed"
)
def test_on_a_slurm_of_one_node(tmp_path):
    """All trials on one cluster: that of a time limit, which waits most of its time, beside two others."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    script = runpy.run_path(str(SCRIPT))

    def tried(trial: str) -> dict[str, object]:
        return script["TRIALS"][trial](tmp_path / trial)

    with script["one_node"](tmp_path / "slurm"), ThreadPoolExecutor(1) as pool:
        limit = pool.submit(tried, "limit")
        told = {trial: tried(trial) for trial in ("cancelled", "sweep")}
        told |= {"limit": limit.result(), "drained": tried("drained")}  # the last takes the node from all others
    assert all(trial["held"] for trial in told.values()), told


@pytest.mark.slow
def test_two_torchruns_meet_and_are_one_run(tmp_path):
    told = runpy.run_path(str(SCRIPT))["ranks"](tmp_path)
    assert told["held"], told
