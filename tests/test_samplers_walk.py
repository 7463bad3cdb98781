"""ddpm/samplers/base.py: walks that go up again and x_t that is changed on the way, in closed form."""

import itertools
import math
from typing import Any

import pytest
import torch
from conftest import GaussianOracle, Probes
from test_samplers import Spy
from torch import Tensor

from ddpm.forward import q_sample, q_step, transition
from ddpm.randomness import SampleNoise
from ddpm.samplers import DDIM, LMS, Ancestral, DPMSolverPP, Euler, Heun, Sampler, Step, UniPC, integrate
from ddpm.schedules import cosine, linear, zero_terminal_snr
from ddpm.targets import Prediction

WALK = [1000, 800, 600, 1000, 800, 600, 400, 200, 600, 400, 200, 400, 200, 0]  # as RePaint's: up by one step, or two
ONCE = [1000, 800, 600, 400, 700, 500, 300, 100]
UPS = [i for i, (t, s) in enumerate(itertools.pairwise(WALK)) if s > t]
MULTISTEP = {
    "2M": DPMSolverPP(order=2),
    "3M": DPMSolverPP(order=3),
    "sde 2M": DPMSolverPP(kind="sde"),
    "lms": LMS(),
    "unipc": UniPC(order=3),
}


def moments(
    sampler: Sampler, oracle: GaussianOracle, times: list[int] | list[float], mean: float, variance: float
) -> list[tuple[float, float]]:
    """Exact mean and variance of x at every time but the first, from N(mean, variance), no chance involved.

    On Gaussian data all of a walk is affine, up and down: a probe for each source of noise tells all of it.
    """
    noise, found = Probes(len(times) - 1), []
    for n in range(2, len(times) + 1):
        x_T, walk = noise.x_T((1,)), {"generator": noise, "renoise": True}
        x = integrate(sampler, oracle.schedule, oracle.denoise, x_T, times[:n], **walk)
        shift, slope = x[0].item(), (x - x[0]).flatten().tolist()
        found.append((shift + slope[1] * mean, slope[1] ** 2 * variance + sum(k**2 for k in slope[2:])))
    return found


class Counter:
    """An oracle's denoiser that keeps (t, x_t) of every evaluation."""

    def __init__(self, oracle: GaussianOracle):
        self.oracle, self.seen = oracle, []

    def __call__(self, x_t: Tensor, t: Tensor) -> Prediction:
        self.seen.append((t[0].item(), x_t))
        return self.oracle.denoise(x_t, t)


# --- Up by the forward process


@pytest.mark.parametrize("make", [linear, cosine])
@pytest.mark.parametrize("times", [WALK, [t - 0.25 for t in WALK[:-1]]], ids=["integer", "real"])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_every_marginal_of_a_walk_with_ups_is_exact_on_a_single_point(make, times, eta):
    """DDIM's are, down; then those after an up are q_sample's too, and the next ones down from there."""
    oracle = GaussianOracle(make(1000), 0.7, 0.0)
    found = moments(DDIM(eta=eta), oracle, times, *oracle.marginal(times[0]))
    for s, (mean, variance) in zip(times[1:], found, strict=True):
        expected_mean, expected_variance = oracle.marginal(s)
        assert mean == pytest.approx(expected_mean, rel=1e-10)
        assert variance == pytest.approx(expected_variance, rel=1e-10, abs=1e-20)


class TrueVariance(GaussianOracle):
    """Answers the reverse variance that is exact on Gaussian data: beta_tilde + c^2 Var[x_0 | x_t], each step 200."""

    def denoise(self, x_t, t):
        pred = super().denoise(x_t, t)
        bar_t, bar_s, _, beta = (c.item() for c in transition(self.schedule, int(t[0]), int(t[0]) - 200))
        beta_tilde = (1 - bar_s) / (1 - bar_t) * beta
        if beta_tilde == 0:
            return pred
        exact = beta_tilde + bar_s * beta**2 / (1 - bar_t) ** 2 * self.x_0_variance(int(t[0]))
        return Prediction(pred.eps, pred.x_0, math.log(exact / beta_tilde) / math.log(beta / beta_tilde))


@pytest.mark.parametrize("make", [linear, cosine])
def test_ancestral_sampling_with_the_true_variance_keeps_every_marginal_up_and_down(make):
    oracle = TrueVariance(make(1000), 0.7, 0.25)
    found = moments(Ancestral(), oracle, WALK, *oracle.marginal(1000))
    for s, (mean, variance) in zip(WALK[1:-1], found, strict=False):
        assert (mean, variance) == pytest.approx(oracle.marginal(s), rel=1e-9)
    assert found[-1] == pytest.approx((0.7, 0.25 - oracle.x_0_variance(200)), rel=1e-9)  # E[x_0 | x_t] is drawn


@pytest.mark.parametrize(
    "sampler",
    [Ancestral(), DDIM(), DDIM(eta=0.5), Euler(), Heun(), DPMSolverPP(kind="singlestep"), *MULTISTEP.values()],
    ids=lambda sampler: type(sampler).__name__,
)
def test_an_up_keeps_the_signal_and_adds_what_noise_is_missing(sampler, oracle):
    """From N(m, v) at t to N(a m, a^2 v + 1 - a^2) at s, a^2 = alpha_bar_s / alpha_bar_t, whatever came before."""
    found = moments(sampler, oracle, WALK, 0.0, 1.0)
    for i in UPS:
        kept = (oracle.schedule.alpha_bar[WALK[i + 1]] / oracle.schedule.alpha_bar[WALK[i]]).item()
        (mean, variance), after = found[i - 1], found[i]
        assert after == pytest.approx((math.sqrt(kept) * mean, kept * variance + 1 - kept), rel=1e-10)


def test_a_walk_that_starts_at_data_is_noised_as_by_q_sample(oracle):
    x_0, noise = torch.randn(3, 2), SampleNoise(1, range(3))
    for t in (600, 600.5):
        x_t = integrate(DDIM(), oracle.schedule, None, x_0, [0, t], generator=noise, renoise=True)
        assert torch.equal(x_t, q_sample(oracle.schedule, x_0, t, noise(1, (2,))))


def test_to_a_time_of_pure_noise_nothing_is_left():
    schedule, noise = zero_terminal_snr(linear(100)), SampleNoise(1, range(3))
    x_T = integrate(DDIM(), schedule, None, torch.randn(3, 2), [40, 100], generator=noise, renoise=True)
    assert torch.equal(x_T, noise(1, (2,)))


@pytest.mark.parametrize("name", MULTISTEP)
def test_after_an_up_a_multistep_method_starts_anew(name, oracle):
    """As two walks with a step of the forward process between them; the first step after it is of order 1."""
    sampler, schedule = MULTISTEP[name], oracle.schedule
    noise, x_T, calls = SampleNoise(2, range(3)), torch.randn(3, 2, dtype=torch.float64), []
    whole = integrate(
        sampler,
        schedule,
        oracle.denoise,
        x_T,
        ONCE,
        generator=noise,
        renoise=True,
        callback=lambda *call: calls.append(call),
    )

    def walked(x: Tensor, start: int, times: list[int]) -> Tensor:
        past = []
        for i, (t, s) in enumerate(itertools.pairwise(times), start):
            pred, z = oracle.denoise(x, t), noise(i + 1, (2,)).double() if sampler.stochastic else None
            x, past = sampler.step(Step(schedule, None, x, t, s, pred, past, z)), [*past, (t, pred)][-sampler.history :]
        return x

    up = q_step(schedule, walked(x_T, 0, ONCE[:4]), 700, noise(4, (2,)).double(), 400)
    assert torch.equal(whole, walked(up, 4, ONCE[4:]))
    (i, t, s, x_t, pred), (*_, after, _) = calls[3:5]
    assert (i, t, s) == (4, 700, 500) and torch.equal(x_t, up)
    if not sampler.stochastic:
        order_1 = DPMSolverPP(order=1).step(Step(schedule, None, up, 700, 500, pred, [], None))
        torch.testing.assert_close(after, order_1, rtol=0, atol=1e-12)
        past = [(c[1], c[4]) for c in calls[:3]][-sampler.history :]
        assert (sampler.step(Step(schedule, None, up, 700, 500, pred, past, None)) - order_1).abs().max() > 1e-3


@pytest.mark.parametrize("make", [Euler, Heun])
def test_churn_is_shared_among_the_steps_that_fall(make, oracle):
    """gamma = S_churn / N, N not counting the ups, and of a single point every marginal stays exact."""
    schedule, calls = oracle.schedule, []
    sampler, times = make(churn=2.0, grid="continuous"), [float(t) for t in WALK]
    x_T, noise = torch.randn(3, 2, dtype=torch.float64), SampleNoise(2, range(3))
    integrate(
        sampler,
        schedule,
        oracle.denoise,
        x_T,
        times,
        generator=noise,
        renoise=True,
        callback=lambda *call: calls.append(call),
    )
    falling = len(times) - 1 - len(UPS)
    assert len(calls) == falling and set(UPS).isdisjoint(call[0] for call in calls)
    raised = 0
    for i, t, s, _, _ in calls:
        if s > 0:
            assert t == sampler.perturb(schedule, x_T, times[i], x_T, falling)[1]
            raised += t > times[i]
    assert raised == falling - 3  # not from T, twice, nor in the last step
    point = GaussianOracle(schedule, 0.7, 0.0)
    for s, (mean, variance) in zip(times[1:], moments(sampler, point, times, *point.marginal(1000)), strict=True):
        expected_mean, expected_variance = point.marginal(s)
        assert (mean, variance) == (
            pytest.approx(expected_mean, rel=1e-9),
            pytest.approx(expected_variance, rel=1e-9, abs=1e-20),
        )


# --- What a walk evaluates, shows and draws


@pytest.mark.parametrize("sampler", [DDIM(), DDIM(eta=1.0), Ancestral(), DPMSolverPP()], ids=lambda s: type(s).__name__)
def test_an_up_evaluates_no_network_and_all_is_numbered_by_its_place_in_the_walk(sampler, oracle):
    denoise, noise, shown, changed = Counter(oracle), Spy(0, range(2)), [], []

    def before(i, t, x_t):
        changed.append((i, t))
        return x_t

    integrate(
        sampler,
        oracle.schedule,
        denoise,
        torch.randn(2, 3),
        WALK,
        generator=noise,
        callback=lambda i, t, s, x_t, pred: shown.append((i, t, s)),
        before=before,
        renoise=True,
    )
    falling = [(i, t, s) for i, (t, s) in enumerate(itertools.pairwise(WALK)) if s < t]
    assert len(falling) == 10 and shown == falling
    assert changed == [(i, t) for i, t, _ in falling]
    assert [t for t, _ in denoise.seen] == [t for _, t, _ in falling]
    last = len(WALK) - 2  # which draws nothing
    assert noise.draws == [i + 1 for i in (range(last) if sampler.stochastic else UPS)]


def test_each_visit_has_its_own_noise(oracle):
    """The same step up from the same x_t, twice."""
    given, noise = torch.ones(2, 3, dtype=torch.float64), SampleNoise(0, range(2))
    times, raised = [600, 400, 600, 400, 600, 500], []
    integrate(
        DDIM(),
        oracle.schedule,
        lambda x_t, t: Prediction(0 * x_t, 0 * x_t),  # forgets x_t: 0 at every time below
        given,
        times,
        generator=noise,
        callback=lambda i, t, s, x_t, pred: raised.append(x_t),
        renoise=True,
    )
    _, first, second = raised
    zero = torch.zeros_like(given)
    assert torch.equal(first, q_step(oracle.schedule, zero, 600, noise(2, (3,)).double(), 400))
    assert torch.equal(second, q_step(oracle.schedule, zero, 600, noise(4, (3,)).double(), 400))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    "sampler",
    [DDIM(), Ancestral(), DPMSolverPP(), UniPC(), Heun(churn=2.0, grid="continuous")],
    ids=lambda sampler: type(sampler).__name__,
)
def test_the_batch_never_changes_a_sample_of_a_walk_with_ups(sampler, oracle):
    def samples(indices):
        noise = SampleNoise(5, indices)
        return integrate(
            sampler, oracle.schedule, oracle.denoise, noise.x_T((1, 4)), WALK, generator=noise, renoise=True
        )

    whole = samples(range(6))
    for size in (1, 4):
        batches = [samples(range(start, min(start + size, 6))) for start in range(0, 6, size)]
        assert torch.equal(torch.cat(batches), whole)
    assert torch.equal(samples([5, 2]), whole[[5, 2]])
    assert len({tuple(x.flatten().tolist()) for x in whole}) == 6


def test_noise_of_an_up_follows_the_generator_the_dtype_and_the_device(oracle, device):
    def draw(generator, x):
        denoise = lambda x_t, t: Prediction(x_t, x_t)  # noqa: E731
        return integrate(DDIM(), oracle.schedule, denoise, x, ONCE, generator=generator, renoise=True)

    for generator in (None, SampleNoise(0, [0, 1])):
        x = draw(generator, torch.zeros(2, 3, device=device, dtype=torch.float64))
        assert x.device.type == device and x.dtype == torch.float64
    seeded = [draw(torch.Generator().manual_seed(n), torch.zeros(2, 3)) for n in (1, 1, 2)]
    assert torch.equal(seeded[0], seeded[1]) and not torch.equal(seeded[0], seeded[2])
    torch.manual_seed(1)
    assert torch.equal(draw(None, torch.zeros(2, 3)), seeded[0])  # torch's global one


@pytest.mark.parametrize("sampler", [DDIM(), Ancestral(), DPMSolverPP(), LMS()], ids=lambda s: type(s).__name__)
def test_a_walk_goes_through_0_and_up_again(sampler, oracle):
    """x_0 is the answer there, and is noised anew."""
    schedule, noise, calls = oracle.schedule, SampleNoise(3, range(2)), []
    x_T = torch.randn(2, 3, dtype=torch.float64)
    times = [1000, 500, 200, 0, 500, 200, 0]
    x_0 = integrate(
        sampler,
        schedule,
        oracle.denoise,
        x_T,
        times,
        generator=noise,
        renoise=True,
        callback=lambda *call: calls.append(call),
    )
    assert [call[:3] for call in calls] == [(0, 1000, 500), (1, 500, 200), (2, 200, 0), (4, 500, 200), (5, 200, 0)]
    first = calls[2][4].x_0
    assert torch.equal(first, integrate(sampler, schedule, oracle.denoise, x_T, times[:4], generator=noise))
    assert torch.equal(calls[3][3], q_sample(schedule, first, 500, noise(4, (3,)).double()))
    assert torch.equal(x_0, calls[-1][4].x_0) and not torch.equal(x_0, first)
    assert torch.equal(integrate(sampler, schedule, oracle.denoise, x_T, times, generator=noise), first)  # no renoise
    point = GaussianOracle(schedule, 0.7, 0.0)
    assert moments(DDIM(), point, times, 0.0, 1.0)[2] == pytest.approx((0.7, 0.0), abs=1e-12)


# --- What changes nothing, and what is refused


@pytest.mark.parametrize(
    "sampler",
    [Ancestral(9), DDIM(9), DPMSolverPP(9), LMS(9), UniPC(9), Heun(9, churn=2.0, grid="continuous")],
    ids=lambda sampler: type(sampler).__name__,
)
def test_a_walk_that_only_falls_is_what_it_is_without_renoise(sampler, oracle):
    noise = SampleNoise(0, range(3))
    x_T, times = noise.x_T((2,)), sampler.times(oracle.schedule)
    plain = sampler(oracle.schedule, oracle.denoise, x_T, generator=noise)
    options = {"generator": noise, "before": lambda i, t, x_t: x_t}
    assert torch.equal(sampler(oracle.schedule, oracle.denoise, x_T, **options), plain)
    walked = integrate(sampler, oracle.schedule, oracle.denoise, x_T, times, renoise=True, **options)
    assert torch.equal(walked, plain)


def test_without_renoise_rising_times_are_the_samplers_own_steps(oracle):
    """As DDIM's from data to noise: nothing is drawn, and the network is asked at each time but the last."""
    x, schedule, denoise = torch.randn(2, 3, dtype=torch.float64), oracle.schedule, Counter(oracle)
    expected = x
    for t, s in [(100, 400), (400, 900)]:
        expected = DDIM().step(Step(schedule, None, expected, t, s, oracle.denoise(expected, t), [], None))
    assert torch.equal(integrate(DDIM(), schedule, denoise, x, [100, 400, 900], generator=Spy(0, [])), expected)
    assert [t for t, _ in denoise.seen] == [100, 400]


@pytest.mark.parametrize("times", [[1000, 500, 500, 0], [200, 400.0, 400], [500, 0, 0]])
def test_a_time_that_follows_itself_is_refused_before_anything_is_evaluated(times, oracle):
    with pytest.raises(ValueError, match=r"times = \[.*\] must fall or rise with renoise = True, but \d+ follows \d+"):
        integrate(DDIM(), oracle.schedule, lambda x, t: pytest.fail("called"), torch.ones(1, 1), times, renoise=True)


# --- before


@pytest.mark.parametrize(
    "sampler",
    [Ancestral(6), DDIM(6), DPMSolverPP(6), UniPC(6), Heun(6), Heun(6, churn=2.0, grid="continuous")],
    ids=["ancestral", "ddim", "2M", "unipc", "heun", "heun with churn"],
)
def test_what_before_returns_is_evaluated_shown_and_stepped_from(sampler, oracle):
    schedule, denoise, asked, calls = oracle.schedule, Counter(oracle), [], []
    noise = SampleNoise(4, range(2))
    x_T = noise.x_T((3,)).double()

    def before(i, t, x_t):
        asked.append((i, t, x_t, len(denoise.seen)))
        return x_t + i + 1

    x_0 = sampler(schedule, denoise, x_T, generator=noise, callback=lambda *call: calls.append(call), before=before)
    times = sampler.times(schedule)
    assert [i for i, *_ in asked] == [call[0] for call in calls] == list(range(6))
    x, past = x_T, []
    for (i, t, given, evaluations), (_, t_shown, s, x_t, pred) in zip(asked, calls, strict=True):
        z = noise(i + 1, (3,)).double() if sampler.stochastic and s > 0 else None
        x, t_hat = (x, times[i]) if z is None else sampler.perturb(schedule, x, times[i], z, 6)
        assert t == t_shown == t_hat and torch.equal(given, x)
        assert denoise.seen[evaluations][0] == t and torch.equal(denoise.seen[evaluations][1], x_t)
        assert torch.equal(x_t, x + i + 1) and torch.equal(pred.x_0, oracle.denoise(x_t, t).x_0)
        x = pred.x_0 if s == 0 else sampler.step(Step(schedule, oracle.denoise, x_t, t, s, pred, past, z))
        past = [*past, (t, pred)][-sampler.history :] if sampler.history else past
    assert torch.equal(x_0, x)


@pytest.mark.parametrize(
    "sampler",
    [Ancestral(), DDIM(), DDIM(eta=0.5), DPMSolverPP(), LMS(), Heun(), Heun(churn=2.0, grid="continuous")],
    ids=["ancestral", "ddim", "ddim with noise", "2M", "lms", "heun", "heun with churn"],
)
def test_known_pixels_that_are_put_back_are_kept_and_independent_ones_do_not_notice(sampler, oracle):
    """Inpainting by replacement, with ups: pixels are independent, so the unknown ones are drawn as ever."""
    schedule, known, noise = oracle.schedule, torch.tensor([1.0, 0.0, 1.0, 0.0]).bool(), SampleNoise(7, range(3))
    image, shown, told = torch.linspace(-1, 1, 12).double().reshape(3, 4), [], []
    forward = SampleNoise(7, range(3), "known")

    def noised(i: int, t: float) -> Tensor:
        return q_sample(schedule, image, t, forward(i, (4,)).double())

    def before(i: int, t: float, x_t: Tensor) -> Tensor:
        return torch.where(known, noised(i, t), x_t)

    def walk(**options: Any) -> Tensor:
        x_T = noise.x_T((4,)).double()
        return integrate(sampler, schedule, oracle.denoise, x_T, WALK, generator=noise, renoise=True, **options)

    ours = walk(before=before, callback=lambda i, t, s, x_t, pred: shown.append((i, t, x_t)))
    free = walk(callback=lambda i, t, s, x_t, pred: told.append(x_t))
    assert len(shown) == len(told) == 10
    for (i, t, x_t), without in zip(shown, told, strict=True):
        assert torch.equal(x_t[:, known], noised(i, t)[:, known])
        assert torch.equal(x_t[:, ~known], without[:, ~known])
    assert torch.equal(ours[:, ~known], free[:, ~known])
    i, t, _ = shown[-1]
    assert torch.equal(ours[:, known], oracle.denoise(noised(i, t), t).x_0[:, known])  # seen in noise, to the last
