"""`ddpm-study optimise`: what is searched, how trials end, and how an interrupted search goes on."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import pytest
from PIL import Image
from test_cli import words

from ddpm.commands.study import optimising
from ddpm.commands.train import training
from ddpm.config import InvalidInput, compose, plain
from ddpm.figures import plots
from ddpm.runs.directory import Run
from ddpm.study.search import space, word

optuna = pytest.importorskip("optuna")
pytestmark = pytest.mark.slow  # so they run where the extra is installed

LR = "search.space={optimizer.lr:{low:1e-4,high:1e-1,log:true}}"
Losses = Callable[[Any], list[float]]


def typed(folder: Path, *changes: str) -> list[str]:
    return words(f"runs={folder}", "study=s", *changes)


def study(folder: Path) -> Any:
    backend = optuna.storages.journal.JournalFileBackend(str(folder / "s" / "optuna.log"))
    return optuna.load_study(study_name="s", storage=optuna.storages.JournalStorage(backend))


def ended(folder: Path) -> list[str]:
    return [t.state.name for t in study(folder).trials]


def proposed(folder: Path) -> list[dict[str, Any]]:
    return [t.params for t in study(folder).trials]


@pytest.fixture
def pretend(monkeypatch) -> Callable[[Losses], list[str]]:
    """Runs that take no time: of a plan's configuration, their held-out losses at steps 1, 2, ...; their hashes.

    And no figure, which takes longer than all else.
    """
    monkeypatch.setattr(plots, "search", lambda *arguments: None)
    begun: list[str] = []

    def pretend(losses: Losses) -> list[str]:
        def lead(plan: Any, team: Any, watch: Callable[[int, float | None], None]) -> None:
            begun.append(plan.run.hash)
            plan.run.path.mkdir(parents=True, exist_ok=True)
            for step, loss in enumerate(losses(plan.config), 1):
                line = {"step": step, "split": "held_out", "loss": loss}
                with open(plan.run.path / "metrics.jsonl", "a") as file:
                    file.write(json.dumps(line) + "\n")
                try:
                    watch(step, loss)
                except training.Stopped as stopped:
                    plan.run.write_status("INTERRUPTED", reason=str(stopped))
                    raise
            plan.run.write_status("DONE", step=4)

        monkeypatch.setattr(training, "lead", lead)
        return begun

    return pretend


def by_lr(config: Any) -> list[float]:
    """Lowest at 1e-2."""
    return [1 + abs(config.optimizer.lr - 1e-2)]


# ------------------------------------------------------------------------------------------------------ the whole


def test_trials_are_runs_and_the_best_is_told_with_its_words(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "_draw_results", lambda *arguments: None)
    space = "search.space={optimizer.lr:{low:1e-4,high:1e-1,log:true},trainer.batch_size:{choices:[4,8]}}"
    search = [*typed(tmp_path), space, "search.trials=3"]
    assert optimising.optimise(search) == 0
    told, trials, folder = capsys.readouterr().out, study(tmp_path).trials, tmp_path / "s"
    runs = {path.name: Run(path) for path in folder.iterdir() if path.is_dir()}
    assert len(runs) == 3 and {run.status()["state"] for run in runs.values()} == {"DONE"}
    for trial in trials:
        run = runs[trial.user_attrs["run"]]
        lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
        assert trial.value == [line["loss"] for line in lines if line["split"] == "held_out"][-1]
        assert sorted(trial.intermediate_values) == [2, 4]
        config = compose("train", run.status()["overrides"])
        assert config.optimizer.lr == trial.params["optimizer.lr"]
        assert str(config.trainer.batch_size) == trial.params["trainer.batch_size"]
        assert "search" not in (run.path / "config.yaml").read_text()
    best = min(trials, key=lambda t: t.value)
    assert f"best held_out {best.value:.6g}, of trial {best.number}: {folder / best.user_attrs['run']}" in told
    assert f"optimizer.lr={best.params['optimizer.lr']}" in told and "search." not in told.partition("best held_out")[2]
    page = (folder / "optimise.md").read_text()
    assert all(f"`{name}`" in page for name in runs) and "3 trials: 3 complete" in page
    assert Image.open(folder / "optimise.png").width > 500
    assert {path.name for path in folder.iterdir() if path.is_file()} == {
        "optimise.md", "optimise.png", "optuna.log", "optuna.lock",
    }  # fmt: skip


def test_repeated_it_only_does_what_is_missing_and_proposes_what_it_would_have(tmp_path, pretend):
    begun = pretend(by_lr)
    for folder, counts in ((tmp_path / "a", (2, 2, 5)), (tmp_path / "b", (5,))):
        for count in counts:
            assert optimising.optimise([*typed(folder), LR, f"search.trials={count}"]) == 0
    assert len(begun) == 10
    assert proposed(tmp_path / "a") == proposed(tmp_path / "b")
    assert len({tuple(params.values()) for params in proposed(tmp_path / "a")}) == 5


def test_another_seed_proposes_otherwise(tmp_path, pretend):
    pretend(by_lr)
    for seed in (0, 1):
        optimising.optimise([*typed(tmp_path / str(seed)), LR, "search.trials=1", f"search.seed={seed}"])
    assert proposed(tmp_path / "0") != proposed(tmp_path / "1")


def test_a_run_that_is_done_is_told_without_training(tmp_path, pretend):
    begun = pretend(by_lr)
    space = "search.space={model.dropout:{choices:[0.0,0.1]}}"
    assert optimising.optimise([*typed(tmp_path), space, "search.trials=6", "search.sampler=random"]) == 0
    assert len(begun) == len(set(begun)) <= 2 and ended(tmp_path) == ["COMPLETE"] * 6


# ------------------------------------------------------------------------------------------------- how trials end


def test_a_trial_goes_on_after_its_process_was_killed(tmp_path, monkeypatch):
    """From its checkpoint, with the same settings, to the same value."""
    monkeypatch.setattr(training, "_draw_results", lambda *arguments: None)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert optimising.optimise([*typed(whole), LR, "search.trials=2"]) == 0
    report = optimising.Watcher.__call__

    def dies(watcher: Any, step: int, loss: float | None) -> None:
        report(watcher, step, loss)
        raise SystemExit(137)

    monkeypatch.setattr(optimising.Watcher, "__call__", dies)
    with pytest.raises(SystemExit):
        optimising.optimise([*typed(killed), LR, "search.trials=2"])
    assert ended(killed) == ["RUNNING"]
    monkeypatch.setattr(optimising.Watcher, "__call__", report)
    assert optimising.optimise([*typed(killed), LR, "search.trials=2"]) == 0
    assert ended(killed) == ["FAIL", "COMPLETE", "COMPLETE"]
    first, *others = study(killed).trials
    assert others[0].user_attrs["continues"] == first.number
    assert [(t.params, t.value, t.intermediate_values) for t in others] == [
        (t.params, t.value, t.intermediate_values) for t in study(whole).trials
    ]
    assert "2 trials: 2 complete" in (killed / "s" / "optimise.md").read_text()


def test_the_trial_of_a_process_that_lives_is_left_to_it(tmp_path, pretend):
    pretend(by_lr)
    search = [*typed(tmp_path), LR, "search.trials=2"]
    assert optimising.optimise([*search, "search.trials=1"]) == 0
    trial = study(tmp_path).ask({"optimizer.lr": optuna.distributions.FloatDistribution(1e-4, 1e-1, log=True)})
    trial.set_user_attr("worker", "other-1")
    with filelock.FileLock(tmp_path / "s" / "optuna.other-1.lock"):
        assert optimising.optimise(search) == 0
        assert ended(tmp_path) == ["COMPLETE", "RUNNING"]
    assert optimising.optimise(search) == 0
    assert ended(tmp_path) == ["COMPLETE", "FAIL", "COMPLETE"]
    assert proposed(tmp_path)[1] == proposed(tmp_path)[2]


def test_trials_that_fail_are_told_with_the_reason_and_the_others_go_on(tmp_path, pretend, capsys):
    def losses(config: Any) -> list[float]:
        if config.model.dropout == 0.1:
            raise training.RunFailed("it broke")
        return [float("nan")] if config.model.dropout == 0.2 else [1.0]

    pretend(losses)
    space = "search.space={model.dropout:{choices:[0.0,0.1,0.2]},model.groups:{choices:[4,3]}}"
    search = [*typed(tmp_path), space, "search.trials=8", "search.sampler=random", "search.pruner=none"]
    assert optimising.optimise(search) == 1
    told, trials = capsys.readouterr().out, study(tmp_path).trials
    assert len(trials) == 8
    reasons = {
        (t.params["model.dropout"], t.params["model.groups"]): t.user_attrs.get("reason", t.state.name) for t in trials
    }
    expected = {
        ("0.0", "4"): "COMPLETE",
        ("0.1", "4"): "it broke",
        ("0.2", "4"): "its held_out is nan, which is not a usable number",
    }
    for chosen, reason in reasons.items():
        assert expected.get(chosen, "groups") in reason and (reason == "COMPLETE" or reason in told)
    assert len(set(reasons.values())) >= 3
    assert optimising.optimise(search) == 1 and len(study(tmp_path).trials) == 8
    pretend(by_lr)
    failed = [t for t in trials if t.state.name == "FAIL"]
    optimising.optimise([*search, "retry=true"])
    again = study(tmp_path).trials[8:]
    assert sorted(t.user_attrs["continues"] for t in again) == [t.number for t in failed]
    assert all(
        (t.state.name == "FAIL") == (t.params["model.groups"] == "3" or t.params["model.dropout"] == "0.2")
        for t in again
    )  # what is done is not trained again, nan or not


@pytest.mark.parametrize(("pruner", "stopped"), [("median", True), ("halving", True), ("none", False)])
def test_a_hopeless_trial_is_pruned(tmp_path, pretend, capsys, pruner, stopped):
    trial = iter(range(100))

    def losses(config: Any) -> list[float]:
        return [5.0 + (number := next(trial)), 4.0 + number, 3.0 + number, 2.0 + number]  # each worse than the last

    begun = pretend(losses)
    search = [*typed(tmp_path), LR, "search.trials=8", f"search.pruner={pruner}", "search.sampler=random"]
    assert optimising.optimise(search) == 0
    states, page = ended(tmp_path), (tmp_path / "s" / "optimise.md").read_text()
    assert states[0] == "COMPLETE" and ("PRUNED" in states) == stopped and len(begun) == 8
    if stopped:
        pruned = next(t for t in study(tmp_path).trials if t.state.name == "PRUNED")
        status = Run(tmp_path / "s" / pruned.user_attrs["run"]).status()
        assert status["state"] == "INTERRUPTED" and status["reason"] == pruned.user_attrs["reason"]
        assert status["reason"].startswith("pruned at step ") and status["reason"] in page
    assert optimising.optimise(search) == 0 and len(begun) == 8


def test_at_its_last_step_no_trial_is_pruned(tmp_path, pretend, capsys):
    trial = iter(range(100))
    pretend(lambda config: [1.0, 1.0, 1.0, float(next(trial))])
    assert optimising.optimise([*typed(tmp_path, "trainer.checkpoint_every=4"), LR, "search.trials=8"]) == 0
    assert ended(tmp_path) == ["COMPLETE"] * 8
    assert "no trial is pruned before its end: trainer.checkpoint_every=4" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- the measure


def test_the_measure_is_a_name_of_evaluation_json_and_recognition_is_to_be_large(tmp_path, pretend, monkeypatch):
    pretend(by_lr)

    def measure(plan: Any) -> None:
        values = {"recognition_logistic_512_train": {"value": 100 * plan.config.optimizer.lr}, "frechet": {"value": 1}}
        (plan.run.path / "evaluation.json").write_text(json.dumps(values))

    monkeypatch.setattr(training, "measure", measure)
    search = [*typed(tmp_path, "recognition=true"), LR, "search.measure=recognition", "search.trials=3"]
    assert optimising.optimise(search) == 0
    found = study(tmp_path)
    assert found.direction.name == "MAXIMIZE"
    assert found.best_value == 100 * max(t.params["optimizer.lr"] for t in found.trials)
    assert "larger is better" in (tmp_path / "s" / "optimise.md").read_text()


@pytest.mark.parametrize("known", [{}, {"frechet_a": {"value": 1}, "frechet_b": {"value": 2}}, {"frechet": {}}])
def test_a_measure_that_is_not_there_or_not_one_fails_the_trial(tmp_path, pretend, monkeypatch, known):
    pretend(by_lr)
    monkeypatch.setattr(
        training, "measure", lambda plan: (plan.run.path / "evaluation.json").write_text(json.dumps(known))
    )
    lines = ["evaluation=['metric=frechet n=600 sampler.steps=2']", "search.measure=frechet", "search.trials=1"]
    assert optimising.optimise([*typed(tmp_path), LR, *lines]) == 1
    (trial,) = study(tmp_path).trials
    assert "frechet" in trial.user_attrs["reason"] and all(name in trial.user_attrs["reason"] for name in known)


# ------------------------------------------------------------------------------------------------------- the space


@pytest.mark.parametrize(
    "typed",
    [
        ["search.space={optimizer.lr:{low:1e-4,high:1e-1,log:true},model.dropout:{low:0,high:0.5,step:0.25}}"],
        [
            "+search.space.optimizer.lr={low:1e-4,high:1e-1,log:true}",
            "+search.space.model.dropout={low:0,high:0.5,step:0.25}",
        ],
        ["search.space={optimizer:{lr:{low:1e-4,high:1e-1,log:true}},model:{dropout:{low:0,high:0.5,step:0.25}}}"],
    ],
    ids=["dotted", "one by one", "indented"],
)  # fmt: skip
def test_a_key_is_written_with_dots_or_indented(typed):
    found = space(plain(compose("optimise", typed).search.space))
    assert found == {
        "optimizer.lr": optuna.distributions.FloatDistribution(1e-4, 1e-1, log=True),
        "model.dropout": optuna.distributions.FloatDistribution(0, 0.5, step=0.25),
    }


@pytest.mark.parametrize(
    "value",
    [1, -2.5, 1e-7, True, None, "cosine", "null", "it's [odd], a: b", "1e-3", "", [4, [8]], ["a b", None], {"low": 1}],
)
def test_a_choice_comes_back_from_its_word(value):
    assert plain(compose("optimise", [f"+search.x={word(value)}"]).search.x) == value


def test_whole_numbers_stay_whole_and_groups_can_be_chosen(tmp_path, pretend):
    pretend(by_lr)
    space = "search.space={model.channels:{low:4,high:16,step:4},optimizer:{choices:[adam,adamw]}}"
    assert optimising.optimise([*typed(tmp_path), space, "search.trials=3"]) == 0
    for params in proposed(tmp_path):
        assert params["model.channels"] in (4, 8, 12, 16) and params["optimizer"] in ("adam", "adamw")


def test_what_is_searched_may_be_wrong_without_it(tmp_path, pretend):
    pretend(by_lr)
    space = "search.space={model.groups:{choices:[4,2]}}"
    assert optimising.optimise([*typed(tmp_path, "model.channels=8"), space, "search.trials=1"]) == 0


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["search.space=null"], "search.space=None must name what is searched, such as"),
        (["search.space=3"], "search.space: it is 3, but ranges are needed"),
        (["search.space={optimizer.lr:3}"], "optimizer.lr: 3 must be {low: L, high: H}"),
        (["search.space={optimizer.lr:{low:1}}"], "must be {low: L, high: H}"),
        (["search.space={optimizer.lr:{low:1,high:2,choices:[1]}}"], "choices is not known"),
        (["search.space={optimizer.lr:{low:1,high:2,lag:3}}"], "lag is not known; allowed: low, high, log, step"),
        (["search.space={optimizer.lr:{low:2,high:1}}"], "low=2 must be less than high=1"),
        (["search.space={optimizer.lr:{low:a,high:1}}"], "must be finite numbers, not a, 1"),
        (["search.space={optimizer.lr:{low:0,high:inf}}"], "must be finite numbers"),
        (["search.space={optimizer.lr:{low:0,high:1.0,log:true}}"], "needs low > 0"),
        (["search.space={optimizer.lr:{low:0,high:1.0,log:3}}"], "log is true or false"),
        (["search.space={optimizer.lr:{low:0.1,high:1.0,log:true,step:0.1}}"], "not be given with log"),
        (["search.space={model.channels:{low:4,high:16,step:0.5}}"], "whole between whole numbers"),
        (["search.space={model.dropout:{choices:[0.1]}}"], "choices=[0.1] must be a list of two values or more"),
        (["search.space={model.dropout:{choices:0.1}}"], "must be a list of two values or more"),
        (["search.space={model.bogus:{low:0,high:0.5}}"], "model.bogus is no key of this configuration; model has:"),
        (["search.space={optimizer:{choices:[adam,newton]}}"], "newton"),
        (["search.space={seed:{low:0,high:5}}"], "seed cannot be searched; allowed are keys of model"),
        (["search.space={sampler.steps:{low:1,high:5}}"], "sampler.steps cannot be searched"),
        (["search.space={trainer.log_every:{low:1,high:5}}"], "trainer.log_every changes no result"),
        (["search.space={schedule.T:{low:10,high:50}}"], "set search.measure=frechet or loss_by_snr"),
        (
            ["search.space={schedule.T:{low:10,high:50}}", "search.measure=loss_by_snr", "search.pruner=median"],
            "and search.pruner=none",
        ),
        (["search.trials=0"], "search.trials=0 must be an integer >= 1"),
        (["search.trials=2.5"], "search.trials=2.5 must be an integer"),
        (["search.seed=-1"], "search.seed=-1 must be an integer >= 0"),
        (["search.sampler=best"], "search.sampler=best is not known; allowed: tpe, random"),
        (["search.pruner=best"], "allowed: auto, median, halving, none"),
        (["search.direction=up"], "allowed: auto, minimize, maximize"),
        (["search.measure=null"], "search.measure=None must be held_out"),
        (
            ["search.measure=latent_purity"],
            "neither direction is better by itself; set search.direction=maximize or minimize",
        ),
        (["search.measure=frechet"], "a run will have held_out; add a line to evaluation"),
        (
            ["search.measure=kernel", "evaluation=['metric=frechet sampler.steps=2']"],
            "a run will have held_out, frechet; add",
        ),
        (["search.rounds=3"], "search.rounds is no key of this configuration; search has: direction"),
        (["search=null"], "search=None must hold settings"),
        (["data.validation=0"], "has no held-out part"),
        (["extend=runs/default/abc"], "extend=runs/default/abc cannot be used here"),
        (["trainer.batch_size=0"], "batch_size = 0"),
        (["retry=3"], "retry=3 must be true or false"),
        (["retry=${nothing}"], "nothing"),
    ],
)
def test_wrong_input_is_refused_in_one_line_before_anything_is_made(tmp_path, monkeypatch, wrong, told):
    monkeypatch.setattr(training, "lead", lambda *arguments, **more: pytest.fail("it began"))
    space = [] if any(word.startswith(("search.space", "search=")) for word in wrong) else [LR]
    with pytest.raises(InvalidInput, match=r"^[^\n]*$") as raised:
        optimising.optimise([*typed(tmp_path, *wrong), *space])
    assert told in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_without_optuna_it_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InvalidInput, match=r"pip install -c constraints.txt -e '\.\[optuna\]'"):
        optimising.optimise([*typed(tmp_path), LR])


# ------------------------------------------------------------------------------------------------ what is on disk


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("trainer.steps=5", "settings: "),
        ("search.direction=maximize", "search.direction: minimize then, maximize now"),
        ("search.space={optimizer.lr:{low:1e-4,high:1.0,log:true}}", "search.space: "),
    ],
)
def test_trials_by_other_settings_are_not_mixed(tmp_path, pretend, change, told):
    pretend(by_lr)
    assert optimising.optimise([*typed(tmp_path), LR, "search.trials=1"]) == 0
    key = change.partition("=")[0]
    search = [word for word in [*typed(tmp_path), LR] if word.partition("=")[0] != key]
    with pytest.raises(InvalidInput, match="choose another study=NAME") as raised:
        optimising.optimise([*search, change, "search.trials=2"])
    assert told in str(raised.value) and len(study(tmp_path).trials) == 1
    assert optimising.optimise([*typed(tmp_path), LR, "search.trials=2"]) == 0


def test_settings_may_change_before_anything_has_come_of_them(tmp_path, monkeypatch, pretend):
    def dies(*arguments: object, **more: object) -> None:
        raise SystemExit(143)

    monkeypatch.setattr(training, "lead", dies)
    with pytest.raises(SystemExit):
        optimising.optimise([*typed(tmp_path), LR, "search.trials=1"])
    pretend(by_lr)
    assert optimising.optimise([*typed(tmp_path), LR, "search.trials=1", "search.direction=maximize"]) == 0
    assert ended(tmp_path) == ["COMPLETE"]


def test_a_line_that_was_cut_off_does_not_spoil_the_study(tmp_path, pretend):
    pretend(by_lr)
    assert optimising.optimise([*typed(tmp_path), LR, "search.trials=1"]) == 0
    with open(tmp_path / "s" / "optuna.log", "a") as file:
        file.write('{"op_code":6,"wor')
    assert optimising.optimise([*typed(tmp_path), LR, "search.trials=2"]) == 0
    assert ended(tmp_path) == ["COMPLETE"] * 2


def test_a_file_that_is_no_study_is_refused(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "optuna.log").write_text("nonsense\nand more\n")
    with pytest.raises(InvalidInput, match="cannot be read as a study of Optuna"):
        optimising.optimise([*typed(tmp_path), LR])


def test_optuna_says_nothing(tmp_path, pretend, capfd, recwarn):
    pretend(by_lr)
    before = optuna.logging.get_verbosity()
    assert optimising.optimise([*typed(tmp_path), LR, "search.trials=2"]) == 0
    assert capfd.readouterr().err == "" and optuna.logging.get_verbosity() == before
    assert [w for w in recwarn if "optuna" in w.filename] == []
