"""Codecs, data as they encode them, what draws through them, and the tasks that train them and on them."""

import copy
import math
from itertools import product

import pytest
import torch
from test_tasks import sgd, trainer
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm.data import Digits, ImageData
from ddpm.data.batch import Batch
from ddpm.data.encoded import Encoded, encoded, must_suit
from ddpm.latent.codec import Continuous, Discrete
from ddpm.metrics.codings import measure_codes, measure_reconstruction
from ddpm.randomness import Keyed
from ddpm.sources.autoregressive import Autoregressive as Drawing
from ddpm.sources.reconstructed import Reconstructed
from ddpm.training.step import Training
from ddpm.training.tasks.autoregressive import Autoregressive
from ddpm.training.tasks.vae import VAE
from ddpm.training.tasks.vqvae import VQVAE
from models.pixelcnn import PixelCNN
from models.vqvae import VQVAE as Network

CPU = torch.device("cpu")


class Halves(nn.Module):
    """An autoencoder of 4x4 images whose latents are the means of squares of 2x2, and their spread."""

    shape, latent_shape, factor = (1, 4, 4), (1, 2, 2), 2

    def encode(self, x: Tensor, y: None = None) -> tuple[Tensor, Tensor]:
        return 3 + 5 * F.avg_pool2d(x, 2), F.avg_pool2d(x.square(), 2) - 1

    def decode(self, z: Tensor, y: None = None) -> Tensor:
        return F.interpolate((z - 3) / 5, scale_factor=2)


def images(n: int = 40, size: int = 4, **options: object) -> ImageData:
    pixels = torch.randint(0, 256, (n, 1, size, size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return ImageData("squares", "all", pixels, torch.arange(n) % 3, validation=0.25, **options)


def network(**options: object) -> Network:
    torch.manual_seed(0)
    return Network(4, 1, **({"codes": 5, "code_channels": 3, "channels": 4, "blocks": 1, "factor": 2} | options))


@pytest.mark.equation("LDM (scaled latents)")
def test_latents_that_are_trained_on_have_mean_0_and_variance_1_and_decode_to_what_their_means_do():
    data = images(400)
    of = encoded(data, Continuous(Halves()), CPU)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([of.batch(of.train, generator=generator).x for _ in range(300)]).double()
    assert drawn.mean().item() == pytest.approx(0, abs=5e-3) and drawn.var().item() == pytest.approx(1, abs=5e-3)
    x = data.batch(torch.arange(9)).x
    means = of.batch(torch.arange(9)).x
    mu, log_variance = Halves().encode(x)
    torch.testing.assert_close(means, of.codec.scale * (mu - of.codec.shift))
    torch.testing.assert_close(of.codec.decode(means), Halves().decode(mu), rtol=0, atol=1e-5)
    spread = torch.stack([of.batch(torch.arange(9), generator=torch.Generator().manual_seed(k)).x for k in range(4000)])
    torch.testing.assert_close(spread.std(0) / of.codec.scale, (log_variance / 2).exp(), rtol=0.06, atol=0)
    again = Continuous(Halves()).with_state(of.codec.state())
    assert torch.equal(again.sample(of.codec.posterior(x)), of.codec.sample(of.codec.posterior(x)))


def test_latents_that_are_all_the_same_have_no_scale():
    class Constant(Halves):
        def encode(self, x: Tensor, y: None = None) -> tuple[Tensor, Tensor]:
            return torch.ones(len(x), 1, 2, 2), torch.full((len(x), 1, 2, 2), -torch.inf)

    with pytest.raises(ValueError, match="variance 0"):
        Continuous(Constant()).fit(torch.cat(Constant().encode(torch.zeros(3, 1, 4, 4)), dim=1))


def test_encoded_data_keep_what_belongs_to_a_sample_and_are_made_once(tmp_path):
    data, codec, said = images(), Discrete(network()), []
    of = encoded(data, codec, CPU, tmp_path / "latents" / "a.safetensors", said.append)
    assert said == ["40 images are encoded"] and of.shape == (2, 2) and of.holds == {"codes", "classes"}
    assert torch.equal(of.train, data.train) and torch.equal(of.held_out, data.held_out) and of.original is data
    batch = of.batch(torch.tensor([7, 3]))
    assert torch.equal(batch.x, network().encode(data.batch(torch.tensor([7, 3])).x)) and batch.y.tolist() == [1, 0]
    assert of.identity() == data.identity() and of.codec.codes == 5 and data.codec is None and data.original is data
    assert set(of.of_classes([2]).held_out.tolist()) == set(data.of_classes([2]).held_out.tolist())

    class Never(Network):
        def encode(self, x: Tensor) -> Tensor:
            assert len(x) == 1, "one sample tells the shape, no more"
            return super().encode(x)

    other = Never(4, 1, codes=5, code_channels=3, channels=4, blocks=1, factor=2)
    again = encoded(data, Discrete(other), CPU, tmp_path / "latents" / "a.safetensors", said.append)
    assert len(said) == 1 and torch.equal(again.samples, of.samples)
    (tmp_path / "latents" / "a.safetensors").write_bytes(b"damaged")
    assert torch.equal(encoded(data, codec, CPU, tmp_path / "latents" / "a.safetensors").samples, of.samples)


def test_a_codec_of_convolutions_takes_images_of_other_sizes():
    codec = Continuous(Halves(), scale=2.0, shift=3.0).of_size(6, 8)
    x = torch.linspace(-1, 1, 48).reshape(1, 1, 6, 8)
    z = codec.sample(codec.posterior(x))
    assert codec.of == (1, 6, 8) and codec.shape == tuple(z.shape[1:]) == (1, 3, 4)
    torch.testing.assert_close(F.avg_pool2d(codec.decode(z), 2), F.avg_pool2d(x, 2))
    with pytest.raises(ValueError, match=r"squares of 2x2 pixels, and 7 of 7x8 is not divisible by 2; nearest.*6, 8"):
        codec.of_size(8, 7)


def test_data_that_a_codec_does_not_take_are_refused():
    codec = Discrete(network())
    for data, told in [
        (images(size=8), r"trained on images \(C, H, W\) = \(1, 4, 4\), but squares has samples of shape \(1, 8, 8\)"),
        (images(flip=True), "data.flip=true: latents are encoded once, from unchanged images.*set data.flip=false"),
        (images(condition="mask"), "set data.condition=null"),
    ]:
        with pytest.raises(ValueError, match=told):
            must_suit(data, codec)

    class Broken(Halves):
        def encode(self, x: Tensor, y: None = None) -> tuple[Tensor, Tensor]:
            mu, log_variance = super().encode(x)
            return mu * torch.inf, log_variance

    with pytest.raises(ValueError, match="not finite"):
        encoded(images(), Continuous(Broken()), CPU)


# ------------------------------------------------------------------------------------------------------- what draws


def test_reconstructions_are_those_of_held_out_samples_in_their_order():
    data, codec = images(), Discrete(network())
    source = Reconstructed(codec, data, 0, CPU)
    x = data.batch(data.held_out[[0, 9, 0]]).x
    assert torch.equal(source.condition_images([0, 9, 10]), x)
    assert torch.equal(source.draw([0, 9, 10]), codec.model(x).x.clamp(-1, 1).detach())
    assert torch.equal(source.classes([0, 9]), data.labels[data.held_out[[0, 9]]])
    with pytest.raises(ValueError, match="trained without classes"):
        Reconstructed(codec, data, 0, CPU, requested=[1])


def prior(num_classes: int | None = 3) -> PixelCNN:
    torch.manual_seed(3)
    model = PixelCNN(5, 2, channels=8, layers=2, num_classes=num_classes)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # far from uniform
    return model.eval()


def test_codes_are_a_function_of_seed_number_and_class_alone():
    source = Drawing(prior(), 0, CPU)
    together, alone = source.codes(range(7)), torch.cat([source.codes([i]) for i in range(7)])
    assert torch.equal(together, alone)
    assert not torch.equal(together, source.with_seed(1).codes(range(7)))
    ones = Drawing(prior(), 0, CPU, requested=[1])
    assert torch.equal(ones.codes([1, 4]), together[[1, 4]]) and not torch.equal(ones.codes(range(7)), together)
    likeliest = source.at(0)
    assert torch.equal(likeliest.codes(range(3)), likeliest.with_seed(5).codes(range(3)))
    for temperature in (-1, math.inf, "warm", True):
        with pytest.raises(ValueError, match="temperature"):
            source.at(temperature)
    with pytest.raises(ValueError, match="never trained without its classes"):
        Drawing(prior(), 0, CPU, requested=[])


def test_codes_come_as_often_as_the_network_says():
    model = prior(None)
    grids = torch.tensor(list(product(range(5), repeat=4))).view(-1, 2, 2)
    p = model.log_prob(grids).exp()
    n = 20000
    drawn = Drawing(model, 0, CPU).codes(range(n)).flatten(1) @ torch.tensor([125, 25, 5, 1])
    counts = drawn.bincount(minlength=625).double()
    likely = p > 2e-3
    assert likely.sum() > 20
    z = (counts[likely] - n * p[likely]) / (n * p[likely] * (1 - p[likely])).sqrt()
    assert z.abs().max() < 4.5 and z.square().mean() < 1.6


def test_a_source_shows_what_the_codec_makes_of_codes():
    codec = Discrete(network())
    source = Drawing(prior(), 0, CPU).decoded_by(codec)
    assert torch.equal(source.draw(range(4)), codec.decode(source.codes(range(4))))
    assert source.draw(range(4)).shape == (4, 1, 4, 4) and source.decoded_by(None).draw(range(4)).shape == (4, 2, 2)


# ------------------------------------------------------------------------------------------------- what is measured


def test_bits_of_codes_and_those_of_their_frequencies_by_hand():
    data = images()
    of = encoded(data, Discrete(network()), CPU)
    model = prior()
    _, words, values = measure_codes(Drawing(model, 0, CPU), of, len(of.held_out), 4)
    real = of.batch(of.held_out)
    expected = -model.log_prob(real.x, real.y).sum() / (4 * len(of.held_out) * math.log(2))
    assert values["value"] == pytest.approx(expected.item(), rel=1e-5)
    right = (model(real.x, real.y).argmax(1) == real.x).double().mean().item()
    assert values["accuracy"] == pytest.approx(right)
    p = of.batch(of.train).x.flatten().bincount(minlength=5).double()
    smooth = (p + 1) / (p + 1).sum()
    assert values["independent"] == pytest.approx(-smooth.log2()[real.x.flatten()].mean().item())
    p = p / p.sum()
    assert values["perplexity"] == pytest.approx(torch.special.entr(p).sum().exp().item())
    assert (
        values["share"] == pytest.approx(values["value"] / values["independent"]) and "predicted, perplexity" in words
    )


def test_what_is_left_of_images_by_hand():
    data, codec = images(), Discrete(network())
    source = Reconstructed(codec, data, 0, CPU)
    protocol, words, values = measure_reconstruction(source, data, len(data.held_out), 3)
    x = data.batch(data.held_out).x
    error = (codec.model(x).x.clamp(-1, 1) - x).square().flatten(1).mean(1)
    assert protocol == "psnr_10_held_out" and values["mse"] == pytest.approx(error.mean().item(), rel=1e-5)
    assert values["value"] == pytest.approx((10 * (4 / error).log10()).mean().item(), rel=1e-5)
    codes = codec.model.encode(x).unique()
    assert values["used"] == len(codes) and f"{len(codes)} of 5 codes in use" in words
    assert "used" not in measure_reconstruction(Reconstructed(Continuous(Halves()), data, 0, CPU), data, 4, 4)[2]


# ------------------------------------------------------------------------------------------------------------ tasks


PARTS = {"squared": 1.0, "commitment": 0.25}


def test_the_parts_of_a_vqvae_are_sums_over_what_they_are_of():
    task, data = VQVAE(network(update="gradient"), PARTS | {"codebook": 2.0}), images()
    drawn = task.draw(data.batch(data.train[:6]), Keyed(0, 1), 0.0)
    losses = task.losses(drawn, 0.0)
    coded = task.model(drawn.x)
    distance = (coded.z_e - coded.z_q).square().flatten(1).sum(1)
    torch.testing.assert_close(losses["commitment"], distance)
    torch.testing.assert_close(losses["codebook"], distance)
    torch.testing.assert_close(losses["squared"], (coded.x - drawn.x).square().flatten(1).sum(1))
    expected = losses["squared"] + 0.25 * distance + 2 * distance
    torch.testing.assert_close(task.total(losses), expected)
    assert losses["perplexity"].tolist() == pytest.approx([5.0] * 6)  # where all codes have stood for as much
    assert "codebook" not in VQVAE(network(), PARTS | {"codebook": 1.0}).losses(drawn, 0.0)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_codes_move_to_the_mean_of_the_whole_batch_whatever_the_micro_batches(accumulate):
    data, task = images(), VQVAE(network(decay=0.0, eps=0.0), PARTS, revive=0)
    settings = trainer(batch_size=8, accumulate=accumulate, ema_decay=0.0, clip=None, precision="fp32")
    training = Training(settings, task, data, sgd, seed=0, device=CPU)
    before = copy.deepcopy(task.model)
    training.step(1)
    x = data.batch(data.order(0, 1, 8)).x
    z = task.model.encoder(x)
    codes = before.codebook.nearest(z).flatten()  # by the codebook as it was, and the encoder as it is
    rows = z.permute(0, 2, 3, 1).reshape(-1, 3)
    for k in range(5):
        expected = rows[codes == k].mean(0) if (codes == k).any() else before.codebook.e[k]
        torch.testing.assert_close(task.model.codebook.e[k], expected)


def test_dead_codes_are_revived_when_it_is_time_and_a_resumed_run_knows_when():
    data = images()

    def after(steps: int, first: int = 0) -> VQVAE:
        task = VQVAE(network(), PARTS, revive=3)
        task.model.codebook.e[1:] = 1e6  # which stand for nothing
        task.model.codebook.N[1:] = 0
        task.load_state_dict({"steps": first})
        for step in range(1, steps + 1):
            drawn = task.draw(data.batch(data.train[:8]), Keyed(0, step), 0.0)
            task.after_step(drawn, {"squared": torch.zeros(8)})
        return task

    assert (after(2).model.codebook.e[1:] > 1e5).all() and after(2).state_dict() == {"steps": 2}
    assert (after(3).model.codebook.e.abs() < 1e3).all()
    assert (after(1, first=2).model.codebook.e.abs() < 1e3).all()


def test_a_step_whose_numbers_are_broken_changes_no_code():
    data, task = images(), VQVAE(network(), PARTS, revive=1)
    drawn, before = task.draw(data.batch(data.train[:8]), Keyed(0, 1), 0.0), copy.deepcopy(task.model.codebook)
    task.after_step(drawn, {"squared": torch.full((8,), math.nan)})
    assert all(torch.equal(a, b) for a, b in zip(before.buffers(), task.model.codebook.buffers(), strict=True))
    task.after_step(drawn, {"squared": torch.zeros(8)})
    assert not torch.equal(before.N, task.model.codebook.N)


def test_what_a_vqvae_cannot_be_trained_with_is_refused():
    for options, told in [
        ({"parts": PARTS | {"nope": 1}}, "'nope' is not known; allowed: .*codebook, commitment"),
        ({"parts": {"commitment": 1.0}}, "none compares with data"),
        ({"parts": PARTS | {"commitment": -1}}, "parts.commitment = -1"),
        ({"revive": -1}, "revive = -1 must be an integer >= 0"),
        ({"revive": True}, "revive = True"),
        ({"parts": PARTS, "model": network(update="gradient")}, "trains no codebook; set parts.codebook=1"),
        ({"parts": PARTS | {"gaussian": 1.0, "squared": 0}}, "has a scale"),
    ]:
        with pytest.raises(ValueError, match=told):
            VQVAE(**({"model": network(), "parts": PARTS} | options))


def test_the_loss_of_codes_is_their_likelihood_for_each():
    of = encoded(images(), Discrete(network()), CPU)
    task = Autoregressive(prior())
    task.check(of)
    batch = of.batch(of.train[:5])
    losses = task.losses(task.draw(batch, Keyed(0, 1), 0.0), 0.0)["codes"]
    torch.testing.assert_close(losses, -task.model.log_prob(batch.x, batch.y) / 4)
    assert batch.x.dtype == torch.int64 and isinstance(of, Encoded) and isinstance(batch, Batch)


def test_codes_of_another_number_and_data_that_are_none_are_refused():
    of = encoded(images(), Discrete(network()), CPU)
    with pytest.raises(ValueError, match="holds no codes; set init_codec="):
        Autoregressive(prior()).check(Digits(validation=0.1))
    with pytest.raises(ValueError, match=r"model\.codes = 7, but the codec has 5"):
        Autoregressive(PixelCNN(7, 2, channels=4, layers=1)).check(of)
    with pytest.raises(ValueError, match="but the data have 3 classes"):
        Autoregressive(PixelCNN(5, 2, channels=4, layers=1, num_classes=2)).check(of)


def test_an_autoencoder_of_maps_shows_reconstructions_and_is_a_codec_and_one_of_codings_is_none():
    class Maps(Halves):
        log_scale, num_classes, takes = None, None, ()

        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))

        def encode(self, x: Tensor, y: None = None) -> tuple[Tensor, Tensor]:
            mu, log_variance = super().encode(x)
            return self.gain * mu, log_variance

    data, task = images(), VAE(Maps(), {"squared": 1.0, "kl": 0.5}, binarise=False)
    drawn = task.draw(data.batch(data.train[:4]), Keyed(0, 1), 0.0)
    losses = task.losses(drawn, 0.0)
    mu, log_variance = task.model.encode(drawn.x)
    of_all = torch.distributions.kl_divergence(
        torch.distributions.Normal(mu, (log_variance / 2).exp()), torch.distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(losses["kl"], of_all.flatten(1).sum(1))
    source = task.source(data, 0, CPU)
    assert isinstance(source, Reconstructed) and isinstance(task.codec(), Continuous) and task.draws_of_data
    assert torch.allclose(source.draw([0]), task.model.decode(task.model.encode(data.batch(data.held_out[:1]).x)[0]))
