"""Few-step students, on data whose exact denoiser and flow are known: what a perfect student would say."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from ddpm import schedules
from ddpm.data.batch import Batch, Condition
from ddpm.diffusion import GaussianDiffusion
from ddpm.distillation import consistency, curriculum, lognormal, one_step_for_two, pseudo_huber
from ddpm.forward import q_sample
from ddpm.losses import L_simple, snr_plus_one, truncated_snr, weighted
from ddpm.oracle import GaussianOracle, MixtureOracle
from ddpm.randomness import Keyed
from ddpm.samplers import DDIM, Consistency, Student, integrate
from ddpm.samplers.consistency import levels
from ddpm.schedules import at
from ddpm.targets import Prediction, to_prediction
from ddpm.training.tasks.consistency import Consistency as ConsistencyTask
from ddpm.training.tasks.consistency import Neighbours
from ddpm.training.tasks.diffusion import Noised
from ddpm.training.tasks.progressive import Progressive
from models.unet import UNet

SCHEDULE = schedules.cosine(1000)
MEAN, VARIANCE = 0.7, 0.25
ORACLE = GaussianOracle(SCHEDULE, MEAN, VARIANCE)
MIXTURE = MixtureOracle(SCHEDULE, [0.3, 0.7], [-0.6, 0.5], [0.04, 0.09])
KINDS = [SCHEDULE, schedules.linear(1000), schedules.zero_terminal_snr(schedules.cosine(1000))]


class Exact(nn.Module):
    """The exact denoiser of Gaussian data, as a network of target v."""

    def __init__(self, oracle: GaussianOracle):
        super().__init__()
        self.oracle = oracle

    def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        pred = self.oracle.denoise(x_t, t)
        a, b = (at(x, ..., x_t) for x in roots(self.oracle.schedule, t))
        return a * pred.eps - b * pred.x_0


class Affine(nn.Module):
    """A free affine map of x for each of some times: all that a student of Gaussian data needs."""

    def __init__(self, times: torch.Tensor):
        super().__init__()
        self.times = times.double()
        self.slope = nn.Parameter(torch.zeros(len(times), dtype=torch.float64))
        self.shift = nn.Parameter(torch.zeros(len(times), dtype=torch.float64))

    def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        number = (self.times - t.double()[:, None]).abs().argmin(1)
        return self.slope[number][:, None] * x_t + self.shift[number][:, None]


def roots(schedule: schedules.NoiseSchedule, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    alpha_bar = schedule.alpha_bar_at(t)
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def normals(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def data(n: int) -> Batch:
    """Quantiles of the Gaussian, (n, 1): its mean and spread without luck."""
    p = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return Batch((MEAN + math.sqrt(VARIANCE) * torch.special.ndtri(p))[:, None], Condition())


def gradient(task: Progressive | ConsistencyTask, drawn: Noised, weight: torch.Tensor | float = 1.0) -> torch.Tensor:
    """Of the mean loss by slopes and shifts, (2 N,)."""
    parameters = list(task.model.parameters())
    loss = (weight * task.losses(drawn, 1.0)["loss"]).mean()
    return torch.cat(torch.autograd.grad(loss, parameters))


def fitted(task: Progressive, drawn: Noised) -> nn.Module:
    """The task's network at the least of its mean loss, which is quadratic in slopes and shifts: a step of Newton."""

    def at_point(theta: torch.Tensor) -> torch.Tensor:
        vector_to_parameters(theta, task.model.parameters())
        return gradient(task, drawn)

    zero = parameters_to_vector(task.model.parameters()).detach()
    g = at_point(zero)
    H = torch.stack([at_point(zero + unit) - g for unit in torch.eye(len(g), dtype=g.dtype)])
    at_point(zero - torch.linalg.solve(H, g))
    return task.model.eval()


# --------------------------------------------------------------------------------------------- progressive distillation


@pytest.mark.equation("PD (student)")
@pytest.mark.parametrize("k", [1, 3, 5])
def test_after_k_stages_one_step_of_the_student_is_2_to_the_k_steps_of_the_teacher(k):
    diffusion = GaussianDiffusion(SCHEDULE, target="v", clip_x_0=False)
    network: nn.Module = Exact(ORACLE)
    x_T = torch.linspace(-3, 3, 9, dtype=torch.float64)[:, None]
    expected = DDIM(2**k, grid="continuous")(SCHEDULE, ORACLE.denoise, x_T)
    for steps in [2**j for j in range(k - 1, -1, -1)]:
        student = Affine(torch.arange(1, steps + 1) * SCHEDULE.T / steps)
        task = Progressive(student, diffusion, network, steps)
        network = fitted(task, task.draw_held_out(data(16 * steps), Keyed(0)))
    found = Student(1)(SCHEDULE, diffusion.denoiser(network), x_T)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (expected - ORACLE.exact_ode(x_T, SCHEDULE.T, 0)).abs().max() > 1e-3  # it is the teacher, not the flow


@pytest.mark.equation("PD (Algorithm 2)")
@pytest.mark.equation("PD (mean of two)")
@pytest.mark.parametrize("schedule", KINDS)
@pytest.mark.parametrize(("t", "u", "s"), [(1000, 750, 500), (31.25, 15.625, 0), (500, 499.5, 499), (2, 1, 0)])
def test_one_step_by_x_tilde_arrives_where_two_of_the_teacher_do(schedule, t, u, s):
    teacher = MixtureOracle(schedule, [0.3, 0.7], [-0.6, 0.5], [0.04, 0.09]).denoise
    if schedule.alpha_bar[-1] == 0 and t == 1000:
        teacher = MIXTURE_AT_NOISE
    x_t = torch.randn(5, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_tilde = one_step_for_two(schedule, teacher, x_t, t, u, s)
    x_s = integrate(DDIM(2, grid="continuous"), schedule, teacher, x_t, [t, u, s])
    (a_t, b_t), (a_s, b_s) = (roots(schedule, torch.tensor(float(time))) for time in (t, s))
    assert x_tilde.isfinite().all()
    torch.testing.assert_close(x_tilde, (x_s - b_s / b_t * x_t) / (a_s - b_s / b_t * a_t), atol=1e-9, rtol=1e-9)
    each = torch.full((5,), float(t)), torch.full((5,), float(u)), torch.full((5,), float(s))
    torch.testing.assert_close(one_step_for_two(schedule, teacher, x_t, *each), x_tilde)


def MIXTURE_AT_NOISE(x_t, t):
    """A denoiser that is finite at alpha_bar = 0 too: a fixed answer with the eps that goes with it."""
    schedule = KINDS[2]
    x_0 = 0.3 * torch.tanh(x_t)
    a, b = (at(x, ..., x_t) for x in roots(schedule, torch.as_tensor(t, dtype=torch.float64)))
    return Prediction((x_t - a * x_0) / b, x_0)


def test_x_tilde_lies_between_the_two_answers_of_the_teacher():
    x_t = torch.randn(64, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    clipped = GaussianDiffusion(SCHEDULE, target="v").clipped(MIXTURE.denoise)
    assert one_step_for_two(SCHEDULE, clipped, 3 * x_t, 900, 850, 800).abs().max() <= 1
    first, x_tilde = clipped(x_t, 500).x_0, one_step_for_two(SCHEDULE, clipped, x_t, 500, 400, 300)
    second = clipped(q_sample(SCHEDULE, first, 400, clipped(x_t, 500).eps), 400).x_0
    low, high = torch.minimum(first, second), torch.maximum(first, second)
    assert ((low - 1e-12 <= x_tilde) & (x_tilde <= high + 1e-12)).all()


@pytest.mark.equation("PD (SNR + 1)")
@pytest.mark.equation("PD (truncated SNR)")
def test_weights_of_distillation():
    snr = torch.tensor([1e-6, 0.5, 1.0, 3.0, 1e4], dtype=torch.float64)
    assert truncated_snr(snr).tolist() == [1, 1, 1, 3, 1e4]
    assert snr_plus_one(snr).tolist() == (snr + 1).tolist()
    x_0, x_t, v = normals(3, 6, 3, 2, 2)
    t = torch.tensor([1, 10, 200, 500, 900, 1000])
    pred = to_prediction(SCHEDULE, "v", v, x_t, t)
    goal = GaussianDiffusion(SCHEDULE, target="v", loss="simple").loss_towards(lambda x, t: v, x_0, x_t, t)
    torch.testing.assert_close(weighted(SCHEDULE, "snr_plus_one", pred, x_0, t), goal)
    by_name = GaussianDiffusion(SCHEDULE, target="v", loss="snr_plus_one").loss_towards(lambda x, t: v, x_0, x_t, t)
    torch.testing.assert_close(by_name, goal)


def test_the_loss_towards_the_truth_is_the_loss():
    x_0, eps, v = normals(3, 6, 2, 2, 2)
    t = torch.tensor([1, 10, 200, 500, 900, 1000])
    for target in ("eps", "x_0", "v", "flow"):
        for loss in ("simple", "min_snr", "p2", "truncated_snr"):
            diffusion = GaussianDiffusion(SCHEDULE, target=target, loss=loss)
            x_t = q_sample(SCHEDULE, x_0, t, eps)
            torch.testing.assert_close(
                diffusion.loss_towards(lambda x, t: v, x_0, x_t, t), diffusion.loss(lambda x, t: v, x_0, t=t, eps=eps)
            )
    with pytest.raises(ValueError, match=r"hybrid.*allowed: simple"):
        GaussianDiffusion(SCHEDULE, loss="hybrid").loss_towards(lambda x, t: v, x_0, x_0, t)


def test_a_student_visits_its_own_times_and_no_others():
    assert Student(3).times(SCHEDULE) == [1000, 1000 * 2 / 3, 1000 / 3, 0]
    seen = []

    class Seeing(Affine):
        def forward(self, x_t, t):
            seen.append(t)
            return super().forward(x_t, t)

    times = torch.arange(1, 7) * 1000 / 6
    task = Progressive(Seeing(times), GaussianDiffusion(SCHEDULE, target="v"), Exact(ORACLE), 6)
    for step in range(20):
        task.losses(task.draw(data(32), Keyed(0, step), 0.0), 0.0)
    torch.testing.assert_close(torch.cat(seen).unique(), times.double())
    torch.testing.assert_close(torch.tensor(Student(6).times(SCHEDULE)[-2::-1], dtype=torch.float64), times.double())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 0}, "1..500"),
        ({"steps": 501}, "1..500"),
        ({"steps": True}, "1..500"),
        ({"steps": [4, 2]}, "1..500"),
        ({"diffusion": GaussianDiffusion(SCHEDULE)}, "diffusion.target=v"),
        ({"diffusion": GaussianDiffusion(SCHEDULE, target="v", loss="vlb")}, "allowed: simple"),
    ],
)
def test_what_cannot_be_distilled_is_refused(changed, message):
    known = {"diffusion": GaussianDiffusion(SCHEDULE, target="v"), "teacher": Exact(ORACLE), "steps": 4}
    with pytest.raises(ValueError, match=message):
        Progressive(Affine(torch.arange(4)), **(known | changed))


# ---------------------------------------------------------------------------------------------------------- consistency


def exact_consistency(x_t, t):
    """Where the flow of the Gaussian takes x_t."""
    a, b = (at(x, ..., x_t) for x in roots(SCHEDULE, torch.as_tensor(t, dtype=torch.float64)))
    s = math.sqrt(VARIANCE)
    x_0 = MEAN + s * (x_t - a * MEAN) / (a**2 * s**2 + b**2).sqrt()
    return Prediction((x_t - a * x_0) / b, x_0)


@pytest.mark.equation("CM (boundary)")
@pytest.mark.parametrize("options", [{"target": "v"}, {"target": "flow"}, {"preconditioning": "edm"}])
@pytest.mark.parametrize("schedule", KINDS)
def test_at_the_boundary_f_is_x_whatever_the_network_says(options, schedule):
    x, wild = torch.randn(7, 3, 2, 2), lambda x_t, t: 1e3 * torch.randn(x_t.shape)
    f = GaussianDiffusion(schedule, **options).predictor(wild)
    assert torch.equal(consistency(f, x, torch.zeros(7)), x)


def test_the_consistency_function_of_a_gaussian_is_the_same_all_along_the_flow():
    x_T = torch.linspace(-3, 3, 9, dtype=torch.float64)[:, None]
    end = ORACLE.exact_ode(x_T, SCHEDULE.T, 0)
    for t in (1000, 731.5, 400, 20, 1):
        x_t = ORACLE.exact_ode(x_T, SCHEDULE.T, t)
        torch.testing.assert_close(consistency(exact_consistency, x_t, t), end, atol=1e-9, rtol=1e-9)


@pytest.mark.equation("iCT (loss)")
@pytest.mark.parametrize("distilled", [True, False])
def test_the_loss_is_least_where_each_level_says_what_ddim_makes_of_it(distilled):
    """With squared distances and Gaussian data; by a teacher's steps, or on average over x_0 and eps of one x_t."""
    N, c, diffusion = 6, 1e4, GaussianDiffusion(SCHEDULE, target="v", clip_x_0=False)
    times, _ = levels(SCHEDULE, N)
    network = Affine(times)
    # a c beside which all distances are small makes the pseudo-Huber distance a square, but for a factor of 2 c
    task = ConsistencyTask(network, diffusion, Exact(ORACLE) if distilled else None, s_0=N, s_1=N, c=c)
    for n in range(1, N + 1):
        a, b = roots(SCHEDULE, times[n])
        ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        shift, one = integrate(DDIM(), SCHEDULE, ORACLE.denoise, ends, times[: n + 1].flip(0).tolist()).flatten()
        with torch.no_grad():
            network.slope[n], network.shift[n] = (a - (one - shift)) / b, -shift / b

    x, w = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(5))  # exact for squares of the two
    x_0, eps, n = (part.flatten() for part in torch.meshgrid(x, x, torch.arange(N).double(), indexing="ij"))
    n, weight = n.long(), (w[:, None, None] * w[None, :, None]).expand(5, 5, N).flatten() / w.sum() ** 2
    drawn = Neighbours(
        x_0=(MEAN + math.sqrt(VARIANCE) * x_0)[:, None], eps=eps[:, None], condition=Condition(),
        t=times[n + 1], s=times[n], delta=torch.ones(len(n)),
    )  # fmt: skip
    found = gradient(task, drawn, 2 * c * len(n) * weight)
    assert found.abs().max() < 1e-8
    with torch.no_grad():
        network.slope[3] += 0.01
    assert gradient(task, drawn, 2 * c * len(n) * weight).abs().max() > 1e-4


class Dropping(nn.Module):
    """Remembers which units it dropped."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.ones(())), []

    def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.seen.append(functional.dropout(torch.ones_like(x_t), 0.5))
        return self.weight * self.seen[-1]


def test_both_answers_are_of_a_network_that_drops_the_same_units():
    task = ConsistencyTask(Dropping(), GaussianDiffusion(SCHEDULE, target="v"))
    for step in range(2):
        task.losses(task.draw(Batch(torch.zeros(4, 1, 8, 8), Condition()), Keyed(0, step), 0.0), 0.0)
    first, second, third, fourth = task.model.seen
    assert torch.equal(first, second) and torch.equal(third, fourth) and not torch.equal(first, third)


def test_every_weight_learns_in_bf16():
    """Under autocast casts of weights are kept: the answer that is learned from must not leave some without history."""
    torch.manual_seed(0)
    network = UNet(8, 1, channels=8, channel_mults=(1,), blocks=1, attention_resolutions=(8,), groups=4)
    task = ConsistencyTask(network, GaussianDiffusion(SCHEDULE, target="v"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = task.losses(task.draw(Batch(torch.randn(4, 1, 8, 8), Condition()), Keyed(0), 0.0), 0.0)["loss"].mean()
    loss.backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


@pytest.mark.equation("CM (Algorithm 1)")
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_exact_consistency_function_draws_exactly_from_the_data(steps):
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(20_000, 1, dtype=torch.float64, generator=generator)
    x = Consistency(steps)(SCHEDULE, exact_consistency, x_T, generator=generator)
    assert x.mean().item() == pytest.approx(MEAN, abs=4 * math.sqrt(VARIANCE / len(x)))
    assert x.var().item() == pytest.approx(VARIANCE, abs=5 * VARIANCE * math.sqrt(2 / len(x)))
    assert Consistency(steps).evaluations(SCHEDULE) == steps


@pytest.mark.parametrize("schedule", KINDS)
def test_levels_rise_from_data_to_the_most_noise(schedule):
    for N in (1, 2, 40):
        times, sigma = levels(schedule, N)
        assert times[0] == 0 and (times.diff() > 0).all() and times[1:].min() >= 1 and times[-1] <= schedule.T
        a, b = roots(schedule, times[1:])
        torch.testing.assert_close(b / a, sigma[1:], rtol=1e-6, atol=0)
        assert sigma[-1] == pytest.approx(80)
        steps = (sigma ** (1 / 7)).diff()
        torch.testing.assert_close(steps, steps.mean().expand(N))
        assert Consistency(N).times(schedule) == times.flip(0).tolist()
    with pytest.raises(ValueError, match="leaves no steps"):
        levels(schedule, 4, 90, 80)


@pytest.mark.equation("iCT (pseudo-Huber)")
def test_pseudo_huber_is_a_square_near_and_a_norm_far():
    x, y = torch.randn(2, 3, 1, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    norm, c = (x - y).flatten(1).norm(dim=1), 0.00054 * 28
    torch.testing.assert_close(pseudo_huber(x, y), (norm**2 + c**2).sqrt() - c)
    torch.testing.assert_close(pseudo_huber(x, y), norm - c, rtol=1e-5, atol=1e-5)
    near = x + 1e-5 * (y - x)
    torch.testing.assert_close(pseudo_huber(x, near), (1e-5 * norm) ** 2 / (2 * c), rtol=1e-3, atol=0)
    assert L_simple(x, x).max() == pseudo_huber(x, x).max() == 0


@pytest.mark.equation("iCT (curriculum)")
def test_the_curriculum_doubles_at_even_intervals():
    K = 8000
    K_prime = K // 8  # log2(1280 / 10) + 1
    found = [curriculum(k / K, 10, 1280) for k in range(K)]
    assert found == [min(10 * 2 ** (k // K_prime), 1280) for k in range(K)]
    assert [curriculum(p, 10, 10) for p in (0, 0.5, 1)] == [10, 10, 10] and curriculum(1.0, 10, 1280) == 1280


@pytest.mark.equation("iCT (lognormal)")
def test_levels_are_drawn_as_often_as_the_lognormal_density_says():
    _, sigma = levels(SCHEDULE, 40)
    p, normal = lognormal(sigma), torch.distributions.Normal(-1.1, 2.0)
    cdf = normal.cdf(sigma.log())
    torch.testing.assert_close(p, cdf.diff() / (cdf[-1] - cdf[0]))
    task = ConsistencyTask(Affine(torch.arange(4)), GaussianDiffusion(SCHEDULE, target="v"), s_0=40, s_1=40)
    n, times = 40_000, levels(SCHEDULE, 40)[0]
    drawn = task.draw(Batch(torch.zeros(n, 1), Condition()), Keyed(0), 0.0)
    count = torch.bincount(torch.searchsorted(times, drawn.t) - 1, minlength=40)
    assert ((count - n * p) ** 2 / (n * p)).sum() < 39 + 5 * math.sqrt(2 * 39)  # chi-squared
    assert torch.equal(times[torch.searchsorted(times, drawn.t) - 1], drawn.s)
    held_out = task.draw_held_out(Batch(torch.zeros(4000, 1), Condition()), Keyed(0))
    assert (torch.bincount(torch.searchsorted(times, held_out.t) - 1, minlength=40) / 4000 - p).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"s_0": 0}, "1 <= s_0"),
        ({"s_0": 20, "s_1": 10}, "s_0 <= s_1"),
        ({"s_1": 1e3}, "integers"),
        ({"c": 0.0}, "c = 0"),
        ({"P_std": -1.0}, "P_std"),
        ({"P_mean": math.nan}, "P_mean"),
        ({"sigma_min": 100.0}, "leaves no steps"),
        ({"diffusion": GaussianDiffusion(SCHEDULE)}, "diffusion.target=v"),
        ({"diffusion": GaussianDiffusion(SCHEDULE, target="x_0")}, "v, flow"),
    ],
)
def test_what_can_be_no_consistency_model_is_refused(changed, message):
    known = {"diffusion": GaussianDiffusion(SCHEDULE, target="v")}
    with pytest.raises(ValueError, match=message):
        ConsistencyTask(Affine(torch.arange(4)), **(known | changed))
