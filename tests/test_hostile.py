"""What somebody sends must be safe to open: no file runs code, leads elsewhere, has no end, or fills the memory."""

import functools
import gzip
import hashlib
import io
import json
import os
import pickle
import platform
import re
import shutil
import signal
import struct
import sys
import tarfile
import tracemalloc
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from ddpm import config
from ddpm.commands.evaluate import evaluating
from ddpm.commands.sample import sampling
from ddpm.commands.train import prepare, training
from ddpm.config import InvalidInput, build, compose, read_config, resolved
from ddpm.data import CIFAR10, IDX, Digits, Folder, ImageData, cifar10, idx
from ddpm.runs import checkpoint, results
from ddpm.runs.directory import Run, read_metrics
from ddpm.training.record import Previews
from models.pretrained import load_unet

SECRET = "a password of the environment"
TINY = [
    "model.channels=8", "model.channel_mults=[1]", "model.groups=4", "model.blocks=1", "model.middle_attention=false",
    "model.attention_resolutions=[]", "schedule.T=10", "sampler.steps=2", "trainer.steps=4", "trainer.seconds=null",
    "device=cpu",
]  # fmt: skip
PATIENCE = 120  # seconds: no measure of speed, but an end for what would have none


# ---------------------------------------------------------------------------------------------- the trap

STARTED: list[str] = []  # processes and connections, while a test runs


def _note(event: str, arguments: tuple) -> None:
    if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect", "urllib.Request"):
        STARTED.append(f"{event} {arguments}")


sys.addaudithook(_note)


class Waiting(BaseException):
    """Nothing came; no error that anything catches."""


@pytest.fixture(autouse=True)
def patience() -> Iterator[None]:
    """What waits or reads for ever is interrupted."""

    def stop(signum: int, frame: object) -> None:
        raise Waiting

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(PATIENCE)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def trap(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder that code in a file would make; and no process is started, no secret told."""
    folder = tmp_path / "trap"
    monkeypatch.setenv("HOSTILE_SECRET", SECRET)
    monkeypatch.setattr("ddpm.runs.directory.git_commit", lambda: None)  # our own process
    platform.processor()  # and `uname`, once in a process
    monkeypatch.chdir(tmp_path)
    STARTED.clear()
    yield folder
    assert not folder.exists() and not STARTED, f"code was run: {STARTED}"


def refused(call: Callable[[], object], *told: object, kind: type[Exception] = InvalidInput) -> str:
    """One error of the right kind, in one line that can be shown in a terminal, with these words."""
    with pytest.raises(kind) as raised:
        call()
    message = str(raised.value)
    assert type(raised.value) is kind and message.isprintable() and SECRET not in message, message
    assert not [word for word in told if str(word) not in message], message
    return message


# ---------------------------------------------------------------------------------------------- a run that was sent


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    return resolved(compose("train", TINY))


@pytest.fixture(scope="module")
def sent(settings, tmp_path_factory) -> Path:
    """A run directory with one checkpoint, as training leaves it. Tests take a copy."""
    run = Run(tmp_path_factory.mktemp("sent") / "0123456789ab")
    model = build(settings["model"], "model")
    state = {"step": 1, "seconds": 0.5, "ema_updates": 1, "optimizer": {}, "scaler": {}, "times": {}}
    checkpoint.save(run.checkpoints, 1, {"model": model}, {"model": model}, state, held_out=0.5)
    OmegaConf.save(OmegaConf.create(settings), run.path / "config.yaml")
    run.write_status("DONE", step=1, seconds=0.5)
    return run.path


@pytest.fixture
def run(sent, tmp_path) -> Path:
    return Path(shutil.copytree(sent, tmp_path / "there" / "default" / sent.name))


def plant(run: Path, name: str, content: bytes) -> Path:
    """Put a file into the run's checkpoint, with a manifest that says its checksum: who sends it can count, too."""
    folder = run / "checkpoints" / "1"
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"][name] = hashlib.sha256(content).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder / name


def store(run: Path, settings: dict[str, Any], **changes: Any) -> None:
    """Write a configuration, in the part of YAML that is JSON."""
    (run / "config.yaml").write_text(json.dumps(settings | changes))


@pytest.fixture(scope="module")
def composed() -> dict[str, DictConfig]:
    return {
        "sample": compose("sample", ["run=x", "n=1", "sampler.steps=2", "device=cpu"]),
        "evaluate": compose("evaluate", ["run=x", "n=2", "sampler.steps=2", "device=cpu", "judge.channels=4"]),
        "train": compose("train", [*TINY, "trainer.steps=9", "recognition=false"]),
    }


@pytest.fixture
def sample(composed) -> Callable[..., None]:
    """`ddpm-sample run=RUN ...`, as it is called once composed."""
    return lambda run, **more: sampling.sample(OmegaConf.merge(composed["sample"], {"run": str(run), **more}))


@pytest.fixture
def evaluate(composed) -> Callable[..., None]:
    return lambda run, **more: evaluating.evaluate(OmegaConf.merge(composed["evaluate"], {"run": str(run), **more}))


@pytest.fixture
def train(composed, monkeypatch) -> Callable[..., None]:
    """`ddpm-train WORDS`."""

    def train(*words: str) -> None:
        hydra = {"mode": "RUN", "overrides": {"task": list(words)}}
        monkeypatch.setattr(HydraConfig.instance(), "cfg", OmegaConf.create({"hydra": hydra}))
        monkeypatch.setattr(training, "_draw_results", lambda *arguments: None)
        training.train(OmegaConf.merge(composed["train"], OmegaConf.from_dotlist(list(words))))

    return train


@pytest.fixture
def extend(train) -> Callable[..., None]:
    return lambda run, *words: train(f"extend={run}", "trainer.steps=9", "trainer.previews=0", *words)


def test_what_was_sent_is_read_as_long_as_it_is_honest(run, sample, capsys):
    """Else the refusals below would prove nothing."""
    sample(run)
    assert "wrote" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- pickles


class Calls:
    """Pickled, a call of a function."""

    def __init__(self, function: Callable, *arguments: object):
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


class Mapping(dict):
    """A dictionary with a method that loading calls."""

    def __setstate__(self, state: dict) -> None:
        os.mkdir(state["trap"])


def saved(thing: object, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(thing, file, **options)
    return file.getvalue()


def mapping(trap: Path) -> Mapping:
    made = Mapping(step=1, seconds=0.5)
    made.trap = str(trap)
    return made


def doubled(times: int) -> bytes:
    """A pickle that calls what torch.load lets it call: of one byte, hexadecimal digits of hexadecimal digits."""
    digits = b"X\x03\0\0\0hex\x86R"
    return b"\x80\x02" + b"c_codecs\nencode\n" * times + b"U\x01a" + digits * times + b"."


def repacked(pickled: bytes, other: str = "") -> bytes:
    """torch.save's own archive with another pickle in it, and one more under a name that is the same to torch."""
    file, honest = io.BytesIO(), zipfile.ZipFile(io.BytesIO(saved({"step": 1})))
    with zipfile.ZipFile(file, "w") as archive:
        for name in honest.namelist():
            archive.writestr(name, pickled if name.endswith("data.pkl") else honest.read(name))
        if other:
            archive.writestr("ARCHIVE/DATA.PKL", other)
    return file.getvalue()


def script() -> bytes:
    """A TorchScript archive, which torch.load knows, too."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(torch.nn.Linear(1, 1), torch.zeros(1, 1)), file)
    return file.getvalue()


def old_tar(trap: Path) -> bytes:
    """The format before the legacy one: a tar file of pickles."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(Calls(os.mkdir, str(trap)), protocol=2)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


PICKLES: dict[str, Callable[[Path], bytes]] = {
    "pickle": lambda trap: pickle.dumps({"step": 1, "x": Calls(os.mkdir, str(trap))}),
    "pickle of protocol 0": lambda trap: pickle.dumps(Calls(os.mkdir, str(trap)), protocol=0),
    "torch.save": lambda trap: saved({"step": 1, "seconds": 0.5, "optimizer": Calls(os.mkdir, str(trap))}),
    "torch.save, legacy": lambda trap: saved(
        {"step": 1, "x": Calls(os.mkdir, str(trap))}, _use_new_zipfile_serialization=False
    ),
    "GLOBAL": lambda trap: f"cos\nsystem\n(S'mkdir {trap}'\ntR.".encode(),
    "GLOBAL in an archive": lambda trap: repacked(f"cos\nsystem\n(S'mkdir {trap}'\ntR.".encode()),
    "INST": lambda trap: repacked(f"(S'mkdir {trap}'\nios\nsystem\n.".encode()),
    "OBJ": lambda trap: repacked(f"(cos\nsystem\nS'mkdir {trap}'\no.".encode()),
    "eval": lambda trap: saved(Calls(eval, f"__import__('os').mkdir({str(trap)!r})")),
    "torch.hub": lambda trap: saved(Calls(torch.hub.load, "owner/repository", "model")),
    "torch.load": lambda trap: saved(Calls(torch.load, str(trap))),
    "a dictionary of another class": lambda trap: saved(mapping(trap)),
    "memory without an end": lambda trap: repacked(b"\x80\x02cbuiltins\nbytearray\n\x8a\x04\0\0\0\x40\x85R."),
    "a tensor without an end": lambda trap: repacked(b"\x80\x02ctorch\nTensor\n\x8a\x05\0\0\0\0\x40\x85R."),
    "a text that is doubled 26 times": lambda trap: repacked(doubled(26)),
    "an attribute of a class": lambda trap: repacked(b"\x80\x02ctorch\nSize\n)\x81}X\x01\0\0\0aK\x01sb."),
    "two pickles": lambda trap: repacked(pickle.dumps({"step": 1, "seconds": 0.5}, 2), f"cos\nmkdir\n(S'{trap}'\ntR."),
    "a storage of another class": lambda trap: repacked(f"(S'storage'\ncos\nsystem\nS'mkdir {trap}'\ntQ.".encode()),
    "TorchScript": lambda trap: script(),
    "tar": old_tar,
}


@pytest.mark.parametrize("trick", PICKLES)
def test_no_code_in_the_state_of_a_checkpoint(trick, run, extend, trap):
    file = plant(run, "state.pt", PICKLES[trick](trap))
    refused(lambda: checkpoint.load_state(file.parent), file, kind=ValueError)
    if trick in ("pickle", "torch.save"):
        refused(lambda: extend(run), "extend=", "state.pt")
        assert not Path("runs").exists()


@pytest.mark.parametrize("trick", PICKLES)
def test_no_code_in_kept_previews(trick, run, trap, capsys):
    """They are pictures of the past, and worth no stop."""
    (run / "previews.pt").write_bytes(PICKLES[trick](trap))
    previews = Previews(run, Digits(), 0, "fp32", 2, 1, 0.5)
    assert previews.rows == [] and "previews.pt" in capsys.readouterr().out


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, None, [(1,)], ["abc"], [("1", 2, 3)]], ids=str)
def test_previews_of_another_form_are_dropped(content, run, capsys):
    (run / "previews.pt").write_bytes(saved(content))
    previews = Previews(run, Digits(), 0, "fp32", 2, 1, 0.5)
    assert previews.rows == [] and "previews.pt" in capsys.readouterr().out


SOME = ("pickle", "torch.save", "GLOBAL")


@pytest.mark.parametrize("trick", SOME)
@pytest.mark.parametrize("name", ["ema.safetensors", "model.safetensors"])
def test_weights_that_are_a_pickle(name, trick, run, sample, trap):
    file = plant(run, name, PICKLES[trick](trap))
    refused(lambda: sample(run, weights=name.split(".")[0].replace("model", "raw")), file, "safetensors")


@pytest.mark.parametrize("trick", SOME)
def test_init_from_weights_that_are_a_pickle(trick, tmp_path, train, trap):
    file = tmp_path / "ema.safetensors"
    file.write_bytes(PICKLES[trick](trap))
    refused(lambda: train(f"init={tmp_path}"), file, "safetensors")
    assert not Path("runs").exists()


def test_init_reads_no_pickle_under_another_name(tmp_path, train, trap):
    for name in ("model.pt", "ema.ckpt", "diffusion_pytorch_model.bin"):
        (tmp_path / name).write_bytes(PICKLES["torch.save"](trap))
    refused(lambda: train(f"init={tmp_path}"), "init=", "ema.safetensors")


@pytest.mark.parametrize("trick", SOME)
def test_a_judge_that_is_a_pickle(trick, run, evaluate, trap, monkeypatch):
    monkeypatch.setattr("ddpm.metrics.quality.train_judge", lambda judge, *arguments, **options: judge.eval())
    evaluate(run, metric=["kernel"], n=3)
    (judge,) = (run.parent.parent / "judges").glob("*.safetensors")
    judge.write_bytes(PICKLES[trick](trap))
    refused(lambda: evaluate(run, metric=["kernel"], n=3), judge, "safetensors")


@pytest.mark.parametrize("trick", SOME)
def test_kept_features_that_are_a_pickle_are_computed_anew(trick, run, evaluate, trap, monkeypatch, capsys):
    monkeypatch.setattr("ddpm.metrics.quality.train_judge", lambda judge, *arguments, **options: judge.eval())
    evaluate(run, metric=["kernel"], n=3)
    (kept,) = (run.parent.parent / "judges" / "features").iterdir()
    before, records = kept.read_bytes(), (run / "evaluation.json").read_bytes()
    kept.write_bytes(PICKLES[trick](trap))
    capsys.readouterr()
    evaluate(run, metric=["kernel"], n=3)
    assert f"{kept} is damaged and will be made again" in capsys.readouterr().out
    assert kept.read_bytes() == before and (run / "evaluation.json").read_bytes() == records


CELL = {"sampler": "ddim", "spacing": "uniform", "steps": 1, "evaluations": 1, "value": 0.5}
CELLS = {
    "a number": 5,
    "names": ["ddim"],
    "without a value": [{**CELL, "value": None}],
    "odd": [{**CELL, "sampler": []}],
}


@pytest.mark.parametrize("cells", CELLS)
def test_a_table_of_steps_that_is_none_is_started_anew(cells, run, evaluate):
    steps = {"samplers": ["ddim"], "steps": [1]}
    given = {"metric": ["steps"], "steps": steps, "n": 4, "features": "pca", "pca": 2}
    evaluate(run, **given)
    (protocol, record), path = *json.loads((run / "evaluation.json").read_text()).items(), run / "evaluation.json"
    path.write_text(json.dumps({protocol: record | {"cells": CELLS[cells]}}))
    evaluate(run, **given)
    assert json.loads(path.read_text())[protocol]["cells"] == record["cells"]


@pytest.mark.parametrize("trick", SOME)
@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"])
def test_published_weights_that_are_a_pickle(name, trick, tmp_path, trap):
    published = {"_class_name": "UNet2DModel", "sample_size": 8, "auto_map": {"AutoModel": "evil.Net"}}
    (tmp_path / "config.json").write_text(json.dumps(published))
    (tmp_path / name).write_bytes(PICKLES[trick](trap))
    refused(lambda: load_unet(tmp_path), tmp_path, kind=ValueError)


@pytest.mark.parametrize("trick", SOME)
def test_pictures_that_are_a_pickle(trick, tmp_path, trap, capsys):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    for name in ("b.png", "c.jpg", "d.npy", "e.pt", "f.pkl"):
        (tmp_path / name).write_bytes(PICKLES[trick](trap))
    assert len(Folder(tmp_path, validation=0)) == 1
    assert "b.png (not a PNG, JPEG, WebP, BMP or TIFF file), c.jpg (not a PNG" in capsys.readouterr().out
    (tmp_path / "a.png").unlink()
    refused(lambda: Folder(tmp_path), tmp_path, "b.png", kind=ValueError)


@pytest.mark.parametrize("trick", SOME)
def test_data_sets_that_are_a_pickle(trick, tmp_path, trap):
    content, labels = PICKLES[trick](trap), tmp_path / "train-labels-idx1-ubyte"
    images = tmp_path / "train-images-idx3-ubyte"
    images.write_bytes(content), labels.write_bytes(content)
    refused(lambda: IDX("mnist", tmp_path, download=False), images, "IDX", kind=ValueError)
    folder = tmp_path / cifar10.FOLDER
    folder.mkdir()
    for name in cifar10.FILES["train"]:
        (folder / name).write_bytes(content)
    refused(lambda: CIFAR10(tmp_path, download=False), folder, "records", kind=ValueError)


# ---------------------------------------------------------------------------------------------- JSON


def nest(n: int) -> bytes:
    return b'{"a":' * n + b"1" + b"}" * n


JSONS: dict[str, Callable[[Path], bytes]] = {
    "a pickle": PICKLES["pickle"],
    "an archive of torch": PICKLES["torch.save"],
    "100,000 levels of lists": lambda trap: b"[" * 100_000 + b"]" * 100_000,
    "100,000 levels of objects": lambda trap: nest(100_000),
    "17 MB": lambda trap: b'{"state": "' + b"x" * (17 << 20) + b'"}',
    "a number of 5,000 digits": lambda trap: b'{"a": 1' + b"0" * 5000 + b"}",
    "binary": lambda trap: bytes(range(256)),
    "a list": lambda trap: b"[1, 2]",
    "a number": lambda trap: b"1e999",
    "a name twice": lambda trap: b'{"state": "DONE", "format": 1, "format": 99999}',
    "words for numbers": lambda trap: b'{"state": 5, "format": "new", "sha256": "all", "held_out": "low"}',
}


@pytest.mark.parametrize("kind", JSONS)
def test_manifests(kind, run, sample, trap):
    path = run / "checkpoints" / "1" / "manifest.json"
    path.write_bytes(JSONS[kind](trap))
    assert checkpoint.verify(path.parent) is not None
    assert checkpoint.best(path.parent.parent) == 1
    if kind != "a name twice":  # which is of a newer version
        refused(lambda: sample(run), "no whole checkpoint")


@pytest.mark.parametrize("kind", JSONS)
def test_states_of_runs(kind, run, sample, trap, capsys):
    (run / "status.json").write_bytes(JSONS[kind](trap))
    if kind == "a name twice":
        refused(Run(run).status, "newer", kind=ValueError)
    else:
        Run(run).status()
        Run(run).write_status("RUNNING", step=3)
        assert json.loads((run / "status.json").read_bytes()[:1000])["step"] == 3
    sample(run)


@pytest.mark.parametrize("kind", JSONS)
def test_results(kind, tmp_path, trap, capsys):
    """What was measured is written, and what was there is kept aside."""
    path, content = tmp_path / "evaluation.json", JSONS[kind](trap)
    path.write_bytes(content)
    results.record(tmp_path, "frechet", {"value": 1.0})
    assert json.loads(path.read_text()) == {"frechet": {"value": 1.0}}
    assert (tmp_path / "evaluation.damaged.json").read_bytes() == content
    assert "evaluation.damaged.json" in capsys.readouterr().out
    results.record(tmp_path, "recognition", {"value": 2.0})
    assert list(json.loads(path.read_text())) == ["frechet", "recognition"]


@pytest.mark.parametrize("levels", range(900, 1000, 20))
def test_levels_that_python_reads_and_may_not_write(levels, run, capsys):
    (run / "evaluation.json").write_bytes(nest(levels))
    results.record(run, "frechet", {"value": 1.0})
    assert b"frechet" in (run / "evaluation.json").read_bytes()
    (run / "status.json").write_bytes(b'{"state": "DONE", "deep": ' + nest(levels) + b"}")
    Run(run).write_status("RUNNING", step=3)
    assert b'"step": 3' in (run / "status.json").read_bytes()


@pytest.mark.parametrize("kind", JSONS)
def test_notes_of_samples(kind, run, sample, tmp_path, trap):
    folder = tmp_path / "samples"
    folder.mkdir()
    (folder / "samples.json").write_bytes(JSONS[kind](trap))
    refused(lambda: sample(run, out=f"{folder}/"), "samples.json", "choose another folder")
    assert [path.name for path in folder.iterdir()] == ["samples.json"]


# ---------------------------------------------------------------------------------------------- what a config may build

TARGETS = [
    "torch.hub.load",
    "torch.optim.optimizer.torch.hub.load",
    "torch.optim.optimizer.torch.load",
    "builtins.eval",
    "builtins.exec",
    "os.system",
    "os.mkdir",
    "subprocess.Popen",
    "pickle.loads",
    "importlib.import_module",
    "hydra.utils.instantiate",
    "hydra.utils.get_method",
    "hydra.utils.call",
    "hydra._internal.instantiate._instantiate2.instantiate",
    "ddpm.config.build",
    "ddpm.config.hydra.utils.instantiate",
    "ddpm.schedules.torch.load",
    "ddpm.schedules.linear.__globals__",
    "ddpm.schedules.NoiseSchedule.__init__",
    "ddpm.data.folder.Folder",  # not the name in conf/
    "ddpm.data.download.download",
    "ddpm.runs.checkpoint.load_state",
    "ddpm.runs.checkpoint.shutil.rmtree",
    "models.pretrained.load_unet",
    "models.unet.UΝet",  # a Greek letter
    "models.unet.UNet ",
    "models.unet.UNet\n",
    "ｍodels.unet.UNet",  # the same name for Python's import statement
    "models..unet.UNet",
    "MODELS.UNET.UNET",
    "",
    None,
    5,
    True,
    ["os.mkdir"],
    {"_target_": "os.mkdir"},
]


@pytest.mark.parametrize("name", TARGETS, ids=ascii)
@pytest.mark.parametrize("group", ["model", "data"])
def test_targets_that_conf_does_not_have(name, group, run, settings, trap):
    store(run, settings, **{group: {"_target_": name, "path": str(trap)}, "trust": [name] if name else []})
    refused(lambda: build(read_config(run / "config.yaml")[group], group), f"{group}: ", "is not allowed")


OTHERS = {
    "schedule": ["ddpm.data.Folder", "ddpm.data.IDX", "models.unet.UNet", "ddpm.samplers.DDIM"],
    "model": ["ddpm.data.IDX", "ddpm.data.CIFAR10", "models.classifier.Classifier", "ddpm.schedules.linear"],
    "diffusion": ["ddpm.data.Folder", "torch.optim.Adam"],
    "optimizer": ["ddpm.data.CIFAR10", "ddpm.training.trainer.Trainer"],
    "trainer": ["ddpm.data.IDX", "ddpm.diffusion.GaussianDiffusion"],
    "data": ["ddpm.training.trainer.Trainer", "models.unet.UNet"],
    "sampler": ["ddpm.data.Folder", "ddpm.schedules.cosine"],
}
WRONG_GROUP = [(group, name) for group, names in OTHERS.items() for name in names]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("group", "name"), WRONG_GROUP)
def test_targets_of_another_group(group, name, nested, run, settings, monkeypatch):
    """A schedule, say, that reads the disk, or a model that downloads."""
    monkeypatch.setattr("ddpm.data.idx.fetch", lambda *arguments, **more: pytest.fail("downloaded"))
    monkeypatch.setattr("ddpm.data.folder.visible", lambda folder: pytest.fail("read"))
    node = {"_target_": name, "root": "/", "name": "mnist"}
    store(run, settings, **{group: settings[group] | {"extra": [[node]]} if nested else node})
    message = refused(lambda: build(read_config(run / "config.yaml")[group], group), f"{group}: ", repr(name))
    assert message.endswith("allowed: " + ", ".join(sorted(config.targets()[group])))


HIDDEN: dict[str, Callable[[dict], object]] = {
    "in a list": lambda evil: [evil],
    "in lists": lambda evil: [[[1, [evil]]]],
    "in a dictionary": lambda evil: {"a": {"b": evil}},
    "beneath an allowed one": lambda evil: {"_target_": "models.unet.UNet", "image_size": evil},
    "beneath a key that is a number": lambda evil: {1: evil},
}


@pytest.mark.parametrize("place", HIDDEN)
def test_targets_that_are_hidden(place, run, settings, sample, extend, trap):
    evil = {"_target_": "os.mkdir", "path": str(trap)}
    store(run, settings, model=settings["model"] | {"channel_mults": HIDDEN[place](evil)}, trust=["os.mkdir"])
    for command in (sample, extend):
        refused(lambda command=command: command(run), "model: _target_ 'os.mkdir' is not allowed")


@pytest.mark.parametrize("key", ["_partial_", "_args_", "_convert_", "_recursive_", "_self_", "_group_", "__class__"])
@pytest.mark.parametrize("place", ["at the top", "in a list"])
def test_other_keys_that_steer(key, place, run, settings, sample, trap):
    steering = {key: [str(trap)]}
    model = settings["model"] | (steering if place == "at the top" else {"blocks": [steering]})
    store(run, settings, model=model)
    refused(lambda: sample(run), f"model: the key {key} is not allowed")


@pytest.mark.parametrize("command", ["sample", "evaluate", "extend"])
def test_every_command_refuses_and_trust_is_nothing_that_can_be_stored(command, run, settings, trap, request):
    evil = {"_target_": "os.mkdir", "path": str(trap)}
    store(run, settings, model=evil, data=evil, trust=["os.mkdir"], device="cpu")
    before = sorted(run.rglob("*"))
    refused(lambda: request.getfixturevalue(command)(run), "'os.mkdir' is not allowed")
    assert sorted(run.rglob("*")) == before and not Path("runs").exists()


def test_init_reads_weights_and_no_configuration(run, settings, train, trap, monkeypatch):
    """The network is the command line's own, whatever the run says that it was."""
    evil = {"_target_": "os.mkdir", "path": str(trap)}
    store(run, settings, model=evil, schedule=evil, optimizer=evil, trust=["os.mkdir"])
    loaded: list[Path] = []
    monkeypatch.setattr(prepare, "load_into", lambda model, file: loaded.append(file))

    def fit(*arguments: object, **more: object) -> None:
        raise RuntimeError("no network came out of this")

    monkeypatch.setattr("ddpm.training.trainer.Trainer.fit", fit)
    with pytest.raises(training.RunFailed, match="no network came out of this"):
        train(f"init={run}")
    assert loaded == [run / "checkpoints" / "1" / "ema.safetensors"]


# ---------------------------------------------------------------------------------------------- YAML

LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
YAML = {
    "python/object/apply": ("evil: !!python/object/apply:os.mkdir ['{trap}']", "a tag"),
    "python/object/new": ("evil: !!python/object/new:os.system ['mkdir {trap}']", "a tag"),
    "python/name": ("evil: !!python/name:os.system", "a tag"),
    "python/module": ("evil: !!python/module:antigravity", "a tag"),
    "a path, which the reader constructs": ("evil: !!python/object/apply:pathlib.Path ['{trap}']", "a tag"),
    "a tag of its own": ("evil: !evil {{a: 1}}", "a tag"),
    "a tag in full": ("evil: !<tag:yaml.org,2002:python/name:os.system> x", "a tag"),
    "a tag of a list": ("evil: !!set {{a, b}}", "a tag"),
    "a tag that is declared": ("evil: !!binary aGVsbG8=", "a tag"),
    "billion laughs": (LAUGHS.replace("{", "{{"), "an alias or an anchor"),
    "an anchor": ("evil: &a [1]", "an alias or an anchor"),
    "an alias of itself": ("evil: &a [*a]", "an alias or an anchor"),
    "an unknown alias": ("evil: *nothing", "an alias or an anchor"),
    "a merge key": ("evil: {{<<: {{seed: 1}}}}", "a merge key"),
    "a merge key at the top": ("<<: {{_target_: os.mkdir}}", "a merge key"),
    "a key twice": ("seed: 5", "duplicate key"),
    "a key twice, deep": ("evil: {{a: 1, a: 2}}", "duplicate key"),
    "10,000 lists": ("evil: " + "[" * 10_000 + "]" * 10_000, "more than 20 levels"),
    "10,000 lists without an end": ("evil: " + "[" * 10_000, "more than 20 levels"),
    "10,000 dictionaries": ("evil: " + "{{a: " * 10_000 + "}}" * 10_000, "more than 20 levels"),
    "10,000 lists of a line": ("evil:\n" + "- " * 10_000 + "1", "more than 20 levels"),
    "100 indents": ("evil:\n" + "".join(" " * n + "a:\n" for n in range(1, 100)), "more than 20 levels"),
    "10,000 keys of keys": ("? " * 10_000 + "a", "more than 20 levels"),
    "300 kB of comment": ("#" * 300_000, "more than 262,144 bytes"),
    "50,000 values": ("evil: [" + "1," * 50_000 + "]", "more than 20,000 values"),
    "a value of 100 kB": ("evil: " + "x" * 100_000, "more than 4,096 characters"),
    "a key of 100 kB": ('"' + "x" * 100_000 + '": 1', "cannot be read"),
    "5,000 digits": ("evil: 1" + "0" * 5000, "more than 4,096 characters"),
    "4,000 digits": ("evil: 1" + "0" * 4000, "64 bits"),
    "4,000 hexadecimal digits": ("evil: [1, 0x" + "f" * 4000 + "]", "evil.1 is a whole number of more than 64 bits"),
    "base 60": ("evil: 1" + ":59" * 1000, "64 bits"),
    "NUL": ("evil: \0", "cannot be read"),
    "control characters": ("evil: \x1b[2J", "cannot be read"),
    "two documents": ("---\nseed: 1", "document"),
    "a key that is a list": ("? [a, b]\n: 1", "cannot be read"),
    "tabs": ("\tevil: 1", "cannot be read"),
    "an open quotation": ("evil: 'a", "cannot be read"),
    "a directive": ("...\n%YAML 9.9\n---\nevil: 1", "cannot be read"),
}


@pytest.mark.parametrize("kind", YAML)
def test_yaml_that_is_more_than_values(kind, run, sample, trap):
    text, told = YAML[kind]
    path = run / "config.yaml"
    path.write_text(path.read_text() + text.format(trap=trap) + "\n")
    assert len(refused(lambda: sample(run), f"{path} cannot be read as a configuration: ", told)) < 1000


@pytest.mark.parametrize(
    "content",
    [
        PICKLES["pickle"],
        PICKLES["torch.save"],
        lambda trap: b"\xff\xfe" + "seed: 1".encode("utf-16-le"),
        lambda trap: b"\xc3\x28",
        lambda trap: bytes(1000),
        lambda trap: b"\x1f\x8b" + bytes(100),
    ],
    ids=["pickle", "torch.save", "UTF-16", "no UTF-8", "zeros", "gzip"],
)
def test_configurations_that_are_no_text(content, run, sample, trap):
    (run / "config.yaml").write_bytes(content(trap))
    refused(lambda: sample(run), run / "config.yaml", "cannot be read as a configuration")


def test_a_configuration_without_an_end(run, sample):
    (run / "config.yaml").unlink()
    (run / "config.yaml").symlink_to("/dev/zero")
    refused(lambda: sample(run), "no config.yaml there")
    refused(lambda: read_config(run / "config.yaml"), "more than 262,144 bytes")


@pytest.mark.slow
def test_the_bounds_have_room_for_what_is_written(settings, tmp_path):
    """The longest configuration that is of use: the betas of 10,000 steps."""
    betas = torch.linspace(1e-5, 0.002, 10_000, dtype=torch.float64).tolist()
    long = settings | {"schedule": {"_target_": "ddpm.schedules.NoiseSchedule", "beta": betas}}
    OmegaConf.save(OmegaConf.create(long), tmp_path / "config.yaml")
    assert OmegaConf.to_container(read_config(tmp_path / "config.yaml")) == long


# ---------------------------------------------------------------------------------------------- interpolations

INTERPOLATIONS = [
    "${oc.env:HOSTILE_SECRET}",
    "${oc.env:HOME}",
    "${oc.decode:${oc.env:HOSTILE_SECRET}}",
    "${oc.create:{_target_:os.mkdir}}",
    "${oc.select:trust}",
    "${oc.dict.keys:model}",
    "${oc.deprecated:seed}",
    "${hydra:runtime.cwd}",
    "${now:%Y}",
    "${evil:1}",
    "${seed}",
    "${trust.0}",
    "${loop}",
    "${.freq_shift}",
    "\\${oc.env:HOSTILE_SECRET}",
    "\\\\${oc.env:HOSTILE_SECRET}",
    "a ${oc.env:HOSTILE_SECRET} b",
    "${${oc.env:HOSTILE_SECRET}}",
    "${",
    "${oc.env:",
]


@pytest.mark.parametrize("text", INTERPOLATIONS)
def test_a_stored_configuration_points_nowhere(text, run, settings, sample, extend):
    """What training writes is resolved; so what is stored has nothing to look up in the environment, nor elsewhere."""
    changes = {"model": settings["model"] | {"freq_shift": text}, "loop": "${loop}", "trust": ["os.mkdir"]}
    for value in (changes, {"seed": text}, {"more": {text: 1}}, {"more": [[text]]}):
        store(run, settings, **value)
        refused(lambda: read_config(run / "config.yaml"), run / "config.yaml", "has an interpolation")
    for command in (sample, extend):
        refused(lambda command=command: command(run), "has an interpolation")


def test_what_is_typed_may_point_where_it_likes():
    assert resolved(compose("train", [*TINY, "study=${oc.env:HOSTILE_SECRET}"]))["study"] == SECRET


# ---------------------------------------------------------------------------------------------- ways out of a folder


@pytest.mark.parametrize(
    "name", ["../../secret", "/etc/passwd", "..", ".", "", "a/b", "../1/state.pt", "./state.pt", "state.pt/"]
)
def test_a_manifest_names_files_of_its_checkpoint_only(name, run, sample):
    folder = run / "checkpoints" / "1"
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"] = {name: "0" * 64} | manifest["sha256"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert f"its manifest names {name!r}, which is no file of a checkpoint" in checkpoint.verify(folder)
    refused(lambda: sample(run), "no whole checkpoint")


STUDIES = [
    "../../x", "/abs", "a/../b", "..", "a/..", "./../..", "/", "a//b", "~/x", "a\\..\\b", "C:\\x", "a\nb", "a\0b",
    "a\tb", "\x1b[2J", "a\u202eb", "<script>alert(1)</script>", "$(touch trap)", "`touch trap`", "$\\frac$", "a;b",
    "a|b", "a*", "a'b", 'a"b',
]  # fmt: skip


@pytest.mark.parametrize("study", STUDIES, ids=ascii)
def test_studies_that_are_no_names(study, tmp_path):
    asked = OmegaConf.create({"runs": str(tmp_path / "runs"), "study": "x"})
    OmegaConf.update(asked, "study", study)
    refused(lambda: prepare._folder_of_runs(asked), "study=")


@pytest.mark.parametrize("study", ["default", "a/b", "Größe 2, (v1.0)", "2024-01-01_12:00", "x=1", ".a", 5, "नाम"])
def test_studies_that_are_names(study, tmp_path):
    asked = OmegaConf.create({"runs": str(tmp_path), "study": study})
    assert prepare._folder_of_runs(asked) == tmp_path / str(study)


@pytest.mark.parametrize("runs", ["a\0b", "", None])
def test_runs_that_are_no_folder(runs):
    with pytest.raises(InvalidInput, match="must be names of folders"):
        prepare._folder_of_runs(OmegaConf.create({"runs": runs, "study": "default"}))


@pytest.mark.parametrize(
    ("runs", "study"), [("{evil}", "default"), ("runs", "../../evil"), ("{evil}/..", "evil"), ("a\0b", "x"), ([1], {})]
)
def test_a_run_does_not_say_where_its_children_go(runs, study, run, settings, extend, tmp_path):
    """Unless that is the truth, they go where the command line says."""
    evil = tmp_path / "evil"
    runs = runs.format(evil=evil) if isinstance(runs, str) else runs
    store(run, settings, runs=runs, study=study)
    extend(run)
    assert not evil.exists() and len(list((tmp_path / "runs" / "default").glob("*/config.yaml"))) == 1


def test_a_run_that_lies_where_it_says_has_its_children_beside_it(run, settings, extend, tmp_path):
    store(run, settings, runs=str(tmp_path / "there"), study="default")
    extend(run)
    assert len(list((tmp_path / "there" / "default").glob("*/config.yaml"))) == 2 and not Path("runs").exists()


WHICH = [
    "../../other", "/etc", "1/..", "..", "-1", "01", "+1", " 1", "1\n", "1_0", "1e0", "١", "²", "9" * 5000, "\x1b[2J",
]  # fmt: skip


@pytest.mark.parametrize("which", WHICH, ids=range(len(WHICH)))
def test_checkpoints_that_lead_elsewhere(which, run, sample):
    refused(lambda: sample(run, checkpoint=which), "cannot be read")


@pytest.mark.parametrize("name", ["5x", "²", "١", "-1", "1e3", "9" * 200, "5 ", "5\n", "05", "5.0", "5_0"])
def test_checkpoints_of_odd_names(name, run, sample):
    """Only a folder named by a number is one, and one that is damaged is passed over."""
    (run / "checkpoints" / name).mkdir()
    sample(run)
    refused(lambda: sample(run, checkpoint=7), "there: ")


NAMES = ["../../evil", "/tmp/evil", "a/b", "a\\b", "..\\evil", "a\nb", "\x1b[2J", "a\0b"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_of_data_that_lead_elsewhere(name, tmp_path, run, settings, evaluate):
    """The judge that is trained on them is kept under their name."""
    pictures = tmp_path / "pictures"
    for i in range(4):
        (pictures / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), i).save(pictures / str(i % 2) / f"{i}.png")
    refused(lambda: Folder(pictures, name=name), repr(name), kind=ValueError)
    refused(lambda: ImageData(name, "all", torch.zeros(2, 1, 8, 8, dtype=torch.uint8)), repr(name), kind=ValueError)
    data = {"_target_": "ddpm.data.Folder", "root": str(pictures), "image_size": 8, "channels": 1, "name": name}
    store(run, settings, data=data)
    refused(lambda: evaluate(run), "data: name=")
    assert {path.name for path in tmp_path.iterdir()} == {"pictures", "there"}


MEMBERS = {
    "an absolute name": ("/{evil}", tarfile.REGTYPE, ""),
    "a way up": ("../../evil", tarfile.REGTYPE, ""),
    "a way up from the folder": (f"{cifar10.FOLDER}/../evil", tarfile.REGTYPE, ""),
    "a link": (f"{cifar10.FOLDER}/data_batch_1.bin", tarfile.SYMTYPE, "/etc/passwd"),
    "a hard link": (f"{cifar10.FOLDER}/data_batch_1.bin", tarfile.LNKTYPE, "../../evil"),
    "a device": (f"{cifar10.FOLDER}/data_batch_1.bin", tarfile.CHRTYPE, ""),
    "a pipe": (f"{cifar10.FOLDER}/data_batch_1.bin", tarfile.FIFOTYPE, ""),
    "a folder": (f"{cifar10.FOLDER}/data_batch_1.bin", tarfile.DIRTYPE, ""),
}


@pytest.mark.parametrize("kind", MEMBERS)
def test_members_of_an_archive(kind, tmp_path):
    name, type_, link = MEMBERS[kind]
    root = tmp_path / "data"
    root.mkdir()
    with tarfile.open(root / cifar10.ARCHIVE, "w:gz") as archive:
        member = tarfile.TarInfo(name.format(evil=tmp_path / "evil"))
        member.type, member.linkname, member.size = type_, link, 5 * (type_ == tarfile.REGTYPE)
        archive.addfile(member, io.BytesIO(b"evil!"))
    refused(lambda: CIFAR10(root, download=False), root / cifar10.ARCHIVE, "lacks", kind=ValueError)
    assert [path.name for path in tmp_path.rglob("*")] == ["data", cifar10.ARCHIVE]


def test_links_that_lead_in_circles_and_things_that_are_no_files(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    (root / "loop").symlink_to(root)
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "zero.png").symlink_to("/dev/zero")
    (root / "folder.png").mkdir()
    os.mkfifo(root / "pipe.png")
    refused(lambda: Folder(root), root, "no PNG, JPEG, WebP, BMP or TIFF", kind=ValueError)
    Image.new("L", (8, 8)).save(root / "a.png")
    assert len(Folder(root, validation=0)) == 1


@pytest.mark.parametrize("name", ["\x1b]0;evil\x07.png", "a\nb.png", "\u202egnp.png", b"\xff.png"], ids=ascii)
def test_what_a_picture_is_called_does_not_steer_the_terminal(name, tmp_path, capsys):
    """Classes and files may have such names; nothing here writes HTML, and figures show no name that was read."""
    folder = tmp_path / "<script>$\\frac$"
    folder.mkdir()
    Image.new("L", (8, 8)).save(folder / "a.png")
    (folder / os.fsdecode(name)).write_bytes(b"no picture")
    data = Folder(tmp_path, image_size=8, validation=0)
    said = capsys.readouterr().out.removesuffix("\n")
    assert data.classes == (folder.name,) and "skipped 1 of 2" in said and said.isprintable()


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def loop(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(path)


def folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def vast(path: Path) -> None:
    """A sparse file: an archive of 1 kB holds it."""
    path.unlink(missing_ok=True)
    with open(path, "wb") as file:
        file.truncate(1 << 42)


def empty(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.touch()


ODD = [pipe, endless, loop, folder, vast, empty]  # what may have a file's name


@pytest.mark.parametrize("make", ODD)
@pytest.mark.parametrize("name", ["state.pt", "ema.safetensors", "model.safetensors", "manifest.json"])
def test_a_checkpoint_of_pipes_and_devices(name, make, run, sample):
    make(run / "checkpoints" / "1" / name)
    refused(lambda: sample(run), "no whole checkpoint")


@pytest.mark.parametrize("make", ODD)
@pytest.mark.parametrize("load", [checkpoint.load_plain, checkpoint.load_weights])
def test_files_of_tensors_that_are_none(load, make, tmp_path):
    make(tmp_path / "a")
    refused(lambda: load(tmp_path / "a"), tmp_path / "a", kind=ValueError)


@pytest.mark.parametrize("make", ODD)
def test_a_run_of_pipes_and_devices(make, run, sample, capsys):
    for name in ("status.json", "evaluation.json", "config.yaml"):
        make(run / name)
    assert Run(run).status() == {}
    results.record(run, "frechet", {"value": 1.0})
    assert json.loads((run / "evaluation.json").read_text()) == {"frechet": {"value": 1.0}}
    refused(lambda: sample(run), "config.yaml")


@pytest.mark.parametrize("make", ODD)
def test_metrics_of_pipes_and_devices(make, run, frugal):
    make(run / "metrics.jsonl")
    if make is empty:  # as those of a run that has just begun
        assert read_metrics(run) == []
    else:
        refused(lambda: read_metrics(run), run / "metrics.jsonl", "cannot be read", kind=ValueError)


METRICS = [
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"step": 1e999, "split": "train", "loss": 0.5}',
    b'{"step": NaN, "split": "train", "loss": 0.5}',
    b'{"step": "2", "split": "train", "loss": 0.5}',
    b'{"step": 2.0, "split": "train", "loss": 0.5}',
    b'{"step": true, "split": "train", "loss": 0.5}',
    b'{"step": -1, "split": "train", "loss": 0.5}',
    b'{"step": 9223372036854775808, "split": "train", "loss": 0.5}',
    b'{"step": 2, "split": ["train"], "loss": 0.5}',
    b'{"step": 2, "split": "train"}',
    b'{"step": 2, "split": "train", "loss": "low"}',
    b'{"step": 2, "split": "train", "loss": [0.5]}',
    b'{"step": 2, "split": "train", "loss": 1' + b"0" * 400 + b"}",
    b'{"step": 2, "split": "train", "loss": 1' + b"0" * 5000 + b"}",
    b'{"step": 2}\r\x0b\x1c\xe2\x80\xa8{"step": 2}',
    b"\xff\xfe",
    bytes(100),
]


@pytest.mark.parametrize("line", METRICS, ids=range(len(METRICS)))
def test_lines_of_metrics(line, run, capsys):
    honest = b'{"step": 1, "split": "train", "loss": 0.5}\n'
    (run / "metrics.jsonl").write_bytes(honest + line + b"\n" + honest)
    assert read_metrics(run) == 2 * [{"step": 1, "split": "train", "loss": 0.5}]
    assert capsys.readouterr().out == f"{run / 'metrics.jsonl'}, line 2 cannot be read and is left out\n"


@pytest.mark.slow
def test_a_million_damaged_lines_are_counted(run, capsys):
    (run / "metrics.jsonl").write_bytes(b"\n" * 10**6)
    assert read_metrics(run) == [] and "so are 999,995 more" in (said := capsys.readouterr().out)
    assert said.count("\n") == 6


@pytest.mark.parametrize("key", ["step", "seconds"])
@pytest.mark.parametrize("value", ['"x"', "true", "[1]", "{}", "1" + "0" * 400])
def test_states_of_runs_without_numbers(key, value, run, capsys):
    (run / "status.json").write_text(f'{{"state": "DONE", "{key}": {value}}}')
    assert Run(run).status() == {} and "is not the status of a run" in capsys.readouterr().out


@pytest.mark.parametrize("make", ODD)
def test_data_of_pipes_and_devices(make, tmp_path, frugal):
    for name in ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz", cifar10.ARCHIVE):
        make(tmp_path / name)
    for data in (lambda: IDX("mnist", tmp_path, download=False), lambda: CIFAR10(tmp_path, download=False)):
        with pytest.raises((ValueError, FileNotFoundError), match=str(tmp_path)):
            data()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train-images-idx3-ubyte.gz", gzip.compress(bytes([0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 7]))),
        ("train-images-idx3-ubyte", bytes([0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 7])),
        (cifar10.ARCHIVE, gzip.compress(b"")),
        ("a.jpg", b"\xff\xd8"),
        ("a.png", b"\x89PNG\r\n\x1a\n"),
    ],
    ids=["idx.gz", "idx", "cifar", "jpg", "png"],  # gzip writes the time into what it makes
)
def test_zeros_without_an_end(name, content, tmp_path, frugal):
    """gzip and PIL look for something behind them, one by one."""
    for path in (tmp_path / name, tmp_path / name.replace("images-idx3", "labels-idx1")):
        path.write_bytes(content)
        os.truncate(path, 1 << 42)
    kind = IDX if name.startswith("train") else CIFAR10 if name == cifar10.ARCHIVE else Folder
    arguments = ["mnist"] if kind is IDX else []
    options = {} if kind is Folder else {"download": False}
    refused(lambda: kind(*arguments, tmp_path, **options), name, "more than 268,435,456 bytes", kind=ValueError)


@pytest.mark.parametrize("make", ODD)
def test_previews_of_pipes_and_devices(make, run, capsys):
    make(run / "previews.pt")
    previews = Previews(run, Digits(), 0, "fp32", 2, 1, 0.5)
    assert previews.rows == []


@pytest.mark.parametrize("victim", ["there", "not there"])
def test_a_lock_that_is_a_link(victim, run, tmp_path):
    """Old versions of filelock empty what it leads to, new ones stop there."""
    file = tmp_path / "victim"
    if victim == "there":
        file.write_text("{}")
    Run(run).write_status("RUNNING")
    (run / "run.lock").unlink(missing_ok=True)
    (run / "run.lock").symlink_to(file)
    assert Run(run).status()["state"] == "INTERRUPTED"
    with Run(run).locked():
        assert Run(run).status()["state"] == "RUNNING"
    assert file.read_text() == "{}" if victim == "there" else not file.exists()


def test_links_among_checkpoints_lead_to_nothing_that_is_deleted_or_kept(run, tmp_path):
    precious, folder = tmp_path / "precious", run / "checkpoints"
    (precious / "7").mkdir(parents=True)
    (precious / "7" / "file").write_text("kept")
    for name in ("7", "99", ".7.1234", ".7.removed"):
        (folder / name).symlink_to(precious / "7")
    (folder / ".8.1234").write_text("no folder")
    (folder / "1" / "more").symlink_to(precious)
    assert checkpoint.verify(checkpoint.keep(folder / "1", tmp_path / "aside")) is None
    assert not (tmp_path / "aside" / "1" / "more").exists()
    checkpoint.rotate(folder, 1)
    checkpoint.drop_after(folder, 1)
    assert checkpoint.steps(folder) == [1] and (precious / "7" / "file").read_text() == "kept"


@pytest.mark.parametrize("victim", ["there", "not there"])
def test_links_in_a_run_are_not_written_through(victim, run, sample, tmp_path, capsys):
    file = tmp_path / "victim"
    if victim == "there":
        file.write_text("{}")
    names = ("samples_step1_ema_ddim2_seed0.png", "evaluation.json", "status.json")
    for name in names:
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(file)
    sample(run)
    results.record(run, "frechet", {"value": 1.0})
    Run(run).write_status("DONE")
    assert file.read_text() == "{}" if victim == "there" else not file.exists()
    assert not any((run / name).is_symlink() for name in names)


# ---------------------------------------------------------------------------------------------- bombs


HUGE = {
    "schedule.T": 10**14,
    "model.channels": 2**24,
    "model.channel_mults": [2**40],
    "model.num_classes": 2**50,
    "model.patch": 2**30,
}


@pytest.mark.parametrize("key", HUGE)
def test_numbers_beyond_all_memory(key, run, settings, sample):
    group, _, name = key.partition(".")
    store(run, settings, **{group: settings[group] | {name: HUGE[key]}})
    refused(lambda: sample(run), f"{group}: ")


@pytest.fixture
def frugal() -> Iterator[None]:
    """The test takes no more memory than 60 MB, that of PIL's texts."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


ZEROS = 40 * gzip.compress(bytes(1 << 20))  # 40 MB, compressed a thousandfold


@pytest.mark.parametrize(
    ("announced", "told"),
    [
        ((10_000, 28, 28), "7,840,000 bytes, and holds more"),
        ((2000, 1000, 1000), "or more than 268,435,456 bytes"),
        ((1 << 31, 1, 1), "or more than 268,435,456 bytes"),
        ((2**32 - 1,) * 3, "or more than 268,435,456 bytes"),
    ],
)
def test_a_bomb_of_idx(announced, told, tmp_path, frugal):
    content = gzip.compress(bytes([0, 0, 8, 3]) + struct.pack(">3I", *announced)) + ZEROS
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(content)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(content)
    refused(lambda: IDX("mnist", tmp_path, download=False), path, "announces the shape", told, kind=ValueError)


def header(name: str, size: int, type_: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, type_
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    "type_", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_SPARSE, b"?"]
)
@pytest.mark.parametrize("size", [400 << 20, 1 << 60, -(1 << 40)])
def test_a_bomb_of_an_archive(type_, size, tmp_path, frugal, monkeypatch):
    monkeypatch.setattr(cifar10, "LARGEST", 8 << 20)
    path = tmp_path / cifar10.ARCHIVE
    path.write_bytes(gzip.compress(header("padding", size, type_)) + ZEROS)
    refused(lambda: CIFAR10(tmp_path, download=False), path, kind=ValueError)


def test_an_archive_of_headers_of_headers(tmp_path):
    path = tmp_path / cifar10.ARCHIVE
    path.write_bytes(gzip.compress((header("a", 1, tarfile.GNUTYPE_LONGNAME) + b"a" + bytes(511)) * 3000))
    refused(lambda: CIFAR10(tmp_path, download=False), path, "damaged", kind=ValueError)


def test_a_member_that_is_larger_than_it_was_ever_published(tmp_path):
    path = tmp_path / cifar10.ARCHIVE
    path.write_bytes(gzip.compress(header(f"{cifar10.FOLDER}/data_batch_1.bin", 3073 * 10_001) + bytes(1000)))
    refused(lambda: CIFAR10(tmp_path, download=False), path, "30,733,073 bytes are not 1 to 10,000", kind=ValueError)


def test_an_extracted_file_without_an_end(tmp_path, frugal):
    (tmp_path / cifar10.FOLDER).mkdir()
    for name in cifar10.FILES["train"]:
        with open(tmp_path / cifar10.FOLDER / name, "wb") as file:
            file.truncate(1 << 40)  # sparse: it takes no room
    refused(lambda: CIFAR10(tmp_path, download=False), "data_batch_1.bin", "records", kind=ValueError)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *more: bytes) -> bytes:
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return start + b"".join(more) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


MEGABYTE = zlib.compress(bytes(1 << 20))
PACKED = zlib.compress(bytes(50 << 20), 9)
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def drawn(form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("P" if form == "GIF" else "RGB", (8, 8)).save(file, format=form, **options)
    return file.getvalue()


PICTURES = {
    "50,000 x 50,000": (lambda: png(50_000, 50_000), "exceeds limit"),
    "2^31 - 1 x 1": (lambda: png(2**31 - 1, 1), "exceeds limit"),
    "2^31 - 1 x 2^31 - 1": (lambda: png(2**31 - 1, 2**31 - 1), "exceeds limit"),
    "zTXt": (lambda: png(8, 8, chunk(b"zTXt", b"a\0\0" + PACKED)), "arge"),  # "too large" or "Too Large"
    "iTXt": (lambda: png(8, 8, chunk(b"iTXt", b"a\0\1\0\0\0" + PACKED)), "arge"),
    "many texts": (lambda: png(8, 8, *[chunk(b"zTXt", b"a\0\0" + MEGABYTE)] * 70), "Too much memory"),
    "a chunk of 2 GB": (lambda: png(8, 8, struct.pack(">I", 2**31 - 1) + b"tEXt"), ""),
    "no pixels": (lambda: png(0, 0), ""),
    "GIF": (lambda: drawn("GIF"), "not a PNG, JPEG"),
    "an animated GIF": (
        lambda: drawn("GIF", save_all=True, append_images=[Image.new("P", (8, 8), i) for i in range(9)]),
        "not a PNG, JPEG",
    ),
    "PDF": (lambda: drawn("PDF"), "not a PNG, JPEG"),
    "PSD": (lambda: b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 8, 8, 8, 3) + bytes(100), "not a PNG, JPEG"),
    "EPS": (lambda: POSTSCRIPT, "not a PNG, JPEG"),
    "SVG": (lambda: b"<svg><script>alert(1)</script></svg>", "not a PNG, JPEG"),
}


@pytest.mark.parametrize("ending", ["png", "jpg"])
@pytest.mark.parametrize("kind", PICTURES)
def test_pictures_that_are_more_than_pictures(kind, ending, tmp_path, trap, monkeypatch, frugal):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("gs", "gswin64c", "djpeg"):  # what PIL calls for some formats
        (tools / name).write_text(f"#!/bin/sh\nmkdir {trap}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    make, told = PICTURES[kind]
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / f"a.{ending}").write_bytes(make())
    refused(lambda: Folder(folder), f"none of its 1 images can be read: a.{ending} (", told, kind=ValueError)


def tensors(text: str | dict, body: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header."""
    head = text.encode() if isinstance(text, str) else json.dumps(text).encode()
    return struct.pack("<Q", len(head) if length is None else length) + head + body


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


SAFETENSORS = {
    "a header of 2^60 bytes": tensors("{}", length=1 << 60),
    "a header of 2^64 - 1 bytes": tensors("{}", length=(1 << 64) - 1),
    "a header of 99 MB that is not there": tensors("{}", length=99 << 20),
    "a tensor of 2^60 bytes": tensors({"a": entry([1 << 58], 0, 1 << 60)}),
    "a shape beyond all numbers": tensors({"a": entry([1 << 40, 1 << 40], 0, 4)}, bytes(4)),
    "a negative offset": tensors({"a": entry([1], -4, 0)}, bytes(4)),
    "a negative shape": tensors({"a": entry([-1], 0, 4)}, bytes(4)),
    "offsets the wrong way round": tensors({"a": entry([1], 4, 0)}, bytes(4)),
    "tensors that overlap": tensors({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)),
    "all tensors in the same place": tensors({f"a{n}": entry([1], 0, 4) for n in range(50)}, bytes(4)),
    "a hole": tensors({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)),
    "more than is named": tensors({"a": entry([1], 0, 4)}, bytes(400)),
    "an unknown type": tensors({"a": entry([1], 0, 4, "PICKLE")}, bytes(4)),
    "100,000 levels": tensors("[" * 100_000),
    "a list": tensors("[1]"),
    "a name twice": tensors('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":5}', bytes(4)),
}


@pytest.mark.parametrize("dtype", ["C64", "F4", "F6_E2M3", "F8_E4M3", "F8_E8M0", "I64", "U8", "BOOL", "\x1b[2J"])
def test_weights_of_other_types(dtype, tmp_path):
    """Which would be cast, or not be, to who knows what."""
    (tmp_path / "a").write_bytes(tensors({"weight": entry([2, 2], 0, 2 if dtype == "F4" else 4, dtype)}, bytes(4)))
    refused(lambda: checkpoint.load_into(torch.nn.Linear(2, 2, bias=False), tmp_path / "a"), tmp_path, kind=ValueError)


@pytest.mark.parametrize("name", ["\x1b[2J", "a\nb", "\u202e", "x" * 10_000])
def test_names_of_weights_neither_steer_nor_flood_the_terminal(name, tmp_path):
    (tmp_path / "a").write_bytes(tensors({name: entry([1], 0, 4)}, bytes(4)))
    told = refused(lambda: checkpoint.load_into(torch.nn.Linear(1, 1), tmp_path / "a"), "1 unknown", kind=ValueError)
    assert len(told) < 1000


@pytest.mark.parametrize("kind", SAFETENSORS)
def test_weights_that_lie_about_themselves(kind, run, sample, tmp_path):
    file = plant(run, "ema.safetensors", SAFETENSORS[kind])
    refused(lambda: sample(run), file, "safetensors file")
    published = {"_class_name": "UNet2DModel", "sample_size": 8, "block_out_channels": [32] * 4, "norm_num_groups": 8}
    (tmp_path / "config.json").write_text(json.dumps(published))
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(SAFETENSORS[kind])
    refused(lambda: load_unet(tmp_path), "safetensors file", kind=ValueError)


def claiming(elements: int) -> bytes:
    """torch.save of a tensor whose storage is said to be so large."""
    honest = zipfile.ZipFile(io.BytesIO(saved({"step": 1, "x": torch.zeros(77)})))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in honest.namelist():
            content = honest.read(name)
            if name.endswith("data.pkl"):
                large = b"\x8a\x08" + struct.pack("<q", elements)  # LONG1 in place of BININT1
                content = content.replace(b"K\x4d", large)
            archive.writestr(name, content)
    return file.getvalue()


@pytest.mark.parametrize("elements", [1 << 60, 1 << 40, 1 << 20, -1, 78])
def test_a_state_that_lies_about_its_size(elements, run, extend):
    file = plant(run, "state.pt", claiming(elements))
    refused(lambda: checkpoint.load_state(file.parent), file, kind=ValueError)
    refused(lambda: extend(run), "extend=", "state.pt")


def test_a_state_that_is_compressed(run):
    """torch.save compresses nothing, and torch.load unpacks whatever it finds: of 200 kB, say, 200 MB."""
    file, state = io.BytesIO(), {"step": 1, "seconds": 0.5, "x": torch.zeros(1 << 21)}
    honest = zipfile.ZipFile(io.BytesIO(saved(state)))
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in honest.namelist():
            archive.writestr(name, honest.read(name))
    path = plant(run, "state.pt", file.getvalue())
    assert len(file.getvalue()) < 20_000
    refused(lambda: checkpoint.load_state(path.parent), path, kind=ValueError)


def in_itself() -> list:
    inside: list = []
    inside.append(inside)
    return inside


BOMBS = {
    "one number as 2^40": lambda: torch.zeros(1).expand(1 << 40),
    "overlapping rows": lambda: torch.zeros(1000).as_strided((500, 500), (1, 1)),
    "lists of lists": lambda: functools.reduce(lambda inner, _: [inner] * 9, range(12), [1]),
    "a list in itself": in_itself,
    "dictionaries of dictionaries": lambda: functools.reduce(lambda inner, _: {1: inner, 2: inner}, range(40), {}),
    "one tensor in many places": lambda: [torch.zeros(1000)] * 100_000,
    "two million values": lambda: [None] * 2_000_000,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BOMBS)
def test_a_state_that_is_more_than_its_file(kind, run):
    """Loaded, it is small; whoever walks through it or copies it never ends."""
    file = plant(run, "state.pt", saved({"step": 1, "seconds": 0.5, "optimizer": BOMBS[kind]()}))
    refused(lambda: checkpoint.load_state(file.parent), file, "unpacks to more than the file contains", kind=ValueError)


def test_a_pickle_that_is_too_long(run):
    file = plant(run, "state.pt", saved({"step": 1, "seconds": 0.5, "x": "x" * checkpoint.LARGEST_PICKLE}))
    refused(lambda: checkpoint.load_state(file.parent), file, "4,194,304 bytes", kind=ValueError)


@pytest.mark.parametrize(
    ("step", "seconds"), [(True, 0.5), (-1, 0.5), (2**63, 0.5), (1.0, 0.5), (1, -1), (1, float("nan")), (1, "0.5")]
)
def test_a_state_of_no_time(step, seconds, run):
    plant(run, "state.pt", saved({"step": step, "seconds": seconds}))
    refused(lambda: checkpoint.load_state(run / "checkpoints" / "1"), "is not the state of a run", kind=ValueError)


@pytest.mark.parametrize("content", [OrderedDict(step=1), [[]] * 9, torch.zeros(3), {"step": 1, "seconds": None}])
def test_a_state_of_plain_data_that_is_none(content, run, extend):
    plant(run, "state.pt", saved(content))
    refused(lambda: extend(run), "state.pt is not the state of a run")


def test_the_bounds_have_room_for_what_was_published():
    assert idx.LARGEST > 5 * 60_000 * 28 * 28 and cifar10.LARGEST > 1.4 * 60_000 * cifar10.RECORD


def test_arrays_are_written_and_never_read():
    """np.load can run code, and would be a new door; so would torch.load without weights_only, and pickle itself."""
    folders = [Path(__file__).parents[1] / name for name in ("ddpm", "models", "experiments")]
    text = {path: path.read_text(encoding="utf-8") for folder in folders for path in folder.rglob("*.py")}
    lines = [line for source in text.values() for line in source.splitlines()]
    doors = r"\b(np|numpy|yaml|pickle|joblib)\.(unsafe_|full_)?loads?\(|\b(shelve|marshal)\.|(?<![\w.])(exec|eval)\("
    assert len(text) > 40 and [line for line in lines if re.search(doors, line)] == []
    loads = [line for line in lines if "torch.load(" in line]
    assert loads and all("weights_only=True" in line for line in loads)
