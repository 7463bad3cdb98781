"""ddpm/training/stack.py: runs that are trained at once are what each of them is alone."""

import signal

import pytest
import torch
from safetensors.torch import load_file
from test_kernels import randn
from test_trainer import CPU, Fit, T, network, options, some, unet

from ddpm.data import Digits, SwissRoll
from ddpm.diffusion import GaussianDiffusion
from ddpm.runs import checkpoint
from ddpm.runs.directory import Run, read_metrics
from ddpm.schedules import cosine
from ddpm.training.interrupt import Interrupted
from ddpm.training.stack import Stack, fit_together, why_not
from ddpm.training.step import Training
from ddpm.training.tasks.diffusion import Diffusion
from ddpm.training.trainer import Trainer
from models import kernels
from models.mlp import MLP

S = 3
EPS = 1e-4  # with Adam's own a parameter whose gradient is rounding alone takes whole steps by it
LRS = ((0, 2e-3), (1, 2e-3), (2, 1e-3))  # seed, learning rate


@pytest.fixture(scope="module")
def data():
    return some(Digits())


def arms(data, make, lrs=(1e-2, 1e-2, 3e-3), diffusion=None, drop=0.0, **changed) -> list[Training]:
    """One a seed, with networks by make(seed)."""
    diffusion = diffusion or GaussianDiffusion(cosine(T), "v")
    trainer = Trainer(**options(**{"steps": 5} | changed))
    return [
        Training(
            trainer, Diffusion(make(seed), diffusion, drop), data, lambda p, lr=lr: torch.optim.AdamW(p, lr, eps=EPS),
            seed=seed, device=CPU,
        )
        for seed, lr in enumerate(lrs)
    ]  # fmt: skip


def weights(training: Training, averaged: bool = False) -> torch.Tensor:
    task = training.averaged if averaged else training.task
    return torch.cat([p.detach().flatten() for p in task.modules["model"].parameters()])


def assert_as_alone(alone: list[Training], together: list[Training], steps: int = 3, tolerance: float = 1e-5) -> None:
    """Take steps, and compare all that a step gives and changes."""
    stack = Stack(together)
    for step in range(1, steps + 1):
        single, stacked = [arm.step(step, 0.1) for arm in alone], stack.step(step, 0.1)
        for a, b in zip(single, stacked, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=0)
    for a, b in zip(alone, together, strict=True):
        for averaged in (False, True):
            x, y = weights(a, averaged), weights(b, averaged)
            assert (x - y).norm() <= tolerance * x.norm()


@pytest.mark.parametrize("silu", [False, True])
def test_group_norms_of_several_networks_are_one(silu):
    """As PyTorch's own of each, values and gradients."""
    x = torch.stack([randn(4, 6, 5, 5) + s for s in range(S)])
    weight, bias, d_out = randn(S, 6) + 1, randn(6, S).T.contiguous(), torch.stack([randn(4, 6, 5, 5)] * S)

    def norm(x, weight, bias):
        return kernels.group_norm(x, 3, weight, bias, 1e-5, silu)

    inputs = [z.clone().requires_grad_() for z in (x, weight, bias)]
    one = torch.vmap(norm)(*inputs)
    each = torch.stack([norm(*(z[s] for z in inputs)) for s in range(S)])
    torch.testing.assert_close(one, each)
    for a, b in zip(torch.autograd.grad(one, inputs, d_out), torch.autograd.grad(each, inputs, d_out), strict=True):
        torch.testing.assert_close(a, b)


def test_group_norm_of_shared_weights():
    """Under vmap over images alone, as without."""
    x, weight, bias = randn(5, 2, 6, 3), randn(6) + 1, randn(6)
    one = torch.vmap(lambda x: kernels.group_norm(x[None], 3, weight, bias, 1e-5, True)[0])(x.transpose(1, 2))
    torch.testing.assert_close(one, kernels.group_norm(x.transpose(1, 2), 3, weight, bias, 1e-5, True))


@pytest.mark.parametrize("width", [4, 5])
def test_attention_of_several_networks_is_one(width):
    q, k, v, d_out = (randn(S, 2, 7, 2 * width) * scale for scale in (1.0, 2.0, 0.5, 1.5))
    inputs = [z.contiguous().requires_grad_() for z in (q, k, v)]
    one = torch.vmap(lambda q, k, v: kernels.attention(q, k, v, 2), in_dims=0)(*inputs)
    each = torch.stack([kernels.attention(*(z[s] for z in inputs), 2) for s in range(S)])
    torch.testing.assert_close(one, each)
    for a, b in zip(torch.autograd.grad(one, inputs, d_out), torch.autograd.grad(each, inputs, d_out), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: unet(seed, middle_attention=False, attention_resolutions=()),
        lambda seed: unet(seed, num_classes=10, drop=0.2, attention="linear"),
        lambda seed: unet(seed, patch=2, groups=2, num_classes=10, class_channels=3, downsample_padding=0),
        network,
    ],
    ids=["unet", "unet with classes", "unet with channels of classes", "small"],
)
def test_steps(data, make):
    drop = getattr(make(0), "drop", 0.0)
    alone, together = (arms(data, make, drop=drop) for _ in range(2))
    assert_as_alone(alone, together)
    assert all(torch.equal(alone[s].draw(3).eps, together[s].draw(3).eps) for s in range(S))


@pytest.mark.parametrize("energy", [False, True])
def test_steps_of_points(energy):
    """Networks of linear layers, with random frequencies that are buffers; and gradients of scalars."""
    data = SwissRoll(64)

    def make(seed):
        torch.manual_seed(seed)
        return MLP(2, 16, 2, time="fourier", octaves=2, energy=energy)

    assert_as_alone(arms(data, make), arms(data, make))


def test_a_part_of_the_parameters_in_bfloat16(data):
    """What is not trained has no gradient; networks compute in the run's precision."""

    def of_some():
        trainer, made = Trainer(**options(steps=5, precision="bf16")), []
        for seed in range(S):
            task = Diffusion(unet(seed), GaussianDiffusion(cosine(T), "v"), only=["model.up.1.*", "model.conv_out.*"])
            made.append(Training(trainer, task, data, lambda p: torch.optim.SGD(p, 1e-2), seed=seed, device=CPU))
        return made

    alone, together = of_some(), of_some()
    before = weights(together[0]).clone()
    assert_as_alone(alone, together, tolerance=2e-2)
    for name, p in together[0].task.modules["model"].named_parameters():
        assert (p.grad is not None) == name.startswith(("up.1.", "conv_out."))
    assert not torch.equal(weights(together[0]), before)


def test_an_arm_whose_numbers_break_leaves_the_others_alone(data):
    make = lambda seed: unet(seed, attention_resolutions=(), middle_attention=False)  # noqa: E731
    alone, together = (arms(data, make) for _ in range(2))
    with torch.no_grad():
        for training in (alone[1], together[1]):
            training.task.modules["model"].conv_out.bias.fill_(float("nan"))
    stack = Stack(together)
    for step in (1, 2):
        for arm in alone:
            arm.step(step)
        stack.step(step)
    assert [arm.skipped for arm in together] == [0, 2, 0]
    for s in (0, 2):
        assert (weights(alone[s]) - weights(together[s])).norm() <= 1e-5 * weights(alone[s]).norm()


@pytest.mark.parametrize(
    "changed, told",
    [
        ({"make": lambda seed: network(seed, dropout=0.1)}, "dropout"),
        ({"make": lambda seed: unet(seed, checkpointing=True)}, "checkpointing"),
        ({"make": network, "accumulate": 2}, "micro-batches"),
        ({"make": lambda seed: unet(seed, channels=8 + 8 * seed)}, "differ"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_stacked(data, changed, told):
    with pytest.raises(ValueError, match=told):
        Stack(arms(data, **changed))


def test_a_task_that_learns_by_itself_is_not_stacked():
    """Loss-aware times are drawn by what was seen before."""
    task = Diffusion(network(), GaussianDiffusion(cosine(T), "v"), time_sampling="loss_aware")
    assert "step to step" in why_not(task, Trainer(**options(steps=1)))


class Together:
    """One call of `fit_together`, and what it left: the same as `Fit` of each seed."""

    def __init__(self, path, data, *, networks=None, resume=False, **changed):
        self.runs = [Run(path / str(seed)) for seed in range(S)]
        self.trainer = Trainer(**options(**changed))
        begun = []
        for run, (seed, lr) in zip(self.runs, LRS, strict=True):
            run.path.mkdir(parents=True, exist_ok=True)
            model = network(seed) if networks is None else networks[seed]
            begun.append(
                self.trainer.begin(
                    run, Diffusion(model, GaussianDiffusion(cosine(T))), data,
                    lambda p, lr=lr: torch.optim.AdamW(p, lr, fused=True), seed=seed, device=CPU,
                    resume=checkpoint.last_whole(run.checkpoints) if resume else None, shown=False,
                )
            )  # fmt: skip
        self.ended = fit_together([self.trainer] * S, begun)


def saved(run: Run, step: int, name: str) -> torch.Tensor:
    return torch.cat([x.flatten() for x in load_file(run.checkpoints / str(step) / f"{name}.safetensors").values()])


def assert_runs_alike(run: Run, other: Run, step: int, tolerance: float = 1e-5) -> None:
    """Weights, averages, and all lines of metrics but for the time."""
    for name in ("model", "ema"):
        x, y = saved(run, step, name), saved(other, step, name)
        assert (x - y).norm() <= tolerance * x.norm()
    lines, others = (read_metrics(one.path) for one in (run, other))
    assert len(lines) == len(others) > 0
    for line, other_line in zip(lines, others, strict=True):
        del line["seconds"], other_line["seconds"]
        assert line.pop("split") == other_line.pop("split")
        assert line == pytest.approx(other_line, rel=tolerance)


def test_runs_at_once_are_what_they_are_alone(tmp_path, data):
    """And one of them goes on alone from its checkpoint, as alone throughout."""
    together = Together(tmp_path / "together", data)
    alone = [Fit(tmp_path / str(seed), data, seed=seed, model=network(seed), lr=lr) for seed, lr in LRS]
    assert [ended for ended, _ in together.ended] == ["steps"] * S
    for run, one in zip(together.runs, alone, strict=True):
        assert_runs_alike(run, one.run, 6)
    further = [
        Fit(path, data, seed=1, model=network(1), lr=LRS[1][1], resume=path / "checkpoints" / "3")
        for path in (together.runs[1].path, alone[1].run.path)
    ]
    assert_runs_alike(*(fit.run for fit in further), 6)
    assert not torch.equal(saved(together.runs[0], 6, "model"), saved(together.runs[1], 6, "model"))


def test_a_signal_ends_all_and_they_go_on_together(tmp_path, data, monkeypatch):
    step_of = Stack.step

    def interrupted(self, step, progress):
        if step == 4:
            signal.raise_signal(signal.SIGINT)
        return step_of(self, step, progress)

    with monkeypatch.context() as patch:
        patch.setattr(Stack, "step", interrupted)
        ended = Together(tmp_path / "together", data).ended
    assert all(isinstance(one, Interrupted) and one.signum == signal.SIGINT for one in ended)
    together = Together(tmp_path / "together", data, resume=True)
    assert [run.status()["step"] for run in together.runs] == [6] * S
    for run, (seed, lr) in zip(together.runs, LRS, strict=True):
        assert_runs_alike(run, Fit(tmp_path / str(seed), data, seed=seed, model=network(seed), lr=lr).run, 6)


def test_a_run_that_breaks_ends_alone(tmp_path, data):
    networks = [network(seed) for seed in range(S)]
    with torch.no_grad():
        networks[1].conv_out.bias.fill_(float("nan"))
    together = Together(tmp_path / "together", data, networks=networks, max_skipped=1)
    assert isinstance(together.ended[1], FloatingPointError) and (together.runs[1].path / "autopsy").is_dir()
    for seed in (0, 2):
        alone = Fit(tmp_path / str(seed), data, seed=seed, model=network(seed), lr=LRS[seed][1], max_skipped=1)
        assert_runs_alike(together.runs[seed], alone.run, 6)


@pytest.mark.parametrize(
    "changed, told", [({"steps": 3, "seconds": 60.0}, "seconds"), ({"accumulate": 2}, "micro-batches")]
)
def test_runs_that_are_not_trained_at_once(tmp_path, data, changed, told):
    with pytest.raises(ValueError, match=told):
        Together(tmp_path, data, **changed)
    assert all(not run.checkpoints.exists() for run in (Run(tmp_path / str(seed)) for seed in range(S)))
