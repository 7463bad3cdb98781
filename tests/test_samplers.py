"""ddpm/samplers: exact moments and the exact flow on Gaussian data, the loop, the times, the noise."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import GaussianOracle, MixtureOracle, propagate

from ddpm.randomness import SampleNoise
from ddpm.samplers import DDIM, LMS, Ancestral, DPMSolverPP, Euler, Heun, Sampler, Step, UniPC
from ddpm.schedules import cosine, linear
from ddpm.targets import Prediction

MIXTURE = ([0.3, 0.7], [-0.8, 0.6], [0.04, 0.01])  # weights, means, variances


# --- The oracle itself


def test_the_oracle_is_the_score_and_its_flow_keeps_the_density(schedule):
    """eps_theta = -sqrt(1 - alpha_bar) d log q / dx, and q_s(x_s) |dx_s / dx_t| = q_t(x_t) along the flow."""
    mixture = MixtureOracle(schedule, *MIXTURE)
    for t in (1, 200, 1000):
        x = torch.linspace(-2, 2, 9, dtype=torch.float64, requires_grad=True)
        (score,) = torch.autograd.grad(mixture.log_prob(x, t).sum(), x)
        pred, alpha_bar = mixture.denoise(x.detach(), t), schedule.alpha_bar[t]
        torch.testing.assert_close(pred.eps, -(1 - alpha_bar).sqrt() * score, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(alpha_bar.sqrt() * pred.x_0 + (1 - alpha_bar).sqrt() * pred.eps, x.detach())
    x, h = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64), 1e-4
    slope = (mixture.exact_ode(x + h, 800, 50) - mixture.exact_ode(x - h, 800, 50)) / (2 * h)
    x_s = mixture.exact_ode(x, 800, 50)
    torch.testing.assert_close(mixture.log_prob(x_s, 50) + slope.log(), mixture.log_prob(x, 800), rtol=0, atol=1e-5)
    one, gauss = MixtureOracle(schedule, [1.0], [0.7], [0.25]), GaussianOracle(schedule, 0.7, 0.25)
    torch.testing.assert_close(one.exact_ode(x, 900, 3), gauss.exact_ode(x, 900, 3), rtol=0, atol=1e-12)
    t = torch.tensor([5, 900])
    rows = torch.stack([mixture.denoise(x, 5).eps, mixture.denoise(x, 900).eps])
    assert torch.equal(mixture.denoise(torch.stack([x, x]), t).eps, rows)


# --- Ancestral


@pytest.mark.parametrize(("frac", "within"), [(50.0, 1.0), (-50.0, 0.0), (0.3, 0.3)])
@pytest.mark.parametrize("each", [False, True])
def test_a_learned_variance_stays_between_beta_tilde_and_beta(frac, within, each):
    schedule, x_T = cosine(20), torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def drawn(value: float) -> torch.Tensor:
        oracle = GaussianOracle(schedule, 0.7, 0.25, torch.full_like(x_T, value) if each else value)
        return Ancestral()(schedule, oracle.denoise, x_T, generator=torch.Generator().manual_seed(1))

    assert torch.equal(drawn(frac), drawn(within)) and drawn(frac).abs().max() < 4


@pytest.mark.slow
@pytest.mark.equation("DDPM (Algorithm 2)")
@pytest.mark.parametrize(("frac", "variance"), [(0.0, 0.2461), (1.0, 0.2508)])
def test_ancestral_moments_on_gaussian_data(schedule, frac, variance):
    """Exact, by probing each affine step: N(0.7, 0.25) is sampled with variance 0.2461 (beta_tilde), 0.2508 (beta)."""
    oracle = GaussianOracle(schedule, 0.7, 0.25, frac)
    s, mean, sampled = propagate(Ancestral(), oracle)[-1]
    assert s == 0 and f"{sampled:.4f}" == str(variance) and mean == pytest.approx(0.7, abs=1e-5)

    beta, alpha, alpha_bar = (c.tolist() for c in (schedule.beta, schedule.alpha, schedule.alpha_bar))
    m, v = 0.0, 1.0  # Algorithm 2 as printed, on scalars
    for t in range(1000, 0, -1):
        z = 1.0 if t > 1 else 0.0
        var_t = alpha_bar[t] * 0.25 + 1 - alpha_bar[t]
        eps_slope = math.sqrt(1 - alpha_bar[t]) / var_t
        eps_shift = -eps_slope * math.sqrt(alpha_bar[t]) * 0.7
        k = (1 - alpha[t]) / math.sqrt(1 - alpha_bar[t])
        sigma = math.sqrt(beta[t] if frac else (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) * beta[t])
        m = (m - k * (eps_slope * m + eps_shift)) / math.sqrt(alpha[t])
        v = ((1 - k * eps_slope) / math.sqrt(alpha[t])) ** 2 * v + (sigma * z) ** 2
    assert (mean, sampled) == (pytest.approx(m, rel=1e-9), pytest.approx(v, rel=1e-9))


@pytest.mark.slow
@pytest.mark.parametrize("steps", [None, 50, 37, 7])
@pytest.mark.parametrize("make", [linear, cosine])
def test_with_the_true_reverse_variance_every_marginal_is_exact(make, steps):
    """Var[x_s | x_t] = beta_tilde + c^2 Var[x_0 | x_t]: then x_s ~ q(x_s) for every s, with strides of any length."""
    schedule, sampler = make(1000), Ancestral(steps)
    stride = dict(itertools.pairwise(sampler.times(schedule)))

    class TrueVariance(GaussianOracle):
        def denoise(self, x_t, t):
            t = int(t[0])
            pred, bar_t, bar_s = super().denoise(x_t, t), *schedule.alpha_bar[[t, stride[t]]].tolist()
            beta = 1 - bar_t / bar_s
            beta_tilde = (1 - bar_s) / (1 - bar_t) * beta
            if beta_tilde == 0:
                return pred
            exact = beta_tilde + bar_s * beta**2 / (1 - bar_t) ** 2 * self.x_0_variance(t)
            return Prediction(pred.eps, pred.x_0, math.log(exact / beta_tilde) / math.log(beta / beta_tilde))

    oracle = TrueVariance(schedule, 0.7, 0.25)
    moments = propagate(sampler, oracle, *oracle.marginal(1000))
    for s, mean, variance in moments[:-1]:
        assert (mean, variance) == pytest.approx(oracle.marginal(s), rel=1e-9)
    last = sampler.times(schedule)[-2]
    assert moments[-1][1:] == pytest.approx((0.7, 0.25 - oracle.x_0_variance(last)), rel=1e-9)  # E[x_0 | x_t] is drawn


def test_ancestral_samples_have_the_propagated_moments():
    oracle = GaussianOracle(linear(200), 0.7, 0.25, frac=1.0)
    _, mean, variance = propagate(Ancestral(), oracle)[-1]
    n = 40000
    generator = torch.Generator().manual_seed(1)
    x_T = torch.randn(n, 1, dtype=torch.float64, generator=generator)
    x_0 = Ancestral()(oracle.schedule, oracle.denoise, x_T, generator=generator)
    assert abs(x_0.mean().item() - mean) < 4 * math.sqrt(variance / n)
    assert abs(x_0.var().item() - variance) < 4 * variance * math.sqrt(2 / n)


# --- DDIM


@pytest.mark.equation("DDIM (12)")
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_step_term_by_term(schedule, eta):
    x_t, eps, x_0, noise = torch.randn(4, 6, dtype=torch.float64)
    for t, s in [(1000, 999), (1000, 700), (300, 1), (40, 0)]:
        bar_t, bar_s = schedule.alpha_bar[[t, s]].tolist()
        sigma = eta * math.sqrt((1 - bar_s) / (1 - bar_t)) * math.sqrt(1 - bar_t / bar_s)
        expected = math.sqrt(bar_s) * x_0 + math.sqrt(1 - bar_s - sigma**2) * eps + sigma * noise
        x_s = DDIM(eta=eta).step(Step(schedule, None, x_t, t, s, Prediction(eps, x_0), [], noise if eta else None))
        torch.testing.assert_close(x_s, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.equation("DDIM (16)")
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_noise_is_eta_times_the_std_of_the_posterior(schedule, eta):
    """sigma_t, read off by probing the noise, against Var[x_s | x_t, x_0] from the joint Gaussian of x_s and x_t."""
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    for t, s in [(2, 1), (1000, 999), (1000, 500), (300, 1)]:
        x_s = DDIM(eta=eta).step(Step(schedule, None, zero, t, s, Prediction(zero, zero), [], one))
        bar_t, bar_s = schedule.alpha_bar[[t, s]].tolist()
        covariance = math.sqrt(bar_t / bar_s) * (1 - bar_s)  # of x_s and x_t given x_0
        posterior = 1 - bar_s - covariance**2 / (1 - bar_t)
        assert x_s.item() == pytest.approx(eta * math.sqrt(posterior), rel=1e-8)


@pytest.mark.parametrize("T", [100, 1000])
def test_ddim_with_eta_1_and_every_step_is_ancestral_sampling_with_beta_tilde(T):
    schedule = linear(T)
    oracle = MixtureOracle(schedule, *MIXTURE, frac=0.0)
    noise = SampleNoise(0, range(5))
    x_T = noise.x_T((1, 2, 2)).double()
    ours = DDIM(T, eta=1.0)(schedule, oracle.denoise, x_T, generator=noise)
    theirs = Ancestral()(schedule, oracle.denoise, x_T, generator=noise)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    assert ours.std() > 0.1


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 3, 20, 99])
def test_ddim_is_exact_on_a_single_point_for_any_eta_and_number_of_steps(eta, steps):
    """Every member of the family has the marginals q(x_s | x_0): the theorem that DDIM stands on."""
    oracle = GaussianOracle(linear(100), 0.7, 0.0)
    for s, mean, variance in propagate(DDIM(steps, eta), oracle, *oracle.marginal(100)):
        expected_mean, expected_variance = oracle.marginal(s)
        assert mean == pytest.approx(expected_mean, rel=1e-10)
        assert variance == pytest.approx(expected_variance, rel=1e-10, abs=1e-20)


@pytest.mark.parametrize("make", [linear, cosine])
@pytest.mark.parametrize("data", ["gaussian", "mixture"])
def test_ddim_converges_to_the_exact_flow_with_order_1(make, data):
    """From T to a fixed end s = 1 > 0; the slope of log error against log steps."""
    schedule = make(1201)
    oracle = GaussianOracle(schedule) if data == "gaussian" else MixtureOracle(schedule, *MIXTURE)
    x_T = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)
    exact = oracle.exact_ode(x_T, 1201, 1)
    counts, errors, ddim = (100, 150, 200, 300, 400), [], DDIM()
    for n in counts:
        x = x_T
        for t, s in itertools.pairwise(range(1201, 0, -1200 // n)):
            x = ddim.step(Step(schedule, oracle.denoise, x, t, s, oracle.denoise(x, t), [], None))
        errors.append((x - exact).abs().max().item())
    order = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert order == pytest.approx(1, abs=0.05) and errors[-1] < 0.01


def test_more_ddim_steps_draw_the_distribution_better(oracle):
    """Ending at 0, where the last step returns E[x_0 | x_t]: still first order, and the limit is N(0.7, 0.25)."""
    errors = [abs(propagate(DDIM(n), oracle)[-1][2] - 0.25) for n in (50, 100, 200, 400)]
    ratios = [a / b for a, b in itertools.pairwise(errors)]
    assert errors[-1] < 0.005 and all(1.7 < r < 2.3 for r in ratios)


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_eta_outside_0_to_1_is_refused(eta):
    with pytest.raises(ValueError, match=rf"eta = {eta:g} must lie in \[0, 1\]"):
        DDIM(10, eta)


# --- The numbers of steps


def test_default_numbers_of_steps():
    assert DDIM().steps == 50 and DDIM().eta == 0 and Ancestral().steps is None
    assert DPMSolverPP().steps == 20 and DPMSolverPP().order == 2 and Heun().churn == 0 and LMS().order == 4


@pytest.mark.parametrize("sampler", [Ancestral, DDIM, DPMSolverPP, Euler, Heun, LMS, UniPC])
def test_wrong_numbers_of_steps_are_refused(sampler):
    for steps in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match=f"steps = {steps}: .* integer >= 1"):
            sampler(steps)
    with pytest.raises(ValueError, match=r"steps = 101 is more than the schedule's T = 100; allowed: 1\.\.100"):
        sampler(101, grid="integer")(linear(100), lambda x, t: pytest.fail("called"), torch.zeros(1, 1))


# --- The loop


class Spy(SampleNoise):
    """Keyed noise that keeps which draws were asked for."""

    def __init__(self, *args):
        super().__init__(*args)
        self.draws = []

    def __call__(self, draw, *args):
        self.draws.append(draw)
        return super().__call__(draw, *args)


@pytest.mark.parametrize(
    ("sampler", "T", "times"),
    [
        (Ancestral(7), 100, [100, 86, 71, 57, 43, 29, 14, 0]),
        (DDIM(7, 0.5), 100, [100, 86, 71, 57, 43, 29, 14, 0]),
        (Ancestral(), 4, [4, 3, 2, 1, 0]),
        (DPMSolverPP(7, 1, "sde"), 100, [100, 86, 71, 57, 43, 29, 14, 0]),
    ],
)
def test_the_loop_step_by_step(sampler, T, times):
    """Callback and network see every (t, s, x_t); each x_t is the `step` of the one before; the end is D(x_t, t)."""
    schedule = linear(T, rescale=False)
    oracle, noise, calls, seen = GaussianOracle(schedule, 0.7, 0.25, frac=1.0), Spy(3, [4, 9]), [], []

    def denoise(x_t, t):
        assert t.shape == (2,) and t.dtype == torch.int64
        seen.append((t.tolist(), x_t))
        return oracle.denoise(x_t, t)

    x_T = noise.x_T((1, 2, 2))
    x_0 = sampler(schedule, denoise, x_T, generator=noise, callback=lambda *args: calls.append(args))

    steps = len(times) - 1
    assert [call[:3] for call in calls] == [(i, times[i], times[i + 1]) for i in range(steps)]
    assert [t for t, _ in seen] == [[t, t] for t in times[:-1]]
    assert noise.draws == list(range(steps))  # x_T, one a step, and none for the last
    assert torch.equal(calls[0][3], x_T)
    again = SampleNoise(3, [4, 9])
    for (i, t, s, x_t, pred), (_, shown) in zip(calls, seen, strict=True):
        assert torch.equal(x_t, shown) and torch.equal(pred.x_0, oracle.denoise(x_t, t).x_0)
        if s > 0:
            expected = sampler.step(Step(schedule, denoise, x_t, t, s, pred, [], again(i + 1, (1, 2, 2))))
            assert torch.equal(calls[i + 1][3], expected)
    assert torch.equal(x_0, calls[-1][4].x_0)


@pytest.mark.parametrize(
    "sampler", [Ancestral(1), DDIM(1), DDIM(1, 1.0), DPMSolverPP(1, 1), Heun(1), LMS(1, 1), UniPC(1, 1)]
)
def test_one_step_is_the_denoiser_at_T(sampler, oracle):
    x_T = torch.randn(3, 2)
    x_0 = sampler(oracle.schedule, oracle.denoise, x_T, generator=Spy(0, []))
    assert torch.equal(x_0, oracle.denoise(x_T, 1000).x_0)


def test_the_step_to_0_is_the_denoiser_itself(schedule):
    """So the loop, which returns pred.x_0 there, leaves the method unchanged. (Ancestral: its mean, for no noise.)"""
    x_t, eps, x_0, noise = torch.randn(4, 5, dtype=torch.float64)
    for sampler, z in ((Ancestral(), 0 * noise), (DDIM(), noise), (DDIM(eta=1.0), noise)):
        x_s = sampler.step(Step(schedule, None, x_t, 20, 0, Prediction(eps, x_0), [], z))
        torch.testing.assert_close(x_s, x_0, rtol=1e-14, atol=0)


def test_a_deterministic_sampler_draws_nothing(oracle):
    before, x_T = torch.get_rng_state(), torch.zeros(2, 3)
    noise = Spy(0, [0, 1])
    DDIM(5)(oracle.schedule, oracle.denoise, x_T, generator=noise)
    DDIM(5)(oracle.schedule, oracle.denoise, x_T)
    assert noise.draws == [] and torch.equal(torch.get_rng_state(), before)
    assert not DDIM().stochastic and DDIM(eta=0.1).stochastic and Ancestral().stochastic


def test_step_noise_comes_from_the_generator_that_is_given(oracle):
    x_T = torch.zeros(2, 3)

    def draw(generator):
        return Ancestral(5)(oracle.schedule, oracle.denoise, x_T, generator=generator)

    before = torch.get_rng_state()
    first, again, other = (draw(torch.Generator().manual_seed(n)) for n in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(draw(None), first)  # torch's global one


@pytest.mark.parametrize("history", [0, 1, 2])
def test_past_holds_the_last_predictions_newest_last(history, oracle):
    record = []

    class Multistep(Sampler):
        def step(self, step):
            assert step.noise is None
            record.append([(u, p) for u, p in step.past])
            return step.x_t

    Multistep.history, preds = history, {}
    Multistep(5)(
        oracle.schedule, oracle.denoise, torch.ones(1, 1), callback=lambda i, t, s, x_t, pred: preds.update({t: pred})
    )
    times = [1000, 800, 600, 400]  # no step from 200: it ends at 0
    expected = [times[max(0, i - history) : i] for i in range(4)]
    assert [[t for t, _ in past] for past in record] == expected
    assert all(pred is preds[t] for past in record for t, pred in past)


def test_sampling_builds_no_graph():
    weight = torch.ones(1, requires_grad=True)
    x_0 = DDIM(3)(linear(100), lambda x, t: Prediction(weight * x, weight * x), torch.ones(1, 1))
    assert not x_0.requires_grad


# --- Keyed noise


@pytest.mark.parametrize(
    "sampler",
    [
        Ancestral(20),
        DDIM(20, 0.7),
        DPMSolverPP(10),
        DPMSolverPP(10, kind="sde"),
        DPMSolverPP(10, kind="singlestep", grid="continuous"),
        Heun(10, churn=5.0, grid="continuous"),
        LMS(10),
        UniPC(10),
    ],
)
def test_the_batch_size_never_changes_a_sample(sampler, oracle):
    def samples(indices):
        noise = SampleNoise(5, indices)
        return sampler(oracle.schedule, oracle.denoise, noise.x_T((1, 4, 4)), generator=noise)

    whole = samples(range(8))
    for size in (1, 3, 8):
        batches = [samples(range(start, min(start + size, 8))) for start in range(0, 8, size)]
        assert torch.equal(torch.cat(batches), whole)
    assert torch.equal(samples([6, 2]), whole[[6, 2]])
    assert len({tuple(x.flatten().tolist()) for x in whole}) == 8


def test_keyed_noise_for_another_number_of_samples_is_refused(oracle):
    """One row would broadcast over the batch, and all samples would share their noise."""
    with pytest.raises(ValueError, match=r"\b1\b.*\b8\b"):
        Ancestral(20)(oracle.schedule, oracle.denoise, torch.randn(8, 2), generator=SampleNoise(0, [0]))


@pytest.mark.parametrize("grid", ["integer", "continuous"])
def test_sampling_follows_x_T_to_its_device_and_dtype(schedule, device, grid):
    samplers = [
        Ancestral(3, grid=grid),
        DDIM(3, grid=grid),
        DDIM(3, 1.0, grid=grid),
        DPMSolverPP(4, 3, grid=grid),
        DPMSolverPP(3, kind="singlestep", grid=grid),
        DPMSolverPP(3, kind="sde", grid=grid),
        Heun(3, churn=1.0 if grid == "continuous" else 0.0, grid=grid),
        LMS(4, grid=grid),
        UniPC(4, 3, grid=grid),
    ]
    for sampler, noise in itertools.product(samplers, [None, SampleNoise(0, [0, 1])]):
        x = torch.zeros(2, 3, device=device, dtype=torch.float64)
        shapes = []
        x_0 = sampler(
            schedule,
            lambda x, t: Prediction(x, x + t[:, None]),
            x,
            generator=noise,
            callback=lambda i, t, s, x_t, pred, shapes=shapes: shapes.append((x_t.device.type, x_t.dtype)),
        )
        assert x_0.device.type == device and shapes == [(device, torch.float64)] * sampler.steps
