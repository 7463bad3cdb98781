"""ddpm/study/reading.py: from run directories to arms, what differs between them, and what each is called."""

import copy
import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from ddpm.commands.study.plan import science_of
from ddpm.config import compose, resolved
from ddpm.study.reading import MISSING, Recorded, arms_of, read, run_directories

SMALL = [
    "model.channels=8", "model.channel_mults=[1]", "model.groups=4", "model.blocks=1", "model.middle_attention=false",
    "model.attention_resolutions=[]", "schedule.T=10", "sampler.steps=2", "trainer.steps=40", "trainer.epochs=null",
    "trainer.seconds=null", "trainer.batch_size=16", "optimizer.lr=0.001", "device=cpu",
]  # fmt: skip
DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


@functools.cache
def _small() -> str:
    return json.dumps(resolved(compose("train", SMALL)))


def settings_of(values: Mapping[str, Any] | None = None, seed: int = 0) -> dict[str, Any]:
    """A run's configuration with other values: dotted key -> value."""
    settings = json.loads(_small())
    for key, value in {"seed": seed, **(values or {})}.items():
        *groups, last = key.split(".")
        functools.reduce(dict.__getitem__, groups, settings)[last] = copy.deepcopy(value)
    return settings


def write_run(
    folder: Path,
    name: str,
    typed: Sequence[str] = (),
    seed: int = 0,
    values: Mapping[str, Any] | None = None,
    state: str = "DONE",
    losses: Sequence[float | None] = (),
    train: Sequence[float | None] = (),
    evaluation: Mapping[str, Any] | None = None,
    **status: Any,
) -> Path:
    """A run directory as training leaves it, without its checkpoints.

    Args:
        typed: what was typed for it, besides the seed.
        values: of its configuration, see `settings_of`.
        losses, train: held-out and training losses, each ten steps after the one before.
        status: what status.json has besides, or instead.
    """
    path = folder / name
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.dump(settings_of(values, seed), Dumper=DUMPER, sort_keys=False))
    data = {"name": "digits", "count": 1797, "image_size": [8, 8], "channels": 1, "sha256": "b8f5"}
    told = {
        "state": state, "reason": None, "traceback": None, "step": 10 * max(len(losses), len(train)),
        "seconds": 10.0, "format": 1, "hash": name,
        "started": f"2026-01-01T00:00:{seed:02}", "ended": f"2026-01-01T00:01:{seed:02}", "host": "here", "pid": 7,
        "commit": "1a2b3c", "precision": "fp32", "device": "cpu", "threads": 1, "paired": True, "data": data,
        "overrides": [*typed, f"seed={seed}"],
    }  # fmt: skip
    (path / "status.json").write_text(json.dumps(told | status))
    lines = [{"step": 10 * i, "split": "train", "loss": loss} for i, loss in enumerate(train, 1)]
    lines += [{"step": 10 * i, "split": "held_out", "loss": loss} for i, loss in enumerate(losses, 1)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if evaluation is not None:
        (path / "evaluation.json").write_text(json.dumps(evaluation))
    return path


def arms_in(folder: Path) -> tuple[list[Any], list[str]]:
    runs, unread = read(folder, science_of)
    return arms_of(runs), unread


def record(typed: Sequence[str] = (), seed: int = 0, at: int = 0, name: str = "r", state="DONE", **science) -> Recorded:
    """A run that is on no disk."""
    status = {"state": state, "overrides": list(typed), "started": f"{at:03}", "ended": f"{at:03}"}
    return Recorded(Path(name), {"seed": seed}, status, {}, science)


def labels(*typed: Sequence[str], **science: Sequence[Any]) -> list[str]:
    """Of arms for which these words were typed, and that differ in their science: by a number, or by what is given."""
    of = science or {"number": range(len(typed))}
    found = [{key: values[i] for key, values in of.items()} for i in range(len(typed))]
    return [arm.label for arm in arms_of(record(words, at=i, **found[i]) for i, words in enumerate(typed))]


# --------------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ([["optimizer.lr=0.1"], ["optimizer.lr=0.2"]], ["lr=0.1", "lr=0.2"]),
        ([["schedule=linear"], ["schedule=cosine"]], ["schedule=linear", "schedule=cosine"]),
        ([["+ablation/schedule=linear"], ["+ablation/schedule=beta_T_0.004"]], ["linear", "beta_T_0.004"]),
        ([["+ablation/target=v", "optimizer.lr=1"], ["+ablation/target=x_0", "optimizer.lr=2"]],
         ["v, lr=1", "x_0, lr=2"]),
        ([["optimizer.lr=1", "trainer.batch_size=8"], ["optimizer.lr=1", "trainer.batch_size=16"],
          ["optimizer.lr=2", "trainer.batch_size=8"]],
         ["lr=1, batch_size=8", "lr=1, batch_size=16", "lr=2, batch_size=8"]),
        ([["experiment=study/x", "optimizer.lr=1"], ["experiment=study/x", "optimizer.lr=2"]], ["lr=1", "lr=2"]),
        ([["model.channel_mults=[1,2]"], ["model.channel_mults=[1,2,2]"]],
         ["channel_mults=[1,2]", "channel_mults=[1,2,2]"]),
        ([["++trainer.ema_decay=0.9"], ["++trainer.ema_decay=0.99"]], ["ema_decay=0.9", "ema_decay=0.99"]),
        ([["sampler@other=ddim"], ["sampler@other=heun"]], ["sampler=ddim", "sampler=heun"]),
        ([["experiment/study=a"], ["experiment/study=b"]], ["a", "b"]),
    ],
)  # fmt: skip
def test_labels_are_what_was_typed_for_one_and_not_for_the_others(typed, expected):
    assert labels(*typed) == expected


def test_labels_of_what_differs_where_words_do_not_tell():
    """An arm for which nothing was typed, or two for which the same was: what differs between them says more."""
    lr = {"optimizer": [{"lr": 0.001}, {"lr": 1e-05}]}
    assert labels([], ["optimizer.lr=1e-05"], **lr) == ["lr=0.001", "lr=1e-05"]
    assert labels([], [], **lr) == ["lr=0.001", "lr=1e-05"]
    assert labels(["a.x=1"], ["b.x=1"], **lr) == ["lr=0.001", "lr=1e-05"]  # both "x=1"
    assert labels(["a=1", "b=1"], ["b=1", "a=1"], **lr) == ["lr=0.001", "lr=1e-05"]
    both = {"optimizer": [{"lr": 1}, {"lr": 2}], "trainer": [{"batch_size": 8}, {"batch_size": 16}]}
    assert labels([], [], **both) == ["lr=1, batch_size=8", "lr=2, batch_size=16"]
    assert labels(["optimizer.lr=1"]) == ["the run"] == labels([])


def test_labels_are_never_the_same():
    """Differences that no level shows, such as those of long lists of numbers, are numbered."""
    long = [list(range(100)), [*range(99), 7]]
    found = labels([], [], schedule=[{"betas": values} for values in long])
    assert len(set(found)) == 2 and found[0].endswith("(1)") and found[1].endswith("(2)")


def test_words_that_change_no_result_are_in_no_label():
    words = [
        "runs=/data", "study=s", "device=cuda:1", "compile=true", "graph=off", "evaluation=[metric=frechet]",
        "question='Why?'", "baseline=x", "slots=2", "retry=true", "trust=[a.b]", "hydra/launcher=joblib",
        "hydra.sweep.dir=x", "seed=3", "data.root=/here", "data.download=true", "recognition=true", "+question=Why",
    ]  # fmt: skip
    assert record([*words, "optimizer.lr=1"]).words == ["optimizer.lr=1"]
    assert labels([words[0], "optimizer.lr=1"], [words[1], words[-4], "optimizer.lr=2"]) == ["lr=1", "lr=2"]


# --------------------------------------------------------------------------------------------------------------- levels


def levels(**science: Sequence[Any]) -> list[dict[str, str]]:
    count = len(next(iter(science.values())))
    runs = [record(at=i, **{key: values[i] for key, values in science.items()}) for i in range(count)]
    return [dict(arm.levels) for arm in arms_of(runs)]


def test_levels_are_of_what_differs():
    found = levels(
        optimizer=[{"_target_": "torch.optim.AdamW", "lr": 1e-05, "betas": [0.9, 0.999]},
                   {"_target_": "torch.optim.AdamW", "lr": 0.002, "betas": [0.9, 0.99]}],
        model=[{"middle_attention": True, "mults": [1, [2, 3]]}, {"middle_attention": False, "mults": [1, [2, 4]]}],
        trainer=[{"steps": 100}, {"steps": 100}],
    )  # fmt: skip
    assert found == [
        {"lr": "1e-05", "betas": "[0.9, 0.999]", "middle_attention": "true", "mults": "[1, [2, 3]]"},
        {"lr": "0.002", "betas": "[0.9, 0.99]", "middle_attention": "false", "mults": "[1, [2, 4]]"},
    ]


def test_keys_that_some_arms_do_not_have():
    options = [{"loss_options": {}}, {"loss_options": {"gamma": 5.0}}, {"loss_options": {"gamma": None}}]
    assert levels(diffusion=options) == [{"gamma": MISSING}, {"gamma": "5"}, {"gamma": "null"}]
    assert levels(augment=[None, {"rotation": 5}]) == [{"augment": "null", "rotation": MISSING},
                                                       {"augment": MISSING, "rotation": "5"}]  # fmt: skip


def test_keys_of_the_same_name_are_told_apart():
    found = levels(trainer=[{"steps": 1, "x": {"lr": 1}}, {"steps": 2, "x": {"lr": 2}}], sampler=[{"steps": 5}, {}])
    assert found == [{"sampler.steps": "5", "trainer.steps": "1", "lr": "1"},
                     {"sampler.steps": MISSING, "trainer.steps": "2", "lr": "2"}]  # fmt: skip


def test_a_group_of_different_functions_is_one_factor():
    """With the arguments in which arms of one function differ, and no others."""
    linear = {"_target_": "ddpm.schedules.linear", "T": 1000, "beta_1": 0.0001}
    schedules = [linear | {"beta_T": 0.02}, linear | {"beta_T": 0.04},
                 {"_target_": "ddpm.schedules.cosine", "T": 1000, "s": 0.008}]  # fmt: skip
    assert levels(schedule=schedules) == [{"schedule": "linear beta_T=0.02"}, {"schedule": "linear beta_T=0.04"},
                                          {"schedule": "cosine"}]  # fmt: skip
    assert levels(schedule=[schedules[0], schedules[1]]) == [{"beta_T": "0.02"}, {"beta_T": "0.04"}]
    crossed = levels(schedule=[*schedules, *schedules], optimizer=[{"lr": 1}] * 3 + [{"lr": 2}] * 3)
    assert [found["lr"] for found in crossed] == ["1", "1", "1", "2", "2", "2"]
    assert crossed[0]["schedule"] == crossed[3]["schedule"] == "linear beta_T=0.02"


def test_a_level_neither_steers_a_terminal_nor_floods_it():
    found = levels(model=[{"name": "\x1b[2Jx"}, {"name": "y" * 500}])
    assert found[0]["name"].isprintable() and len(found[1]["name"]) < 80


# ----------------------------------------------------------------------------------------------------------------- arms


def test_arms_are_runs_that_differ_in_the_seed_alone(tmp_path):
    """In the order in which they were begun, whatever the names of the folders."""
    for number, (lr, seed) in enumerate([(0.2, 1), (0.1, 0), (0.2, 0), (0.1, 1), (0.1, 2)]):
        values = {"optimizer.lr": lr, "runs": f"/elsewhere/{number}", "device": f"cuda:{number}", "study": f"s{number}",
                  "evaluation": [f"metric={number}"], "question": f"{number}?", "data.root": f"/{number}",
                  "trainer.log_every": 7 + number, "compile": number % 2 == 0,
                  "graph": ("auto", "off")[number % 2]}  # fmt: skip
        words = [f"optimizer.lr={lr}", f"runs=/elsewhere/{number}", f"device=cuda:{number}"]
        times = {"started": f"2026-01-0{number + 1}", "ended": f"2026-02-0{9 - seed}"}  # the last seed ended first
        write_run(tmp_path, f"{9 - number}", words, seed, values, **times)
    arms, unread = arms_in(tmp_path)
    assert unread == []
    assert [(arm.label, dict(arm.levels), list(arm.done)) for arm in arms] == [
        ("lr=0.2", {"lr": "0.2"}, [0, 1]),
        ("lr=0.1", {"lr": "0.1"}, [0, 1, 2]),
    ]
    assert [run.path.name for run in arms[0].runs] == ["9", "7"]
    assert [run.path.name for run in arms[0].done.values()] == ["7", "9"]  # by seed


def test_of_two_runs_of_a_seed_the_last_that_ended_counts(tmp_path):
    write_run(tmp_path, "first", seed=3, ended="2026-01-05")
    write_run(tmp_path, "second", seed=3, ended="2026-01-07")
    write_run(tmp_path, "third", seed=3, ended="2026-01-06")
    write_run(tmp_path, "fourth", seed=3, ended="2026-01-08", state="FAILED")
    ((arm,), _) = arms_in(tmp_path)
    assert len(arm.runs) == 4 and {seed: run.path.name for seed, run in arm.done.items()} == {3: "second"}
    assert arm.first.path.name == "second"


def test_runs_at_any_depth(tmp_path):
    write_run(tmp_path / "a" / "b", "x")
    write_run(tmp_path, "y", seed=1)
    assert [path.name for path in run_directories(tmp_path)] == ["x", "y"]
    for folder in (tmp_path / "none", tmp_path / "y" / "status.json"):
        with pytest.raises(ValueError, match="holds no runs"):
            run_directories(folder)


def test_a_run_that_nobody_holds_is_interrupted(tmp_path):
    write_run(tmp_path, "x", state="RUNNING")
    ((arm,), _) = arms_in(tmp_path)
    assert arm.runs[0].state == "INTERRUPTED" and not arm.done and arm.first is arm.runs[0]


def test_runs_without_a_configuration(tmp_path):
    """As a refused one may be: an arm by what was typed, of its seed, and no factor for the others."""
    for seed in range(2):
        write_run(tmp_path, f"1{seed}", ["model.channels=8"], seed, {"model.channels": 8})
        write_run(tmp_path, f"2{seed}", ["model.channels=16"], seed, {"model.channels": 16})
        path = write_run(tmp_path, f"3{seed}", ["model.channels=7"], seed, state="FAILED", reason="7 is odd")
        (path / "config.yaml").unlink()
    (write_run(tmp_path, "4", overrides=["seed=0"], state="FAILED") / "config.yaml").unlink()
    arms, unread = arms_in(tmp_path)
    assert unread == []
    found = {arm.runs[0].path.name[0]: (dict(arm.levels), [run.seed for run in arm.runs]) for arm in arms}
    assert found == {"1": ({"channels": "8"}, [0, 1]), "2": ({"channels": "16"}, [0, 1]), "3": ({}, [0, 1]),
                     "4": ({}, [0])}  # fmt: skip
    assert len({arm.label for arm in arms}) == 4
    untyped = json.loads((tmp_path / "4" / "status.json").read_text()) | {"overrides": None}
    (tmp_path / "4" / "status.json").write_text(json.dumps(untyped))
    assert None in [run.seed for arm in arms_in(tmp_path)[0] for run in arm.runs]
    (tmp_path / "4" / "status.json").unlink()
    assert sorted(arm.label for arm in arms_in(tmp_path)[0]) == ["channels=16", "channels=7", "channels=8"]


# ----------------------------------------------------------------------------------------------- what cannot be read


def damage(path: Path, kind: str) -> None:
    config, status = path / "config.yaml", path / "status.json"
    match kind:
        case "truncated status":
            status.write_text(status.read_text()[:100])
        case "status of something else":
            status.write_text('{"answer": 42}')
        case "status that is no file":
            status.unlink()
            status.mkdir()
        case "a newer version's status":
            status.write_text(json.dumps(json.loads(status.read_text()) | {"format": 99}))
        case "words that are none":
            status.write_text(json.dumps(json.loads(status.read_text()) | {"overrides": 5}))
        case "alias":
            config.write_text("a: &x [1]\nb: *x\n")
        case "tag":
            config.write_text("a: !!python/object/apply:os.getcwd []\n")
        case "no YAML":
            config.write_text("a: [1\n")
        case "bytes":
            config.write_bytes(b"\xff\xfe\x00")
        case "list":
            config.write_text("[1, 2]\n")
        case "huge":
            config.write_text(config.read_text())
            os.truncate(config, 2**30)
        case "other settings":
            config.write_text("colour: blue\n")
        case "settings of another kind":
            config.write_text("\n".join(f"{key}: 5" for key in settings_of()))
        case "a date":
            config.write_text(config.read_text().replace("lr: 0.001", "lr: 2026-01-01"))
            assert "2026" in config.read_text()


@pytest.mark.parametrize(
    "kind",
    ["truncated status", "status of something else", "status that is no file", "a newer version's status",
     "words that are none", "alias", "tag", "no YAML", "bytes", "list", "huge", "other settings",
     "settings of another kind", "a date"],
)  # fmt: skip
def test_what_cannot_be_read_is_told_and_stops_no_other(kind, tmp_path):
    write_run(tmp_path, "good", ["optimizer.lr=0.1"], values={"optimizer.lr": 0.1})
    damage(write_run(tmp_path, "damaged", ["optimizer.lr=0.2"], values={"optimizer.lr": 0.001}), kind)
    arms, unread = arms_in(tmp_path)
    assert [run.path.name for arm in arms for run in arm.runs] == ["good"]
    (line,) = unread
    assert line.startswith("damaged: ") and len(line) < 500 and "\n" not in line


@pytest.mark.parametrize("content", ['{"frechet": {"val', "[1]", '{"frechet": 5}', "[" * 100_000, "\x00"])
def test_an_evaluation_that_cannot_be_read_is_left_out(content, tmp_path):
    path = write_run(tmp_path, "x")
    (path / "evaluation.json").write_text(content)
    ((arm,), (told,)) = arms_in(tmp_path)
    assert arm.done and arm.first.evaluation == {} and "evaluation.json" in told and "left out" in told


def test_what_was_asked_for_and_is_not_measured_is_known(tmp_path):
    lines = ["metric=cost", "metric=kernel"]
    for name, status in {"a": {}, "b": {"evaluated": lines[:1]}, "c": {"evaluated": lines}, "d": {"state": "FAILED"},
                         "e": {"evaluated": ["metric=recall"]}}.items():  # fmt: skip
        write_run(tmp_path, name, values={"evaluation": lines}, **status)
    runs, _ = read(tmp_path, science_of)
    assert [run.unmeasured for run in runs] == [lines, lines[1:], [], [], []]


def test_a_run_is_read_whole(tmp_path):
    results = {"frechet_pixels_64": {"value": 1.5}}
    write_run(tmp_path, "x", ["optimizer.lr=1"], 4, losses=[0.5, None], train=[1.0], evaluation=results)
    ((run,), unread) = read(tmp_path, science_of)
    assert unread == [] and run.done and run.seed == 4 and run.words == ["optimizer.lr=1"]
    assert run.settings == settings_of(seed=4) and run.evaluation == results
    assert run.science["trainer"]["batch_size"] == 16 and "seed" not in run.science
    assert [(line["step"], line["split"], line["loss"]) for line in run.metrics] == [
        (10, "train", 1.0), (10, "held_out", 0.5), (20, "held_out", None),
    ]  # fmt: skip
