"""ddpm/losses.py: the squared error and its weights in all coordinates, and the bound term by term."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ddpm.diffusion import GaussianDiffusion
from ddpm.forward import q_sample
from ddpm.losses import L_0, L_T, L_hybrid, L_simple, L_t_1, L_vlb, log_bin, min_snr, offset, p2, weighted
from ddpm.oracle import GaussianOracle
from ddpm.schedules import NoiseSchedule, constant, cosine, linear, zero_terminal_snr
from ddpm.targets import TARGETS, Prediction, eps_from_x_0, from_prediction

t = torch.tensor([1, 2, 30, 400, 1000])
CLOSE = {"rtol": 1e-12, "atol": 0}


def test_L_simple_is_the_mean_over_pixels_of_each_sample():
    output, target = torch.randn(2, 3, 2, 4, 5, dtype=torch.float64)
    loss = L_simple(output, target)
    assert loss.shape == (3,)
    for i in range(3):
        a, b = output[i].flatten().tolist(), target[i].flatten().tolist()
        assert loss[i].item() == pytest.approx(sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) / 40, rel=1e-13)
    assert torch.equal(L_simple(target, target), torch.zeros(3).double())


def test_gradient_of_L_simple():
    output, target = torch.randn(2, 3, 20, dtype=torch.float64)
    output.requires_grad_()
    L_simple(output, target).sum().backward()
    torch.testing.assert_close(output.grad, 2 * (output.detach() - target) / 20)


@pytest.mark.equation("DDPM (14)")
@pytest.mark.parametrize("t", [1, 100, 400, 1000])
def test_L_simple_of_the_best_denoiser_is_the_posterior_variance(oracle, t):
    """E over x_0, eps on Gauss-Hermite nodes, exact for squares: Var[eps | x_t] = alpha_bar c^2 / Var[x_t].

    For x_0 and v it is c^2 (1 - alpha_bar) / Var[x_t] and c^2 / Var[x_t], for the velocity of the straight path
    c^2 (sqrt(alpha_bar) + sqrt(1 - alpha_bar))^2 / Var[x_t].
    """
    nodes, weights = (torch.tensor(a) for a in np.polynomial.hermite_e.hermegauss(4))
    weights = weights / weights.sum()
    x_0, eps = torch.meshgrid(oracle.mean + oracle.variance**0.5 * nodes, nodes, indexing="ij")
    x_0, eps, weight = x_0.reshape(-1, 1), eps.reshape(-1, 1), torch.outer(weights, weights).flatten()

    alpha_bar, (_, var_t) = oracle.schedule.alpha_bar[t].item(), oracle.marginal(t)
    share = oracle.variance / var_t
    of_target = {"eps": alpha_bar, "x_0": 1 - alpha_bar, "v": 1, "flow": (alpha_bar**0.5 + (1 - alpha_bar) ** 0.5) ** 2}
    for target, expected in {name: factor * share for name, factor in of_target.items()}.items():

        def model(x_t, t, target=target, alpha_bar=alpha_bar):
            pred = oracle.denoise(x_t, t)
            v = alpha_bar**0.5 * pred.eps - (1 - alpha_bar) ** 0.5 * pred.x_0
            return {"eps": pred.eps, "x_0": pred.x_0, "v": v, "flow": pred.eps - pred.x_0}[target]

        diffusion = GaussianDiffusion(oracle.schedule, target)
        loss = diffusion.loss(model, x_0, t=torch.full((16,), t), eps=eps)
        assert (weight * loss).sum().item() == pytest.approx(expected, rel=1e-11)
        better = diffusion.loss(lambda x_t, t, m=model: m(x_t, t) + 0.1, x_0, t=torch.full((16,), t), eps=eps)
        assert (weight * better).sum().item() == pytest.approx(expected + 0.01, rel=1e-11)  # any other is worse


# --- weightings


class Case:
    """x_0, noise and a prediction for every t above, in float64: (5, 2, 3) each."""

    def __init__(self, schedule: NoiseSchedule, frac: float | Tensor = 0.0):
        self.x_0 = (torch.rand(5, 2, 3, dtype=torch.float64) * 255).round() / 127.5 - 1
        self.eps = torch.randn(5, 2, 3, dtype=torch.float64)
        self.x_t = q_sample(schedule, self.x_0, t, self.eps)
        x_0_theta = self.x_0 + 0.1 * torch.randn(5, 2, 3, dtype=torch.float64)
        self.pred = Prediction(eps_from_x_0(schedule, self.x_t, t, x_0_theta), x_0_theta, frac)
        self.snr = schedule.alpha_bar[t] / (1 - schedule.alpha_bar[t])
        self.error = ((self.x_0 - x_0_theta) ** 2).mean((1, 2))

    def loss(self, diffusion: GaussianDiffusion) -> tuple[Tensor, Tensor]:
        """The loss of a network that says x_0_theta in its own coordinate, and its gradient towards x_0_theta."""
        x_0_theta = self.pred.x_0.clone().requires_grad_()
        pred = Prediction(eps_from_x_0(diffusion.schedule, self.x_t, t, x_0_theta), x_0_theta)
        output = from_prediction(diffusion.schedule, diffusion.target, pred, t)
        loss = diffusion.loss(lambda x_t, t: output, self.x_0, t=t, eps=self.eps)
        (gradient,) = torch.autograd.grad(loss.sum(), x_0_theta)
        return loss.detach(), gradient


WEIGHTS = [
    ("x_0", {}, lambda snr: snr**0),
    ("snr", {}, lambda snr: snr),
    ("min_snr", {}, lambda snr: snr.clamp(max=5)),
    ("min_snr", {"gamma": 0.5}, lambda snr: snr.clamp(max=0.5)),
    ("p2", {}, lambda snr: snr / (1 + snr)),
    ("p2", {"k": 0.3, "gamma": 2}, lambda snr: snr / (0.3 + snr) ** 2),
]


@pytest.mark.parametrize(("weighting", "options", "weight"), WEIGHTS)
def test_a_weighted_loss_and_its_gradient_do_not_depend_on_the_target(schedule, weighting, options, weight):
    case = Case(schedule)
    w = weight(case.snr)
    for target in TARGETS:
        loss, gradient = case.loss(GaussianDiffusion(schedule, target, loss=weighting, loss_options=options))
        torch.testing.assert_close(loss, w * case.error, **CLOSE)
        by_hand = w[:, None, None] * 2 * (case.pred.x_0 - case.x_0) / 6
        torch.testing.assert_close(gradient, by_hand, rtol=1e-12, atol=1e-12 * w.max().item())


def test_L_simple_is_a_weighted_loss_of_x_0_too(schedule):
    """Of eps with weight SNR, of x_0 with 1, of v with SNR + 1, of the flow with (sqrt(SNR) + 1)^2."""
    case = Case(schedule)
    weights = {"eps": case.snr, "x_0": torch.ones(5).double(), "v": case.snr + 1, "flow": (case.snr.sqrt() + 1) ** 2}
    for target, weight in weights.items():
        loss, gradient = case.loss(GaussianDiffusion(schedule, target))
        torch.testing.assert_close(loss, weight * case.error, **CLOSE)
        by_hand = weight[:, None, None] * 2 * (case.pred.x_0 - case.x_0) / 6
        torch.testing.assert_close(gradient, by_hand, rtol=1e-12, atol=1e-12 * weight.max().item())


@pytest.mark.equation("Min-SNR (weight)")
def test_min_snr(schedule):
    """Of the loss of eps it is min(SNR, gamma) / SNR, of that of v min(SNR, gamma) / (SNR + 1)."""
    assert min_snr(torch.tensor([0.1, 5.0, 7.0])).tolist() == pytest.approx([0.1, 5, 5])
    assert min_snr(torch.tensor([0.1, 5.0, 7.0]), gamma=0.3).tolist() == pytest.approx([0.1, 0.3, 0.3])
    case = Case(schedule)
    assert (case.snr > 5).any() and (case.snr < 5).any()
    for target, of_simple in {
        "eps": case.snr.clamp(max=5) / case.snr,
        "v": case.snr.clamp(max=5) / (case.snr + 1),
    }.items():
        simple, _ = case.loss(GaussianDiffusion(schedule, target))
        loss, _ = case.loss(GaussianDiffusion(schedule, target, loss="min_snr"))
        torch.testing.assert_close(loss / simple, of_simple, **CLOSE)


@pytest.mark.equation("P2 (weight)")
def test_p2(schedule):
    """Of the loss of eps it is 1 / (k + SNR)^gamma."""
    assert p2(torch.tensor([0.0, 1.0, 3.0])).tolist() == [0, 0.5, 0.75]
    assert p2(torch.tensor([3.0]), k=2, gamma=0.5).item() == pytest.approx(3 / 5**0.5)
    case = Case(schedule)
    simple, _ = case.loss(GaussianDiffusion(schedule))
    loss, _ = case.loss(GaussianDiffusion(schedule, loss="p2", loss_options={"k": 2, "gamma": 0.5}))
    torch.testing.assert_close(loss / simple, (2 + case.snr) ** -0.5, **CLOSE)


@pytest.mark.equation("VDM (SNR)")
def test_the_snr_is_that_of_x_t(schedule):
    """Power of the signal over power of the noise, e^{2 lambda}, at integer and real t; an error of 1 shows it."""
    times = torch.tensor([0.5, 1, 30.25, 400, 999.5, 1000], dtype=torch.float64)
    zeros, ones = torch.zeros(6, 2, dtype=torch.float64), torch.ones(6, 2, dtype=torch.float64)
    signal, noise = (q_sample(schedule, a, times, b)[:, 0] for a, b in ((ones, zeros), (zeros, ones)))
    loss = weighted(schedule, "snr", Prediction(zeros, ones), zeros, times)
    torch.testing.assert_close(loss, signal**2 / noise**2, **CLOSE)
    torch.testing.assert_close(loss, (2 * schedule.lambda_at(times)).exp(), rtol=1e-10, atol=0)


# --- the bound


def bits(nats: Tensor) -> Tensor:
    return nats.flatten(1).mean(1) / math.log(2)


@pytest.mark.equation("DDPM (5)")
@pytest.mark.parametrize("make", [lambda: linear(1000), lambda: linear(100, rescale=False), lambda: cosine(1000)])
def test_the_cost_of_the_prior(make):
    schedule, x_0 = make(), torch.rand(4, 2, 3, dtype=torch.float64) * 2 - 1
    kept = schedule.alpha_bar[-1]
    expected = kl_divergence(Normal(kept.sqrt() * x_0, (1 - kept).sqrt()), Normal(0, torch.ones_like(x_0)))
    torch.testing.assert_close(L_T(schedule, x_0), bits(expected), rtol=1e-9, atol=1e-16)


def test_pure_noise_costs_nothing():
    assert torch.equal(L_T(zero_terminal_snr(linear(100)), torch.rand(4, 2)), torch.zeros(4))


@pytest.mark.equation("DDPM (8)")
@pytest.mark.parametrize("stride", [None, lambda t: 0.4 * t.double(), lambda t: t - 1, lambda t: t // 2])
@pytest.mark.parametrize("frac", [0.0, 1.0, "learned"])
def test_the_cost_of_a_step(schedule, stride, frac):
    case = Case(schedule, torch.rand(5, 2, 3, dtype=torch.float64) if frac == "learned" else frac)
    x_0, x_t, steps = case.x_0[1:], case.x_t[1:], t[1:]  # L_0 is another
    pred = Prediction(case.pred.eps[1:], case.pred.x_0[1:], case.pred.frac[1:] if frac == "learned" else frac)
    s = None if stride is None else stride(steps)
    before = schedule.alpha_bar_at(steps - 1 if s is None else s)[:, None, None]
    bar_t = schedule.alpha_bar[steps, None, None]
    beta = 1 - bar_t / before
    beta_tilde = (1 - before) / (1 - bar_t) * beta

    def mean(x_0: Tensor) -> Tensor:
        return before.sqrt() * beta / (1 - bar_t) * x_0 + (bar_t / before).sqrt() * (1 - before) / (1 - bar_t) * x_t

    sigma2 = beta**pred.frac * beta_tilde ** (1 - pred.frac)
    step = kl_divergence(Normal(mean(x_0), beta_tilde.sqrt()), Normal(mean(pred.x_0), sigma2.sqrt()))
    ours = L_t_1(schedule, pred, x_0, x_t, steps, s)
    torch.testing.assert_close(ours, bits(step), rtol=1e-8, atol=1e-12)
    squares = (mean(x_0) - mean(pred.x_0)) ** 2 / (2 * sigma2)
    no_error = L_t_1(schedule, Prediction(pred.eps, x_0, pred.frac), x_0, x_t, steps, s)  # C
    torch.testing.assert_close(ours - no_error, bits(squares), rtol=1e-8, atol=1e-12)
    if frac == 0.0:
        torch.testing.assert_close(no_error, torch.zeros(4).double(), rtol=0, atol=1e-12)


BYTES = torch.arange(256, dtype=torch.float64) / 127.5 - 1


@pytest.mark.equation("DDPM (13)")
@pytest.mark.parametrize("mean", [-1.7, -1.0, 0.0, 0.3, 0.9999, 1.2])
@pytest.mark.parametrize("std", [0.004, 0.05, 1.0, 30.0])
def test_the_bins_of_a_byte(mean, std):
    """256 of them, whose probabilities add up to 1 and are differences of the distribution function."""
    edges = torch.tensor([-math.inf, *(BYTES[:-1] + BYTES[1:]) / 2, math.inf], dtype=torch.float64)
    z = (edges - mean) / std
    left, right = (-a * torch.erfc(a * z / 2**0.5).diff() / 2 for a in (-1, 1))
    expected = torch.where(z[:-1] > 0, right, left)  # each where it does not cancel
    ours = log_bin(BYTES, torch.full_like(BYTES, mean), torch.full_like(BYTES, std)).exp()
    assert ours.sum().item() == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-290)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_tails_are_finite_and_so_are_their_gradients(dtype):
    x = BYTES.to(dtype).expand(3, 5, 256)
    mean = torch.tensor([-1000.0, -3.0, 0.1, 3.0, 1000.0]).to(dtype)[:, None].expand(3, 5, 256).clone().requires_grad_()
    std = torch.tensor([1e-3, 0.01, 1.0]).to(dtype)[:, None, None].expand(3, 5, 256).clone().requires_grad_()
    log = log_bin(x, mean, std)
    log.sum().backward()
    assert log.isfinite().all() and mean.grad.isfinite().all() and std.grad.isfinite().all() and (log <= 0).all()
    inner = log[1, 1, 1:-1], log[1, 3, 1:-1]  # far from the mean: -z^2 / 2 - log z and constants, in both tails alike
    torch.testing.assert_close(inner[0], inner[1].flip(0), rtol=1e-4, atol=0)
    assert (mean.grad[1, 1, 1:] > 0).all() and (mean.grad[1, 3, :-1] < 0).all()  # towards x


@pytest.mark.equation("DDPM (13)")
def test_the_cost_of_the_last_step(schedule):
    """Its mean is x_0_theta, its variance beta_1, or beta_tilde_2 for the beta_tilde_1 that is 0."""
    x_0, x_1 = BYTES[torch.randint(256, (2, 4, 2))].unbind()
    x_0[0] = torch.tensor([-1.0, 1.0])
    x_0_theta = x_0 + 0.01 * torch.rand(4, 2, dtype=torch.float64)  # near, for a difference to have digits left
    for frac, sigma2 in (
        (0.0, schedule.beta_tilde[2].item()),
        (1.0, 1e-4),
        (0.5, (1e-4 * schedule.beta_tilde[2]) ** 0.5),
    ):
        cdf = Normal(x_0_theta, sigma2**0.5).cdf
        high, low = cdf(x_0 + 1 / 255), cdf(x_0 - 1 / 255)
        expected = high.where(x_0 < 1, 1) - low.where(x_0 > -1, 0)
        ours = L_0(schedule, Prediction(x_1, x_0_theta, frac), x_0, x_1)
        torch.testing.assert_close(ours, bits(-expected.log()), rtol=1e-9, atol=0)
        strided = L_0(schedule, Prediction(x_1, x_0_theta, 0.0), x_0, x_1, 40)
        torch.testing.assert_close(strided, L_0(schedule, Prediction(x_1, x_0_theta, 0.0), x_0, x_1), rtol=1e-9, atol=0)


@pytest.mark.equation("iDDPM (4)")
def test_the_bound_term_by_term(schedule):
    case = Case(schedule, torch.rand(5, 2, 3, dtype=torch.float64))
    ours = L_vlb(schedule, case.pred, case.x_0, case.x_t, t)
    rows = [slice(i, i + 1) for i in range(5)]
    for i, row in enumerate(rows):
        pred = Prediction(case.pred.eps[row], case.pred.x_0[row], case.pred.frac[row])
        term = L_0(schedule, pred, case.x_0[row], case.x_t[row]) if i == 0 else None
        term = L_t_1(schedule, pred, case.x_0[row], case.x_t[row], t[row]) if i else term
        torch.testing.assert_close(ours[row], term, **CLOSE)


@pytest.mark.equation("iDDPM (4)")
@pytest.mark.parametrize("T", [1, 2, 4])
def test_the_terms_add_up_to_minus_the_log_likelihood_of_the_chain(T):
    """E[sum of the terms] + L_T = E_q[log q(x_1..T | x_0) - log p(x_0..T)], whose every factor is written out here."""
    schedule, B = NoiseSchedule([0.3, 0.2, 0.5, 0.4][:T]), 40_000
    x_0 = BYTES[torch.tensor([90])].expand(B, 1)

    def theta(x_t: Tensor, t: int) -> Prediction:
        return Prediction(x_t, 0.3 * x_t - 0.1, 0.4)

    x, log_ratio, total = x_0, torch.zeros(B, 1).double(), 0.0
    for step in range(1, T + 1):
        beta = schedule.beta[step]
        x_t = (1 - beta).sqrt() * x + beta.sqrt() * torch.randn(B, 1, dtype=torch.float64)
        log_ratio += Normal((1 - beta).sqrt() * x, beta.sqrt()).log_prob(x_t)
        bar_t, bar_s = schedule.alpha_bar[step], schedule.alpha_bar[step - 1]
        mean = (
            bar_s.sqrt() * beta / (1 - bar_t) * theta(x_t, step).x_0
            + (1 - beta).sqrt() * (1 - bar_s) / (1 - bar_t) * x_t
        )
        low = schedule.beta_tilde[max(step, 2)] if T > 1 else beta
        std = (beta**0.4 * low**0.6).sqrt()
        log_ratio -= log_bin(x, mean, std.expand(B, 1)) if step == 1 else Normal(mean, std).log_prob(x)
        total = total + L_vlb(schedule, theta(x_t, step), x_0, x_t, torch.full((B,), step))
        x = x_t
    log_ratio -= Normal(0.0, 1.0).log_prob(x)
    difference = total + L_T(schedule, x_0) - log_ratio[:, 0] / math.log(2)
    assert abs(difference.mean()) < 4.5 * difference.std() / B**0.5
    assert difference.std() / B**0.5 < 0.01 * total.mean()  # sharp enough to fail


@pytest.mark.parametrize("loss", ["vlb", "hybrid"])
@pytest.mark.parametrize("make", [linear, cosine])
def test_gradients_of_the_bound_are_finite_at_every_t_in_float32(make, loss):
    """With cosine and eps, x_0_theta reaches 20,000, and terms that are left out could still poison the gradient."""
    schedule = make(1000)
    times = torch.arange(1000, 0, -9)
    output = torch.randn(len(times), 4, 3).requires_grad_()
    diffusion = GaussianDiffusion(schedule, variance="learned", loss=loss)
    x_0 = torch.rand(len(times), 2, 3) * 2 - 1
    value = diffusion.loss(lambda x_t, t: output, x_0, t=times, eps=torch.randn(len(times), 2, 3))
    value.sum().backward()
    assert value.isfinite().all() and output.grad.isfinite().all() and (output.grad[:, 2:] != 0).all()


@pytest.mark.equation("iDDPM (16)")
def test_the_hybrid_trains_the_mean_by_L_simple_and_the_variance_by_the_bound():
    schedule = linear(1200)
    case = Case(schedule)
    o = torch.randn(5, 2, 3, dtype=torch.float64)

    def gradients(loss: str, **options: float) -> tuple[Tensor, Tensor, Tensor]:
        output = torch.cat([case.pred.eps, o], 1).requires_grad_()
        diffusion = GaussianDiffusion(schedule, variance="learned", loss=loss, loss_options=options)
        value = diffusion.loss(lambda x_t, t: output, case.x_0, t=t, eps=case.eps)
        value.sum().backward()
        return value.detach(), *output.grad.chunk(2, 1)

    eps_theta = case.pred.eps.clone().requires_grad_()
    simple = L_simple(eps_theta, case.eps)
    simple.sum().backward()
    pred = Prediction(case.pred.eps, case.pred.x_0, (o + 1) / 2)
    term = L_vlb(schedule, pred, case.x_0, case.x_t, t)
    vlb = gradients("vlb")
    torch.testing.assert_close(vlb[0], 1200 * term, rtol=1e-9, atol=0)
    assert (vlb[1] != 0).all()
    for weight, options in ((1e-3, {}), (0.02, {"weight": 0.02})):
        hybrid, of_mean, of_variance = gradients("hybrid", **options)
        torch.testing.assert_close(hybrid, simple.detach() + weight * 1200 * term, rtol=1e-9, atol=0)
        assert torch.equal(of_mean, eps_theta.grad)
        torch.testing.assert_close(of_variance, weight * vlb[2], rtol=1e-9, atol=1e-12 * of_variance.abs().max().item())
    assert (of_variance != 0).all()
    by_default = L_hybrid(simple.detach(), schedule, pred, case.x_0, case.x_t, t)
    torch.testing.assert_close(by_default, gradients("hybrid")[0], rtol=1e-9, atol=0)


def test_the_best_variance_for_the_bound_of_real_numbers_is_that_of_the_reverse_step():
    """Of data N(0, c^2), for each t, the last step included: with it no gradient is left on what is learned."""
    schedule, c2 = constant(20, 0.1, rescale=False), 0.3
    for step in (1, 2, 7, 20):
        oracle = GaussianOracle(schedule, 0.0, c2)
        x_t = torch.full((2, 1), 0.4, dtype=torch.float64)
        mean = oracle.denoise(x_t, step).x_0
        bar_t, bar_s, beta = schedule.alpha_bar[step], schedule.alpha_bar[step - 1], schedule.beta[step]
        of_x_0 = c2 * (1 - bar_t) / (bar_t * c2 + 1 - bar_t)  # Var(x_0 | x_t)
        x_0 = mean + of_x_0.sqrt() * torch.tensor([[1.0], [-1.0]]).double()  # the moments of the posterior
        of_step = (bar_s.sqrt() * beta / (1 - bar_t)) ** 2 * of_x_0 + schedule.beta_tilde[step]
        low = schedule.beta_tilde[max(step, 2)]
        frac = ((of_step / low).log() / (beta / low).log()).reshape(1, 1).requires_grad_()
        pred = replace(oracle.denoise(x_t, step), frac=frac.expand(2, 1))
        term = L_vlb(schedule, pred, x_0, x_t, torch.full((2,), step), discrete=False).mean()
        assert abs(torch.autograd.grad(term, frac)[0]) < 1e-12
        exact = 0.5 * (math.log(2 * math.pi) + of_step.log() + 1)  # the entropy of the reverse step, in nats
        known = 0 if step == 1 else 0.5 * (math.log(2 * math.pi) + schedule.beta_tilde[step].log() + 1)
        assert term.item() == pytest.approx((exact - known).item() / math.log(2), rel=1e-12)


# --- offset noise


@pytest.mark.parametrize("strength", [0.0, 0.1, 2.0])
def test_offset_noise_has_this_covariance(strength):
    """It is linear in (eps, z), so unit vectors tell all: I, plus strength^2 between the pixels of a channel."""
    B, shape = 14, (2, 3, 2)
    eps, z = torch.eye(B, 12).double().reshape(B, *shape), torch.eye(B).double()[:, 12:]
    rows = offset(eps, z, strength).reshape(B, 12)
    expected = torch.eye(12) + strength**2 * torch.block_diag(torch.ones(6, 6), torch.ones(6, 6))
    torch.testing.assert_close(rows.T @ rows, expected.double())
    assert torch.equal(offset(0 * eps, 0 * z, strength), 0 * eps)  # mean 0


@pytest.mark.parametrize("loss", ["hybrid", "vlb"])
def test_the_bound_has_finite_gradients_at_every_t_of_a_long_cosine_schedule(loss):
    """At T x_0_theta is 1e5 away, where a bin has no probability in float32: nothing of it may reach other t."""
    schedule = cosine(4000)
    diffusion = GaussianDiffusion(schedule, "eps", "learned", loss=loss)
    for frac in (0.0, 20.0, -20.0):  # a network's second half knows no bounds
        output = torch.full((5, 2, 8, 8), frac)
        output[:, :1] = 0
        output.requires_grad_()
        t = torch.tensor([2, 500, 2000, 3999, 4000])
        value = diffusion.loss(lambda x_t, t, output=output: output, torch.zeros(5, 1, 8, 8), t=t)
        value.mean().backward()
        assert value.isfinite().all() and output.grad.isfinite().all()
