"""ddpm/times.py: what is drawn how often, what it weighs, and what is remembered of the losses."""

import math
from collections import defaultdict, deque

import pytest
import torch

from ddpm.schedules import NoiseSchedule, cosine, geometric, linear, zero_terminal_snr
from ddpm.times import TIME_SAMPLINGS, TimeSampler


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def steps(T: int) -> NoiseSchedule:
    """A schedule, of which the times of most kinds know no more than how long it is."""
    return linear(T, rescale=False)


def filled(T: int, scale: torch.Tensor | None = None) -> TimeSampler:
    """Loss-aware, with ten losses of every t: |normal| times a scale (T,)."""
    sampler = TimeSampler("loss_aware", steps(T))
    scale = torch.ones(T) if scale is None else scale
    for i in range(10):
        sampler.update(torch.arange(1, T + 1), scale * torch.randn(T, generator=random(i)).abs())
    return sampler


@pytest.mark.parametrize(("T", "B"), [(1000, 64), (7, 50), (1, 3)])
def test_uniform_times_are_those_of_randint(T, B):
    t, weight = TimeSampler("uniform", steps(T)).draw(B, random(5))
    assert torch.equal(t, torch.randint(1, T + 1, (B,), generator=random(5))) and weight is None


@pytest.mark.parametrize(("T", "B"), [(1000, 64), (100, 10), (7, 50), (10, 3), (1, 3)])
def test_stratified_times_come_one_from_each_part(T, B):
    """T u for one u in each [i / B, (i + 1) / B), rounded up."""
    sampler = TimeSampler("stratified", steps(T))
    for seed in range(20):
        t, weight = sampler.draw(B, random(seed))
        low, high = torch.arange(B) * T / B, torch.arange(1, B + 1) * T / B
        assert weight is None and t.dtype == torch.long
        assert (t > low).all() and (t <= high.ceil()).all()
    counts = torch.bincount(sampler.draw(30 * T, random())[0], minlength=T + 1)
    assert counts.tolist() == [0] + [30] * T  # as even as can be


def test_stratified_times_are_uniform_each():
    """Every t is as likely as any other, although the strata cut across: 20,000 draws of 3 from 1..10."""
    sampler, generator = TimeSampler("stratified", steps(10)), random()
    counts = sum(torch.bincount(sampler.draw(3, generator)[0], minlength=11) for _ in range(20_000))
    assert (counts[1:] - 6000).abs().max() < 4.5 * math.sqrt(60_000 * 0.1 * 0.9) and counts[0] == 0


@pytest.mark.equation("iDDPM (18)")
def test_loss_aware_probabilities_and_weights():
    T = 6
    sampler, seen = TimeSampler("loss_aware", steps(T)), defaultdict(list)
    for step in range(25):
        t = torch.randperm(T, generator=random(step)) + 1
        loss = torch.rand(T, generator=random(100 + step)).double() * t
        sampler.update(t, loss)
        for k, value in zip(t.tolist(), loss.tolist(), strict=True):
            seen[k].append(value)
        if step < 9:
            assert sampler.probabilities().tolist() == pytest.approx([1 / T] * T)
    root = [math.sqrt(sum(value**2 for value in seen[k][-10:]) / 10) for k in range(1, T + 1)]
    p = sampler.probabilities()
    assert p.tolist() == pytest.approx([r / sum(root) for r in root], rel=1e-12)
    t, weight = sampler.draw(60_000, random())
    torch.testing.assert_close(weight.double(), 1 / (T * p[t - 1]), rtol=1e-6, atol=0)
    counts = torch.bincount(t, minlength=T + 1)[1:]
    assert ((counts - 60_000 * p).abs() < 4.5 * (60_000 * p * (1 - p)).sqrt()).all()
    losses = torch.rand(T).double()  # E over t ~ p of weight * L_t, without chance: sum_t p_t L_t / (T p_t)
    weight_of = torch.zeros(T).double().index_copy(0, t - 1, weight.double())
    assert (p * weight_of * losses).sum().item() == pytest.approx(losses.mean().item(), rel=1e-6)


def test_one_time_without_ten_losses_keeps_them_all_uniform():
    sampler = filled(5, torch.tensor([1.0, 2, 3, 4, 5]))
    assert sampler.probabilities()[4] > 2 * sampler.probabilities()[0]
    sampler.count[3] = 9
    t, weight = sampler.draw(1000, random())
    assert sampler.probabilities().tolist() == [0.2] * 5 and torch.equal(weight, torch.ones(1000))
    assert set(t.tolist()) == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_losses_that_no_probability_can_be_made_of_keep_them_uniform(value):
    """A broken loss must be told as such, not as an error of the draw; and a weight 1 / p_t must not be infinite."""
    sampler = filled(5, torch.tensor([1.0, 2, 3, 4, 5]))
    for _ in range(10):
        sampler.update(torch.tensor([2]), torch.tensor([value]))
    assert sampler.probabilities().tolist() == [0.2] * 5 and sampler.draw(9, random())[1].isfinite().all()


@pytest.mark.parametrize("B", [1, 4, 30, 200])
def test_the_history_is_that_of_a_plain_loop_duplicates_included(B):
    """In one batch a t may come more than ten times: its last ten losses count, in the order of the batch."""
    T, sampler, seen = 4, TimeSampler("loss_aware", steps(4)), {k: deque(maxlen=10) for k in range(1, 5)}
    for step in range(12):
        t = torch.randint(1, T + 1, (B,), generator=random(step))
        loss = torch.rand(B, generator=random(50 + step)) * t
        sampler.update(t, loss)
        for k, value in zip(t.tolist(), loss.tolist(), strict=True):
            seen[k].append(value)
        for k in range(1, T + 1):
            filled_in = sampler.losses[k][: len(seen[k])].tolist()
            assert sorted(filled_in) == sorted(seen[k]) and sampler.losses[k].count_nonzero() == len(seen[k])
        ready = all(len(values) == 10 for values in seen.values())
        assert sampler.count.sum() == (step + 1) * B and bool((sampler.count[1:] >= 10).all()) == ready


def test_only_loss_aware_sampling_remembers_losses():
    for kind in TIME_SAMPLINGS:
        sampler = TimeSampler(kind, steps(5))
        sampler.update(torch.tensor([1, 2]), torch.tensor([0.5, 0.7]))
        assert sampler.count.sum() == (2 if kind == "loss_aware" else 0)
        assert bool(sampler.state_dict()) == (kind == "loss_aware")


def test_the_state_goes_on_where_it_was():
    first, second = filled(5, torch.tensor([1.0, 2, 3, 4, 5])), TimeSampler("loss_aware", steps(5))
    state = {name: value.clone() for name, value in first.state_dict().items()}
    second.load_state_dict(state)
    for sampler in (first, second):
        sampler.update(torch.tensor([3, 3, 1]), torch.tensor([9.0, 8.0, 7.0]))
    assert torch.equal(first.losses[1:], second.losses[1:]) and torch.equal(first.count, second.count)
    assert all(map(torch.equal, first.draw(50, random()), second.draw(50, random())))
    assert torch.equal(state["count"][1:], torch.full((5,), 10))  # what was loaded is a copy
    TimeSampler("uniform", steps(5)).load_state_dict({})


@pytest.mark.equation("EDM (noise levels)")
def test_ln_sigma_of_lognormal_times_is_normal_with_the_papers_mean_and_std():
    """Within 4.5 standard errors, on a schedule so fine and so wide that neither rounding nor its ends are seen."""
    schedule, n = geometric(4000, 1e-4, 1e3), 100_000
    t, weight = TimeSampler("lognormal", schedule).draw(n, random())
    ln_sigma = -schedule.lambda_[t]
    assert weight is None and t.dtype == torch.long
    assert ln_sigma.mean().item() == pytest.approx(-1.2, abs=4.5 * 1.2 / n**0.5)
    assert ln_sigma.std().item() == pytest.approx(1.2, abs=4.5 * 1.2 / (2 * n) ** 0.5)
    assert ((ln_sigma + 1.2) ** 3).mean().item() == pytest.approx(0, abs=4.5 * 15**0.5 * 1.2**3 / n**0.5)


@pytest.mark.parametrize("make", [lambda: cosine(8), lambda: zero_terminal_snr(linear(50)), lambda: geometric(5)])
def test_lognormal_times_are_those_whose_lambda_is_nearest(make):
    """How often t comes is the normal mass between the middles of its neighbours, all beyond the ends at them."""
    schedule, n = make(), 200_000
    lambda_ = schedule.lambda_[1:][schedule.lambda_[1:].isfinite()]
    edges = -torch.cat([torch.tensor([math.inf]), (lambda_[1:] + lambda_[:-1]) / 2, torch.tensor([-math.inf])])
    p = torch.special.ndtr((edges.double() + 1.2) / 1.2).diff()
    t, _ = TimeSampler("lognormal", schedule).draw(n, random(1))
    counts = torch.bincount(t, minlength=schedule.T + 1)[1:].double()
    assert counts.sum() == n and counts[len(p) :].sum() == 0  # pure noise has no place in a lognormal
    assert ((counts[: len(p)] - n * p).abs() <= 4.5 * (n * p * (1 - p)).sqrt() + 1).all()


def test_lognormal_times_come_of_the_given_generator_alone():
    sampler, before = TimeSampler("lognormal", cosine(100)), torch.get_rng_state()
    one, again, other = (sampler.draw(50, random(seed))[0] for seed in (3, 3, 4))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_schedule_of_pure_noise_has_no_lognormal_times():
    with pytest.raises(ValueError, match="beta_1 = 1 makes x_1 pure noise: no time has a finite log-SNR"):
        TimeSampler("lognormal", NoiseSchedule([1.0]))
    assert TimeSampler("lognormal", NoiseSchedule([0.5])).draw(9, random())[0].tolist() == [1] * 9
    assert TimeSampler("lognormal", NoiseSchedule([0.5, 1.0])).draw(9, random())[0].tolist() == [1] * 9


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="'even' is not known; allowed: uniform, stratified, loss_aware, lognormal"):
        TimeSampler("even", steps(10))


def test_times_are_drawn_where_the_sampler_is(device):
    sampler = TimeSampler("loss_aware", steps(5), device)
    sampler.update(torch.ones(4, dtype=torch.long, device=device), torch.ones(4, device=device))
    assert sampler.probabilities().device.type == sampler.losses.device.type == device
