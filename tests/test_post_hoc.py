"""ddpm/training/post_hoc.py and ddpm/runs/snapshots.py: averages of any width, after training, from snapshots."""

import functools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_cli import assert_refused, call, typed, without_pictures  # noqa: F401
from test_trainer import Fit, some, stop_at
from torch import Tensor, nn

from ddpm import cli, config
from ddpm.commands import sources
from ddpm.commands.train import training
from ddpm.data import Digits, ImageData
from ddpm.runs import checkpoint, preflight, snapshots
from ddpm.runs.directory import Run
from ddpm.training import post_hoc
from ddpm.training.ema import EMA
from ddpm.training.interrupt import Interrupted
from ddpm.training.post_hoc import WIDTHS, PowerAverages, coefficients, decay, exponent, inner_product, reconstruct
from ddpm.training.trainer import Trainer

STEPS = 400
HELD = SimpleNamespace(nbytes=0, shape=(1, 8, 8))
BETWEEN = (0.03, 0.07, 0.15, 0.2)


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


@pytest.fixture
def data(digits: Digits) -> ImageData:
    return some(digits)


class Scalars(nn.Module):
    """Weights without a network, float64."""

    def __init__(self, theta: Tensor):
        super().__init__()
        self.theta = nn.Parameter(theta)


def profile(gamma: float, t: float, tau: Tensor) -> Tensor:
    return torch.where(tau <= t, (gamma + 1) / t ** (gamma + 1) * tau**gamma, 0.0)


def averaged(path: Tensor, gamma: float) -> Tensor:
    """The average of theta(1), ..., theta(t), each constant over a step: the integral in closed form."""
    r = torch.arange(len(path) + 1, dtype=torch.float64) / len(path)
    return (r ** (gamma + 1)).diff() @ path


def trajectory(kind: str) -> Tensor:
    """theta(1), ..., theta(STEPS): three scalars."""
    tau = torch.linspace(0, 1, STEPS + 1, dtype=torch.float64)[1:, None]
    if kind == "polynomial":
        return torch.cat([2 + tau, 1 - 3 * tau**2 + tau**3, torch.ones_like(tau)], 1)
    noise = torch.randn(STEPS, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return 1 + noise.cumsum(0) / STEPS**0.5


def snapshots_of(path: Tensor, number: int) -> dict[int, Callable[[], post_hoc.Averages]]:
    """Of a training that goes along a path, from a start that has no share in it."""
    model = Scalars(path[0] + 7)
    tracked, kept = PowerAverages({"model": model}), {}
    for t, theta in enumerate(path, 1):
        model.theta.data.copy_(theta)
        tracked.update(t)
        if t % (len(path) // number) == 0:
            kept[t] = functools.partial(dict, {name: x.clone() for name, x in tracked.state_dict().items()})
    return kept


# -------------------------------------------------------------------------------------------------------- closed forms


@pytest.mark.equation("EDM2 (sigma_rel)")
@pytest.mark.parametrize("gamma", [0.0, 0.5, 6.94, 16.97, 98.0])
def test_the_width_is_the_standard_deviation_of_the_profile(gamma):
    tau = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    p = profile(gamma, 1.0, tau)
    mean, second = (p * tau).mean(), (p * tau**2).mean()
    assert post_hoc.width(gamma) == pytest.approx((second - mean**2).sqrt().item(), rel=1e-4)


@pytest.mark.equation("EDM2 (gamma)")
@pytest.mark.parametrize("sigma_rel", [0.001, 0.01, 0.05, 0.1, 0.2, 0.28, 0.2886])
def test_the_exponent_is_the_root_of_the_cubic(sigma_rel):
    gamma = exponent(sigma_rel)
    assert post_hoc.width(gamma) == pytest.approx(sigma_rel, rel=1e-9) and gamma > 0
    assert (gamma + 2) ** 2 * (gamma + 3) == pytest.approx((gamma + 1) / sigma_rel**2, rel=1e-8)


def test_the_tracked_widths_have_the_exponents_of_the_paper():
    assert [round(exponent(width), 2) for width in WIDTHS] == [16.97, 6.94]


@pytest.mark.parametrize("sigma_rel", [0.0, 0.0009, -0.1, 0.2887, 0.3, 5.0, math.nan, math.inf])
def test_a_width_that_no_average_has_is_refused(sigma_rel):
    with pytest.raises(ValueError, match=r"must be at least 0\.001 and below 0\.2887"):
        exponent(sigma_rel)


@pytest.mark.equation("EDM2 (inner product)")
@pytest.mark.parametrize("a", [(0.4, 2.0), (1.0, 16.97), (0.9, 6.94)])
@pytest.mark.parametrize("b", [(0.7, 16.97), (1.0, 0.5), (0.9, 6.94)])
def test_the_inner_product_is_the_integral(a, b):
    tau = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    by_numbers = (profile(a[1], a[0], tau) * profile(b[1], b[0], tau)).mean().item()
    assert inner_product(a, b) == pytest.approx(by_numbers, rel=1e-4)
    assert inner_product(a, b) == inner_product(b, a)


@pytest.mark.equation("EDM2 (beta_gamma)")
def test_the_decay_leaves_an_earlier_profile_in_shape():
    """What is before t - 1 has the same shape in both profiles, and so one factor; in step 1 it has no share."""
    for t in (2, 5, 100):
        before, after = (profile(6.94, u, torch.tensor(0.7, dtype=torch.float64)).item() for u in (t - 1, t))
        assert decay(6.94, t) == pytest.approx(after / before, rel=1e-12)
    assert decay(6.94, 1) == 0


@pytest.mark.equation("EDM2 (power function)")
def test_the_tracked_average_is_the_integral():
    path = trajectory("walk")
    for t, read in snapshots_of(path, 8).items():
        for width in WIDTHS:
            x = read()[f"{width:g}/model/theta"]
            torch.testing.assert_close(x, averaged(path[:t], exponent(width)), rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------------ reconstruction


@pytest.mark.equation("EDM2 (least squares)")
def test_the_coefficients_are_the_nearest_that_add_up_to_one():
    stored, wanted = [(t, exponent(w)) for t in (40, 70, 100) for w in WIDTHS], (100, exponent(0.07))
    tau = 100 * (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    p = torch.stack([profile(gamma, t, tau) for t, gamma in stored])
    target = profile(wanted[1], wanted[0], tau)
    x, missed = coefficients(stored, wanted)
    x = torch.from_numpy(x)
    assert x.sum().item() == pytest.approx(1, abs=1e-12)
    error = (x @ p - target).norm()
    assert missed == pytest.approx((error / target.norm()).item(), rel=1e-2)
    for number in range(1, len(stored)):  # no other is nearer
        other = x.clone()
        other[number] += 1e-2
        other[0] -= 1e-2
        assert (other @ p - target).norm() > error


@pytest.mark.parametrize("kind", ["polynomial", "walk"])
@pytest.mark.parametrize("sigma_rel", [*WIDTHS, *BETWEEN])
def test_any_width_is_the_average_that_was_not_tracked(kind, sigma_rel):
    path = trajectory(kind)
    found, missed = reconstruct(snapshots_of(path, 20), STEPS, sigma_rel)
    direct = averaged(path, exponent(sigma_rel))
    error = (found["theta"] - direct).norm() / direct.norm()
    assert error < (1e-10 if sigma_rel in WIDTHS else 1e-3)
    assert missed < (1e-6 if sigma_rel in WIDTHS else 0.03)


def test_half_the_way_is_reconstructed_from_what_was_kept_till_then():
    path = trajectory("walk")
    kept = {t: read for t, read in snapshots_of(path, 40).items() if t <= STEPS // 2}
    direct = averaged(path[: STEPS // 2], exponent(0.15))
    found = reconstruct(kept, STEPS // 2, 0.15)[0]["theta"]
    assert (found - direct).norm() < 1e-3 * direct.norm()


def test_weights_that_stand_still_stay_what_they_are_however_few_snapshots_there_are():
    kept = snapshots_of(torch.full((STEPS, 3), 5.0, dtype=torch.float64), 4)
    found, missed = reconstruct(kept, STEPS, 0.02)
    torch.testing.assert_close(found["theta"], torch.full((3,), 5.0, dtype=torch.float64), rtol=1e-12, atol=0)
    assert missed > post_hoc.WELL_MATCHED  # which a command warns of


def test_the_houses_own_average_is_a_power_function_until_it_is_capped():
    path = torch.linspace(0, 1, STEPS, dtype=torch.float64)[:, None] ** 2
    model = Scalars(torch.full_like(path[0], 9.0))
    average = EMA(model, 0.999999, exponent(0.1) + 1)
    for theta in path:
        model.theta.data.copy_(theta)
        average.update(model)
    assert average.model.theta.item() == pytest.approx(averaged(path, exponent(0.1)).item(), rel=3e-3)


@pytest.mark.parametrize("averages", [{}, {"0.05/other/theta": torch.ones(1)}, {"0.05/model/theta": 3}, [1]])
def test_snapshots_of_something_else_are_refused(averages):
    with pytest.raises(ValueError, match="averages"):
        reconstruct({10: lambda: averages}, 10, 0.07)


# ------------------------------------------------------------------------------------------------------------- on disk


def test_a_snapshot_is_known_by_its_checksum(tmp_path, capsys):
    folder = tmp_path / "averages"
    for step in (2, 10, 30):
        path = snapshots.save(folder, step, {"x": torch.full((3,), float(step))})
        assert checkpoint.sha256(path).startswith(path.name.split(".")[1])
    assert list(snapshots.found(folder, 10)) == [2, 10] and list(snapshots.found(folder, 99)) == [2, 10, 30]
    torch.testing.assert_close(checkpoint.load_weights(path)["x"], torch.full((3,), 30.0))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert list(snapshots.found(folder, 99)) == [2, 10] and "damaged" in capsys.readouterr().out
    again = snapshots.save(folder, 10, {"x": torch.zeros(3)})
    assert list(folder.glob("10.*")) == [again]
    (folder / ".40.1.safetensors").write_bytes(b"half")
    snapshots.drop_after(folder, 2)
    assert [path.name.split(".")[0] for path in folder.iterdir()] == ["2"]


def test_an_extended_run_has_the_snapshots_of_its_parent(tmp_path):
    for step in (2, 10):
        snapshots.save(tmp_path / "parent", step, {"x": torch.ones(1)})
    snapshots.inherit(tmp_path / "child", tmp_path / "parent", 5)
    snapshots.inherit(tmp_path / "child", tmp_path / "parent", 5)
    snapshots.drop_after(tmp_path / "child", 1)
    assert list(snapshots.found(tmp_path / "parent", 99)) == [2, 10] and not snapshots.found(tmp_path / "child", 99)


# ------------------------------------------------------------------------------------------------------------ training


def averages_of(fit: Fit) -> dict[str, bytes]:
    """The snapshots of a run, by the names of their files."""
    return {path.name: path.read_bytes() for path in (fit.run.path / "averages").iterdir()}


def test_without_snapshots_a_run_is_what_it_was(data, tmp_path):
    plain, tracking = Fit(tmp_path / "plain", data), Fit(tmp_path / "tracking", data, ema_snapshots=3)
    assert not (tmp_path / "plain" / "averages").exists()
    state, other = (checkpoint.load_state(fit.run.checkpoints / "6") for fit in (plain, tracking))
    assert other.keys() - state.keys() == {"tracked"}
    for name in ("model", "ema"):
        one, two = ((fit.run.checkpoints / "6" / f"{name}.safetensors").read_bytes() for fit in (plain, tracking))
        assert one == two
    assert [int(name.split(".")[0]) for name in sorted(averages_of(tracking))] == [2, 4, 6]


def test_an_interrupted_run_keeps_the_snapshots_of_one_that_was_not(data, tmp_path, monkeypatch):
    whole = Fit(tmp_path / "whole", data, steps=12, checkpoint_every=3, ema_snapshots=6)
    stop_at(monkeypatch, 9)
    with pytest.raises(Interrupted):
        Fit(tmp_path / "cut", data, steps=12, checkpoint_every=3, ema_snapshots=6)
    run = Run(tmp_path / "cut")
    state = run.checkpoints / "9"
    assert state.is_dir()
    checkpoint.drop_after(run.checkpoints, 6)  # as if the process had been killed before it was written
    snapshots.save(run.path / "averages", 10, {"x": torch.ones(1)})
    again = Fit(run.path, data, steps=12, checkpoint_every=3, ema_snapshots=6, resume=run.checkpoints / "6")
    assert averages_of(again) == averages_of(whole) and len(averages_of(again)) == 6
    one, two = (checkpoint.load_state(fit.run.checkpoints / "12")["tracked"] for fit in (whole, again))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_what_was_not_tracked_cannot_be_gone_on_with(data, tmp_path):
    Fit(tmp_path, data)
    with pytest.raises(ValueError, match="tracked averages of the checkpoint"):
        Fit(tmp_path, data, steps=9, ema_snapshots=3, resume=tmp_path / "checkpoints" / "6")


@pytest.mark.parametrize("number", [-1, 257, 1.5])
def test_a_number_of_snapshots_that_is_none_is_refused(number):
    with pytest.raises(ValueError, match="ema_snapshots"):
        Trainer(steps=1, ema_snapshots=number)


@pytest.mark.slow
@pytest.mark.parametrize("sigma_rel", [0.03, 0.15])
def test_a_width_read_off_afterwards_is_the_average_of_a_run_that_kept_it(data, tmp_path, sigma_rel):
    """To 1e-3 of the weights' norm; the run's own average is a power function but for its first steps."""
    options = {"steps": 400, "checkpoint_every": 400, "log_every": 100, "lr_schedule": "constant"}
    options |= {"ema_decay": 0.999999, "ema_warmup": exponent(sigma_rel) + 1, "ema_snapshots": 32}
    fit = Fit(tmp_path, data, **options)
    files = snapshots.found(tmp_path / "averages", 400)
    kept = {step: functools.partial(checkpoint.load_weights, path) for step, path in files.items()}
    found, _ = reconstruct(kept, 400, sigma_rel)
    parts = [(found[name] - p.double(), p.double()) for name, p in fit.ema.named_parameters()]
    error, norm = (torch.cat([pair[k].flatten() for pair in parts]).norm() for k in (0, 1))
    last = torch.cat([(p - q).flatten() for p, q in zip(fit.model.parameters(), fit.ema.parameters(), strict=True)])
    assert error < 1e-3 * norm and last.norm() > 5 * error


# ------------------------------------------------------------------------------------------------------- command line

TINY = [
    "model.channels=8", "model.groups=4", "model.attention_resolutions=[]", "schedule.T=20", "sampler.steps=2",
    "trainer.steps=8", "trainer.seconds=null", "trainer.batch_size=16", "trainer.warmup=0", "trainer.previews=0",
    "trainer.checkpoint_every=4", "recognition=false", "device=cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Trained for 8 steps, with a snapshot of each."""
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_draw_results", lambda *arguments: None)
        patch.setattr(sys, "argv", ["train", *TINY, "trainer.ema_snapshots=8", f"runs={runs}"])
        cli.train()
    return next((runs / "default").iterdir())


@pytest.mark.slow
def test_weights_of_a_width_are_drawn_from_and_measured_apart(call, run):  # noqa: F811
    measure = [f"run={run}", "metric=loss_by_snr", "n=8", "device=cpu"]
    for weights in ("ema:.050", "ema:0.1", "ema"):
        assert call(cli.evaluate, *measure, f"weights={weights}").code == 0
    found = json.loads((run / "evaluation.json").read_text())
    named = {name.removeprefix("loss_by_snr_w1_8_held_out"): values["weights"] for name, values in found.items()}
    assert named == {"": "ema", "_ema0.05": "ema:0.05", "_ema0.1": "ema:0.1"}
    assert len({values["value"] for values in found.values()}) == 3

    source, *_ = sources.source_of(config.compose("sample", [f"run={run}", "weights=ema:0.05", "device=cpu"]))
    stored = checkpoint.load_state(run / "checkpoints" / "8")["tracked"]
    for name, p in source.model.named_parameters():
        torch.testing.assert_close(p.detach(), stored[f"0.05/model/{name}"], rtol=1e-6, atol=1e-7)
    result = call(cli.sample, f"run={run}", "n=4", "sampler.steps=2", "weights=ema:0.05", "device=cpu")
    assert result.code == 0 and list(run.glob("**/*step8_ema0.05_ddim2*"))


@pytest.mark.slow
def test_what_is_told_where_a_width_cannot_be_had(call, without_pictures, run, tmp_path):  # noqa: F811
    sample = functools.partial(call, cli.sample, f"run={run}", "n=1", "sampler.steps=2", "device=cpu")
    for wrong in ("ema:", "ema:x", "ema:0.3"):
        assert_refused(sample(f"weights={wrong}"), f"weights={wrong}")
    assert_refused(sample("weights=ema:0.3"), "0.2887")
    assert "warning: " in (told := sample("weights=ema:0.28").out) and "trainer.ema_snapshots" in told
    assert sample("weights=ema:0.05", "checkpoint=4").code == 0

    runs = f"runs={tmp_path / 'others'}"
    assert call(cli.train, *TINY, runs).code == 0
    other = next((tmp_path / "others" / "default").iterdir())
    assert_refused(call(cli.sample, f"run={other}", "weights=ema:0.1", "device=cpu"), "trainer.ema_snapshots=32")
    longer = [f"extend={other}", "trainer.steps=12", "trainer.ema_snapshots=4"]
    assert_refused(call(cli.train, *longer), "trainer.ema_snapshots=4", "was trained without")


@pytest.mark.slow
def test_a_run_that_is_extended_goes_on_with_its_averages(call, without_pictures, run):  # noqa: F811
    assert call(cli.train, f"extend={run}", "trainer.steps=16").code == 0
    (child,) = (path for path in run.parent.iterdir() if path != run)
    steps = [list(snapshots.found(path / "averages", 99)) for path in (run, child)]
    assert steps == [[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16]]


def test_a_line_of_evaluation_needs_snapshots(call, tmp_path):  # noqa: F811
    line = "evaluation=['metric=loss_by_snr weights=ema:0.1']"
    assert_refused(call(cli.train, *TINY, f"runs={tmp_path / 'runs'}", line), "trainer.ema_snapshots=32")
    assert not (tmp_path / "runs").exists()


def test_what_snapshots_take_on_disk_and_in_memory_is_foreseen():
    network = nn.Linear(100, 100)
    plain, three = (preflight.memory([network], 2, HELD, 8, 1, averages=n) for n in (1, 3))
    assert three.average == 3 * plain.average and three._replace(average=0) == plain._replace(average=0)
    written = preflight.snapshot([network], post_hoc.tracked(32))
    assert written == 2 * 10_100 * 4 and preflight.snapshot([network], post_hoc.tracked(0)) == 0
    assert preflight.disk(10**6, 4, Path("nowhere"), 32 * written) == 24 * 10**6 + 32 * written
