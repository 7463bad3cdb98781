"""ddpm/samplers: every solver's formula, its order on exact flows, its limits, and where schedules end."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import GaussianOracle, MixtureOracle, propagate

from ddpm.randomness import SampleNoise
from ddpm.samplers import DDIM, LMS, PLMS, Ancestral, DPMSolverPP, Euler, Heun, Step, UniPC, integrate, interpolate
from ddpm.samplers.plms import transfer
from ddpm.schedules import cosine, linear, zero_terminal_snr
from ddpm.targets import Prediction

MIXTURE = ([0.3, 0.7], [-0.8, 0.6], [0.04, 0.01])  # weights, means, variances
TIMES = [900, 650, 430, 200]  # three steps of history, then from 200 on, unevenly
X_T = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)


def dpm(schedule, t):
    """alpha_t, sigma_t, lambda_t of the DPM-Solver papers."""
    alpha_bar = schedule.alpha_bar_at(t).item()
    return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar), 0.5 * math.log(alpha_bar / (1 - alpha_bar))


def exact_for_x_0(schedule, x_t, t, s, x_0):
    """The flow from t to s where x_0 is a known function of lambda: variation of constants, by quadrature."""
    (_, sigma_t, l_t), (_, sigma_s, l_s) = dpm(schedule, t), dpm(schedule, s)
    points, weights = np.polynomial.legendre.leggauss(24)
    at = (l_t + l_s) / 2 + (l_s - l_t) / 2 * points
    integral = sum(w * math.exp(u) * x_0(u) for w, u in zip(weights * (l_s - l_t) / 2, at, strict=True))
    return sigma_s / sigma_t * x_t + sigma_s * integral


def of_x_0(schedule, x_0, times):
    """[(t, prediction)] for an x_0 that is a function of lambda; eps must not matter."""
    return [(t, Prediction(torch.full((2,), math.nan, dtype=torch.float64), x_0(dpm(schedule, t)[2]))) for t in times]


# --- DPM-Solver++


@pytest.mark.equation("DPM-Solver++ (order 1)")
def test_dpm_solver_order_1_is_ddim(schedule):
    mixture = MixtureOracle(schedule, *MIXTURE)
    for steps, grid in [(7, "integer"), (40, "continuous")]:
        ddim = DDIM(steps, grid=grid)(schedule, mixture.denoise, X_T[:, None])
        for kind in ("multistep", "singlestep"):
            ours = DPMSolverPP(steps, 1, kind, grid=grid)(schedule, mixture.denoise, X_T[:, None])
            torch.testing.assert_close(ours, ddim, rtol=0, atol=1e-12)
    x_t, x_0 = torch.randn(2, 5, dtype=torch.float64)
    (_, sigma_t, l_t), (alpha_s, sigma_s, l_s) = dpm(schedule, 700), dpm(schedule, 300)
    expected = sigma_s / sigma_t * x_t - alpha_s * (math.exp(l_t - l_s) - 1) * x_0
    x_s = DPMSolverPP(order=1).step(Step(schedule, None, x_t, 700, 300, Prediction(x_t, x_0), [], None))
    torch.testing.assert_close(x_s, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.equation("DPM-Solver++ (Algorithm 2)")
@pytest.mark.parametrize("s", [120, 150.5])
def test_2M_term_by_term(schedule, s):
    x_t, x_0, x_0_before, eps = torch.randn(4, 5, dtype=torch.float64)
    (_, _, l_1), (_, sigma_t, l_t), (alpha_s, sigma_s, l_s) = (dpm(schedule, t) for t in (430, 200, s))
    h, h_before = l_s - l_t, l_t - l_1
    r = h_before / h
    D = (1 + 1 / (2 * r)) * x_0 - 1 / (2 * r) * x_0_before
    expected = sigma_s / sigma_t * x_t - alpha_s * (math.exp(-h) - 1) * D
    past = [(430, Prediction(eps, x_0_before))]
    x_s = DPMSolverPP(order=2).step(Step(schedule, None, x_t, 200, s, Prediction(eps, x_0), past, None))
    torch.testing.assert_close(x_s, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.equation("DPM-Solver++ (Algorithm 1)")
@pytest.mark.parametrize(
    ("t", "s", "m"), [(430, 200, 315), (431, 200, 315), (3, 1, 2), (3.5, 1.0, 2.25), (2.0, 1.0, 1.5)]
)
def test_2S_term_by_term(schedule, t, s, m):
    x_t, x_0, x_0_m, eps = torch.randn(4, 2, 3, dtype=torch.float64)
    (_, sigma_t, l_t), (alpha_m, sigma_m, l_m), (alpha_s, sigma_s, l_s) = (dpm(schedule, u) for u in (t, m, s))
    h = l_s - l_t
    r = (l_m - l_t) / h

    def denoise(u, time):
        assert time.tolist() == [m, m]
        torch.testing.assert_close(
            u, sigma_m / sigma_t * x_t - alpha_m * (math.exp(-r * h) - 1) * x_0, rtol=0, atol=1e-11
        )
        return Prediction(eps, x_0_m)

    D = (1 - 1 / (2 * r)) * x_0 + 1 / (2 * r) * x_0_m
    expected = sigma_s / sigma_t * x_t - alpha_s * (math.exp(-h) - 1) * D
    x_s = DPMSolverPP(kind="singlestep").step(Step(schedule, denoise, x_t, t, s, Prediction(eps, x_0), [], None))
    torch.testing.assert_close(x_s, expected, rtol=1e-11, atol=1e-11)
    assert DPMSolverPP(kind="singlestep").calls(schedule, t, s) == 2


def test_2S_has_no_middle_between_neighbouring_integers(schedule):
    x_t, x_0, eps = torch.randn(3, 5, dtype=torch.float64)
    given = (schedule, None, x_t, 8, 7, Prediction(eps, x_0), [], None)
    assert torch.equal(DPMSolverPP(kind="singlestep").step(Step(*given)), DPMSolverPP(order=1).step(Step(*given)))


@pytest.mark.equation("DPM-Solver++ (3M)")
@pytest.mark.parametrize("s", [120, 199, 150.5])
def test_3M_is_exact_where_x_0_is_a_parabola_in_lambda(schedule, s):
    a, b, c, x_t = torch.randn(4, 2, dtype=torch.float64)
    parabola = lambda u: a + b * u + c * u**2  # noqa: E731
    *past, (_, pred) = of_x_0(schedule, parabola, TIMES)
    x_s = DPMSolverPP(order=3).step(Step(schedule, None, x_t, 200, s, pred, past[-2:], None))
    torch.testing.assert_close(x_s, exact_for_x_0(schedule, x_t, 200, s, parabola), rtol=1e-9, atol=1e-10)


@pytest.mark.equation("DPM-Solver++ (SDE)")
def test_the_sde_solver_term_by_term_and_order_1_is_ancestral_sampling(schedule):
    x_t, x_0, x_0_before, eps, z = torch.randn(5, 5, dtype=torch.float64)
    (_, _, l_1), (_, sigma_t, l_t), (alpha_s, sigma_s, l_s) = (dpm(schedule, t) for t in (430, 200, 120))
    h = l_s - l_t
    r = (l_t - l_1) / h
    gain = alpha_s * (1 - math.exp(-2 * h))
    expected = sigma_s / sigma_t * math.exp(-h) * x_t + gain * x_0 + gain / (2 * r) * (x_0 - x_0_before)
    expected = expected + sigma_s * math.sqrt(1 - math.exp(-2 * h)) * z
    past = [(430, Prediction(eps, x_0_before))]
    x_s = DPMSolverPP(kind="sde").step(Step(schedule, None, x_t, 200, 120, Prediction(eps, x_0), past, z))
    torch.testing.assert_close(x_s, expected, rtol=1e-11, atol=1e-12)

    mixture, noise = MixtureOracle(schedule, *MIXTURE, frac=0.0), SampleNoise(0, range(7))
    ours = DPMSolverPP(40, 1, "sde")(schedule, mixture.denoise, X_T[:, None], generator=noise)
    ancestral = Ancestral(40)(schedule, mixture.denoise, X_T[:, None], generator=noise)
    torch.testing.assert_close(ours, ancestral, rtol=0, atol=1e-12)


# --- EDM


@pytest.mark.equation("EDM (Algorithm 1)")
@pytest.mark.parametrize(("t", "s"), [(1000, 700), (430, 200), (2, 1), (300.25, 12.5)])
def test_heun_is_the_papers_algorithm_in_the_papers_coordinates(schedule, t, s):
    """x / alpha_t, the noise level sigma / alpha, and D as printed."""
    oracle = MixtureOracle(schedule, *MIXTURE)
    (alpha_t, sigma_t, _), (alpha_s, sigma_s, _) = dpm(schedule, t), dpm(schedule, s)
    level_t, level_s = sigma_t / alpha_t, sigma_s / alpha_s
    x = X_T / alpha_t
    d = (x - oracle.denoise(X_T, t).x_0) / level_t
    x_next = x + (level_s - level_t) * d
    euler = alpha_s * x_next
    d_next = (x_next - oracle.denoise(alpha_s * x_next, s).x_0) / level_s
    x_next = x + (level_s - level_t) * (0.5 * d + 0.5 * d_next)
    given = (schedule, oracle.denoise, X_T, t, s, oracle.denoise(X_T, t), [], None)
    torch.testing.assert_close(Euler().step(Step(*given)), euler, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(Heun().step(Step(*given)), alpha_s * x_next, rtol=1e-10, atol=1e-10)


def test_euler_is_ddim(schedule):
    mixture = MixtureOracle(schedule, *MIXTURE)
    for steps in (3, 40):
        samplers = (make(steps, spacing="uniform", grid="integer") for make in (Euler, DDIM))
        ours, ddim = (sampler(schedule, mixture.denoise, X_T[:, None]) for sampler in samplers)
        torch.testing.assert_close(ours, ddim, rtol=0, atol=1e-12)


@pytest.mark.equation("EDM (Algorithm 2)")
@pytest.mark.parametrize(("churn", "steps"), [(2.0, 40), (60.0, 40)])  # below and above the bound sqrt(2) - 1
def test_churn_raises_the_noise_level_as_printed(schedule, churn, steps):
    x_t, z = torch.randn(2, 5, dtype=torch.float64)
    sampler = Heun(steps, churn=churn, S_min=0.05, S_max=50.0, S_noise=1.003, grid="continuous")
    for t in (600.0, 211.7, 30.0):
        alpha_t, sigma_t, _ = dpm(schedule, t)
        level = sigma_t / alpha_t
        gamma = min(churn / steps, math.sqrt(2) - 1)
        raised = level + gamma * level
        x, t_hat = sampler.perturb(schedule, x_t, t, z, steps)
        alpha_hat, sigma_hat, _ = dpm(schedule, t_hat)
        assert t_hat > t and sigma_hat / alpha_hat == pytest.approx(raised, rel=1e-9)
        expected = x_t / alpha_t + math.sqrt(raised**2 - level**2) * 1.003 * z
        torch.testing.assert_close(x / alpha_hat, expected, rtol=1e-9, atol=1e-9)
    for t in (3.0, 999.0):  # outside [S_min, S_max]
        x, t_hat = sampler.perturb(schedule, x_t, t, z, steps)
        assert t_hat == t and x is x_t
    assert Euler(churn=churn, grid="continuous").perturb(schedule, x_t, 1000.0, z, steps)[1] == 1000  # T is the top
    top = Euler(churn=churn, grid="continuous").perturb(schedule, x_t, 999.5, z, steps)[1]
    assert 999.5 < top <= 1000


@pytest.mark.parametrize("make", [Euler, Heun])
def test_churn_keeps_the_distribution(make):
    """Of a single point every marginal stays exact; of Gaussian data in the limit of many steps."""
    point = GaussianOracle(linear(100), 0.7, 0.0)
    sampler = make(12, churn=3.0, grid="continuous")
    for s, mean, variance in propagate(sampler, point, *point.marginal(100))[:-1]:
        expected_mean, expected_variance = point.marginal(s)
        assert (mean, variance) == (pytest.approx(expected_mean, rel=1e-9), pytest.approx(expected_variance, rel=1e-9))
    louder = propagate(make(12, churn=3.0, S_noise=1.1, grid="continuous"), point, *point.marginal(100))[-2]
    assert louder[2] > 1.05 * point.marginal(louder[0])[1]


def test_the_loop_steps_from_where_churn_ended(oracle):
    calls, noise = [], SampleNoise(2, range(3))
    sampler = Heun(8, churn=2.0, grid="continuous")
    x_T = noise.x_T((2,)).double()
    x_0 = sampler(oracle.schedule, oracle.denoise, x_T, generator=noise, callback=lambda *call: calls.append(call))
    times = sampler.times(oracle.schedule)
    x = x_T
    for i, (t, s, x_t, pred) in enumerate(call[1:] for call in calls):
        planned = times[i]
        if s > 0:
            x, t_hat = sampler.perturb(oracle.schedule, x, planned, noise(i + 1, (2,)).double(), 8)
            assert t == t_hat and (t > planned or i == 0)
        assert torch.equal(x, x_t) and torch.equal(pred.x_0, oracle.denoise(x_t, t).x_0)
        x = x_0 if s == 0 else sampler.step(Step(oracle.schedule, oracle.denoise, x_t, t, s, pred, [], None))
    assert torch.equal(x, calls[-1][4].x_0) and len(calls) == 8
    still = Heun(8, churn=2.0, S_min=1e6, grid="continuous")(oracle.schedule, oracle.denoise, x_T, generator=noise)
    assert torch.equal(still, Heun(8, grid="continuous")(oracle.schedule, oracle.denoise, x_T))


# --- LMS


@pytest.mark.equation("k-diffusion (LMS)")
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("s", [120, 60.5])
def test_lms_is_exact_where_eps_is_a_polynomial_in_sigma(schedule, order, s):
    coefficients, x_0 = torch.randn(order, 2, dtype=torch.float64), torch.randn(2, dtype=torch.float64)

    def level(t):
        alpha, sigma, _ = dpm(schedule, t)
        return sigma / alpha

    def eps(t):
        return sum(c * level(t) ** k for k, c in enumerate(coefficients))

    def primitive(t):
        return sum(c * level(t) ** (k + 1) / (k + 1) for k, c in enumerate(coefficients))

    alpha_t, sigma_t, _ = dpm(schedule, 200)
    x_t = alpha_t * x_0 + sigma_t * eps(200)
    past = [(t, Prediction(eps(t), torch.full_like(x_0, math.nan))) for t in TIMES[:-1]][4 - order :]
    x_s = LMS(order=order).step(Step(schedule, None, x_t, 200, s, Prediction(eps(200), x_0), past, None))
    expected = dpm(schedule, s)[0] * (x_t / alpha_t + primitive(s) - primitive(200))
    torch.testing.assert_close(x_s, expected, rtol=1e-10, atol=1e-11)


# --- PLMS


@pytest.mark.equation("PNDM (11)")
@pytest.mark.parametrize("s", [120, 60.5])
def test_the_transfer_of_pndm_is_exact_where_eps_is_constant(schedule, s):
    """The flow is a straight line in x / alpha over sigma / alpha."""
    x_t, eps = torch.randn(2, 5, dtype=torch.float64)
    (alpha_t, sigma_t, _), (alpha_s, sigma_s, _) = dpm(schedule, 430), dpm(schedule, s)
    expected = alpha_s * (x_t / alpha_t + (sigma_s / alpha_s - sigma_t / alpha_t) * eps)
    torch.testing.assert_close(transfer(schedule, x_t, eps, 430, s), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.equation("PNDM (Adams-Bashforth)")
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_plms_takes_the_mean_of_eps_over_the_step_where_it_is_a_polynomial_in_t(schedule, order):
    """Of equal steps: the mean of the polynomial of degree order - 1 through the predictions, by its primitive."""
    coefficients, x_t = torch.randn(order, 2, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    eps = lambda t: sum(c * (t / 100) ** k for k, c in enumerate(coefficients))  # noqa: E731
    primitive = lambda t: sum(c * (t / 100) ** (k + 1) / (k + 1) * 100 for k, c in enumerate(coefficients))  # noqa: E731
    past = [(t, Prediction(eps(t), torch.full_like(x_t, math.nan))) for t in (500, 400, 300)][4 - order :]
    pred = Prediction(eps(200), torch.full_like(x_t, math.nan))
    x_s = PLMS(order=order).step(Step(schedule, None, x_t, 200, 100, pred, past, None))
    expected = transfer(schedule, x_t, (primitive(100) - primitive(200)) / -100, 200, 100)
    torch.testing.assert_close(x_s, expected, rtol=1e-10, atol=1e-11)


def test_plms_starts_with_an_improved_step_of_euler_which_is_counted(schedule):
    mixture, asked = MixtureOracle(schedule, *MIXTURE), []

    def denoise(x_t, t):
        asked.append(t.flatten()[0].item())
        return mixture.denoise(x_t, t)

    sampler, seen = PLMS(times=[900, 650, 430, 200]), []
    sampler(schedule, denoise, X_T[:, None], callback=lambda i, t, s, x_t, pred: seen.append((x_t, pred.eps)))
    assert asked == [900, 650, 650, 430, 200] and sampler.evaluations(schedule) == 5
    (x, first), (x_1, second), (x_2, _), _ = seen
    there = mixture.denoise(transfer(schedule, x, first, 900, 650), 650).eps
    torch.testing.assert_close(x_1, transfer(schedule, x, (first + there) / 2, 900, 650), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x_2, transfer(schedule, x_1, (3 * second - first) / 2, 650, 430), rtol=1e-12, atol=1e-12)
    for walk, count in ((PLMS(1, 1), 1), (PLMS(7, 1), 7), (PLMS(7), 8), (PLMS(7).ending_at(1), 8)):
        asked.clear()
        walk(schedule, denoise, X_T[:, None])
        assert len(asked) == walk.evaluations(schedule) == count


# --- Walks that end above data


@pytest.mark.parametrize("make", [DDIM, PLMS, lambda **given: DPMSolverPP(order=2, **given)])
def test_a_walk_ends_where_it_is_told_by_a_step_of_its_own(schedule, make):
    mixture, times = MixtureOracle(schedule, *MIXTURE), [801, 601, 401, 201, 2]
    sampler = make(times=times).ending_at(1)
    assert sampler.times(schedule) == [*times, 1] and make(times=times).times(schedule) == [*times, 0]
    ours = sampler(schedule, mixture.denoise, X_T[:, None])
    expected = integrate(make(times=times), schedule, mixture.denoise, X_T[:, None], [*times, 1])
    assert torch.equal(ours, expected)
    assert (ours - make(times=times)(schedule, mixture.denoise, X_T[:, None])).abs().max() > 1e-4
    assert make(times=[801, 401, 201, 1]).ending_at(1).times(schedule) == [801, 401, 201, 1]
    with pytest.raises(ValueError, match="end = -1 must be an integer >= 0"):
        sampler.ending_at(-1)
    with pytest.raises(ValueError, match="hold none above the end of the walk, 5"):
        DDIM(times=[3, 1]).ending_at(5).times(schedule)


# --- UniPC


@pytest.mark.equation("UniPC (coefficients)")
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("s", [120, 60.5])
def test_unip_3_is_exact_where_x_0_is_a_parabola_in_lambda(schedule, variant, s):
    a, b, c, x_t = torch.randn(4, 2, dtype=torch.float64)
    parabola = lambda u: a + b * u + c * u**2  # noqa: E731
    *past, (_, pred) = of_x_0(schedule, parabola, TIMES)
    sampler = UniPC(order=3, variant=variant, corrector=False)
    x_s = sampler.step(Step(schedule, None, x_t, 200, s, pred, past, None))
    torch.testing.assert_close(x_s, exact_for_x_0(schedule, x_t, 200, s, parabola), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("order", [2, 3])
def test_unic_is_exact_where_x_0_is_a_polynomial_of_degree_p(schedule, order):
    """The step before, predicted with error, is put right; from there it is predicted on."""
    coefficients, x_u = torch.randn(order + 1, 2, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    polynomial = lambda u: sum(c * u**k for k, c in enumerate(coefficients))  # noqa: E731
    *past, now = of_x_0(schedule, polynomial, TIMES)
    (u, pred_u), (t, pred) = past[-1], now
    both, alone = UniPC(order=order), UniPC(order=order, corrector=False)
    predicted = alone.step(Step(schedule, None, x_u, u, t, pred_u, past[-order:-1], None))
    exact = exact_for_x_0(schedule, x_u, u, t, polynomial)
    assert (predicted - exact).abs().max() > 1e-4
    ours = both.step(Step(schedule, None, predicted, t, 120, pred, past[-order:], None))
    expected = alone.step(Step(schedule, None, exact, t, 120, pred, past[-order:], None))
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.equation("UniPC (data prediction)")
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_unipc_of_order_1_and_2_term_by_term(schedule, variant):
    """a_1 = 1/2: UniC-1 after UniP-1, and UniP-2."""
    x_t, x_0, x_0_u, eps = torch.randn(4, 5, dtype=torch.float64)
    (_, _, l_u), (alpha_t, sigma_t, l_t), (alpha_s, sigma_s, l_s) = (dpm(schedule, t) for t in (430, 200, 120))
    h_u, h = l_t - l_u, l_s - l_t
    B_u, B = (h_u, h) if variant == "bh1" else (1 - math.exp(-h_u), 1 - math.exp(-h))
    past, pred = [(430, Prediction(eps, x_0_u))], Prediction(eps, x_0)

    corrected = x_t + alpha_t * B_u * 0.5 * (x_0 - x_0_u)
    first = sigma_s / sigma_t * corrected - alpha_s * (math.exp(-h) - 1) * x_0
    x_s = UniPC(order=1, variant=variant).step(Step(schedule, None, x_t, 200, 120, pred, past, None))
    torch.testing.assert_close(x_s, first, rtol=1e-11, atol=1e-12)

    r = (l_u - l_t) / h
    second = sigma_s / sigma_t * x_t - alpha_s * (math.exp(-h) - 1) * x_0 + alpha_s * B * 0.5 / r * (x_0_u - x_0)
    sampler = UniPC(order=2, variant=variant, corrector=False)
    torch.testing.assert_close(
        sampler.step(Step(schedule, None, x_t, 200, 120, pred, past, None)), second, rtol=1e-11, atol=1e-12
    )


@pytest.mark.parametrize("order", [1, 2, 3])
def test_unip_alone_is_dpm_solver(schedule, order):
    mixture = MixtureOracle(schedule, *MIXTURE)
    ours = UniPC(30, order, "bh2", corrector=False)(schedule, mixture.denoise, X_T[:, None])
    theirs = DPMSolverPP(30, order)(schedule, mixture.denoise, X_T[:, None])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


# --- Orders

SOLVERS = {  # order on the flow from T to a fixed end, and how far the measured one may be from it
    "ddim": (DDIM, 1, 0.05),
    "euler": (lambda n: Euler(n, spacing="uniform", grid="integer"), 1, 0.05),
    "dpmpp_1": (lambda n: DPMSolverPP(n, 1), 1, 0.05),
    "dpmpp_2m": (lambda n: DPMSolverPP(n, 2), 2, 0.12),
    "dpmpp_2s": (lambda n: DPMSolverPP(n, 2, "singlestep"), 2, 0.12),
    "dpmpp_3m": (lambda n: DPMSolverPP(n, 3), 3, 0.25),
    "heun": (lambda n: Heun(n, spacing="uniform", grid="integer"), 2, 0.05),
    "lms_2": (lambda n: LMS(n, 2), 2, 0.15),
    "lms_3": (lambda n: LMS(n, 3), 3, 0.25),
    "lms_4": (LMS, 4, 0.35),
    "plms_1": (lambda n: PLMS(n, 1), 1, 0.05),
    "plms_2": (lambda n: PLMS(n, 2), 2, 0.15),
    "plms_4": (PLMS, 2, 0.15),
    "unipc_1": (lambda n: UniPC(n, 1), 2, 0.12),
    "unipc_2": (UniPC, 3, 0.1),
    "unipc_2_bh1": (lambda n: UniPC(n, 2, "bh1"), 3, 0.1),
    "unipc_3": (lambda n: UniPC(n, 3), 4, 0.2),
}
COUNTS = (100, 125, 160, 200)


def measured_order(make, oracle, spacing):
    """The slope of log error against log steps, from T to t = 1 on real times."""
    schedule, errors = oracle.schedule, []
    exact = oracle.exact_ode(X_T, schedule.T, 1)
    for n in COUNTS:
        times = DDIM(n + 1, spacing=spacing, grid="continuous").times(schedule)[:-1]
        assert len(times) == n + 1 and times[-1] == 1
        x = integrate(make(n), schedule, oracle.denoise, X_T, times)
        errors.append((x - exact).abs().max().item())
    return -np.polyfit(np.log(COUNTS), np.log(errors), 1)[0], errors[-1]


@pytest.mark.parametrize("name", SOLVERS)
def test_order_on_the_flow_of_gaussian_data(schedule, name):
    make, order, tolerance = SOLVERS[name]
    found, error = measured_order(make, GaussianOracle(schedule), "karras")
    print(f"{name}: order {found:.2f}, error {error:.1e}")
    assert found == pytest.approx(order, abs=tolerance) and error < (0.015 if order == 1 else 1e-3)


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "unipc_3"])
def test_order_on_the_flow_of_a_mixture(schedule, name):
    """unipc_3 apart: its error changes sign here, so that no slope can be read off; see the Gaussian."""
    make, order, tolerance = SOLVERS[name]
    found, error = measured_order(make, MixtureOracle(schedule, *MIXTURE), "log_snr")
    print(f"{name}: order {found:.2f}, error {error:.1e}")
    assert found == pytest.approx(order, abs=max(tolerance, 0.12) + 0.1) and error < (0.01 if order == 1 else 1e-3)


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "heun", "lms_4", "unipc_2"])
def test_order_on_the_cosine_schedule(name):
    make, order, _ = SOLVERS[name]
    found, _ = measured_order(make, GaussianOracle(cosine(1000)), "log_snr")
    assert found == pytest.approx(order, abs=0.35)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "order"),
    [
        (lambda n: DPMSolverPP(n, 1, "sde"), 1),
        (lambda n: DPMSolverPP(n, 2, "sde"), 2),
        (lambda n: Euler(n, churn=10.0, grid="continuous"), 1),
        (lambda n: Heun(n, churn=10.0, grid="continuous"), 2),
    ],
)
def test_weak_order_of_stochastic_solvers(oracle, make, order):
    """Exact moments at t = 1 against those of q(x_1): no statistics."""
    expected_mean, expected_variance = oracle.marginal(1)
    errors = []
    for n in COUNTS:
        times = DDIM(n + 1, spacing="log_snr", grid="continuous").times(oracle.schedule)[:-1]
        _, mean, variance = propagate(make(n), oracle, *oracle.marginal(1000), times=times)[-1]
        assert mean == pytest.approx(expected_mean, abs=1e-9)
        errors.append(abs(variance - expected_variance))
    found = -np.polyfit(np.log(COUNTS), np.log(errors), 1)[0]
    print(f"weak order {found:.2f}")
    assert found == pytest.approx(order, abs=0.15)


@pytest.mark.slow
def test_the_last_step_to_0_is_of_first_order_for_all(schedule):
    """x_0 - D(x_t, t) falls like 1 - alpha_bar_t, so a walk to 0 has an error that falls like 1 / steps at best."""
    oracle = GaussianOracle(schedule)
    x = X_T[:, None]
    exact = oracle.exact_ode(x, 1000, 0)
    errors, times = [], (8, 4, 2, 1)
    for t in times:
        x_t = oracle.exact_ode(x, 1000, t)
        errors.append((oracle.denoise(x_t, t).x_0 - exact).abs().max().item())
    assert np.polyfit(np.log(1 - schedule.alpha_bar[list(times)].numpy()), np.log(errors), 1)[0] == pytest.approx(
        1, abs=0.05
    )
    for name, (make, *_) in SOLVERS.items():
        error = [(make(n)(schedule, oracle.denoise, x) - exact).abs().max().item() for n in (100, 1000)]
        assert 0.2 * errors[-1] < error[1] < 3e-3 and error[1] < error[0], name


def test_stochastic_samples_have_the_propagated_moments():
    """Through the loop and its noise: within four standard errors of 20,000 samples."""
    oracle, n = GaussianOracle(linear(200), 0.7, 0.25), 20000
    for sampler in (DPMSolverPP(25, kind="sde"), Heun(25, churn=5.0, grid="continuous")):
        _, mean, variance = propagate(sampler, oracle)[-1]
        generator = torch.Generator().manual_seed(1)
        x_T = torch.randn(n, 1, dtype=torch.float64, generator=generator)
        x_0 = sampler(oracle.schedule, oracle.denoise, x_T, generator=generator)
        assert abs(x_0.mean().item() - mean) < 4 * math.sqrt(variance / n)
        assert abs(x_0.var().item() - variance) < 4 * variance * math.sqrt(2 / n)


# --- Where alpha_bar_T = 0


DETERMINISTIC = {**SOLVERS, "lms_1": (lambda n: LMS(n, 1), 1, 0)}


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_zero_terminal_snr_is_solved_with_a_first_step_in_closed_form(name):
    schedule = zero_terminal_snr(linear(1000))
    oracle, make = MixtureOracle(schedule, *MIXTURE), DETERMINISTIC[name][0]
    x_T = X_T[:, None]
    pred, seen = oracle.denoise(x_T, 1000), []
    x_0 = make(100)(schedule, oracle.denoise, x_T, callback=lambda i, t, s, x_t, pred: seen.append((t, x_t)))
    (_, start), (t, first) = seen[:2]
    alpha, sigma, _ = dpm(schedule, t)
    assert torch.equal(start, x_T) and t == 990
    torch.testing.assert_close(first, alpha * pred.x_0 + sigma * x_T, rtol=1e-12, atol=1e-12)
    assert (x_0 - oracle.exact_ode(x_T, 1000, 0)).abs().max() < (0.05 if DETERMINISTIC[name][1] == 1 else 0.025)
    for grid, steps in itertools.product(("integer", "continuous"), (4, 20)):
        sampler = make(steps)
        sampler.grid = grid
        x_0 = sampler(schedule, oracle.denoise, x_T.float())
        assert x_0.dtype == torch.float32 and x_0.isfinite().all()


def test_zero_terminal_snr_with_noise():
    oracle = GaussianOracle(zero_terminal_snr(linear(1000)))
    for sampler in (DPMSolverPP(400, 1, "sde"), DPMSolverPP(400, 2, "sde"), DDIM(400, 1.0), Ancestral(400)):
        walk = propagate(sampler, oracle)
        s, mean, variance = walk[0]
        alpha, sigma, _ = dpm(oracle.schedule, s)
        assert (mean, variance) == (pytest.approx(alpha * 0.7, rel=1e-9), pytest.approx(sigma**2, rel=1e-9))
        assert walk[-1][1:] == (pytest.approx(0.7, abs=1e-6), pytest.approx(0.25, abs=0.02))
    with pytest.raises(ValueError, match="churn = 1 needs a finite noise level at T, but beta_T = 1"):
        Heun(10, churn=1.0, grid="continuous").times(oracle.schedule)


# --- Precision


@pytest.mark.parametrize("name", SOLVERS)
def test_float32_follows_float64(schedule, name):
    oracle, make = MixtureOracle(schedule, *MIXTURE), SOLVERS[name][0]
    x_T = torch.randn(50, 1, dtype=torch.float64)
    for steps in (10, 100):
        exact, ours = (make(steps)(schedule, oracle.denoise, x) for x in (x_T, x_T.float()))
        assert ours.dtype == torch.float32
        assert (ours - exact).abs().median() < 2e-5 and (ours - exact).abs().max() < 5e-3


# --- Errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPMSolverPP(10, 4), "order = 4 is not known here; allowed: 1, 2, 3"),
        (lambda: DPMSolverPP(10, 3, "singlestep"), "order = 3 is not known here; allowed: 1, 2"),
        (lambda: DPMSolverPP(10, 3, "sde"), "order = 3 is not known here; allowed: 1, 2"),
        (lambda: DPMSolverPP(10, kind="ode"), "kind = 'ode' is not known; allowed: multistep, singlestep, sde"),
        (lambda: DPMSolverPP(2, 3), "order = 3 needs at least 3 steps, but steps = 2; .* order <= 2"),
        (lambda: DPMSolverPP(times=[1000], order=2), "order = 2 needs at least 2 steps, but steps = 1"),
        (lambda: LMS(10, 5), "order = 5 is not known here; allowed: 1, 2, 3, 4"),
        (lambda: LMS(3), "order = 4 needs at least 4 steps"),
        (lambda: PLMS(10, 5), "order = 5 is not known here; allowed: 1, 2, 3, 4"),
        (lambda: PLMS(3), "order = 4 needs at least 4 steps"),
        (lambda: UniPC(10, 4), "order = 4 is not known here"),
        (lambda: UniPC(1), "order = 2 needs at least 2 steps"),
        (lambda: UniPC(10, variant="bh3"), "variant = 'bh3' is not known; allowed: bh1, bh2"),
        (
            lambda: Heun(10, churn=1.0, grid="integer"),
            "churn = 1 raises t to times between integers; it needs grid=continuous",
        ),
        (lambda: Heun(10, churn=-1.0, grid="continuous"), "churn = -1 must be >= 0"),
        (lambda: Euler(10, churn=math.nan, grid="continuous"), "churn = nan must be >= 0"),
        (lambda: Euler(10, S_min=2.0, S_max=1.0), r"S_min = 2\.0 and S_max = 1\.0: 0 <= S_min < S_max"),
        (lambda: Euler(10, S_noise=0.0), "S_noise = 0 must be > 0"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- From images to noise and between them


@pytest.mark.slow
@pytest.mark.equation("DDIM (14)")
def test_encode_follows_the_flow_upwards_with_order_1(schedule):
    for oracle, x_0 in (
        (GaussianOracle(schedule), torch.linspace(-0.9, 2.1, 7, dtype=torch.float64)[:, None]),
        (MixtureOracle(schedule, *MIXTURE), torch.tensor([-1.0, -0.8, 0.55, 0.7], dtype=torch.float64)[:, None]),
    ):
        counts, errors, reconstructed = (50, 100, 200, 400), [], []
        for n in counts:
            ddim = DDIM(n, spacing="quadratic", grid="continuous")
            x_T = ddim.encode(schedule, oracle.denoise, x_0)
            errors.append((oracle.exact_ode(x_T, 1000, 0) - x_0).abs().max().item())
            reconstructed.append((ddim(schedule, oracle.denoise, x_T) - x_0).abs().max().item())
        for found in (errors, reconstructed):
            assert -np.polyfit(np.log(counts), np.log(found), 1)[0] == pytest.approx(1, abs=0.2)
        assert errors[-1] < 0.02 and reconstructed[-1] < 0.02


def test_encode_step_by_step(schedule):
    """Its own times, upwards: eps at the lowest one for the step from data, then Euler's step in sigma."""
    oracle, x_0 = MixtureOracle(schedule, *MIXTURE), X_T[:, None] / 2
    x_T = DDIM(4).encode(schedule, oracle.denoise, x_0)
    alpha, sigma, _ = dpm(schedule, 250)
    x_bar = x_0 + sigma / alpha * oracle.denoise(alpha * x_0, 250).eps
    for t, s in [(250, 500), (500, 750), (750, 1000)]:
        (alpha_t, sigma_t, _), (alpha_s, sigma_s, _) = dpm(schedule, t), dpm(schedule, s)
        x_bar = x_bar + (sigma_s / alpha_s - sigma_t / alpha_t) * oracle.denoise(alpha_t * x_bar, t).eps
    torch.testing.assert_close(x_T, dpm(schedule, 1000)[0] * x_bar, rtol=0, atol=1e-10)
    zero = zero_terminal_snr(schedule)
    assert DDIM(20).encode(zero, MixtureOracle(zero, *MIXTURE).denoise, x_0).isfinite().all()
    assert DDIM(1).encode(schedule, oracle.denoise, x_0).isfinite().all()
    with pytest.raises(ValueError, match=r"eta = 0\.5: only the ODE"):
        DDIM(4, eta=0.5).encode(schedule, oracle.denoise, x_0)


@pytest.mark.equation("DDIM (App. D.5)")
def test_interpolation_runs_along_the_arc():
    x_a, x_b = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    x_b = x_b * x_a.norm() / x_b.norm()
    arc = interpolate(x_a, x_b, 9)
    assert arc.shape == (9, 3, 4, 4)
    torch.testing.assert_close(arc[[0, -1]], torch.stack([x_a, x_b]), rtol=0, atol=1e-12)
    norms = arc.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, norms[:1].expand(9), rtol=1e-12, atol=0)
    steps = (arc[1:].flatten(1) * arc[:-1].flatten(1)).sum(1) / norms[0] ** 2  # cosines of equal angles
    torch.testing.assert_close(steps, steps[:1].expand(8), rtol=1e-12, atol=0)
    torch.testing.assert_close(interpolate(x_a, 2 * x_a, 3)[1], 1.5 * x_a)  # no arc: the line
    assert interpolate(x_a.float(), x_b.float(), 2).dtype == torch.float32
    other = torch.randn(3, 4, 4, dtype=torch.float64)
    theta = math.acos((x_a * other).sum().item() / (x_a.norm() * other.norm()).item())
    expected = (math.sin(0.75 * theta) * x_a + math.sin(0.25 * theta) * other) / math.sin(theta)
    torch.testing.assert_close(interpolate(x_a, other, 5)[1], expected, rtol=1e-11, atol=1e-12)


def test_interpolation_refuses_what_it_cannot_join():
    with pytest.raises(ValueError, match=r"shapes \(2,\) and \(3,\)"):
        interpolate(torch.zeros(2), torch.zeros(3), 4)
    for k in (1, 2.5, True):
        with pytest.raises(ValueError, match="at least 2 latents"):
            interpolate(torch.zeros(2), torch.ones(2), k)
