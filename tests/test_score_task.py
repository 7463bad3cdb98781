"""ddpm/training/tasks/score.py and ddpm/metrics/score.py: the objectives as losses of one network, and their error."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from ddpm.data import Mixture, Moons
from ddpm.diffusion import GaussianDiffusion
from ddpm.metrics.score import measure_score_error, score_levels
from ddpm.oracle import JointMixture
from ddpm.randomness import Keyed
from ddpm.samplers import DDIM
from ddpm.schedules import cosine, geometric, sigmas, zero_terminal_snr
from ddpm.score import noise_level
from ddpm.sources.trained import TrainedSampler
from ddpm.training.task import trial_loss
from ddpm.training.tasks.diffusion import Diffusion
from ddpm.training.tasks.score import OBJECTIVES, Score
from models.mlp import MLP

SCHEDULE = sigmas([0.2, 0.6, 1.5])
DATA = Mixture(means=[[-1.0, 0.0], [1.0, 0.5]], std=0.4, weights=[0.3, 0.7], count=200)


class Affine(nn.Module):
    """eps = x_t W^T + c, whatever t."""

    shape, num_classes, takes = (2,), None, ()

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor([[0.5, 0.2], [-0.1, 0.7]]))
            self.linear.bias.copy_(torch.tensor([0.3, -0.2]))

    def forward(self, x_t, t):
        return self.linear(x_t)


def task(objective: str, model: nn.Module | None = None, schedule=SCHEDULE, **options) -> Score:
    diffusion = GaussianDiffusion(schedule, clip_x_0=False)
    made = Score(model or Affine(), diffusion, objective, **options)
    made.check(DATA)
    return made


def drawn(of: Score, n: int, level: int | None = None):
    """n rows of fresh data at every level, or at one."""
    made = of.draw(DATA.batch(torch.arange(n) % len(DATA)), Keyed(0, 1), 0.0)
    x_0 = JointMixture.of(SCHEDULE, DATA).sample(n, torch.Generator().manual_seed(1)).float()
    return replace(made, x_0=x_0, t=made.t if level is None else torch.full_like(made.t, level))


@pytest.mark.equation("Score (loss)")
def test_the_denoising_objective_is_the_loss_of_eps():
    of = task("denoising")
    rows = drawn(of, 64)
    eps = Diffusion(of.model, of.diffusion).losses(rows, 0.0)["loss"]
    torch.testing.assert_close(of.losses(rows, 0.0)["loss"], eps, rtol=1e-5, atol=1e-5)


@pytest.mark.equation("Score (loss)")
@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "denoising"])
@pytest.mark.parametrize("level", [1, 3])
def test_every_objective_has_the_same_mean_and_the_same_mean_gradient(objective, level):
    """Within four standard errors; the explicit one is less by 1 - sigma^2 E |score|^2 / d, whatever the network."""
    reference, of = task("denoising"), task(objective)
    rows = drawn(reference, 20_000, level)
    loss, other = (one.losses(rows, 0.0)["loss"] for one in (reference, of))
    lost = 0.0
    if objective == "explicit":
        sigma, a = noise_level(SCHEDULE, level).item(), SCHEDULE.alpha_bar[level].sqrt().item()
        x = rows.x_0 + sigma * rows.eps
        lost = 1 - sigma**2 * (a * of.truth.score(a * x, level)).square().sum(1).mean().item() / 2
    difference = loss - other
    assert abs(difference.mean().item() - lost) < 4 * difference.std().item() / math.sqrt(len(loss)) + 1e-3
    ours, theirs = (
        torch.autograd.grad(each.mean(), one.model.linear.weight)[0] for one, each in ((reference, loss), (of, other))
    )
    assert (ours - theirs).abs().max() < 0.1


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("energy", [False, True])
def test_every_objective_trains_an_mlp_and_an_energy(objective, energy):
    torch.manual_seed(0)
    of = task(objective, MLP(2, 32, 2, energy=energy), projection="gaussian")
    optimizer = torch.optim.Adam(of.model.parameters(), 3e-3)
    losses = []
    for step in range(30):
        of.model.train()
        loss = of.losses(of.draw(DATA.batch(DATA.order(0, step + 1, 128)), Keyed(0, step), 0.0), 0.0)["loss"]
        assert loss.shape == (128,) and loss.isfinite().all()
        optimizer.zero_grad()
        loss.mean().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in of.model.parameters())
        optimizer.step()
        losses.append(loss.mean().item())
    assert sum(losses[-10:]) < sum(losses[:10])
    held_out = of.held_out(of.draw_held_out(DATA.batch(DATA.held_out), Keyed(0)))["loss"]
    assert held_out.shape == (len(DATA.held_out),) and held_out.isfinite().all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"objective": "nope"}, "objective = 'nope' is not known; allowed: denoising, explicit, implicit, sliced"),
        ({"projection": "nope"}, "projection = 'nope' is not known; allowed: rademacher, gaussian"),
        ({"step": 0}, "step = 0 must be > 0"),
        ({"step": math.nan}, "step = nan must be > 0"),
        (
            {"diffusion": GaussianDiffusion(SCHEDULE, loss="snr")},
            "diffusion.loss = 'snr' does not apply to score matching",
        ),
        ({"diffusion": GaussianDiffusion(zero_terminal_snr(cosine(20)), "v")}, "beta_T = 1 makes the noise level"),
    ],
)
def test_what_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Score(**{"model": Affine(), "diffusion": GaussianDiffusion(SCHEDULE)} | options)


def test_the_explicit_objective_needs_a_density():
    with pytest.raises(ValueError, match="the density of moons is not known"):
        Score(Affine(), GaussianDiffusion(SCHEDULE), "explicit").check(Moons())


# --- The error of a score


class Exact(nn.Module):
    """The exact eps of the data, times a factor."""

    shape, num_classes, takes = (2,), None, ()

    def __init__(self, schedule, factor: float):
        super().__init__()
        self.truth, self.factor = JointMixture.of(schedule, DATA), factor
        self.one = nn.Parameter(torch.zeros(()))

    def forward(self, x_t, t):
        return self.factor * self.truth.denoise(x_t, t).eps


@pytest.mark.equation("Score (relative error)")
@pytest.mark.parametrize("schedule", [SCHEDULE, geometric(10), cosine(100)], ids=["sigmas", "geometric", "cosine"])
@pytest.mark.parametrize("factor", [1.0, 1.1, 0.0])
def test_a_score_that_is_too_long_by_a_factor_has_its_square_as_error(schedule, factor):
    network = Exact(schedule, factor)
    diffusion = GaussianDiffusion(schedule)  # which clips, and must not here
    source = TrainedSampler(diffusion, network, DDIM(3), (2,), 0, torch.device("cpu"))
    levels, counted = score_levels(schedule), []
    protocol, words, values = measure_score_error(source, DATA, 300, levels, 128, counted.append)
    assert values["errors"] == pytest.approx([(factor - 1) ** 2] * len(levels), abs=1e-5)
    assert values["value"] == pytest.approx((factor - 1) ** 2, abs=1e-5)
    assert values["low"] <= values["value"] <= values["high"] and sum(counted) == 300 * len(levels)
    assert protocol == f"score_error_{len(levels)}levels_300_density" and "relative squared error" in words
    for t, sigma in zip(levels, values["sigma"], strict=True):
        assert sigma == pytest.approx(noise_level(schedule, t).item())


def test_levels_are_those_that_are_asked_for_or_spread_over_the_schedule():
    assert score_levels(SCHEDULE) == [1.0, 2.0, 3.0]
    assert score_levels(SCHEDULE, [0.6]) == pytest.approx([2.0])
    spread = score_levels(cosine(1000))
    assert len(spread) == 10 and spread[0] == 1 and spread[-1] == 1000
    logs = torch.tensor([noise_level(cosine(1000), t).log().item() for t in spread])
    assert (logs.diff() - logs.diff().mean()).abs().max() < 1e-6
    with pytest.raises(ValueError, match=r"sigma = 2: the network was trained on noise levels from 0.2 to 1.5"):
        score_levels(SCHEDULE, [2.0])
    with pytest.raises(ValueError, match="there is no level of noise"):
        score_levels(sigmas([1.0]).__class__([1.0]))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_plan_knows_its_shapes_without_weights(objective):
    with torch.device("meta"):
        network = MLP(width=8, depth=1)
    loss = trial_loss(task(objective, network), DATA, 3, torch.device("meta"))
    assert loss.is_meta and loss.shape == ()
