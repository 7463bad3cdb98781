"""Variational autoencoders: bounds against closed forms, the linear one against probabilistic PCA."""

import functools
import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal, kl_divergence

from ddpm.data import Digits
from ddpm.data.batch import Condition
from ddpm.data.points import Points
from ddpm.latent.elbo import (
    active_units,
    importance_weighted,
    iwae,
    kl,
    log_weight,
    reparametrised,
    with_free_bits,
)
from ddpm.latent.reconstruction import (
    PARTS,
    Reconstruction,
    absolute,
    bernoulli,
    focal,
    gaussian,
    huber,
    logistic,
    squared,
    ssim,
)
from ddpm.metrics import codings
from ddpm.randomness import Keyed
from ddpm.runs.directory import Run
from ddpm.sources.decoded import Decoded
from ddpm.training.tasks.vae import VAE
from ddpm.training.trainer import Trainer
from models.vae import VAE as Network
from models.vae import LinearVAE

CPU = torch.device("cpu")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------ the bound


@pytest.mark.equation("VAE (KL)")
def test_the_kl_is_that_of_torch_for_each_coding():
    mean, log_variance = drawn(5, 3), drawn(5, 3, seed=1)
    q, p = Normal(mean, (log_variance / 2).exp()), Normal(torch.zeros(()).double(), torch.ones(()).double())
    torch.testing.assert_close(kl(mean, log_variance), kl_divergence(q, p))


@pytest.mark.equation("VAE (reparametrisation)")
def test_reparametrised_gradients_are_those_of_the_closed_form():
    """d/dmu E[z^2] = 2 mu and d/dlog sigma^2 E[z^2] = sigma^2; eps of two points, -1 and 1, has N(0, 1)'s moments."""
    mean, log_variance = (drawn(4, seed=s).requires_grad_() for s in (2, 3))
    eps = torch.tensor([-1.0, 1.0], dtype=torch.float64)[:, None]
    reparametrised(mean, log_variance, eps).square().mean(0).sum().backward()
    torch.testing.assert_close(mean.grad, 2 * mean.detach())
    torch.testing.assert_close(log_variance.grad, log_variance.detach().exp())


@pytest.mark.equation("IAF (free bits)")
def test_free_bits_count_a_coding_by_its_mean_and_cheap_ones_have_no_gradient():
    of_codings = torch.tensor([[0.1, 2.0], [0.3, 4.0]], dtype=torch.float64, requires_grad=True)
    free = with_free_bits(of_codings, 0.5)
    torch.testing.assert_close(free.mean(), torch.tensor(0.5 + 3.0).double())
    free.mean().backward()
    assert of_codings.grad.tolist() == [[0, 0.5], [0, 0.5]]


class Exact(nn.Module):
    """x = a z + s noise with scalar z: posterior and density are known. `wider` spoils the posterior's variance."""

    a, s, codings = 1.5, 0.7, 1

    def __init__(self, wider: float = 1.0):
        super().__init__()
        self.variance = self.s**2 / (self.a**2 + self.s**2)
        self.wider, self.log_scale = wider, torch.tensor(math.log(self.s), dtype=torch.float64)

    def encode(self, x: Tensor, y: None = None) -> tuple[Tensor, Tensor]:
        mean = self.a * x / (self.a**2 + self.s**2)
        return mean, torch.full_like(mean, math.log(self.wider * self.variance))

    def decode(self, z: Tensor, y: None = None) -> Tensor:
        return self.a * z

    def log_p(self, x: Tensor) -> Tensor:
        return Normal(0, (self.a**2 + self.s**2) ** 0.5).log_prob(x)[:, 0]


NORMAL = Reconstruction({"gaussian": 1.0})


def noise(i: int) -> Tensor:
    return drawn(500, 6, 1, seed=100 + i)


@pytest.mark.equation("IWAE (weight)")
@pytest.mark.parametrize("k", [1, 3, 700])
def test_with_the_exact_posterior_the_bound_is_exact_with_any_number_of_draws(k):
    x, model = drawn(6, 1), Exact()
    bound, elbo = importance_weighted(model, NORMAL, x, None, k, noise)
    torch.testing.assert_close(bound, model.log_p(x))
    torch.testing.assert_close(elbo, model.log_p(x))


@pytest.mark.equation("IWAE (bound)")
def test_with_twice_the_variance_the_bound_rises_with_k_to_the_exact_value():
    x, model = drawn(6, 1), Exact(wider=2.0)
    exact = model.log_p(x).mean()
    log_w = []
    for i in range(40):
        eps = noise(i)
        mean, log_variance = model.encode(x)
        z = reparametrised(mean, log_variance, eps)
        log_p_x = -gaussian(model.decode(z.flatten(0, 1)), x.expand(500, 6, 1).flatten(0, 1), model.log_scale)
        log_w.append(log_weight(log_p_x.unflatten(0, (500, 6)), z, mean, log_variance, eps))
    log_w = torch.cat(log_w)  # (20000, 6)
    bounds = [torch.stack([iwae(part) for part in log_w.split(k)]).mean() for k in (1, 2, 5, 25, 20000)]
    assert all(a < b for a, b in itertools.pairwise(bounds)), bounds
    # the gap of the ELBO is KL(q || posterior) = (2 - 1 - log 2) / 2
    assert abs(exact - bounds[0] - (1 - math.log(2)) / 2) < 0.01 and abs(exact - bounds[-1]) < 2e-3


def test_the_likelihood_counts_draws_in_any_parts():
    x, model = drawn(6, 1), Exact(wider=2.0)
    whole = torch.cat([noise(0), noise(1)])
    told = []
    one = importance_weighted(model, NORMAL, x, None, 600, lambda i: whole, told.append)
    parts = importance_weighted(model, NORMAL, x, None, 600, lambda i: whole[200 * i : 200 * (i + 1)])
    torch.testing.assert_close(one, parts)
    assert sum(told) == 600 * 6


@pytest.mark.equation("IWAE (active units)")
def test_active_units_are_codings_whose_mean_varies():
    mean = torch.stack([torch.tensor([0.0, 1.0, 2.0]), torch.zeros(3), 0.1 * torch.tensor([0.0, 0.5, 1.0])], dim=1)
    assert active_units(mean).tolist() == [True, False, False]


# ----------------------------------------------------------------------------------------- what is compared with data


@pytest.mark.equation("VAE (Bernoulli)")
def test_bernoulli_is_that_of_torch_and_grey_is_its_expectation():
    logits, x = drawn(3, 1, 2, 2), drawn(3, 1, 2, 2, seed=1).sign()
    white = (x + 1) / 2
    torch.testing.assert_close(bernoulli(logits, x), -Bernoulli(logits=logits).log_prob(white).sum((1, 2, 3)))
    grey = torch.full_like(x, 0.5)  # white with probability 3/4
    both = [bernoulli(logits, torch.full_like(x, value)) for value in (-1.0, 1.0)]
    torch.testing.assert_close(bernoulli(logits, grey), 0.25 * both[0] + 0.75 * both[1])


@pytest.mark.equation("VAE (Gaussian)")
def test_gaussian_is_that_of_torch():
    mean, x, log_scale = drawn(3, 5), drawn(3, 5, seed=1), torch.tensor(0.3, dtype=torch.float64)
    torch.testing.assert_close(gaussian(mean, x, log_scale), -Normal(mean, log_scale.exp()).log_prob(x).sum(1))


@pytest.mark.equation("IAF (logistic)")
@pytest.mark.parametrize("log_scale", [-5.0, -2.0, 1.0])
def test_the_logistic_probabilities_of_all_bytes_sum_to_one_and_far_ones_are_finite(log_scale):
    x = torch.arange(256, dtype=torch.float64)[:, None] / 127.5 - 1
    for mean in (-0.9, 0.01, 3.0):
        nats = logistic(torch.full_like(x, mean), x, torch.tensor(log_scale).double())
        torch.testing.assert_close((-nats).exp().sum(), torch.ones(()).double())
        assert nats.isfinite().all()
    middle, s = x[100], math.exp(log_scale)
    cdf = [torch.sigmoid((middle + side / 255 - 0.01) / s) for side in (1, -1)]
    ours = logistic(torch.full_like(middle, 0.01)[None], middle[None], torch.tensor(log_scale).double())
    torch.testing.assert_close((-ours).exp(), cdf[0] - cdf[1])


@pytest.mark.equation("Huber (loss)")
def test_huber_is_squared_below_delta_and_absolute_above():
    x, picture = torch.zeros(2, 2).double(), torch.tensor([[0.05, 0.0], [0.3, 0.0]]).double()
    torch.testing.assert_close(huber(picture, x), torch.tensor([0.05**2 / 2, 0.1 * (0.3 - 0.05)]).double())


@pytest.mark.equation("Focal (loss)")
def test_focal_with_gamma_0_is_the_cross_entropy_and_weighs_by_what_is_wrong():
    logits, x = drawn(3, 4), drawn(3, 4, seed=1).sign()
    torch.testing.assert_close(focal(logits, x, gamma=0.0), bernoulli(logits, x))
    p = torch.sigmoid(logits * x)  # of what the pixel is
    torch.testing.assert_close(focal(logits, x), -((1 - p) ** 2 * p.log()).sum(1))


@pytest.mark.equation("SSIM (13)")
def test_ssim_by_loops_over_windows_and_of_small_images():
    x, y = (drawn(1, 1, 5, 6, seed=s).tanh() for s in (0, 1))
    at = torch.arange(5).double() - 2
    w = torch.exp(-(at[:, None] ** 2 + at**2) / 4.5)
    w = w / w.sum()
    values = []
    for left in range(2):
        a, b = (z[0, 0, :, left : left + 5] for z in (x, y))
        mu_a, mu_b = (w * a).sum(), (w * b).sum()
        v_a, v_b, c = ((w * p * q).sum() - m for p, q, m in ((a, a, mu_a**2), (b, b, mu_b**2), (a, b, mu_a * mu_b)))
        c_1, c_2 = 0.02**2, 0.06**2
        values.append((2 * mu_a * mu_b + c_1) * (2 * c + c_2) / ((mu_a**2 + mu_b**2 + c_1) * (v_a + v_b + c_2)))
    torch.testing.assert_close(ssim(y, x), (1 - torch.stack(values).mean())[None] * 30)
    torch.testing.assert_close(ssim(x, x), torch.zeros(1).double(), atol=1e-9, rtol=0)


def test_ssim_is_as_exact_where_networks_compute_in_half_precision():
    """Of even pictures the variances are small differences, of which rounded means leave nothing."""
    x = 0.9 + 1e-2 * drawn(2, 1, 8, 8).float()
    picture = x + 1e-2 * drawn(2, 1, 8, 8, seed=1).float()
    with torch.autocast("cpu", torch.bfloat16):
        half = ssim(picture, x)
    assert half.dtype == torch.float32 and torch.equal(half, ssim(picture, x))


def test_distances_are_sums():
    x, picture = torch.zeros(1, 2, 2).double(), torch.tensor([[[1.0, -2.0], [0.0, 0.5]]]).double()
    assert squared(picture, x).item() == 5.25 and absolute(picture, x).item() == 3.5


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"bernouli": 1}, "'bernouli' is not known; allowed: bernoulli, focal"),
        ({"bernoulli": -1}, "parts.bernoulli = -1 must be >= 0"),
        ({"bernoulli": 0}, "none compares with data"),
        ({"perceptual": 1}, "perceptual alone does not determine data; set one of bernoulli, .*, ssim to 1"),
        ({"squared": 1, "perceptual": -1}, "parts.perceptual = -1 must be >= 0"),
        ({"bernoulli": 1, "gaussian": 1}, "gaussian takes the decoder's output for a picture, bernoulli for logits"),
    ],
)
def test_parts_that_mean_nothing_are_refused(parts, words):
    with pytest.raises(ValueError, match=words):
        Reconstruction(parts)


@pytest.mark.parametrize(
    ("parts", "binarise", "name"),
    [({"bernoulli": 1}, True, "bernoulli"), ({"bernoulli": 1}, False, None), ({"logistic": 1, "ssim": 2}, True, None),
     ({"logistic": 1}, True, "logistic"), ({"squared": 1}, True, None),
     ({"gaussian": 1, "perceptual": 1}, True, None)],
)  # fmt: skip
def test_a_likelihood_is_one_part_alone(parts, binarise, name):
    made = Reconstruction(parts, binarise)
    if name is None:
        with pytest.raises(ValueError, match="no likelihood"):
            _ = made.likelihood
    else:
        assert made.likelihood == name


# ------------------------------------------------------------------------------------------------------------ networks


@pytest.mark.parametrize(
    ("size", "options", "last"),
    [(28, {}, (64, 7, 7)), (28, {"patch": 2}, (64, 7, 7)), (8, {}, (64, 4, 4)), ((12, 8), {}, (64, 6, 4)),
     (7, {}, (32, 7, 7)), (32, {"channel_mults": [1, 1]}, (32, 16, 16))],
)  # fmt: skip
def test_networks_of_any_size_give_images_back(size, options, last):
    model = Network(size, 1, codings=5, **options)
    height, width = (size, size) if isinstance(size, int) else size
    x = torch.zeros(2, 1, height, width)
    mean, log_variance = model.encode(x)
    assert mean.shape == log_variance.shape == (2, 5) and model.decode(mean).shape == x.shape and model.last == last


def test_classes_reach_both_halves():
    model = Network(8, 1, codings=3, num_classes=10)
    for p in model.parameters():  # residual blocks begin as the identity
        nn.init.normal_(p, std=0.1)
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4)
    for half, given in ((model.encode, x), (model.decode, torch.zeros(4, 3))):
        first = half(given, y)
        second = half(given, y.roll(1))
        first, second = (z[0] if isinstance(z, tuple) else z for z in (first, second))
        assert not torch.allclose(first, second)
        with pytest.raises(ValueError, match="y must be given exactly when"):
            half(given)


def test_a_class_beside_z_is_heard_from_the_first_step_on():
    z, y = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    for beside in (False, True):  # residual blocks begin as the identity, and hear of nothing
        model = Network(8, 1, codings=3, num_classes=10, beside_z=beside)
        assert torch.equal(model.decode(z, y), model.decode(z, y.roll(1))) != beside
    same = model.from_z(z) + model.from_y(nn.functional.silu(model.class_embedding[1](y)))
    model.from_z, model.from_y = nn.Identity(), nn.Linear(32 * 4, same.shape[1], bias=False)
    nn.init.zeros_(model.from_y.weight)
    assert model.decode(same, y).shape == (4, 1, 8, 8)
    assert Network(8, 1, codings=3, beside_z=True).from_y is None  # without classes it is without effect


@pytest.mark.parametrize(
    ("options", "words"),
    [({"image_size": 28, "channel_mults": [1, 2, 2, 2]}, "allowed: at most 3 channel_mults"),
     ({"image_size": 28, "patch": 3}, "patch = 3 does not divide the image size 28x28"),
     ({"image_size": 8, "codings": 0}, "codings = 0 must be an integer >= 1"),
     ({"image_size": 8, "scale": 0.0}, "scale = 0 must be > 0"),
     ({"image_size": 8, "groups": 7}, "groups = 7 does not divide"),
     ({"image_size": 8, "dropout": 1.0}, "must lie in")],
)  # fmt: skip
def test_networks_that_cannot_be_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Network(**options)


# --------------------------------------------------------------------------------------- the linear one is known


@pytest.mark.equation("PPCA (model)")
def test_the_linear_one_reaches_the_likelihood_of_probabilistic_pca():
    """Trained by its own loss, in expectation over eps: a cubature of 2 d points is exact for a quadratic."""
    torch.manual_seed(0)
    features, d = 4, 2
    x = drawn(400, features) @ torch.tensor([[2.0, 0, 0, 0], [1, 1, 0, 0], [0, 0.3, 0.5, 0], [0.2, 0, 0, 0.4]]).double()
    x = x + torch.tensor([1.0, -1, 0, 2]).double()
    model = LinearVAE(features, d).double()
    task = VAE(model, {"gaussian": 1.0, "kl": 1.0})
    points = torch.cat([torch.eye(d), -torch.eye(d)]).double() * d**0.5
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=400, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

    def loss() -> Tensor:
        optimizer.zero_grad()
        nats = []
        for eps in points:
            parts = task.losses(task_drawn(x, eps.expand(len(x), d)), 1.0)
            nats.append(task.total(parts).mean())
        mean = torch.stack(nats).mean()
        mean.backward()
        return mean

    for _ in range(3):
        optimizer.step(loss)
    S = torch.cov(x.T, correction=0)
    values = torch.linalg.eigvalsh(S).flip(0)
    sigma2 = values[d:].mean()  # Tipping and Bishop: the mean of the variances that are lost
    log_det = values[:d].log().sum() + (features - d) * sigma2.log()
    ppca = (features * math.log(2 * math.pi) + log_det + d + (features - d)) / 2
    assert loss().item() == pytest.approx(ppca.item(), abs=1e-3)
    assert model.log_scale.exp().square().item() == pytest.approx(sigma2.item(), rel=1e-2)
    # and the bound is tight: with so few draws the importance-weighted one is the exact density already
    C = model.W @ model.W.T + model.log_scale.exp().square() * torch.eye(features).double()
    exact = torch.distributions.MultivariateNormal(model.mu, C).log_prob(x)
    bound, _ = importance_weighted(model, NORMAL, x, None, 2, lambda i: drawn(2, len(x), d, seed=i))
    torch.testing.assert_close(bound.mean(), exact.mean(), atol=1e-3, rtol=0)


def task_drawn(x: Tensor, eps: Tensor) -> object:
    from ddpm.training.tasks.vae import Coded

    return Coded(x=x, condition=Condition(), eps=eps)


# ------------------------------------------------------------------------------------------------------------ the task


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


def small(**options: object) -> Network:
    torch.manual_seed(0)
    return Network(8, 1, codings=2, channels=8, **options)


@pytest.mark.equation("VAE (3)")
def test_the_loss_is_minus_the_bound_and_warmup_weighs_the_kl(digits):
    task = VAE(small(), {"bernoulli": 1.0, "kl": 2.0}, warmup=0.5)
    task.check(digits)
    drawn_ = task.draw(digits.batch(digits.train[:6]), Keyed(0, 1), 0.25)
    assert drawn_.x.unique().tolist() == [-1, 1]
    mean, log_variance = task.model.encode(drawn_.x)
    output = task.model.decode(reparametrised(mean, log_variance, drawn_.eps))
    half, whole = (task.losses(drawn_, progress) for progress in (0.25, 0.8))
    torch.testing.assert_close(whole, {"bernoulli": bernoulli(output, drawn_.x), "kl": kl(mean, log_variance).sum(1)})
    torch.testing.assert_close(half["kl"], whole["kl"] / 2)
    torch.testing.assert_close(task.total(whole), whole["bernoulli"] + 2 * whole["kl"])


def test_every_part_trains_and_is_logged_by_its_name(digits):
    for logits in (True, False):
        chosen = {"bernoulli", "focal"} if logits else {"gaussian", "logistic"}
        names = [name for name in PARTS if name in chosen or name in ("squared", "absolute", "huber", "ssim")]
        task = VAE(small(scale=1.0), dict.fromkeys(names, 0.5) | {"kl": 0.0})
        task.check(digits)
        parts = task.losses(task.draw(digits.batch(digits.train[:4]), Keyed(0, 1), 0.0), 0.0)
        assert set(parts) == set(names) and all(part.shape == (4,) and part.isfinite().all() for part in parts.values())
        task.total(parts).mean().backward()
        assert all(p.grad is not None for p in task.model.up.parameters())


@pytest.mark.parametrize(
    ("parts", "options", "words"),
    [({"gaussian": 1}, {}, "gaussian has a scale, and the decoder has none; set model.scale=1"),
     ({"bernoulli": 1}, {"warmup": 2}, "warmup = 2 must lie in"),
     ({"bernoulli": 1}, {"free_bits": -1}, "free_bits = -1 must be >= 0"),
     ({"bernoulli": 1, "kl": -1}, {}, "parts.kl = -1 must be >= 0")],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(parts, options, words):
    with pytest.raises(ValueError, match=words):
        VAE(small(), parts, **options)


def test_points_have_no_black_and_white():
    task = VAE(LinearVAE(2), {"bernoulli": 1.0, "kl": 1.0})
    with pytest.raises(ValueError, match="bernoulli needs bytes"):
        task.check(Points("points", torch.randn(20, 2)))


def test_a_run_learns_resumes_draws_and_is_measured(digits, tmp_path):
    def fit(path, resume=None, steps=20):
        path.mkdir()
        trainer = Trainer(steps=steps, batch_size=32, previews=1, checkpoint_every=10, lr_schedule="constant", keep=9)
        adam = functools.partial(torch.optim.AdamW, lr=3e-3)
        task = VAE(small(num_classes=10), {"bernoulli": 1.0, "kl": 1.0})
        return trainer.fit(Run(path), task, digits, adam, seed=0, device=CPU, resume=resume)[1]

    whole = fit(tmp_path / "a")
    again = fit(tmp_path / "b", tmp_path / "a/checkpoints/10")
    for one, other in zip(whole.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    source = whole.source(digits, 0, CPU, requested=[3, 7])
    x = source.samples(6)
    assert x.shape == (6, 1, 8, 8) and source.classes(range(4)).tolist() == [3, 7, 3, 7]
    torch.testing.assert_close(source.draw([5, 2]), x[[5, 2]])  # a sample is its number's
    assert source.between(x[:2], torch.tensor([1, 2]), 5).shape == (5, 1, 8, 8)
    with pytest.raises(ValueError, match="class = none"):
        whole.source(digits, 0, CPU, requested=[])
    _, _, elbo = codings.measure_elbo(source, digits, 40, 16)
    assert elbo["value"] == pytest.approx(elbo["reconstruction"] + elbo["kl"]) and len(elbo["kl_of_codings"]) == 2
    _, _, values = codings.measure_log_likelihood(source, digits, 40, 120, 64)
    assert values["value"] < values["elbo"] and values["low"] < values["value"] < values["high"]
    _, _, same = codings.measure_log_likelihood(source, digits, 40, 120, 8)
    assert same["value"] == pytest.approx(values["value"], rel=1e-5)  # the batch changes nothing
    whole.draw_results(tmp_path, digits)
    assert {p.name for p in tmp_path.glob("*.png")} == {
        "reconstructions.png", "traversals.png", "interpolations.png", "latent_map.png",
    }  # fmt: skip


def test_samples_leave_nothing_to_the_batch_they_are_decoded_in():
    source = Decoded(small(), Reconstruction({"squared": 1}), (1, 8, 8), 3, CPU)
    torch.testing.assert_close(source.samples(5, batch=2), source.samples(5, batch=5), atol=1e-6, rtol=0)
