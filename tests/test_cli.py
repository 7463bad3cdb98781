"""ddpm/cli.py and ddpm/commands/: from the words that are typed to the files, the exit code and what is printed."""

import errno
import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from PIL import Image
from test_devanagari import make_font

import ddpm.training.graph
import ddpm.training.trainer
from ddpm import cli, config
from ddpm.commands.train import next_steps, prepare, training
from ddpm.data.devanagari import Devanagari, styles
from ddpm.runs import checkpoint, preflight
from ddpm.runs.directory import Run, read_metrics

REPOSITORY = Path(__file__).parents[1]
TINY = [
    "model.channels=8", "model.channel_mults=[1]", "model.groups=4", "model.blocks=1", "model.middle_attention=false",
    "model.attention_resolutions=[]", "schedule.T=10", "sampler.steps=2", "data.validation=0.02", "trainer.steps=4",
    "trainer.seconds=null", "trainer.batch_size=8", "trainer.warmup=0", "trainer.previews=0", "trainer.log_every=1",
    "trainer.checkpoint_every=2", "recognition=false", "device=cpu",
]  # fmt: skip


class Result(NamedTuple):
    code: int
    out: str
    err: str


Call = Callable[..., Result]


@pytest.fixture
def typed(monkeypatch, capsys) -> Call:
    """A command in this process, just as it is typed."""

    def typed(command: Callable[[], None], *words: object) -> Result:
        monkeypatch.setattr(sys, "argv", [command.__name__, *map(str, words)])
        capsys.readouterr()
        try:
            command()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return typed


@pytest.fixture
def call(typed, monkeypatch) -> Call:
    """The same for one job, without what Hydra does besides: with it, a configuration is composed three times."""
    composed = []

    def compose(name: str, overrides: list[str]) -> object:
        composed[:] = [config.compose(name, overrides)]
        task = {"hydra": {"mode": "RUN", "overrides": {"task": list(overrides)}, "launcher": {}}}
        monkeypatch.setattr(HydraConfig.instance(), "cfg", OmegaConf.create(task))
        return composed[0]

    monkeypatch.setattr(cli, "compose", compose)
    monkeypatch.setattr(cli.hydra, "main", lambda **where: lambda job: lambda: job(composed[0]))
    return typed


@pytest.fixture
def without_pictures(monkeypatch) -> None:
    """The pictures at the end, and the networks that a sweep around a run could have, take longer than such runs."""
    monkeypatch.setattr(training, "_draw_results", lambda *arguments: None)
    monkeypatch.setattr(next_steps, "_around", lambda plan: ["seed=0,1"])


def words(*changes: str) -> list[str]:
    """TINY with some keys of another value."""
    keys = {change.partition("=")[0].lstrip("+~") for change in changes}
    return [word for word in TINY if word.partition("=")[0] not in keys] + list(changes)


def run_of(runs: Path, study: str = "default") -> Path:
    (run,) = (path for path in (runs / study).iterdir() if path.is_dir())
    return run


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


def weights(run: Path, step: int, name: str = "model") -> dict[str, torch.Tensor]:
    return checkpoint.load_weights(run / "checkpoints" / str(step) / f"{name}.safetensors")


def losses(run: Path) -> list[tuple]:
    return [(line["step"], line["split"], line["loss"]) for line in read_metrics(run)]


def save_pictures(folder: Path, count: int) -> None:
    folder.mkdir()
    for n in range(count):
        Image.new("L", (8, 8), 20 * n).save(folder / f"{n}.png")


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def assert_refused(result: Result, *told: str) -> None:
    """Exit code 2 and one line that says what is allowed."""
    lines = result.err.strip().splitlines()
    assert result.code == 2, result
    assert len(lines) == 1 and lines[0].startswith("error: "), result.err
    assert "Traceback" not in result.err + result.out
    assert not [word for word in told if word not in lines[0]], lines[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of six steps with all its pictures. Tests that change it take a copy."""
    changes = words("trainer.steps=6", "trainer.keep=1", "trainer.previews=2", "recognition=true", "optimizer.lr=0.01")
    return trained(tmp_path_factory.mktemp("finished") / "runs", changes)


def trained(runs: Path, changes: list[str]) -> Path:
    """The run of what is typed."""
    before, sys.argv = sys.argv, ["train", *changes, f"runs={runs}"]
    try:
        cli.train()
    finally:
        sys.argv = before
    return run_of(runs)


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copied" / finished.name))


# ---------------------------------------------------------------------------------------------- train


def test_a_run_leaves_what_it_promises(finished):
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        "config.yaml", "status.json", "metrics.jsonl", "evaluation.json", "checkpoints", "tensorboard", "samples.png",
        "denoising.gif", "forward.png", "preview.png", "loss.png", "schedule.png",
    }  # fmt: skip
    assert not [name for name in names if name.startswith(".")]
    for name in names:
        if name.endswith((".png", ".gif")):
            Image.open(finished / name).load()
    assert Image.open(finished / "denoising.gif").n_frames > 1
    said = status(finished)
    assert (said["state"], said["step"], said["reason"], said["paired"]) == ("DONE", 6, "budget of steps used", True)
    assert (said["hash"], said["precision"], said["device"]) == (finished.name, "fp32", "cpu")
    assert said["ended"] >= said["started"] and said["traceback"] is None
    lines = read_metrics(finished)
    assert [line["step"] for line in lines if line["split"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert lines[0].keys() == {"step", "split", "images", "seconds", "loss", "grad_norm", "lr", "skipped"}
    (record,) = json.loads((finished / "evaluation.json").read_text()).values()
    assert record.keys() >= {
        "value",
        "low",
        "high",
        "n",
        "seeds",
        "real_vs_real",
        "weights",
        "sampler",
        "steps",
        "commit",
    }
    assert (record["n"], record["weights"], record["sampler"], record["steps"]) == (512, "ema", "DDIM", 2)
    config = OmegaConf.load(finished / "config.yaml")
    assert config.model.image_size == 8 and "${" not in (finished / "config.yaml").read_text()


@pytest.mark.slow
def test_the_same_command_again_has_nothing_to_do_and_another_seed_is_another_run(call, tmp_path, without_pictures):
    first = call(cli.train, *TINY, f"runs={tmp_path}")
    run = run_of(tmp_path)
    assert first.code == 0 and str(run) in first.out and "done: 4 steps" in first.out
    assert f"sample.py run={run}" in first.out or f"ddpm-sample run={run}" in first.out
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    again = call(cli.train, *TINY, f"runs={tmp_path}", "trainer.log_every=3", "trainer.keep=7", "device=auto")
    assert again.code == 0 and "is done already (4 steps); nothing to do" in again.out
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before
    assert call(cli.train, *TINY, f"runs={tmp_path}", "seed=1", "study=other").code == 0
    other = run_of(tmp_path, "other")
    assert other.name != run.name and not same(weights(run, 4), weights(other, 4))


@pytest.mark.slow
def test_a_run_that_stopped_without_a_word_goes_on(call, tmp_path, without_pictures):
    call(cli.train, *TINY, f"runs={tmp_path / 'a'}")
    whole = run_of(tmp_path / "a")
    broken = Path(shutil.copytree(whole, tmp_path / "b" / "default" / whole.name))
    shutil.rmtree(broken / "checkpoints" / "4")
    (broken / "status.json").write_text(json.dumps(status(whole) | {"state": "RUNNING", "step": 2}))
    assert Run(broken).status()["state"] == "INTERRUPTED"
    result = call(cli.train, *TINY, f"runs={tmp_path / 'b'}")
    assert result.code == 0 and f"going on from {broken / 'checkpoints' / '2'}" in result.out
    assert status(broken)["state"] == "DONE" and same(weights(broken, 4), weights(whole, 4))
    assert [line["step"] for line in read_metrics(broken)] == [line["step"] for line in read_metrics(whole)]


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """Folders and files to point wrong arguments at."""
    base = tmp_path_factory.mktemp("places")
    (base / "empty").mkdir()
    (base / "file").write_text("x")
    (base / "garbage").mkdir()
    (base / "garbage" / "ema.safetensors").write_bytes(b"garbage")
    (base / "no_checkpoint" / "checkpoints").mkdir(parents=True)
    (base / "no_checkpoint" / "config.yaml").write_text("seed: 0\n")
    return {path.name: path for path in base.iterdir()}


WRONG = {
    "bogus=1": ["bogus", "the top level has", "trainer"],
    "model.chanels=8": ["model.chanels", "channels"],
    "data=nope": ["nope", "digits", "mnist", "folder"],
    "schedule=linear,cosine": ["schedule=linear,cosine", "--multirun"],
    "model=null": ["model"],
    "model.attention_resolutions=[3] model.channel_mults=[1,2]": ["3", "8, 4"],
    "model.groups=3": ["groups = 3", "1, 2, 4"],
    "model.groups=0": ["groups = 0"],
    "model.heads=3 model.middle_attention=true": ["heads = 3", "1, 2, 4"],
    "model.image_size=7 model.channel_mults=[1,2]": ["7", "6, 8"],
    "model.in_channels=3": ["(3, 8, 8)", "(1, 8, 8)"],
    "model.num_classes=5": ["num_classes = 5", "10 classes"],
    "model._target_=os.system": ["'os.system' is not allowed", "models.unet.UNet"],
    "schedule.T=0": ["T = 0", ">= 1"],
    "sampler.steps=11": ["steps = 11", "1..10"],
    "diffusion.target=z": ["'z'", "eps, x_0, v, flow"],
    "optimizer.lr=-1": ["-1"],
    "optimizer.lr=nan": ["nan"],
    "optimizer.betas=[0.9]": ["optimizer"],
    "trainer.batch_size=0": ["batch_size = 0", ">= 1"],
    "trainer.steps=null": ["no budget", "trainer.epochs"],
    "trainer.seconds=inf": ["seconds = inf"],
    "data.validation=2": ["validation=2", "0 <= validation < 1"],
    "data=folder": ["data.root"],
    "data=folder data.root=/no/such/folder": ["/no/such/folder"],
    "data=folder data.root={empty}": ["no PNG, JPEG, WebP, BMP or TIFF file", "{empty}"],
    "data=folder data.root={file}": ["{file} is a file"],
    "data=folder data.root=null": ["root"],
    "data=mnist data.root={empty} data.download=false": ["{empty}", "download=true"],
    "data=cifar10 data.root={empty} data.download=false": ["{empty}", "cifar-10"],
    "device=tpu": ["device=tpu", "auto, cpu, cuda"],
    "seed=abc": ["seed"],
    "seed=1.5": ["seed"],
    "init=/no/such/run": ["/no/such/run"],
    "init={garbage}": ["{garbage}"],
    "init={no_checkpoint}": ["{no_checkpoint}", "checkpoint"],
    "extend=/no/such/run trainer.steps=9": ["/no/such/run"],
    "extend=5 trainer.steps=9": ["extend=5"],
    "extend={no_checkpoint} trainer.steps=9": ["{no_checkpoint}", "no whole checkpoint"],
    "runs={file}": ["{file}"],
    "runs=null": ["runs"],
    "trust=5": ["trust"],
    "~seed": ["seed"],
}


@pytest.mark.parametrize("given", WRONG)
def test_wrong_input_is_one_line_and_nothing_is_begun(given, call, places, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = [change.format(**places) for change in given.split()]
    runs = [] if given.startswith("runs=") else [f"runs={tmp_path / 'runs'}"]
    assert_refused(call(cli.train, *words(*changes), *runs), *(word.format(**places) for word in WRONG[given]))
    assert list(tmp_path.iterdir()) == []


def test_cuda_where_there_is_none(call, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert_refused(call(cli.train, *words("device=cuda"), f"runs={tmp_path / 'runs'}"), "device=cuda", "device=cpu")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_that_is_held_says_by_whom(call, tmp_path, without_pictures):
    call(cli.train, *TINY, f"runs={tmp_path}")
    run = run_of(tmp_path)
    with Run(run).locked():
        (run / "status.json").write_text(
            json.dumps(status(run) | {"state": "RUNNING", "host": "elsewhere", "pid": 4711})
        )
        result = call(cli.train, *TINY, f"runs={tmp_path}")
    assert result.code == 1 and "is being trained by process 4711 on elsewhere" in result.out + result.err
    assert "Traceback" not in result.err and status(run)["state"] == "RUNNING"


@pytest.mark.slow
def test_classes_from_training_to_sampling(call, tmp_path):
    changes = ["model.num_classes=10", "trainer.previews=1"]
    assert call(cli.train, *words(*changes), f"runs={tmp_path}").code == 0
    out = tmp_path / "samples.npy"
    assert call(cli.sample, f"run={run_of(tmp_path)}", "n=3", "sampler.steps=2", f"out={out}").code == 0
    assert np.load(out).shape == (3, 8, 8, 1)


@pytest.mark.slow
def test_pictures_of_one_class_are_learned_and_nothing_is_recognised(call, tmp_path):
    save_pictures(tmp_path / "pictures", 0)
    save_pictures(tmp_path / "pictures" / "only", 8)
    where = ["data=folder", f"data.root={tmp_path / 'pictures'}", "data.image_size=8", "data.channels=1"]
    result = call(cli.train, *words(*where, "recognition=true", "trainer.steps=1"), f"runs={tmp_path / 'runs'}")
    run = run_of(tmp_path / "runs")
    assert result.code == 0 and status(run)["state"] == "DONE", result
    assert (run / "samples.png").is_file() and not (run / "evaluation.json").exists()


def test_a_network_with_classes_needs_labels(call, tmp_path, places):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(np.full((8, 8), 80 * i, np.uint8)).save(folder / f"{i}.png")
    changes = ["data=folder", f"data.root={folder}", "data.image_size=8", "data.channels=1", "model.num_classes=2"]
    assert_refused(call(cli.train, *words(*changes), f"runs={tmp_path / 'runs'}"), "num_classes = 2", "no labels")
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (RuntimeError("out of memory"), "RuntimeError: out of memory"),
    ],
)
def test_a_run_that_fails_keeps_its_last_checkpoint_and_says_how_to_go_on(
    error, told, call, tmp_path, without_pictures, monkeypatch
):
    real, calls = checkpoint.save, []

    def save(*arguments: object, **options: object) -> Path:
        calls.append(arguments[1])
        if len(calls) == 2:
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(checkpoint, "save", save)
    result = call(cli.train, *TINY, f"runs={tmp_path / 'a'}")
    run = run_of(tmp_path / "a")
    said = status(run)
    assert result.code == 1 and calls == [2, 4]
    output = result.out + result.err
    assert told in output and f"the last whole checkpoint is {run / 'checkpoints' / '2'}" in output
    assert "same command" in output and "Traceback" not in output
    assert said["state"] == "FAILED" and told in said["reason"] and "Traceback" in said["traceback"]
    assert checkpoint.verify(run / "checkpoints" / "2") is None and said["step"] == 2

    monkeypatch.setattr(checkpoint, "save", real)
    assert call(cli.train, *TINY, f"runs={tmp_path / 'a'}").code == 0
    assert (status(run)["state"], status(run)["traceback"]) == ("DONE", None)
    assert call(cli.train, *TINY, f"runs={tmp_path / 'b'}").code == 0
    assert same(weights(run, 4), weights(run_of(tmp_path / "b"), 4))


def test_a_disk_that_is_full_from_the_start(call, tmp_path, without_pictures, monkeypatch):
    """What is there already must not be cut off: without config.yaml a run cannot be sampled from."""
    call(cli.train, *TINY, f"runs={tmp_path}")
    run = run_of(tmp_path)
    whole = (run / "config.yaml").read_text()
    (run / "status.json").write_text(json.dumps(status(run) | {"state": "FAILED"}))

    def half(settings: object, file: Path, *arguments: object) -> None:
        Path(file).write_text(whole[:50])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(OmegaConf, "save", half)
    result = call(cli.train, *TINY, f"runs={tmp_path}")
    assert (run / "config.yaml").read_text() == whole
    assert result.code == 1 and "the disk is full" in result.out + result.err and "Traceback" not in result.err


def test_an_error_while_drawing_is_a_failure_that_keeps_the_training(call, tmp_path, monkeypatch):
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError("no picture")

    monkeypatch.setattr(training, "_draw_results", broken)
    result = call(cli.train, *TINY, f"runs={tmp_path}")
    run = run_of(tmp_path)
    assert result.code == 1 and "ZeroDivisionError: no picture" in result.out + result.err
    assert status(run)["state"] == "FAILED" and (run / "checkpoints" / "4").is_dir()
    monkeypatch.setattr(training, "_draw_results", lambda *arguments: None)
    assert call(cli.train, *TINY, f"runs={tmp_path}").code == 0 and status(run)["state"] == "DONE"
    assert len([line for line in read_metrics(run) if line["split"] == "train"]) == 4


def test_a_second_interrupt_stops_at_once(call, tmp_path, monkeypatch):
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "_draw_results", interrupted)
    result = call(cli.train, *TINY, f"runs={tmp_path}")
    assert (
        result.code == 130 and "the same command" in result.out and status(run_of(tmp_path))["state"] == "INTERRUPTED"
    )


# ---------------------------------------------------------------------------------------------- real processes


SLOWLY = """
import runpy, sys, time
from ddpm.training.step import Training
original = Training.draw
def draw(self, *arguments):
    time.sleep(0.3)
    return original(self, *arguments)
Training.draw = draw
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def process(tmp_path):
    """The real script in a process of its own, slowed down so that a signal meets it at work."""
    started = []

    def start(*arguments: str) -> subprocess.Popen:
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": str(torch.get_num_threads())}
        command = [sys.executable, "-c", SLOWLY, str(REPOSITORY / "experiments" / "train.py"), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("signum", "code"), [pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow), (signal.SIGINT, 130)]
)
def test_a_signal_leaves_a_checkpoint_and_the_same_command_goes_on(
    signum, code, call, process, tmp_path, without_pictures
):
    changes = words("trainer.steps=20", "trainer.checkpoint_every=100")
    real = process(*changes, f"runs={tmp_path / 'a'}")
    wait_for(lambda: len([line for p in tmp_path.glob("a/*/*") for line in read_metrics(p)]) >= 2, real)
    run = run_of(tmp_path / "a")
    if signum == signal.SIGTERM:  # while it runs, it cannot be run twice
        assert Run(run).status()["state"] == "RUNNING"
        second = call(cli.train, *changes, f"runs={tmp_path / 'a'}")
        assert second.code == 1 and f"by process {real.pid} on {platform.node()}" in second.out + second.err
    real.send_signal(signum)
    out, err = real.communicate(timeout=120)
    said = status(run)
    assert real.returncode == code, (out, err)
    assert "Traceback" not in err and f"interrupted by {signal.Signals(signum).name}" in out
    assert "the same command resumes from" in out
    assert said["state"] == "INTERRUPTED" and signal.Signals(signum).name in said["reason"] and said["ended"]
    last = checkpoint.last_whole(run / "checkpoints")
    assert 0 < int(last.name) == said["step"] < 20 and f"{last}" in out

    assert call(cli.train, *changes, f"runs={tmp_path / 'a'}").code == 0
    assert call(cli.train, *changes, f"runs={tmp_path / 'b'}").code == 0
    undisturbed = run_of(tmp_path / "b")
    assert undisturbed.name == run.name and status(run)["state"] == "DONE"
    for name in ("model", "ema"):
        assert same(weights(run, 20, name), weights(undisturbed, 20, name))
    losses = [[line["loss"] for line in read_metrics(r) if line["split"] == "train"] for r in (run, undisturbed)]
    assert losses[0] == losses[1] and len(losses[0]) == 20


@pytest.mark.slow
def test_wrong_input_in_a_real_process(process, tmp_path):
    real = process("trainer.batch_size=0", f"runs={tmp_path / 'runs'}")
    _, err = real.communicate(timeout=120)
    assert real.returncode == 2 and err == "error: trainer: batch_size = 0 must be an integer >= 1\n"
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------- extend and init


@pytest.mark.slow
def test_extend_is_a_new_run_that_names_its_parent_and_goes_on_from_it(call, copied, tmp_path, without_pictures):
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*")}
    runs = f"runs={tmp_path / 'runs'}"
    result = call(cli.train, f"extend={copied}", "trainer.steps=9", runs)
    child = run_of(tmp_path / "runs")
    assert result.code == 0 and f"going on from {copied / 'checkpoints' / '6'}" in result.out
    assert child.name != copied.name
    settings = OmegaConf.load(child / "config.yaml")
    assert settings.extend == str(copied) and settings.trainer.steps == 9
    assert settings.model == OmegaConf.load(copied / "config.yaml").model
    assert [line["step"] for line in read_metrics(child) if line["split"] == "train"] == [7, 8, 9]
    assert status(child)["state"] == "DONE" and status(child)["step"] == 9
    assert {path: path.stat().st_mtime_ns for path in copied.rglob("*")} == before
    assert "nothing to do" in call(cli.train, f"extend={copied}/", "trainer.steps=9", runs).out
    # and on from there
    assert call(cli.train, f"extend={child}", "trainer.steps=10", runs).code == 0
    assert len(list((tmp_path / "runs" / "default").glob("*/config.yaml"))) == 2


@pytest.mark.slow
def test_a_constant_rate_makes_extending_the_same_as_training_longer(call, tmp_path, without_pictures):
    constant = words("trainer.lr_schedule=constant")
    assert call(cli.train, *constant, f"runs={tmp_path / 'short'}").code == 0
    assert (
        call(
            cli.train, *constant[:-1], "trainer.lr_schedule=constant", "trainer.steps=6", f"runs={tmp_path / 'long'}"
        ).code
        == 0
    )
    extend = [f"extend={run_of(tmp_path / 'short')}", "trainer.steps=6", f"runs={tmp_path / 'child'}"]
    assert call(cli.train, *extend).code == 0
    assert same(weights(run_of(tmp_path / "child"), 6), weights(run_of(tmp_path / "long"), 6))


def test_the_shortest_time_has_a_step_and_a_checkpoint(call, tmp_path, without_pictures):
    result = call(cli.train, *words("trainer.seconds=1e-9"), f"runs={tmp_path}")
    run = run_of(tmp_path)
    assert result.code == 0 and status(run)["step"] == 1 and "budget of seconds" in status(run)["reason"]
    assert weights(run, 1)


EXTEND = {
    "trainer.steps=6": ["trainer.steps=6", "6 steps"],
    "trainer.steps=3": ["trainer.steps=3", "6 steps"],
    "trainer.steps=abc": ["abc"],
    "trainer.epochs=0.01": ["trainer.epochs=0.01"],
    "trainer.seconds=0.001": ["trainer.seconds=0.001"],
    "optimizer.lr=1": ["larger budget", "trainer.steps"],
    "trainer.steps=9 schedule=linear": ["schedule=linear", "only values may be changed"],
    "trainer.steps=9 experiment=mnist": ["experiment=mnist"],
    "trainer.steps=9 +model.bogus=1": ["+model.bogus=1"],
    "trainer.steps=9 model.bogus=1": ["model.bogus"],
    "trainer.steps=9 model.channels=16": ["does not fit"],
    "trainer.steps=9 optimizer.lr=-1": ["-1"],
}


@pytest.mark.parametrize("given", EXTEND)
def test_extend_refuses(given, call, finished, tmp_path):
    result = call(cli.train, f"extend={finished}", *given.split(), f"runs={tmp_path / 'runs'}")
    assert_refused(result, *EXTEND[given])
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_parent_that_went_on_has_other_children(call, tmp_path, without_pictures):
    """The checkpoint that a child starts from is part of what its result depends on."""
    call(cli.train, *TINY, f"runs={tmp_path / 'a'}")
    parent = run_of(tmp_path / "a")
    extend = [f"extend={parent}", "trainer.steps=6", f"runs={tmp_path / 'b'}"]
    assert call(cli.train, *extend).code == 0
    shutil.rmtree(parent / "checkpoints" / "4")  # as if it had been stopped at 2
    assert call(cli.train, *extend).code == 0
    assert len(list((tmp_path / "b" / "default").iterdir())) == 2


def test_a_stored_configuration_cannot_add_trust(call, copied, tmp_path):
    trap = tmp_path / "ran"
    settings = OmegaConf.load(copied / "config.yaml")
    evil = OmegaConf.create({"_target_": "pathlib.Path.touch", "self": str(trap)})
    settings.optimizer, settings.schedule, settings.trust = evil, evil, ["pathlib.Path.touch"]
    OmegaConf.save(settings, copied / "config.yaml")
    for result in (
        call(cli.train, f"extend={copied}", "trainer.steps=9", f"runs={tmp_path / 'runs'}"),
        call(cli.sample, f"run={copied}", "n=1", "sampler.steps=2"),
    ):
        assert_refused(result, "'pathlib.Path.touch' is not allowed")
    assert not trap.exists() and not (tmp_path / "runs").exists()


def test_a_stored_configuration_cannot_build_what_it_points_to(call, copied, tmp_path):
    trap = tmp_path / "ran"
    settings = OmegaConf.load(copied / "config.yaml")
    settings.evil = {"_target_": "pathlib.Path.touch", "self": {"_target_": "pathlib.Path", "_args_": [str(trap)]}}
    settings.model.freq_shift = "${evil}"
    OmegaConf.save(settings, copied / "config.yaml")
    assert_refused(call(cli.sample, f"run={copied}", "n=1", "sampler.steps=2"), "an interpolation")
    assert not trap.exists()


def test_init_starts_from_the_averaged_weights_of_a_run_or_from_a_folder(call, finished, tmp_path, without_pictures):
    still = words("trainer.steps=1", "optimizer.lr=1e-30", "optimizer.weight_decay=0")
    assert call(cli.train, *still, f"init={finished}", f"runs={tmp_path / 'a'}").code == 0
    one = run_of(tmp_path / "a")
    assert same(weights(one, 1), weights(finished, 6, "ema"))
    assert [line["step"] for line in read_metrics(one) if line["split"] == "train"] == [1]
    assert OmegaConf.load(one / "config.yaml").init == str(finished)
    assert "nothing to do" in call(cli.train, *still, f"init={finished}@6", f"runs={tmp_path / 'a'}").out
    refused = call(cli.train, *still, f"init={finished}@99", f"runs={tmp_path / 'none'}")
    assert_refused(refused, "checkpoint 99 cannot be read (there is none of that name)")

    folder = tmp_path / "weights"
    folder.mkdir()
    shutil.copy(finished / "checkpoints" / "6" / "model.safetensors", folder)
    assert call(cli.train, *still, f"init={folder}", f"runs={tmp_path / 'b'}").code == 0
    assert same(weights(run_of(tmp_path / "b"), 1), weights(finished, 6, "model"))
    assert run_of(tmp_path / "b").name != one.name
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    assert "nothing to do" in call(cli.train, *still, f"init={moved}", f"runs={tmp_path / 'b'}").out


def test_init_from_weights_of_another_network(call, finished, tmp_path):
    result = call(cli.train, *words("model.channels=16"), f"init={finished}", f"runs={tmp_path / 'runs'}")
    assert_refused(result, "does not fit the network", "of another shape")
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------------------------------------- many runs


@pytest.mark.slow
def test_a_sweep_over_channels_attention_and_schedule(typed, tmp_path, without_pictures, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = ["model.channels=8,16", "model.attention_resolutions=[],[4]", "schedule=linear,cosine", "schedule.T=25"]
    tiny = words(*sweep, "model.channel_mults=[1,2]", "trainer.steps=1", "data.validation=0")
    result = typed(cli.train, "-m", *tiny, f"runs={tmp_path / 'runs'}", "study=sweep")
    assert result.code == 0, result
    runs = [path.parent for path in (tmp_path / "runs" / "sweep").glob("*/config.yaml")]
    assert {status(run)["state"] for run in runs} == {"DONE"}
    found = {
        (c.model.channels, tuple(c.model.attention_resolutions), c.schedule._target_.rpartition(".")[2])
        for c in (OmegaConf.load(run / "config.yaml") for run in runs)
    }
    assert len(runs) == 8 and found == {(c, a, s) for c in (8, 16) for a in ((), (4,)) for s in ("linear", "cosine")}
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}


@pytest.mark.parametrize(
    ("sweep", "told"),
    [
        ("schedule=cosine,nope", "nope"),
        ("model.chanels=8,16", "model.chanels"),
        ("seed=0,1 bogus=1", "bogus"),
        ("seed=range(", "range("),
    ],
)
def test_a_sweep_that_does_not_compose_stops_before_its_first_job(sweep, told, typed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(typed(cli.train, "-m", *words(*sweep.split()), f"runs={tmp_path / 'runs'}"), told)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_arm_that_is_illegal_only_in_combination_fails_and_the_others_run(typed, tmp_path, without_pictures):
    sweep = words("model.channels=6,8", "trainer.steps=1")  # groups = 4
    result = typed(cli.train, "-m", *sweep, f"runs={tmp_path}")
    output = result.out + result.err
    assert result.code == 1 and "Traceback" not in output
    assert "FAILED" in output and "model.channels=6" in output and "groups = 4 does not divide" in output
    by_state = {status(path.parent)["state"]: path.parent for path in tmp_path.glob("default/*/status.json")}
    assert by_state.keys() == {"FAILED", "DONE"}
    assert "groups = 4 does not divide" in status(by_state["FAILED"])["reason"]
    assert (by_state["DONE"] / "checkpoints" / "1").is_dir() and not (by_state["FAILED"] / "checkpoints").exists()


@pytest.mark.slow
def test_an_illegal_arm_does_not_overwrite_a_run_that_is_done(typed, tmp_path, without_pictures):
    """The sampler is no part of a run's name, so both arms are one run."""
    result = typed(cli.train, "-m", *words("sampler.steps=2,11", "trainer.steps=1"), f"runs={tmp_path}")
    assert result.code == 1 and "steps = 11 is more than" in result.out + result.err
    (one,) = tmp_path.glob("default/*/status.json")
    assert status(one.parent)["state"] == "DONE"


@pytest.mark.slow
def test_an_illegal_arm_does_not_touch_a_run_that_another_process_trains(typed, tmp_path, without_pictures):
    assert typed(cli.train, *TINY, f"runs={tmp_path}").code == 0
    run = run_of(tmp_path)
    with Run(run).locked():
        (run / "status.json").write_text(json.dumps(status(run) | {"state": "RUNNING"}))
        assert typed(cli.train, "-m", *words("sampler.steps=11"), f"runs={tmp_path}").code == 1
        assert status(run)["state"] == "RUNNING"


def test_checkpoints_of_a_newer_version_are_not_deleted(call, tmp_path, without_pictures):
    """To go on from nothing would mean to throw away what only a newer version can read."""
    call(cli.train, *TINY, f"runs={tmp_path}")
    run = run_of(tmp_path)
    for path in run.glob("checkpoints/*/manifest.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    (run / "status.json").write_text(json.dumps(status(run) | {"state": "INTERRUPTED"}))
    result = call(cli.train, *TINY, f"runs={tmp_path}")
    assert_refused(result, "its format 99 is newer than 2", "move it away")
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"2", "4"}


@pytest.mark.parametrize("source", ["digits", "folder"])
@pytest.mark.slow
def test_runs_of_a_sweep_that_share_their_data_are_those_of_their_own(
    source, typed, tmp_path, without_pictures, monkeypatch
):
    """To the bit, and under the same names."""
    sweep = words("seed=0,1", "data.flip=true", "data.validation=0.5", f"data={source}", "data.image_size=8")
    if source == "folder":
        save_pictures(tmp_path / "pictures", 10)
        sweep += [f"data.root={tmp_path / 'pictures'}", "data.channels=1"]
    ends = []
    for where in ("together", "apart"):
        if where == "apart":
            monkeypatch.setattr(prepare, "build_data", lambda node, trust: config.build(node, "data", trust))
        result = typed(cli.train, "-m", *sweep, f"runs={tmp_path / where}")
        assert result.code == 0, result
        runs = {path.parent.name: path.parent for path in (tmp_path / where).glob("default/*/config.yaml")}
        ends.append({name: (weights(run, 4), losses(run)) for name, run in runs.items()})
    together, apart = ends
    assert len(together) == 2 and together.keys() == apart.keys()
    for name, (w, told) in together.items():
        assert same(w, apart[name][0]) and told == apart[name][1]


@pytest.mark.slow
def test_a_file_that_changed_between_two_runs_of_a_sweep_is_read_again(typed, tmp_path, without_pictures, monkeypatch):
    save_pictures(tmp_path / "pictures", 6)
    fit, counts = ddpm.training.trainer.Trainer.fit, []

    def adds(self, run, task, data, *arguments, **options):
        counts.append(len(data))
        (tmp_path / "pictures" / "0.png").unlink(missing_ok=True)
        return fit(self, run, task, data, *arguments, **options)

    monkeypatch.setattr(ddpm.training.trainer.Trainer, "fit", adds)
    where = ["data=folder", f"data.root={tmp_path / 'pictures'}", "data.image_size=8", "data.channels=1"]
    sweep = words("seed=0,1,2", "trainer.steps=1", "data.validation=0.5", *where)
    assert typed(cli.train, "-m", *sweep, f"runs={tmp_path / 'runs'}").code == 0
    assert counts == [6, 5, 5]


@pytest.mark.slow
def test_an_arm_that_breaks_does_not_stop_the_sweep_but_an_interrupt_does(
    typed, tmp_path, without_pictures, monkeypatch
):
    fit, seen = ddpm.training.trainer.Trainer.fit, []

    def breaks(self, run, *arguments, seed, **options):
        seen.append(seed)
        if seed == 0:
            raise RuntimeError("broken")
        if seed == 2:
            raise ddpm.training.trainer.Interrupted(signal.SIGTERM)
        return fit(self, run, *arguments, seed=seed, **options)

    monkeypatch.setattr(ddpm.training.trainer.Trainer, "fit", breaks)
    result = typed(cli.train, "-m", *words("seed=0,1,2,3", "trainer.steps=1"), f"runs={tmp_path}")
    assert result.code == 143 and seen == [0, 1, 2]
    states = sorted(status(path.parent)["state"] for path in tmp_path.glob("default/*/status.json"))
    assert states == ["DONE", "FAILED", "INTERRUPTED"]


# ---------------------------------------------------------------------------------------------- looking


@pytest.mark.slow
def test_the_configuration_and_help_are_shown_and_nothing_is_made(typed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = typed(cli.train, "--cfg", "job", "trainer.steps=77")
    assert shown.code == 0 and OmegaConf.create(shown.out).trainer.steps == 77
    for command in (cli.train, cli.sample, cli.evaluate):
        result = typed(command, "--help")
        assert result.code == 0 and "sampler" in result.out and "Traceback" not in result.err
    assert typed(cli.train, "--bogus-flag").code == 2
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------- sample


@pytest.mark.slow
def test_samples_as_an_array(call, finished, tmp_path):
    arrays = {}
    for name, changes in {
        "reference": [],
        "batch": ["batch=2"],
        "more": ["n=7"],
        "raw": ["weights=raw"],
        "seed": ["seed=1"],
        "steps": ["sampler.steps=7"],
        "ancestral": ["sampler=ancestral"],
        "best": ["checkpoint=best"],
    }.items():
        out = tmp_path / f"{name}.npy"
        given = [f"run={finished}", "n=5", "sampler.steps=3", *changes, f"out={out}"]
        result = call(cli.sample, *given)
        assert result.code == 0 and f"wrote {out}" in result.out, result
        arrays[name] = np.load(out)
    reference = arrays.pop("reference")
    assert reference.shape == (5, 8, 8, 1) and reference.dtype == np.uint8 and reference.std() > 10
    assert np.array_equal(arrays.pop("batch"), reference)
    assert np.array_equal(arrays.pop("more")[:5], reference)
    assert np.array_equal(arrays.pop("best"), reference)
    assert not [name for name, array in arrays.items() if np.array_equal(array, reference)]


def test_samples_as_a_grid_and_on_their_way(call, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [f"run={finished}", "n=4", "sampler.steps=3"]
    assert call(cli.sample, *given, "out=grid.png").code == 0
    assert call(cli.sample, *given, "out=way.gif").code == 0
    grid, way = Image.open("grid.png"), Image.open("way.gif")
    assert grid.size == way.size and way.n_frames == 4
    assert {path.name for path in tmp_path.iterdir()} == {"grid.png", "way.gif"}


def test_without_out_the_picture_lies_in_the_run(call, copied):
    result = call(cli.sample, f"run={copied}", "n=2", "sampler.steps=3", "weights=raw", "seed=4")
    path = copied / "samples_step6_raw_ddim3_seed4.png"
    assert result.code == 0 and f"wrote {path}" in result.out and path.is_file()


@pytest.mark.slow
@pytest.mark.parametrize("end", ["/", ""])
def test_a_folder_of_numbered_pictures_is_resumed_by_number(end, call, finished, tmp_path):
    folder = tmp_path / "pictures"
    given = [f"run={finished}", "sampler.steps=3", f"out={folder}{end}", "batch=2"]
    assert call(cli.sample, *given, "n=5").code == 0
    names = [f"{i:06}.png" for i in range(5)]
    assert sorted(path.name for path in folder.glob("*.png")) == names
    whole = {name: (folder / name).read_bytes() for name in names}
    for name in (names[1], names[4]):
        (folder / name).unlink()
    kept = (folder / names[0]).stat().st_mtime_ns
    result = call(cli.sample, *given, "n=6")
    assert result.code == 0 and "3 of 6 samples exist already" in result.out
    assert {name: (folder / name).read_bytes() for name in names} == whole and (folder / "000005.png").is_file()
    assert (folder / names[0]).stat().st_mtime_ns == kept
    for change in (["seed=1"], ["weights=raw"], ["sampler.steps=4"], ["sampler=ancestral"]):
        assert_refused(call(cli.sample, *given, *change, "n=6"), str(folder), "other settings")
    array = tmp_path / "same.npy"
    call(cli.sample, *given[:2], "n=5", f"out={array}")
    for i, picture in enumerate(np.load(array)):
        assert np.array_equal(np.asarray(Image.open(folder / names[i])), picture[..., 0])


def test_pictures_of_somebody_else_are_left_alone(call, finished, tmp_path):
    (tmp_path / "000000.png").write_bytes(b"theirs")
    assert_refused(
        call(cli.sample, f"run={finished}", f"out={tmp_path}/", "n=2", "sampler.steps=2"), "not written here"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["000000.png"]


@pytest.mark.slow
def test_figures_of_the_number_of_steps_and_of_the_process(call, finished, tmp_path):
    sizes = {}
    for name, changes in {
        "strip": ["steps_strip=[1,2,5,10]"],
        "short strip": ["steps_strip=[1,2]"],
        "one": ["steps_strip=3"],
        "process": ["process=8", "sampler.steps=10"],
        "short process": ["process=3", "sampler.steps=10"],
        "between": ["between=[0,3]"],
    }.items():
        out = tmp_path / f"{name}.png"
        assert call(cli.sample, f"run={finished}", "n=4", "sampler.steps=2", *changes, f"out={out}").code == 0
        sizes[name] = Image.open(out).size
    assert sizes["strip"][1] > sizes["short strip"][1] > sizes["one"][1]
    pixels = np.asarray(Image.open(tmp_path / "process.png").convert("L"))
    assert pixels.std() > 20 and sizes["process"] != sizes["short process"]
    assert sizes["between"][0] > 5 * sizes["between"][1], "eight pictures and both images, in one row"


WRONG_SAMPLE = {
    "": ["run"],
    "run=/no/such/run": ["/no/such/run", "no run directory"],
    "run={empty}": ["{empty}", "no run directory"],
    "run={no_checkpoint}": ["{no_checkpoint}", "no whole checkpoint"],
    "run=5": ["run=5"],
    "checkpoint=99": ["checkpoint 99", "there: 6"],
    "n=0": ["n=0", ">= 1"],
    "n=true": ["n="],
    "batch=0": ["batch=0", ">= 1"],
    "seed=abc": ["seed"],
    "weights=best": ["weights=best", "ema, raw"],
    "precision=bf8": ["precision=bf8", "auto, fp32, bf16, fp16"],
    "sampler=nope": ["nope", "ancestral", "ddim"],
    "sampler.steps=11": ["steps = 11", "1..10"],
    "sampler.eta=2": ["eta = 2"],
    "sampler._target_=os.system": ["'os.system' is not allowed"],
    "bogus=1": ["bogus", "steps_strip"],
    "device=tpu": ["device=tpu"],
    "out=/no/such/folder/x.npy": ["/no/such/folder does not exist"],
    "out=/no/such/folder/x/": ["/no/such/folder does not exist"],
    "out={empty}/x.jpeg": [".jpeg", ".npy, .png, .gif"],
    "out={file}": ["{file}"],
    "out={folder_png}": ["{folder_png}"],
    "out=5": ["out=5"],
    "steps_strip=[1,11] out={empty}/x.png": ["11", "1..10"],
    "steps_strip=[0] out={empty}/x.png": ["0"],
    "steps_strip=[1] out={empty}/x.npy": [".png"],
    "steps_strip=[1] process=3 out={empty}/x.png": ["one at a time"],
    "process=1 out={empty}/x.png": ["process=1", ">= 2"],
    "process=3 out={empty}/x/": [".png"],
    "between=[1] out={empty}/x.png": ["between=[1]", "held-out images"],
    "between=[0,100000] out={empty}/x.png": ["100000", "held-out images"],
    "between=[0,1] out={empty}/x.gif": [".png"],
    "between=[0,1] sampler.eta=1 out={empty}/x.png": ["eta = 1"],
    "sampler=heun sampler.times=[5,9]": ["must fall strictly"],
    "sampler=dpmpp_3m sampler.steps=2": ["order = 3 needs at least 3 steps"],
}


@pytest.mark.parametrize("given", WRONG_SAMPLE)
def test_wrong_input_when_sampling(given, call, finished, places, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    known = {**places, "folder_png": tmp_path / "folder.png"}
    changes = [change.format(**known) for change in given.split()]
    keys = {change.partition("=")[0] for change in changes}
    base = (
        []
        if given == ""
        else [w for w in (f"run={finished}", "n=2", "sampler.steps=2") if w.partition("=")[0] not in keys]
    )
    before = sorted(finished.iterdir())
    assert_refused(call(cli.sample, *base, *changes), *(word.format(**known) for word in WRONG_SAMPLE[given]))
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"] and list(
        (tmp_path / "folder.png").iterdir()
    ) == []
    assert sorted(finished.iterdir()) == before and list(places["empty"].iterdir()) == []


def test_a_run_whose_newest_checkpoint_is_damaged_is_sampled_from_the_one_before(call, tmp_path, without_pictures):
    call(cli.train, *TINY, f"runs={tmp_path}")
    run = run_of(tmp_path)
    (run / "checkpoints" / "4" / "ema.safetensors").write_bytes(b"damaged")
    result = call(cli.sample, f"run={run}", "n=1", "sampler.steps=2")
    assert result.code == 0 and "4 is damaged" in result.out and "step 2" in result.out


# ---------------------------------------------------------------------------------------------- evaluate


@pytest.mark.slow
def test_evaluation_records_its_protocols_beside_those_that_are_there(call, copied):
    before = json.loads((copied / "evaluation.json").read_text())
    given = [f"run={copied}", "n=16", "sampler.steps=2", "judge.channels=4", "judge.features=4"]
    result = call(cli.evaluate, *given)
    assert result.code == 0, result
    records = json.loads((copied / "evaluation.json").read_text())
    (recognised,) = (r for name, r in records.items() if name == "recognition_logistic_16_train")
    (frechet,) = (
        r for name, r in records.items() if name.startswith("frechet_classifier-") and name.endswith("_16_train")
    )
    assert len(records) == 3 and all(records[name] == value for name, value in before.items())
    for record in (recognised, frechet):
        keys = {"value", "low", "high", "n", "seeds", "real_vs_real", "weights", "sampler", "steps", "commit"}
        assert record.keys() >= keys and (record["n"], record["seeds"], record["steps"]) == (16, [0], 2)
    assert "judge_accuracy" in frechet and "judge_accuracy" not in recognised
    assert list((copied.parent.parent / "judges").glob("digits-*.safetensors"))
    raw = call(cli.evaluate, *given, "weights=raw", "metric=recognition")
    assert raw.code == 0
    again = json.loads((copied / "evaluation.json").read_text())
    assert again["recognition_logistic_16_train"]["weights"] == "raw" and len(again) == 3


def test_the_judge_does_not_depend_on_the_run_that_meets_it_first(call, finished, tmp_path, monkeypatch):
    monkeypatch.setattr("ddpm.metrics.quality.train_judge", lambda judge, *arguments, **options: judge.eval())
    judges = []
    for name, draws in (("a", 0), ("b", 17)):
        run = Path(shutil.copytree(finished, tmp_path / name / "default" / finished.name))
        torch.manual_seed(draws)
        given = [f"run={run}", "n=8", "sampler.steps=2", "metric=frechet", "judge.channels=4", "judge.features=4"]
        assert call(cli.evaluate, *given).code == 0
        (judge,) = (tmp_path / name / "judges").glob("*.safetensors")
        protocols = {p for p in json.loads((run / "evaluation.json").read_text()) if p.startswith("frechet")}
        judges.append((judge.name, checkpoint.load_weights(judge), protocols))
    assert judges[0][0] == judges[1][0] and same(judges[0][1], judges[1][1])
    assert judges[0][2] == judges[1][2] and len(judges[0][2]) == 1


def test_a_sweep_over_a_finished_run_leaves_nothing_of_its_own(typed, copied, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert typed(cli.sample, "-m", f"run={copied}", "n=1", "sampler.steps=2,3").code == 0
    assert not list(Path.cwd().iterdir()) and len(list(copied.glob("samples_*_ddim[23]_seed0.png"))) == 2


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("metric=fid", ["metric=fid", "recognition, frechet"]),
        ("metric=[]", ["metric"]),
        ("n=0", ["n=0"]),
        ("n=40", ["n = 40", "64 features", "at least 65"]),
        ("run=/no/such/run", ["/no/such/run"]),
        ("judge.channels=0", ["channels"]),
        ("sampler.steps=11", ["1..10"]),
    ],
)
def test_wrong_input_when_evaluating_is_told_before_anything_is_drawn(given, told, call, copied, monkeypatch):
    monkeypatch.setattr("ddpm.sources.trained.TrainedSampler.draw", lambda *arguments: pytest.fail("drawn"))
    before = (copied / "evaluation.json").read_text()
    base = [w for w in (f"run={copied}", "n=8", "sampler.steps=2") if w.partition("=")[0] != given.partition("=")[0]]
    assert_refused(call(cli.evaluate, *base, given), *told)
    assert (copied / "evaluation.json").read_text() == before


def test_the_default_evaluation_works_on_the_default_data(call, copied, monkeypatch):
    """It holds out fewer images than the number of samples that larger data sets are measured with, and than features.

    Samples are then one more than features, and what is compared with fewer held-out images says so.
    """
    monkeypatch.setattr("ddpm.metrics.quality.train_judge", lambda judge, *arguments, **options: judge.eval())
    before = json.loads((copied / "evaluation.json").read_text())
    result = call(cli.evaluate, f"run={copied}", "sampler.steps=1", "judge.channels=4")
    assert result.code == 0 and "36 images are held out" in result.out, result
    found = {name: r for name, r in json.loads((copied / "evaluation.json").read_text()).items() if name not in before}
    (recognised,) = (found.pop(name) for name in list(found) if name.startswith("recognition_logistic_"))
    (frechet,) = found.values()
    assert recognised["n"] == frechet["n"] == 65 and frechet["real_n"] == 36


@pytest.mark.slow
@pytest.mark.parametrize("change", ["no labels", "no held-out part"])
def test_data_that_cannot_be_measured_against(change, call, tmp_path, without_pictures, monkeypatch):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(6):
        Image.fromarray(np.full((8, 8), 40 * i, np.uint8)).save(folder / f"{i}.png")
    data = ["data=folder", f"data.root={folder}", "data.image_size=8", "data.channels=1"]
    changes = data if change == "no labels" else ["data.validation=0"]
    assert call(cli.train, *words(*changes, "trainer.steps=1"), f"runs={tmp_path / 'runs'}").code == 0
    monkeypatch.setattr("ddpm.sources.trained.TrainedSampler.draw", lambda *arguments: pytest.fail("drawn"))
    result = call(cli.evaluate, f"run={run_of(tmp_path / 'runs')}", "n=1", "sampler.steps=2", "metric=recognition")
    assert_refused(result, change)


@pytest.mark.parametrize("channels", ["1", "2"])
def test_a_learned_variance_needs_a_network_with_twice_the_channels(channels, call, tmp_path, without_pictures):
    learned = ["diffusion.variance=learned", "diffusion.loss=hybrid", f"model.out_channels={channels}"]
    result = call(cli.train, *words(*learned, "diffusion.target=eps"), f"runs={tmp_path}")
    if channels == "2":
        assert result.code == 0 and "warning: target eps" not in result.out  # T = 10: 204, and no reason to warn
    else:
        assert_refused(result, "model.out_channels = 1", "diffusion.variance=learned", "takes model.out_channels=2")
        assert not list(tmp_path.iterdir())


def test_a_doubtful_schedule_is_warned_of_when_training_begins(call, tmp_path, without_pictures):
    doubtful = words("schedule=linear", "schedule.rescale=false", "schedule.T=50", "trainer.steps=1")
    result = call(cli.train, *doubtful, f"runs={tmp_path}")
    assert result.code == 0 and "warning: x_T still carries 78% of the signal" in result.out


# ---------------------------------------------------------------------------------------------- schedule


@pytest.mark.slow
def test_schedules_are_drawn_beside_each_other_with_the_same_T(typed, tmp_path):
    out = tmp_path / "a.png"
    given = ["schedule=linear", "schedule.T=100", "schedule.rescale=false", "compare=[linear,zero_terminal_snr,cosine]"]
    result = typed(cli.schedule, *given, f"out={out}", "target=eps")
    assert result.code == 0 and result.err == ""
    header, *rows, low, end, clipped, wrote = result.out.splitlines()
    assert header.split()[:2] == ["schedule", "T"]
    assert [row.split("  ")[0] for row in rows] == ["linear", "linear (default)", "zero_terminal_snr", "cosine"]
    assert [row.split()[-8] for row in rows] == ["100"] * 4 and rows[0].endswith(" 1.66")
    assert low.startswith("warning: linear: x_T still carries 60% of the signal")
    assert end.startswith("warning: zero_terminal_snr: target eps")
    assert clipped.startswith("warning: cosine: target eps")
    assert wrote == f"wrote {out}" and Image.open(out).size[0] > 800


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("compare=[nope]", ["schedule/nope", "sigmoid"]),
        ("compare=linear", ["compare=linear must be a list of names"]),
        ("compare=[betas]", ["schedule.beta must be given"]),
        ("compare=[linear]", ["compare, linear: T = 5 is too small", "21"]),
        ("target=w", ["target=w is not known; allowed: eps, x_0, v, flow"]),
        ("out=a.gif", ["out=a.gif must be the name of a .png file"]),
        ("out=/no/such/a.png", ["/no/such does not exist"]),
        ("schedule.T=0", ["T = 0"]),
        ("schedule.s=-1", ["s = -1"]),
        ("schedule.s=nan", ["schedule.s = nan must be a finite number"]),
    ],
)
def test_wrong_input_for_a_figure_of_schedules_draws_nothing(given, told, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = [] if given.startswith("schedule.T") else ["schedule.T=5"]
    assert_refused(call(cli.schedule, *base, given), *told)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------- --check


@pytest.mark.slow
def test_a_check_says_what_a_run_would_be_and_begins_nothing(call, tmp_path, monkeypatch, without_pictures):
    monkeypatch.chdir(tmp_path)
    result = call(cli.train, "--check", *TINY, "runs=runs")
    lines = dict(line.split(maxsplit=1) for line in result.out.splitlines())
    assert result.code == 0 and result.err == "" and list(tmp_path.iterdir()) == []
    assert list(lines) == ["run", "data", "model", "budget", "memory", "disk"]
    assert lines["run"].endswith(": new, would begin at step 1") and "digits, 1,761 images" in lines["data"]
    assert lines["budget"] == "4 steps of 8 images" and "activations" in lines["memory"] and "UNet" in lines["model"]
    assert "2 checkpoints of" in lines["disk"]

    assert call(cli.train, *TINY, "runs=runs").code == 0
    assert str(Path("runs") / "default" / run_of(Path("runs")).name) in lines["run"]  # as it had said
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert "done (4 steps); nothing to do" in call(cli.train, *TINY, "runs=runs", "--check").out
    run = run_of(Path("runs"))
    longer = call(cli.train, "--check", f"extend={run}", "trainer.steps=9")
    assert f"new, would resume from {run / 'checkpoints' / '4'}" in longer.out, longer
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before

    (run / "status.json").write_text(json.dumps(status(run) | {"state": "FAILED"}))
    again = call(cli.train, *TINY, "runs=runs", "--check")
    assert f"FAILED before, would resume from {Path('runs') / 'default' / run.name / 'checkpoints' / '4'}" in again.out


def test_a_check_of_a_run_that_is_held_says_by_whom(call, tmp_path, without_pictures):
    call(cli.train, *TINY, f"runs={tmp_path}")
    run = run_of(tmp_path)
    with Run(run).locked():
        held = status(run) | {"state": "RUNNING", "host": "elsewhere", "pid": 4711}
        (run / "status.json").write_text(json.dumps(held))
        assert_refused(
            call(cli.train, "--check", *TINY, f"runs={tmp_path}"), "being trained by process 4711", "elsewhere"
        )


@pytest.mark.parametrize(
    ("available", "free", "told"),
    [
        (1000, 10**12, ["a training step needs", "of memory on cpu", "are available", "model.channels"]),
        (1_500_000, 10**12, ["activations", "1.66 MB are available", "trainer.accumulate", "trainer.batch_size"]),
        (10**12, 10**6, ["needs 20.", "of disk", "1 MB are free", "trainer.keep"]),
    ],
)  # fmt: skip
def test_a_check_refuses_what_does_not_fit(available, free, told, call, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "available", lambda device: available)
    monkeypatch.setattr(preflight, "free", lambda folder: free)
    monkeypatch.chdir(tmp_path)
    assert_refused(call(cli.train, "--check", *words("trainer.batch_size=128"), "runs=runs"), *told)
    assert list(tmp_path.iterdir()) == []


def test_a_smaller_micro_batch_takes_less_and_then_it_fits(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preflight, "available", lambda device: 2_000_000)
    assert_refused(call(cli.train, "--check", *words("trainer.batch_size=128")), "trainer.accumulate")
    assert call(cli.train, "--check", *words("trainer.batch_size=128"), "trainer.accumulate=16").code == 0


@pytest.mark.slow
def test_checkpointing_takes_less_and_makes_the_same_run(call, tmp_path, monkeypatch, without_pictures):
    asked, counted = words("trainer.batch_size=32", "model.dropout=0.1"), []
    monkeypatch.setattr(preflight, "memory", lambda *arguments: (counted.append(arguments[5]), (0,))[1])
    for saving in (False, True):
        call(cli.train, "--check", *asked, f"model.checkpointing={saving}", f"runs={tmp_path / 'none'}")
        assert call(cli.train, *asked, f"model.checkpointing={saving}", f"runs={tmp_path / str(saving)}").code == 0
    plain, less = (run_of(tmp_path / str(saving)) for saving in (False, True))
    assert plain.name == less.name and same(weights(plain, 4), weights(less, 4)) and losses(plain) == losses(less)
    assert OmegaConf.load(less / "config.yaml").model.checkpointing
    assert "nothing to do" in call(cli.train, *asked, "model.checkpointing=true", f"runs={tmp_path / 'False'}").out
    kept = [activations for activations in counted if activations]  # which --check alone counts
    assert len(kept) == 2 and kept[1] < 0.7 * kept[0]


@pytest.mark.slow
def test_a_network_that_cannot_be_compiled_is_trained_as_it_is(call, tmp_path, monkeypatch, without_pictures):
    def stumble(*arguments: object, **keys: object) -> None:
        raise RuntimeError("no compiler of any kind\nand a long story")

    monkeypatch.setattr(torch.nn.Module, "compile", lambda model: setattr(model, "_compiled_call_impl", stumble))
    plain, tried = (
        call(cli.train, *words(), f"compile={compile}", f"runs={tmp_path / str(compile)}") for compile in (False, True)
    )
    assert plain.code == tried.code == 0
    assert (
        "warning: the network cannot be compiled here, and is trained as it is: no compiler of any kind\n" in tried.out
    )
    one, other = (run_of(tmp_path / str(compile)) for compile in (False, True))
    assert one.name == other.name and same(weights(one, 4), weights(other, 4)) and losses(one) == losses(other)
    assert_refused(call(cli.train, *words(), "compile=perhaps", f"runs={tmp_path}"), "compile=perhaps", "true or false")


def test_a_graph_is_for_gpus_and_changes_no_name(call, tmp_path, monkeypatch, without_pictures):
    told = call(cli.train, *words(), "graph=auto", f"runs={tmp_path / 'auto'}")
    assert told.code == 0 and "CUDA" not in told.out + told.err
    asked = []
    monkeypatch.setattr(ddpm.training.graph, "graph_on", asked.append)
    assert call(cli.train, *words(), "graph=off", f"runs={tmp_path / 'off'}").code == 0 and not asked
    assert call(cli.train, *words("seed=1"), "graph=auto", f"runs={tmp_path / 'other'}").code == 0
    assert asked == [torch.device("cpu")]  # of a CPU there is none
    one, other = (run_of(tmp_path / graph) for graph in ("auto", "off"))
    assert one.name == other.name and same(weights(one, 4), weights(other, 4))
    assert_refused(call(cli.train, *words(), "graph=on", f"runs={tmp_path}"), "graph=on", "auto, off")
    assert_refused(call(cli.train, *words(), "graph=null", "--check", f"runs={tmp_path}"), "graph=None", "auto, off")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler for a CPU")
def test_a_compiled_network_learns_the_same_but_for_rounding(call, tmp_path, without_pictures):
    for compile in (False, True):
        told = call(cli.train, *words("trainer.previews=1"), f"compile={compile}", f"runs={tmp_path / str(compile)}")
        assert told.code == 0 and ("compiled in" in told.out) == compile
    one, other = (run_of(tmp_path / str(compile)) for compile in (False, True))
    assert one.name == other.name
    a, b = ([loss for *_, loss in losses(run)] for run in (one, other))
    assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.slow
def test_training_warns_of_a_small_disk_and_refuses_a_small_memory(call, tmp_path, monkeypatch, without_pictures):
    monkeypatch.setattr(preflight, "free", lambda folder: 10**6)
    result = call(cli.train, *TINY, f"runs={tmp_path}")
    warned = [line for line in result.out.splitlines() if line.startswith("warning: the run needs")]
    assert result.code == 0 and len(warned) == 1 and "1 MB are free" in warned[0]
    monkeypatch.setattr(preflight, "available", lambda device: 1000)
    monkeypatch.setattr(preflight, "activations", None)  # which takes a moment, and only --check has
    assert_refused(call(cli.train, *words("seed=1"), f"runs={tmp_path / 'other'}"), "a training step needs")
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_a_check_of_a_sweep_looks_at_every_job_and_writes_nothing(typed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = typed(cli.train, "-m", "--check", *words("model.groups=4,3", "seed=0,1"), "runs=runs")
    assert result.code == 2 and list(tmp_path.iterdir()) == []
    refused = result.err.splitlines()
    assert len(refused) == 2 and all(line.startswith("error: ") and "groups = 3" in line for line in refused)
    assert result.out.count("new, would begin at step 1") == 2 and "FAILED" not in result.out
    assert "model.groups=4 seed=1" in result.out
    result = typed(cli.train, "--multirun", "--check", *words("seed=0,1"), "runs=runs")
    assert result.code == 0 and result.err == "" and list(tmp_path.iterdir()) == []


def test_a_check_downloads_nothing(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["data=mnist", "data.root=nowhere", "data.download=true", "data.image_size=8"]
    assert_refused(call(cli.train, "--check", *words(*given)), "mnist", "start the run, which downloads it")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [cli.evaluate, cli.schedule])
def test_only_training_and_sampling_can_be_checked(command, typed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(typed(command, "--check", "run=x"), "--check", "key=value")
    assert_refused(typed(cli.train, "--chek"), "--chek", "--help")
    assert_refused(typed(cli.sample, "--check", "run=x"), "run=x: no config.yaml there")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_check_in_a_real_process(tmp_path):
    runs = tmp_path / "runs"
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "experiments" / "train.py"), "--check", *TINY, f"runs={runs}"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "") and "new, would begin" in done.stdout, done
    assert list(tmp_path.iterdir()) == []


OPTIMIZERS = {
    "+optimizer.capturable=true optimizer.fused=null": ["it cannot take a step on cpu", "capturable"],
    "+optimizer.differentiable=true": ["optimizer: "],
    "+optimizer.foreach=true": ["fused", "foreach"],
    "optimizer.eps=0": ["first step makes", "nan", "eps"],
    "optimizer.lr=1e300": ["first step makes", "lr"],
    "optimizer.lr=abc": ["lr = 'abc' must be a number"],
    "optimizer.betas=[2,3]": ["beta"],
    "optimizer.fused=5": ["fused = 5 must be true or false or null"],
    "+optimizer.params=[1]": ["params is no argument", "lr"],
}


@pytest.mark.parametrize("group", ["data=digits", "data=folder data.channels=1 data.root={pictures}"])
def test_images_beyond_memory_are_refused(group, call, tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "pictures" / "0.png")
    given = [*group.format(pictures=tmp_path / "pictures").split(), "data.image_size=10000000"]
    assert_refused(
        call(cli.train, *words(*given), f"runs={tmp_path / 'runs'}"),
        "data: image_size=10000000",
        "while they are read",
        "available",
    )


@pytest.mark.parametrize("given", OPTIMIZERS)
def test_an_optimizer_that_takes_no_step_is_refused(given, call, tmp_path):
    assert_refused(call(cli.train, *words(*given.split()), f"runs={tmp_path / 'runs'}"), *OPTIMIZERS[given])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("device=99999999999999999999999999", ["device=", "auto, cpu, cuda"]),
        ("seed='a\nb\x1b[2J'", [r"seed=a\nb\x1b[2J must be an integer"]),
        (f"study={'x' * 300}", ["255 bytes of a folder"]),
        (f"extend={'x' * 300}", ["File name too long: xxx"]),
        (f"init={'x' * 300}", ["File name too long: xxx"]),
        ("seed=9223372036854775808", ["seed is a whole number of more than 64 bits"]),
        ("recognition=abc", ["recognition=abc must be true or false"]),
        ("runs=[a]", ["runs=['a'] must be text"]),
    ],
)
def test_what_was_typed_is_told_again_in_one_line(given, told, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(call(cli.train, *words(given)), *told)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------- points in the plane

POINTS = [
    "experiment=points", "data.count=60", "model.width=16", "model.depth=1", "schedule.T=10", "sampler.steps=2",
    "trainer.steps=4", "trainer.batch_size=8", "trainer.warmup=0", "trainer.previews=1", "trainer.log_every=1",
    "trainer.checkpoint_every=2", "device=cpu",
]  # fmt: skip


@pytest.mark.slow
def test_points_go_the_whole_way_of_images(call, tmp_path):
    runs = tmp_path / "runs"
    command = (*POINTS, 'evaluation=["metric=[loss_by_snr,bits_per_dim,log_likelihood] n=4"]', f"runs={runs}")
    assert call(cli.train, *command).code == 0
    run = run_of(runs)
    of_the_plane = ("score.png", "walks.png", "field.gif", "process.png", "density.png")
    pictures = ("samples.png", "preview.png", "denoising.gif", "forward.png", "samples.npy", *of_the_plane)
    assert all((run / name).stat().st_size for name in pictures)
    measured = json.loads((run / "evaluation.json").read_text())
    assert len(measured) == 3 and all("gaussian" in record for name, record in measured.items() if "bits" in name)

    shutil.rmtree(run / "checkpoints" / "4")
    kept, lines = weights(run, 2), losses(run)
    (run / "status.json").write_text(json.dumps(status(run) | {"state": "INTERRUPTED"}))
    result = call(cli.train, *command)
    assert result.code == 0 and f"going on from {run / 'checkpoints' / '2'}" in result.out
    assert losses(run) == lines and same(weights(run, 2), kept)

    out = tmp_path / "x"
    for words in (["out=X.npy", "n=5"], ["out=X.png"], ["out=X.gif"], ["out=X_strip.png", "steps_strip=[1,2]"],
                  ["out=X_way.png", "process=3"], ["out=X_between.png", "between=[0,1]"]):  # fmt: skip
        result = call(cli.sample, f"run={run}", "sampler.steps=2", *(word.replace("X", str(out)) for word in words))
        assert result.code == 0 and "warning" not in result.out + result.err
    array = np.load(f"{out}.npy")
    assert array.shape == (5, 2) and array.dtype == np.float32 and np.isfinite(array).all()
    assert len(list(tmp_path.glob("x*.png"))) == 4 and Path(f"{out}.gif").exists()
    assert call(cli.sample, f"run={run}", "sampler.steps=2", f"out={tmp_path / 'all'}/").code == 0
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == sorted(of_the_plane)


SCORE = [
    "task=score", "experiment=plane/mixture_score", "data.count=60", "data.grid=[2,1]", "model.width=16",
    "model.depth=1", "sampler.moves=3", "trainer.seconds=null", "trainer.steps=4", "trainer.batch_size=8",
    "trainer.checkpoint_every=2", "trainer.previews=1", "device=cpu",
]  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(["task.objective=sliced_vr", "model.time=none"], id="one level", marks=pytest.mark.slow),
        pytest.param(
            ["task.objective=explicit", "schedule=geometric", "~schedule.sigma", "model.energy=true"],
            id="a ladder",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_score_goes_the_whole_way_of_a_diffusion(call, tmp_path, settings):
    runs = tmp_path / "runs"
    measured = 'evaluation=["metric=[score_error,sliced_wasserstein] n=30 sampler=langevin sampler.moves=2"]'
    command = (*SCORE, *settings, measured, f"runs={runs}")
    result = call(cli.train, *command)
    assert result.code == 0 and "warning" not in result.out + result.err and "sampler=langevin" in result.out
    run = run_of(runs)
    assert all((run / name).stat().st_size for name in ("score.png", "walks.png", "field.gif", "samples.png"))
    found = json.loads((run / "evaluation.json").read_text())
    assert {name.partition("_")[0] for name in found} == {"score", "sliced"}

    shutil.rmtree(run / "checkpoints" / "4")
    lines = losses(run)
    (run / "status.json").write_text(json.dumps(status(run) | {"state": "INTERRUPTED"}))
    assert call(cli.train, *command).code == 0 and losses(run) == lines
    out = tmp_path / "x.npy"
    assert call(cli.sample, f"run={run}", "sampler=langevin", "sampler.moves=2", "n=5", f"out={out}").code == 0
    assert np.load(out).shape == (5, 2)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("task.objective=nope", ["objective = 'nope' is not known", "denoising, explicit, implicit, sliced"]),
        ("schedule.sigma=[0]", ["sigma"]),
        ("schedule.sigma=[-1]", ["sigma"]),
        ("sampler.r=4", ["r = 4 must lie in (0, 4)"]),
        ("diffusion.loss=snr", ["does not apply to score matching"]),
        ("data.covariances=[[[1,2],[2,1]],[[1,0],[0,1]]]", ["not positive definite"]),
        ("model.features=3", ["(3,)", "(2,)"]),
        ('evaluation=["metric=score_error score_error.sigma=[5] sampler=langevin"]', ["sigma = 5", "0.2"]),
    ],
)
def test_what_is_no_score_is_refused(call, tmp_path, change, told):
    assert_refused(call(cli.train, *SCORE, change, f"runs={tmp_path / 'runs'}"), *told)
    assert not (tmp_path / "runs").exists()


def test_the_explicit_objective_is_refused_where_the_density_is_not_known(call, tmp_path):
    words = ("experiment=plane/score", "task.objective=explicit", "device=cpu", f"runs={tmp_path / 'runs'}")
    assert_refused(call(cli.train, *words), "the density of swiss_roll is not known; that of data=mixture is")


@pytest.mark.slow
@pytest.mark.parametrize("d", [1, 3])
def test_points_of_other_dimensions_go_that_way_too(call, tmp_path, d):
    """Fresh ones, by the gradient of an energy."""
    runs = tmp_path / "runs"
    of = ("data=mixture", f"data.grid={[2] * d}".replace(" ", ""), "data.fresh=true", f"model.features={d}")
    assert call(cli.train, *POINTS, *of, "model.energy=true", f"runs={runs}").code == 0
    run = run_of(runs)
    assert all((run / name).stat().st_size for name in ("samples.png", "preview.png", "denoising.gif", "forward.png"))
    assert np.load(run / "samples.npy").shape[1:] == (d,)
    for words in (["out=x.npy", "n=5"], ["out=x.gif"], ["out=x_strip.png", "steps_strip=[1,2]"],
                  ["out=x_way.png", "process=3"], ["out=x_between.png", "between=[0,1]"]):  # fmt: skip
        words[0] = words[0].replace("x", str(tmp_path / "x"), 1)
        assert call(cli.sample, f"run={run}", "sampler.steps=2", *words).code == 0
    assert np.load(tmp_path / "x.npy").shape == (5, d)
    assert_refused(call(cli.train, *POINTS, *of[:-1], f"runs={tmp_path / 'no'}"), f"set model.features={d}")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("augment=script", ["augment changes pictures", "swiss_roll"]),
        ("model=unet", ["model=mlp points"]),
        ("model.features=3", ["(3,)", "(2,)"]),
        ("task.drop=0.1", ["drop = 0.1"]),
        ('evaluation=["metric=frechet"]', ["metric=frechet needs pictures", "loss_by_snr"]),
    ],
)
def test_what_needs_pictures_is_refused_for_points(call, tmp_path, change, told):
    kept = [word for word in POINTS if change != "model=unet" or not word.startswith("model.")]
    assert_refused(call(cli.train, *kept, change, f"runs={tmp_path / 'runs'}"), *told)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_folder_of_numbered_pictures_is_refused_for_points(call, tmp_path, without_pictures):
    of = ("data=mixture", "data.grid=[2,2,2]", "model.features=3")
    assert call(cli.train, *POINTS, *of, f"runs={tmp_path / 'runs'}").code == 0
    run = run_of(tmp_path / "runs")
    assert_refused(call(cli.sample, f"run={run}", "sampler.steps=2", f"out={tmp_path}/many/"), "points", ".npy")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "linked"),
    [("trainer.offset_noise=5", "offset_noise"), ("trainer.time_sampling=stratified", "time_sampling")],
)
def test_what_a_task_takes_from_the_trainer_is_changed_with_it_in_a_child_too(
    key, linked, call, tmp_path, without_pictures
):
    runs = f"runs={tmp_path / 'runs'}"
    assert call(cli.train, *words(), runs).code == 0
    parent = run_of(tmp_path / "runs")
    assert call(cli.train, f"extend={parent}", "trainer.steps=6", key, "device=cpu", runs).code == 0
    (child,) = (path for path in (tmp_path / "runs" / "default").iterdir() if path != parent)
    assert call(cli.train, f"extend={parent}", "trainer.steps=6", "device=cpu", runs).code == 0
    (plain,) = (path for path in (tmp_path / "runs" / "default").iterdir() if path not in (parent, child))
    stored = OmegaConf.load(child / "config.yaml")
    assert stored.task[linked] == stored.trainer[linked] != OmegaConf.load(plain / "config.yaml").task[linked]
    assert losses(child) != losses(plain)


def test_a_value_that_is_taken_from_elsewhere_is_set_there_alone(call, tmp_path):
    for word, told in [
        ("task.time_sampling=loss_aware", "set trainer.time_sampling alone"),
        ("task.offset_noise=0.1", "set trainer.offset_noise alone"),
        ("model.drop=0.1", "set task.drop alone"),
    ]:
        assert_refused(call(cli.train, *words(), word, f"runs={tmp_path / 'runs'}"), word.partition("=")[0], told)


# ----------------------------------------------------------------------------------------------------- what is typed


@pytest.mark.parametrize(
    "typed",
    [
        ["a=1", "-m", "b=1,2"],
        ["-m", "a=1", "b=1,2"],
        ["a=1", "b=1,2", "--multirun"],
        ["a=1", "--cfg", "job", "b=2"],
        ["a=1", "--info", "defaults"],
    ],
)
def test_options_may_stand_between_settings(typed):
    known = cli._parser().parse_args(cli._in_order(typed))
    settings = [word for word in typed if "=" in word]
    assert known.overrides == settings and known.multirun == bool({"-m", "--multirun"} & set(typed))
    assert (known.cfg, known.info) == ("job" if "--cfg" in typed else None, "defaults" if "--info" in typed else None)


@pytest.mark.slow
def test_a_sweep_whose_option_stands_between_its_settings(typed, without_pictures, tmp_path):
    result = typed(cli.train, *words(f"runs={tmp_path}", "study=é"), "-m", "seed=0,1")
    assert result.code == 0 and len(list(tmp_path.glob("é/*/config.yaml"))) == 2, result


def test_an_option_that_is_not_known_is_named_without_the_settings(typed):
    assert_refused(typed(cli.train, "seed=1", "--nope", "seed=2"), "error: unrecognized --nope; settings are given as")


def test_numbers_that_no_optimizer_takes_are_refused_in_our_words(call):
    for word, allowed in (
        ("optimizer.lr=abc", "lr = 'abc' must be a number"),
        ("optimizer.lr=-1", "optimizer.lr = -1 must be >= 0 and finite"),
        ("optimizer.betas=[0.9,1]", "optimizer.betas = [0.9, 1] must be in [0, 1)"),
        ("optimizer.weight_decay=-0.1", "optimizer.weight_decay = -0.1 must be >= 0 and finite"),
    ):
        assert_refused(call(cli.train, *words(word)), allowed)


def test_a_key_of_a_group_that_is_not_there_is_told_with_those_that_are(call):
    assert_refused(call(cli.sample, "run=x", "judge.width=3"), "judge", "has:", "steps_strip")


def test_a_run_that_learned_nothing_has_failed(call, monkeypatch, tmp_path):
    """Each step is skipped, fewer of them than trainer.max_skipped: it would else end as if all were well."""
    monkeypatch.setattr("ddpm.diffusion.L_simple", lambda output, target: (output * math.nan).flatten(1).mean(1))
    result = call(cli.train, *words("trainer.steps=2", f"runs={tmp_path}"))
    run = run_of(tmp_path)
    assert result.code == 1 and "nothing was learned: loss or gradient not finite in each of the 2 steps" in result.out
    assert status(run)["state"] == "FAILED" and (run / "autopsy" / "report.json").exists()
    assert not list((run / "checkpoints").glob("*"))


# ------------------------------------------------------------------------------------------------------------- classes


@pytest.mark.slow
def test_a_class_is_asked_for(call, tmp_path):
    changes = words("model.num_classes=10", "trainer.steps=2", f"runs={tmp_path / 'runs'}", "data.validation=0.1")
    assert call(cli.train, *changes).code == 0
    run = run_of(tmp_path / "runs")
    drawn = {}
    for asked in ("3", "[3,5]", "all", "null"):
        drawn[asked] = tmp_path / f"{len(drawn)}.npy"
        result = call(cli.sample, f"run={run}", "sampler.steps=2", "n=12", f"class={asked}", f"out={drawn[asked]}")
        assert result.code == 0 and ("class 3" in result.out) == ("3" in asked)
    of_3, of_both, of_all, plain = (np.load(path) for path in drawn.values())
    assert np.array_equal(of_all, plain) and np.array_equal(of_3[::2], of_both[::2]) and len(of_3) == 12
    assert np.array_equal(of_3[3], plain[3]) and np.array_equal(of_both[5], plain[5])

    result = call(cli.sample, f"run={run}", "sampler.steps=2", "n=2", "class=[3,5]")
    assert result.code == 0 and (run / "samples_step2_ema_class3-5_ddim2_seed0.png").exists()
    assert call(cli.sample, f"run={run}", "sampler.steps=2", "n=12", 'class="5"', f"out={tmp_path / 'x.npy'}").code == 0
    assert np.array_equal(np.load(tmp_path / "x.npy")[1::2], of_both[1::2])  # by its name
    named = ("[3,x]", "class=x is not known; the classes are 0, 1, 2, 3, 4, 5, 6, 7, 8, 9")
    for asked, allowed in (("10", "classes 0..9"), ("[]", "or all"), ("true", "or all"), named):
        assert_refused(call(cli.sample, f"run={run}", f"class={asked}"), "class", allowed)
    assert_refused(call(cli.sample, f"run={run}", "class=1", "between=[0,1]", "sampler.steps=2"), "class=", "between")

    measured = ["metric=[recognition,frechet,loss_by_snr]", "features=pca", "pca=2", "n=10", "sampler.steps=2"]
    assert call(cli.evaluate, f"run={run}", *measured, "class=[5,3]").code == 0
    assert call(cli.evaluate, f"run={run}", *measured).code == 0
    found = json.loads((run / "evaluation.json").read_text())
    of_classes = {name for name in found if name.endswith("_class3-5")}
    assert len(found) == 6 and {name.removesuffix("_class3-5") for name in of_classes} == found.keys() - of_classes
    (name,) = (name for name in of_classes if name.startswith("frechet"))
    assert found[name]["real_vs_real"] != found[name.removesuffix("_class3-5")]["real_vs_real"]


def test_a_network_without_classes_is_asked_for_none(call, finished):
    assert_refused(call(cli.sample, f"run={finished}", "class=3"), "class=3: the network was trained without classes")
    assert_refused(call(cli.evaluate, f"run={finished}", "class=3"), "class=3: the network was trained without")
    line = 'evaluation=["metric=frechet class=3 features=pixels"]'
    assert_refused(call(cli.train, *words(line)), "the network was trained without classes")


NAMES = {"classes": ["character_1_ka", "character_2_kha", "digit_3"], "styles": ["Gargi", "Lohit-Devanagari"]}


def styled_run(run: Path, *changes: str, names: dict[str, list[str]] | None = None) -> Path:
    """A run of two labels as training leaves it, with random weights, and the names that it noted."""
    data = ["data=devanagari", "data.labels=[class,style]", "data.image_size=8", "task.drop=0.1"]
    composed = config.compose("train", words(*data, "model.num_classes=[3,2]", *changes))
    (run / "checkpoints").mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(config.resolved(composed)), run / "config.yaml")
    torch.manual_seed(0)
    model = config.build_group(composed, "model", [])
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    checkpoint.save(run / "checkpoints", 2, {"model": model}, {"model": model}, {}, None)
    (run / "status.json").write_text(json.dumps({"state": "DONE"} | (names or {})))
    return run


@pytest.fixture(scope="module")
def styled(tmp_path_factory) -> Path:
    return styled_run(tmp_path_factory.mktemp("styled") / "run", names=NAMES)


def test_a_class_and_a_style_are_asked_for(call, styled, tmp_path):
    def drawn(*asked: str) -> tuple[str, np.ndarray]:
        result = call(cli.sample, f"run={styled}", "sampler.steps=2", "n=6", f"out={tmp_path / 'x.npy'}", *asked)
        assert result.code == 0, result
        return result.out, np.load(tmp_path / "x.npy")

    out, plain = drawn("class=all")
    assert "each class in turn, each style in turn" in out
    out, both = drawn("class=kha", "style=lohit")
    assert "class 1, style 1 (Lohit-Devanagari)" in out and np.array_equal(both[4], plain[4])
    out, lists = drawn("class=[2,ka]", "style=[1]")
    assert "class 2, 0, style 1" in out and np.array_equal(lists[3], plain[3])
    out, without = drawn("class=1", "style=none", "guidance=classifier_free", "guidance.w=2")
    assert "class 1, style none, classifier-free guidance w = 2" in out and not np.array_equal(without, both)
    guided = drawn("class=1", "style=1", "guidance=classifier_free", "guidance.w=2")[1]
    assert not np.array_equal(guided, both) and not np.array_equal(guided, without)


def test_a_sheet_of_classes_and_styles_has_them_in_its_columns_and_rows(call, styled, tmp_path):
    given = (f"run={styled}", "sampler.steps=2", f"out={tmp_path / 'x.png'}")
    for asked, told, columns in (
        (["n=6"], "a column a class, a row a style", 3),
        (["n=5"], "a column a class, a row a style", 3),
        (["n=4", "class=ka"], "a column a style", 2),
        (["n=6", "style=1"], "a column a class", 3),
        (["n=9", "class=ka", "style=0"], None, 3),
    ):
        result = call(cli.sample, *given, *asked)
        assert result.code == 0 and result.out.endswith(f": {told}\n" if told else "x.png\n"), result
        assert Image.open(tmp_path / "x.png").width == 2 + columns * (48 + 2)


def test_what_was_asked_for_is_noted_beside_the_samples(call, styled, tmp_path):
    given = (f"run={styled}", "sampler.steps=2", "n=2")
    assert call(cli.sample, *given, f"out={tmp_path}/x/", "class=ka", "style=[1,0]").code == 0
    noted = json.loads((tmp_path / "x" / "samples.json").read_text())
    assert (noted["class"], noted["style"]) == ([0], [1, 0])
    assert_refused(call(cli.sample, *given, f"out={tmp_path}/x/", "class=ka", "style=1"), "samples of other settings")
    assert call(cli.sample, *given, "class=none", "style=[1,0]").code == 0
    assert (styled / "samples_step2_ema_classnone_style1-0_ddim2_seed0.png").exists()


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["style=2"], ["style = 2: the network has the styles 0..1"]),
        (["style=[0,5]"], ["style = [0, 5]: the network has the styles 0..1"]),
        (
            ["style=lohti"],
            ["style=lohti is not known, perhaps Lohit-Devanagari; the styles are Gargi, Lohit-Devanagari"],
        ),
        (["class=khaa"], ["class=khaa is not known, perhaps character_2_kha", "the classes are character_1_ka"]),
        (["class=character"], ["class=character is not known, perhaps character_1_ka or character_2_kha; the classes"]),
        (["style=[]"], ["style=[] must be a style, by number or name", "none, or all"]),
        (["style=true"], ["style=True must be a style"]),
        (["style=[1,none]"], ["none (without a style) cannot be combined with others"]),
        (["style=1", "between=[0,1]"], ["style= has no effect on between"]),
    ],
)
def test_labels_that_are_not_there(asked, told, call, styled):
    assert_refused(call(cli.sample, f"run={styled}", "sampler.steps=2", *asked), *told)


def test_networks_without_styles_or_without_a_null(call, styled, finished, tmp_path):
    assert_refused(call(cli.sample, f"run={finished}", "style=1"), "style=1: the network was trained without styles")
    run = styled_run(tmp_path / "always", "task.drop=0", names=NAMES)
    assert_refused(call(cli.sample, f"run={run}", "style=none"), "style = none: the network was never trained without")
    guided = call(cli.sample, f"run={run}", "style=1", "guidance=classifier_free")
    assert_refused(guided, "trained without its condition too", "task.drop=0.1")


@pytest.mark.slow
def test_two_labels_are_measured_and_their_guidance_swept(call, tmp_path):
    (tmp_path / "fonts").mkdir()
    for font in ("a.ttf", "b.ttf"):
        make_font(tmp_path / "fonts" / font)
    changes = [f"data.root={tmp_path}", f"data.fonts={tmp_path / 'fonts'}", "data.count=400", "data.validation=0.25"]
    run = styled_run(tmp_path / "runs" / "default" / "run", "model.num_classes=[46,2]", *changes)
    asked = [f"run={run}", "n=8", "features=pca", "pca=2", "sampler.steps=2", "recogniser=logistic"]
    for given in (["style=b"], ["class=[ka,3]"], ["class=ka", "style=none"], []):
        assert call(cli.evaluate, *asked, "metric=sliced_wasserstein", *given).code == 0
    found = json.loads((run / "evaluation.json").read_text())
    assert {name.partition("_train")[2] for name in found} == {"_style1", "_class0-3", "_class0_stylenone", ""}
    assert len({record["real_vs_real"] for record in found.values()}) == 4
    sweep = [*asked, "metric=guidance_sweep", "guidance=classifier_free", "guidance_sweep.w=[0,2]", "style=b"]
    result = call(cli.evaluate, *sweep)
    assert result.code == 0 and "_train_style1: 2 weights" in result.out, result
    assert_refused(call(cli.evaluate, *asked, "style=c"), "style=c is not known", "the styles are a, b")

    edit = (f"run={run}", "sampler.steps=2", "image=held_out:3", f"out={tmp_path / 'x.npy'}")
    result = call(cli.edit, *edit, "strength=0.5", "guidance=classifier_free")
    data = Devanagari(tmp_path, 400, fonts=tmp_path / "fonts", image_size=8, validation=0.25)
    held = int(data.held_out[3])
    own = [held % 46, int(styles(2, 400)[held])]
    assert result.code == 0 and f"class {own[0]}, style {own[1]}, classifier-free" in result.out, result
    for more, n in (("", 46), ("style=all", 92), ("class=[1,2]", 2), ("class=3 style=all from_style=b", 2)):
        result = call(cli.edit, *edit, "redraw=true", *more.split())
        assert result.code == 0 and np.load(tmp_path / "x.npy").shape == (n, 8, 8, 1), result
    Image.fromarray(np.load(tmp_path / "x.npy")[0, :, :, 0]).save(tmp_path / "x.png")
    file = (*edit[:2], f"image={tmp_path / 'x.png'}", edit[3], "class=ka")
    assert_refused(call(cli.edit, *file, "strength=0.5"), "style= is needed", "has styles: a, b, none, or all")
    assert_refused(call(cli.edit, *file, "redraw=true", "from_class=ka"), "redraw needs from_style=", "a, b")
    assert_refused(call(cli.edit, *file, "redraw=true", "from_class=ka", "from_style=3"), "from_style=3 must be one of")
    assert_refused(call(cli.edit, *file, "strength=0.5", "from_style=a"), "from_style=a has an effect", "redraw=true")
    assert call(cli.edit, *file, "strength=0.5", "style=none").code == 0


# --------------------------------------------------------------------------------------------------- what comes next


WITHOUT_T = [word for word in TINY if word != "schedule.T=10"]
NEXT = {
    "digits": words("trainer.seconds=200"),
    "one step of noise": words("schedule.T=1", "sampler.steps=1"),
    "epochs": words("trainer.steps=null", "trainer.epochs=0.01"),
    "oblong images": words("data.image_size=[8,16]", "model.channel_mults=[1,2]", "model.attention_resolutions=[8]"),
    "a zero terminal SNR": [*WITHOUT_T, "schedule=zero_terminal_snr", "diffusion.target=v", "schedule.schedule.T=30"],
    "points": [*POINTS, "trainer.steps=2"],
    "a folder with spaces": words("study=my é study"),
    "classes": words("model.num_classes=10", "task.drop=0.1"),
}


@pytest.mark.parametrize(
    "kind",
    [kind if kind == "one step of noise" else pytest.param(kind, marks=pytest.mark.slow) for kind in NEXT],
)
def test_what_is_proposed_at_a_runs_end_runs(kind, typed, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_draw_results", lambda *arguments: None)
    monkeypatch.chdir(tmp_path)
    result = typed(cli.train, *NEXT[kind], "runs=runs")
    assert result.code == 0, result
    lines = result.out.split("next:\n")[1].splitlines()
    proposed = {line[2:16].strip(): shlex.split(line[16:]) for line in lines}
    usual = {"more samples", "few steps", "train longer", "a sweep"}
    assert proposed.keys() == usual | ({"guided"} if kind == "classes" else set())
    commands = {"ddpm-sample": cli.sample, "ddpm-train": cli.train}
    for command, *rest in proposed.values():
        check = ["--check"] if "-m" in rest else []  # which trains nothing
        result = typed(commands[command], *check, *rest)
        assert result.code == 0, (rest, result)
    assert Path("samples.png").exists() and Path("strip.png").exists()


# ------------------------------------------------------------------------------------------------------------ guidance


@pytest.fixture(scope="module")
def guidable(tmp_path_factory) -> Path:
    """A run with classes that learned to do without them, of which two checkpoints are kept."""
    changes = words("model.num_classes=10", "task.drop=0.2", "optimizer.lr=0.02", "data.validation=0.1")
    return trained(tmp_path_factory.mktemp("guidable") / "runs", changes)


@pytest.mark.slow
def test_samples_are_guided(call, guidable, tmp_path):
    drawn = {}
    for name, given in {
        "plain": [],
        "none": ["guidance=none"],
        "one": ["guidance=classifier_free", "guidance.w=1"],
        "more": ["guidance=classifier_free", "guidance.w=4"],
        "rescaled": ["guidance=classifier_free", "guidance.w=4", "guidance.rescale=0.7"],
        "within": ["guidance=classifier_free", "guidance.w=4", "guidance.interval=[-90,-80]"],
        "auto": ["guidance=auto", f"guidance.bad={guidable}@2", "guidance.w=3"],
    }.items():
        out = tmp_path / f"{name}.npy"
        result = call(cli.sample, f"run={guidable}", "n=12", "sampler.steps=5", f"out={out}", *given)
        assert result.code == 0, result
        assert ("guidance w = " in result.out) == (name not in ("plain", "none"))
        drawn[name] = np.load(out).astype(int)
    for name in ("none", "one", "within"):
        assert np.abs(drawn[name] - drawn["plain"]).max() <= 1
    assert len({array.tobytes() for array in drawn.values()}) >= 4
    result = call(cli.sample, f"run={guidable}", "n=2", "sampler.steps=2", "guidance=classifier_free", "guidance.w=3")
    assert result.code == 0 and (guidable / "samples_step4_ema_ddim2_w3_seed0.png").exists()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["guidance=classifier_free", "guidance.w=nan"], ["w = nan must be a finite number"]),
        (["guidance=classifier_free", "guidance.interval=[2,1]"], ["low < high"]),
        (["guidance=classifier_free", "guidance.interval=[2]"], ["interval = [2]", "(low, high)"]),
        (["guidance=auto"], ["guidance.bad must be given"]),
        (["guidance=auto", "guidance.bad=/nowhere"], ["guidance.bad=/nowhere", "no run directory"]),
        (["guidance=auto", "guidance.bad=RUN@3"], ["checkpoint 3", "2, 4"]),
        (["guidance=nothing"], ["auto", "classifier_free", "none"]),
        (["guidance=classifier_free", "between=[0,1]"], ["guidance=", "between"]),
    ],
)
def test_guidance_that_cannot_be(given, told, call, guidable):
    given = [word.replace("RUN", str(guidable)) for word in given]
    assert_refused(call(cli.sample, f"run={guidable}", "sampler.steps=2", *given), *told)


def test_a_network_that_was_never_trained_without_its_condition_is_not_guided(call, finished):
    result = call(cli.sample, f"run={finished}", "sampler.steps=2", "guidance=classifier_free")
    assert_refused(result, "needs a conditional network", "model.num_classes=K task.drop=0.1")


@pytest.mark.slow
def test_a_sweep_over_weights_is_kept_and_gone_on_with(call, guidable, tmp_path):
    run = Path(shutil.copytree(guidable, tmp_path / "runs" / "default" / guidable.name))
    asked = [f"run={run}", "metric=guidance_sweep", "n=24", "features=pca", "pca=2", "sampler.steps=2", "seeds=2"]
    asked += ["judge.channels=4"] if "channels" in config.compose("evaluate", ["run=x"]).judge else []
    assert_refused(call(cli.evaluate, *asked), "guidance with a weight")
    asked += ["guidance=classifier_free"]
    assert_refused(call(cli.evaluate, *asked, "guidance_sweep.w=[a]"), "guidance_sweep.w=", "numbers")
    assert_refused(call(cli.evaluate, *asked, "metric=loss_by_snr"), "measures the network itself")
    result = call(cli.evaluate, *asked, "guidance_sweep.w=[0,2]")
    assert result.code == 0 and (run / "guidance_sweep.png").exists(), result
    (record,) = json.loads((run / "evaluation.json").read_text()).values()
    assert [cell["w"] for cell in record["cells"]] == [0, 2] and record["seeds"] == [0, 1]
    assert all(0 <= cell[key] <= 1 for cell in record["cells"] for key in ("precision", "recall", "agreement"))
    result = call(cli.evaluate, *asked, "guidance_sweep.w=[1,2]")
    assert result.code == 0 and "w = 1:" in result.out and "w = 2:" not in result.out
    (after,) = json.loads((run / "evaluation.json").read_text()).values()
    assert [cell["w"] for cell in after["cells"]] == [0, 1, 2] and after["cells"][::2] == record["cells"]
    assert after["guidance"]["kind"] == "ClassifierFree" and "w" not in after["guidance"]


@pytest.mark.slow
def test_a_classifier_of_noisy_images_is_trained_and_guides(call, finished, tmp_path):
    changes = ["model.num_classes=10", "trainer.steps=4"]
    tiny = [
        word for word in words(*changes) if word.partition("=")[0] not in ("model.middle_attention", "sampler.steps")
    ]
    result = call(cli.train, "task=classifier", *tiny, f"runs={tmp_path / 'runs'}")
    assert result.code == 0, result
    run = run_of(tmp_path / "runs")
    assert (run / "accuracy.png").stat().st_size and status(run)["state"] == "DONE" and "a sweep" in result.out
    out, given = tmp_path / "x.npy", ["sampler.steps=2", "n=4", "guidance=classifier", f"guidance.run={run}"]
    result = call(cli.sample, f"run={finished}", *given, "class=3", f"out={out}")
    assert result.code == 0 and "class 3, classifier guidance w = 1" in result.out, result
    assert np.load(out).shape == (4, 8, 8, 1)
    assert_refused(call(cli.sample, f"run={finished}", *given, "class=11"), "classes 0..9")
    assert_refused(call(cli.sample, f"run={run}"), "trained no network that a sampler draws from")
    other = [given[0], "guidance=classifier", f"guidance.run={finished}"]
    assert_refused(call(cli.sample, f"run={finished}", *other), "trained no classifier", "task=classifier")


def test_modes_that_exclude_each_other(typed):
    assert_refused(typed(cli.train, "seed=0,1", "-m", "--cfg", "job"), "--multirun and --cfg exclude each other")


def test_an_interrupted_evaluation_ends_without_a_traceback(call, finished, monkeypatch):
    def interrupted(config: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.evaluating, "evaluate", interrupted)
    result = call(cli.evaluate, f"run={finished}")
    assert result.code == 130 and "Traceback" not in result.err + result.out


@pytest.mark.slow
def test_names_of_guided_samples_tell_them_apart(call, guidable):
    written = set()
    for given in (
        ["w=0"],
        ["w=2"],
        ["w=-2"],
        ["w=2", "interval=[-3,5]"],
        ["w=2", "interval=[3,5]"],
        ["w=2", "rescale=1"],
    ):
        words = ["guidance=classifier_free", *(f"guidance.{word}" for word in given)]
        result = call(cli.sample, f"run={guidable}", "sampler.steps=1", "n=1", *words)
        assert result.code == 0
        written.add(result.out.split("wrote ")[1].strip())
    result = call(cli.sample, f"run={guidable}", "sampler.steps=1", "n=1")
    written.add(result.out.split("wrote ")[1].strip())
    assert len(written) == 7


@pytest.mark.slow
def test_a_sweep_by_another_sampler_or_with_more_seeds_takes_nothing_over_and_loses_nothing(call, guidable, tmp_path):
    run = Path(shutil.copytree(guidable, tmp_path / "runs" / "default" / guidable.name))
    asked = [f"run={run}", "metric=guidance_sweep", "n=24", "features=pca", "pca=2", "guidance=classifier_free"]
    one = [*asked, "sampler=heun", "sampler.steps=2"]
    assert call(cli.evaluate, *one, "guidance_sweep.w=[0,1]").code == 0
    result = call(cli.evaluate, *asked, "sampler=euler", "sampler.steps=2", "guidance_sweep.w=[0,1]")
    assert result.code == 0 and "w = 0:" in result.out and "w = 1:" in result.out
    assert "w = 2:" in call(cli.evaluate, *one, "guidance_sweep.w=[2]", "seeds=2").out
    result = call(cli.evaluate, *one, "guidance_sweep.w=[0,1]")
    assert result.code == 0 and "w = 0:" not in result.out and "w = 1:" not in result.out
