"""task.parts of a diffusion: distances of the predicted x_0 beside its own loss, by hand, and none by default."""

import functools
from pathlib import Path

import pytest
import torch
from test_cli import TINY, Call, assert_refused, call, run_of, typed, without_pictures  # noqa: F401
from torch import Tensor, nn

from ddpm import cli
from ddpm.data import Digits, Moons
from ddpm.data.batch import Condition
from ddpm.diffusion import GaussianDiffusion
from ddpm.forward import q_sample
from ddpm.latent.reconstruction import OF_PICTURES
from ddpm.losses import L_simple
from ddpm.runs.directory import read_metrics
from ddpm.schedules import cosine, zero_terminal_snr
from ddpm.training.task import trial_loss
from ddpm.training.tasks.diffusion import PARTS, Diffusion, Noised
from models.mlp import MLP
from models.unet import UNet

SCHEDULE = cosine(10)
DISTANCES = tuple(OF_PICTURES)


class Scaled(nn.Module):
    """a x_t + b t / T, whatever that is said to be; more of the same where the channels are."""

    takes, num_classes = (), None

    def __init__(self, channels: int = 1):
        super().__init__()
        self.a, self.b, self.channels = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor(-0.2)), channels

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return (self.a * x_t + self.b * t[:, None, None, None] / 10).repeat(1, self.channels, 1, 1)


def rows(n: int = 6) -> Noised:
    """Pictures with noise, each at a time of its own, up to T."""
    draw = functools.partial(torch.randn, n, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    return Noised(x_0=draw().tanh(), condition=Condition(), t=torch.linspace(1, 10, n).round().long(), eps=draw())


def task(parts: dict[str, float] | None, target: str = "eps", **options: object) -> Diffusion:
    return Diffusion(Scaled(), GaussianDiffusion(SCHEDULE, target, **options), parts=parts)


@pytest.mark.equation("Parts (x_0)")
@pytest.mark.parametrize("target", ["eps", "x_0", "v"])
def test_each_part_is_its_mean_over_the_predicted_x_0_times_alpha_bar(target):
    of, drawn = task(dict.fromkeys(PARTS, 1.0) | {"ssim": 0.1, "diffusion": 2.0}, target), rows()
    parts = of.losses(drawn, 0.0)
    assert tuple(parts) == PARTS
    alpha_bar = SCHEDULE.alpha_bar[drawn.t].float()[:, None, None, None]
    x_t = alpha_bar.sqrt() * drawn.x_0 + (1 - alpha_bar).sqrt() * drawn.eps
    output = of.model(x_t, drawn.t)
    x_0 = {
        "eps": (x_t - (1 - alpha_bar).sqrt() * output) / alpha_bar.sqrt(),
        "x_0": output,
        "v": alpha_bar.sqrt() * x_t - (1 - alpha_bar).sqrt() * output,
    }[target]
    error, factor = x_0 - drawn.x_0, alpha_bar.flatten()
    huber = torch.where(error.abs() <= 0.1, error.square() / 2, 0.1 * (error.abs() - 0.05))
    by_hand = {"squared": error.square(), "absolute": error.abs(), "huber": huber}
    for name, each in by_hand.items():
        torch.testing.assert_close(parts[name], factor * each.mean((1, 2, 3)), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(parts["ssim"], factor * OF_PICTURES["ssim"](x_0, drawn.x_0) / 36, rtol=1e-4, atol=1e-6)
    own = of.diffusion.loss(of.model, drawn.x_0, t=drawn.t, eps=drawn.eps)
    assert torch.equal(parts["diffusion"], own)
    whole = 2 * own + parts["squared"] + parts["absolute"] + parts["huber"] + 0.1 * parts["ssim"]
    torch.testing.assert_close(of.total(parts), whole)


@pytest.mark.equation("Parts (x_0)")
@pytest.mark.parametrize("target", ["eps", "v"])
def test_the_squared_part_is_never_more_than_the_error_that_is_trained(target):
    """At every t, however little x_t says of x_0."""
    drawn = rows()
    parts = task({"diffusion": 1.0, "squared": 1.0}, target).losses(drawn, 0.0)
    alpha_bar = SCHEDULE.alpha_bar[drawn.t].float()
    share = (1 - alpha_bar) * (alpha_bar if target == "v" else 1)
    torch.testing.assert_close(parts["squared"], share * parts["diffusion"], rtol=1e-3, atol=1e-6)


def test_where_all_is_noise_no_part_counts():
    of = Diffusion(Scaled(), GaussianDiffusion(zero_terminal_snr(SCHEDULE), "v"), parts={"squared": 1.0, "ssim": 1.0})
    assert [part[-1].item() for part in of.losses(rows(), 0.0).values()] == [0, 0]


@pytest.mark.parametrize("name", DISTANCES)
def test_the_network_learns_from_each_part_alone(name):
    of = task({"diffusion": 0.0, name: 3.0})
    parts = of.losses(rows(), 0.0)
    assert parts.keys() == {name}
    of.total(parts).mean().backward()
    assert of.model.a.grad.isfinite() and of.model.a.grad.abs() > 0 and of.model.b.grad.abs() > 0


@pytest.mark.parametrize("loss", ["simple", "min_snr", "vlb"])
@pytest.mark.parametrize("parts", [None, {"diffusion": 1}, {"diffusion": 1.0, "ssim": 0.0}, {"diffusion": 3.0}])
def test_the_loss_of_the_diffusion_alone_is_what_it_was(loss, parts):
    of, drawn = task(parts, loss=loss, clip_x_0=False), rows()
    losses, own = of.losses(drawn, 0.0), of.diffusion.loss(of.model, drawn.x_0, t=drawn.t, eps=drawn.eps)
    assert losses.keys() == {"loss"} and torch.equal(losses["loss"], own)
    assert torch.equal(of.total(losses), own * (parts or {}).get("diffusion", 1))
    x_t = q_sample(SCHEDULE, drawn.x_0, drawn.t, drawn.eps)
    if loss == "simple":
        assert torch.equal(own, L_simple(of.model(x_t, drawn.t), drawn.eps))
    both, pred = of.diffusion.loss_and_prediction(of.model, drawn.x_0, t=drawn.t, eps=drawn.eps)
    assert torch.equal(both, own) and torch.equal(pred.x_0, of.diffusion.predictor(of.model)(x_t, drawn.t).x_0)


def test_a_learned_variance_has_its_own_part_and_needs_it():
    diffusion = GaussianDiffusion(SCHEDULE, variance="learned", loss="hybrid")
    parts = Diffusion(Scaled(2), diffusion, parts={"diffusion": 1.0, "ssim": 1.0}).losses(rows(), 0.0)
    assert all(part.shape == (6,) and part.isfinite().all() for part in parts.values())
    network = UNet(8, 1, 2, channels=4, channel_mults=(1,), blocks=1, attention_resolutions=(), groups=2)
    with pytest.raises(ValueError, match=r"variance = 'learned' is trained by parts\.diffusion alone"):
        Diffusion(network, diffusion, parts={"squared": 1.0}).check(Digits())


def test_times_are_drawn_by_the_sum_of_all_parts():
    of = Diffusion(
        Scaled(), GaussianDiffusion(SCHEDULE), time_sampling="loss_aware", parts={"diffusion": 1, "huber": 4}
    )
    parts = of.losses(drawn := rows(), 0.0)
    of.after_step(drawn, parts)
    kept = of.times.state_dict()["losses"].sum(1)[drawn.t]
    torch.testing.assert_close(kept.float(), (parts["diffusion"] + 4 * parts["huber"]).detach())


def test_memory_is_counted_without_numbers():
    network = UNet(8, 1, channels=4, channel_mults=(1,), blocks=1, attention_resolutions=(), groups=2)
    of = Diffusion(network, GaussianDiffusion(SCHEDULE), parts=dict.fromkeys(PARTS, 1.0)).to(torch.device("meta"))
    assert trial_loss(of, Digits(), 3, torch.device("meta")).shape == ()


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (
            {"nope": 1},
            "'nope' is no part of the loss of a diffusion.*allowed: diffusion, squared, absolute, huber, ssim",
        ),
        ({"bernoulli": 1.0}, "'bernoulli' is no part.*without logits or a scale; allowed: diffusion"),
        ({"gaussian": 0.0}, "'gaussian' is no part"),
        ({"ssim": -1.0}, r"parts\.ssim = -1\.0 must be >= 0 and finite"),
        ({"ssim": float("inf")}, "must be >= 0 and finite"),
        ({"squared": True}, "must be >= 0 and finite"),
        ({"diffusion": 0.0, "ssim": 0.0}, "all are 0.*set one of diffusion"),
        ({}, "all are 0"),
    ],
)
def test_parts_that_mean_nothing_are_refused(parts, words):
    with pytest.raises(ValueError, match=words):
        task(parts)


def test_points_have_no_structure():
    with pytest.raises(
        ValueError, match=r"parts\.ssim needs pictures, and moons holds none; allowed for it: diffusion"
    ):
        Diffusion(MLP(), GaussianDiffusion(SCHEDULE), parts={"diffusion": 1.0, "ssim": 1.0}).check(Moons(count=20))
    Diffusion(MLP(), GaussianDiffusion(SCHEDULE), parts={"diffusion": 1.0, "huber": 1.0}).check(Moons(count=20))


# ------------------------------------------------------------------------------------------------------- as a command


def test_a_run_logs_each_part_and_their_sum(call, tmp_path, without_pictures):  # noqa: F811
    result = call(cli.train, *TINY, "trainer.steps=2", f"runs={tmp_path}", "task.parts.ssim=0.1")
    assert result.code == 0, result
    lines = read_metrics(run_of(tmp_path))
    assert {line["split"] for line in lines} == {"train", "held_out"}
    for line in lines:
        assert line["loss"] == pytest.approx(line["loss_diffusion"] + 0.1 * line["loss_ssim"], rel=1e-5)
        assert 0 < line["loss_ssim"] < 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["task.parts.nope=1"], "task.parts has: absolute, diffusion, huber, squared, ssim"),
        (["+task.parts.focal=1"], "allowed: diffusion, squared, absolute, huber, ssim"),
        (["task.parts.diffusion=0"], "all are 0"),
        (["task.parts.ssim=lots"], "parts = "),
        (["task.parts=3"], "parts = 3 must be a mapping of names to numbers"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_begun(words, told, call, tmp_path: Path):  # noqa: F811
    assert_refused(call(cli.train, *TINY, f"runs={tmp_path / 'runs'}", *words), told)
    assert not (tmp_path / "runs").exists()
