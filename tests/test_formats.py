"""What an older version wrote is read for good: tests/format_N is a run as the first version of format N left it.

A run of 6 steps on digits, 8 channels; samples.npy is what DDIM with 5 steps drew from it then.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from ddpm.commands.sample import sampling
from ddpm.commands.train import prepare, training
from ddpm.config import compose, read_config
from ddpm.runs import checkpoint, directory
from ddpm.runs.directory import Run, read_metrics

FOLDERS = sorted(Path(__file__).parent.glob("format_*"))


def test_every_format_has_its_run():
    assert [path.name for path in FOLDERS] == [f"format_{n}" for n in range(1, checkpoint.FORMAT + 1)]
    assert directory.FORMAT <= checkpoint.FORMAT, "else a run of the newer one is missing here"


@pytest.fixture(params=FOLDERS, ids=lambda path: path.name)
def old(request, tmp_path) -> Path:
    """A copy: reading it must not need to change it, and extending it must not."""
    name = json.loads((request.param / "status.json").read_text())["hash"]
    return Path(shutil.copytree(request.param, tmp_path / "default" / name))


@pytest.fixture
def task(monkeypatch):
    def task(*words: str) -> None:
        hydra = {"hydra": {"mode": "RUN", "overrides": {"task": list(words)}}}
        monkeypatch.setattr(HydraConfig.instance(), "cfg", OmegaConf.create(hydra))

    return task


def test_an_old_run_is_sampled_as_it_was(old, tmp_path):
    out = tmp_path / "samples.npy"
    words = [f"run={old}", "n=4", "sampler=ddim", "sampler.steps=5", "device=cpu", f"out={out}"]
    sampling.sample(compose("sample", words))
    drawn, then = np.load(out).astype(int), np.load(old / "samples.npy").astype(int)
    assert drawn.shape == then.shape and np.abs(drawn - then).max() <= 1  # another processor may round otherwise


def test_all_of_them_are_one_run():
    """By the settings that its format knew: formats change, names do not."""
    assert len({json.loads((path / "status.json").read_text())["hash"] for path in FOLDERS}) == 1


def test_an_old_run_has_its_name_still(old, task):
    """So the command that made it finds it done, and does not train it again."""
    task()
    plan = prepare.planned(read_config(old / "config.yaml"), torch.device("cpu"))
    assert plan.run.hash == old.name and Run(old).status()["state"] == "DONE"


def test_an_old_run_is_extended(old, task, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_draw_results", lambda *arguments: None)
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    words = [f"extend={old}", "trainer.steps=9", f"runs={tmp_path}", "device=cpu"]
    task(*words)
    training.train(compose("train", words))
    (child,) = (path for path in (tmp_path / "default").iterdir() if path.name != old.name)
    assert Run(child).status()["state"] == "DONE" and [line["step"] for line in read_metrics(child)] == [9, 9]
    assert before == {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}


@pytest.mark.parametrize("changed", [(), ("augment.rotation=8",)])
def test_an_old_run_is_extended_without_augmentation_or_with_what_is_typed(changed, old, task, tmp_path):
    """Where its configuration has no such key."""
    words = [f"extend={old}", "trainer.steps=9", f"runs={tmp_path}", "device=cpu", *changed]
    task(*words)
    plan = prepare.planned(compose("train", words), torch.device("cpu"))
    assert plan.parts.augment.active == bool(changed) and plan.parts.augment.rotation == 8 * len(changed)


def test_an_old_run_that_was_interrupted_goes_on(old, task, monkeypatch):
    monkeypatch.setattr(training, "_draw_results", lambda *arguments: None)
    Run(old).write_status("INTERRUPTED")
    task()
    config = read_config(old / "config.yaml")
    config.runs, config.device = str(old.parent.parent), "cpu"
    training.train(config)
    assert Run(old).status()["state"] == "DONE" and Run(old).status()["step"] == 6
