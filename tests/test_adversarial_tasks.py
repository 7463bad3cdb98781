"""Tasks with a discriminator: what each phase trains, by hand, and a game on points whose end is known."""

import copy
from functools import partial

import pytest
import torch
from test_codec import images
from test_tasks import trainer
from torch import Tensor, nn

from ddpm.data import Points
from ddpm.latent.adversarial import adaptive_weight, hinge, hinge_generator, non_saturating, r1
from ddpm.latent.perceptual import Perceptual
from ddpm.randomness import Keyed
from ddpm.training.cost import gflop_of_loss
from ddpm.training.step import Training
from ddpm.training.task import checksum, trial_loss
from ddpm.training.tasks.adversarial import VQGAN, AutoencoderKL
from ddpm.training.tasks.gan import GAN
from models.autoencoder_kl import AutoencoderKL as Network
from models.classifier import Classifier
from models.discriminator import PatchDiscriminator
from models.gan import Discriminator, Generator
from models.vqvae import VQVAE

CPU = torch.device("cpu")
PARTS = {"squared": 1.0, "kl": 0.1, "adversarial": 0.3}


def autoencoder(**options: object) -> AutoencoderKL:
    torch.manual_seed(0)
    network = Network(8, 1, latent_channels=2, channels=8, channel_mults=(1, 2), blocks=1, groups=4)
    critic = PatchDiscriminator(1, channels=4, layers=1, groups=None, image_size=8)
    return AutoencoderKL(network, critic, **({"parts": PARTS, "start": 0.0} | options))


def drawn_for(task: AutoencoderKL | GAN, n: int = 6) -> object:
    data = images(size=8)
    return task.draw(data.batch(data.train[:n]), Keyed(0, 1), 0.5)


def test_the_adversarial_part_moves_the_last_layer_as_the_others_do():
    task = autoencoder()
    drawn = drawn_for(task)
    losses = task.losses(drawn, 0.0)
    output = task.output(drawn)
    judged = hinge_generator(task.discriminator(output))
    of_data = (output - drawn.x).square().flatten(1).sum(1)
    weight = adaptive_weight(of_data, judged, task.model.decoder.conv_out.weight)
    torch.testing.assert_close(losses["adversarial"], weight * judged)
    torch.testing.assert_close(task.total(losses), of_data + 0.1 * losses["kl"] + 0.3 * weight * judged)
    plain = autoencoder(adaptive=False).losses(drawn, 0.0)
    torch.testing.assert_close(plain["adversarial"], judged)
    with torch.no_grad():
        assert set(task.held_out(drawn)) == {"squared", "kl"}


def test_the_discriminator_learns_from_data_and_reconstructions_and_from_its_start_on():
    task = autoencoder(r1=2.0, start=0.5)
    drawn = drawn_for(task)
    assert task.discriminator_losses(drawn, 0.4)["discriminator"].tolist() == [0.0] * 6
    assert "adversarial" not in task.losses(drawn, 0.4)
    losses = task.discriminator_losses(drawn, 0.5)
    real = drawn.x.clone().requires_grad_()
    of_real, of_made = task.discriminator(real), task.discriminator(task.output(drawn).detach())
    torch.testing.assert_close(losses["discriminator"], hinge(of_real, of_made))
    torch.testing.assert_close(losses["r1"], r1(of_real, real))
    torch.testing.assert_close(task.total(losses), losses["discriminator"] + 2 * losses["r1"])
    task.total(losses).mean().backward()
    assert all(p.grad is None for p in task.model.parameters())
    assert all(p.grad is not None for p in task.discriminator.parameters())


def test_each_phase_steps_its_own_network_and_only_the_autoencoder_is_averaged():
    data, task = images(size=8), autoencoder()
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=1e-3)  # noqa: E731
    before = copy.deepcopy(task.modules)
    training = Training(
        trainer(batch_size=6, ema_decay=0.9, clip=None, precision="fp32"), task, data, sgd, seed=0, device=CPU
    )
    taken = training.step(1)
    assert {"squared", "kl", "adversarial", "discriminator"} <= taken.parts.keys()
    for name, module in task.modules.items():
        changed = [not torch.equal(a, b) for a, b in zip(before[name].parameters(), module.parameters(), strict=True)]
        assert any(changed), name
    assert not task.averages("discriminator") and task.averages("model")
    assert training.phases[0].names[0].startswith("model.") and training.phases[1].names[0].startswith("discriminator.")


@pytest.mark.parametrize("r1", [0.0, 1.0])
def test_operations_and_memory_of_both_phases_can_be_counted(r1):
    data = images(size=8)
    with torch.device("meta"):
        tasks = [gan(r1=r1), autoencoder(r1=r1, adaptive=False), autoencoder(r1=r1, start=0.9)]
    for task in tasks:
        counts = [
            gflop_of_loss(partial(trial_loss, task, data, device=torch.device("meta"), phase=phase)) for phase in (0, 1)
        ]
        assert min(counts) > 0
    with_penalty, without = (
        gflop_of_loss(partial(trial_loss, gan(r1=r), data, device=CPU, phase=0)) for r in (1.0, 0.0)
    )
    assert with_penalty > without


def test_without_its_weight_there_is_no_discriminator():
    task = autoencoder(parts={"squared": 1.0, "kl": 0.1, "adversarial": 0.0})
    assert list(task.modules) == ["model"] and len(task.phases) == 1
    assert set(task.losses(drawn_for(task), 1.0)) == {"squared", "kl"}


def test_codes_have_one_too():
    torch.manual_seed(0)
    network = VQVAE(8, 1, codes=6, code_channels=3, channels=4, blocks=1, factor=2)
    critic = PatchDiscriminator(1, channels=4, layers=1, groups=None, image_size=8)
    task = VQGAN(network, critic, {"squared": 1.0, "commitment": 0.25, "adversarial": 0.5}, start=0.0)
    losses = task.losses(drawn_for(task), 0.0)
    assert {"squared", "commitment", "adversarial", "perplexity"} == losses.keys()
    (gradient,) = torch.autograd.grad(0.5 * losses["adversarial"].mean(), network.last_layer, retain_graph=True)
    (of_data,) = torch.autograd.grad(losses["squared"].mean() + 0.25 * losses["commitment"].mean(), network.last_layer)
    assert gradient.norm().item() == pytest.approx(0.5 * of_data.norm().item(), rel=1e-3)


@pytest.mark.parametrize("adversarial", [0.0, 0.3])
def test_a_perceptual_part_trains_the_autoencoder_and_counts_where_the_discriminator_is_balanced(adversarial):
    task = autoencoder(parts=PARTS | {"adversarial": adversarial, "perceptual": 0.5})
    drawn = drawn_for(task)
    assert task.perceives and not autoencoder().perceives
    task.check(images(size=8))
    with pytest.raises(ValueError, match="none was given"):  # what opens a trained one asks for none
        task.losses(drawn, 1.0)
    task.frozen["perceptual"] = distance = Perceptual(Classifier(8, channels=4))
    losses, output = task.losses(drawn, 1.0), task.output(drawn)
    torch.testing.assert_close(losses["perceptual"], 64 * distance(output, drawn.x))
    of_data = losses["squared"] + 0.5 * losses["perceptual"]
    whole = of_data + 0.1 * losses["kl"]
    if adversarial:
        judged = hinge_generator(task.discriminator(output))
        again = (output - drawn.x).square().flatten(1).sum(1) + 32 * distance(output, drawn.x)
        weight = adaptive_weight(again, judged, task.model.decoder.conv_out.weight)
        whole = whole + 0.3 * weight * judged
    torch.testing.assert_close(task.total(losses), whole)
    before = checksum(distance)
    losses["perceptual"].mean().backward()
    assert all(p.grad is not None for p in task.model.decoder.parameters())
    assert all(p.grad is None for p in distance.parameters())
    with torch.no_grad():
        torch.testing.assert_close(task.held_out(drawn)["perceptual"], losses["perceptual"].detach())
    training = Training(
        trainer(batch_size=6, precision="fp32"), task, images(size=8), torch.optim.AdamW, seed=0, device=CPU
    )
    assert training.step(1).parts["perceptual"] > 0 and checksum(distance) == before and not distance.training


def gan(**options: object) -> GAN:
    torch.manual_seed(0)
    return GAN(
        Generator(8, 1, codings=4, channels=8, num_classes=3),
        Discriminator(8, 1, channels=8, num_classes=3),
        **options,
    )


def test_both_losses_of_a_gan_by_hand():
    task = gan(r1=4.0)
    drawn = drawn_for(task)
    losses, of_generator = task.losses(drawn, 0.0), task.generator_losses(drawn, 0.0)
    y, real = drawn.condition.classes, drawn.x.clone().requires_grad_()
    made = task.model.decode(drawn.z, y).detach()
    of_real = task.discriminator(real, y)
    torch.testing.assert_close(losses["discriminator"], non_saturating(of_real, task.discriminator(made, y)))
    torch.testing.assert_close(losses["r1"], r1(of_real, real))
    torch.testing.assert_close(task.total(losses), losses["discriminator"] + 4 * losses["r1"])
    judged = task.discriminator(task.model.decode(drawn.z_generator, y), y)
    torch.testing.assert_close(of_generator["generator"], nn.functional.softplus(-judged))
    assert not torch.equal(drawn.z, drawn.z_generator)
    with torch.no_grad():
        assert set(task.held_out(drawn)) == {"discriminator"}
    task.total(losses).mean().backward()
    assert all(p.grad is None for p in task.model.parameters())


class Shift(nn.Module):
    """A generator of points: normal ones, scaled and moved."""

    codings, shape, num_classes, takes = 1, (1,), None, ()

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.mean = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(0.0))

    def decode(self, z: Tensor, y: None = None) -> Tensor:
        return self.mean + self.scale * z


class Quadratic(nn.Module):
    """A discriminator of points, whose logit is that of two normal distributions."""

    shape, num_classes, takes = (1,), None, ()

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor, y: None = None) -> Tensor:
        return (self.w * torch.cat([torch.ones_like(x), x, x.square()], dim=1)).sum(1)


@pytest.mark.slow
def test_a_game_on_points_ends_where_the_generator_has_the_mean_and_the_spread_of_data():
    x = 2 + 0.5 * torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
    data = Points("normal", x, standardise=False, validation=0.0)
    task = GAN(Shift(), Quadratic(), r1=0.1)
    adam = lambda parameters: torch.optim.Adam(parameters, lr=0.02, betas=(0.0, 0.9))  # noqa: E731
    settings = trainer(batch_size=256, ema_decay=0.99, clip=None, precision="fp32")
    training = Training(settings, task, data, adam, seed=0, device=CPU)
    for step in range(1, 601):
        training.step(step)
    model = training.averaged.model
    assert model.mean.item() == pytest.approx(2, abs=0.05) and abs(model.scale.item()) == pytest.approx(0.5, abs=0.05)


def test_samples_are_a_function_of_seed_number_and_class_and_what_cannot_be_is_refused():
    source = gan().source(None, 0, CPU)
    together = source.draw(range(6))
    assert torch.equal(together[4:], source.draw([4, 5])) or torch.allclose(
        together[4:], source.draw([4, 5]), atol=1e-6
    )
    assert source.classes([4]).tolist() == [1] and together.abs().max() <= 1 and not hasattr(source, "between")
    assert not torch.allclose(together, source.with_seed(1).draw(range(6)))
    data = images(size=8)
    gan().check(data)
    with pytest.raises(ValueError, match=r"discriminator\.num_classes = None, but model\.num_classes = 3"):
        GAN(gan().model, Discriminator(8, 1, channels=8)).check(data)
    for options, told in [({"game": "chess"}, "choose one of hinge, non_saturating"), ({"r1": -1}, "r1 = -1")]:
        with pytest.raises(ValueError, match=told):
            gan(**options)
    for options, told in [
        ({"start": 1.0}, r"start = 1.0 must lie in \[0, 1\)"),
        ({"parts": PARTS | {"adversarial": -1}}, r"parts\.adversarial = -1"),
        ({"r1": float("nan")}, "r1 = nan"),
        ({"game": "chess"}, "choose one of"),
    ]:
        with pytest.raises(ValueError, match=told):
            autoencoder(**options)
