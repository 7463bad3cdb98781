"""ddpm/editing/inverse.py and invert.py: operators and adjoints, exact posteriors of Gaussian data, round trips."""

import itertools
import math

import pytest
import torch
from conftest import GaussianOracle
from torch import Tensor

from ddpm.diffusion import GaussianDiffusion
from ddpm.editing import Blur, Inpainting, Operator, SuperResolution, dps, pigdm, redraw
from ddpm.oracle import JointGaussian, PointsOracle
from ddpm.samplers import DDIM, Ancestral
from ddpm.schedules import cosine, zero_terminal_snr

SHAPE = (1, 4, 6)
UNEVEN = torch.rand(3, 5, generator=torch.Generator().manual_seed(0)) - 0.3
OPERATORS = {
    "inpainting": Inpainting(torch.tensor([[1, 0, 0, 1, 1, 0]])),
    "super resolution": SuperResolution(2),
    "blur": Blur(UNEVEN),
    "gaussian blur": Blur.gaussian(0.6),
}
every_operator = pytest.mark.parametrize("A", OPERATORS.values(), ids=OPERATORS)


def matrix(A: Operator) -> Tensor:
    """A as (k, 24), column by column."""
    return A(torch.eye(24, dtype=torch.float64).reshape(24, *SHAPE)).flatten(1).T


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@every_operator
def test_the_transpose_is_the_adjoint_and_solve_solves(A):
    x, y = normal(5, 2, *SHAPE[1:]), A(normal(5, 2, *SHAPE[1:], seed=2))
    assert (A(x) * y).sum().item() == pytest.approx((x * A.transpose(y)).sum().item(), rel=1e-12)
    r2 = torch.tensor([0.1, 0.5, 1.0, 2.0, 0.0], dtype=torch.float64).reshape(5, 1, 1, 1)
    solved = A.solve(y, r2, 0.3)
    torch.testing.assert_close(r2 * A(A.transpose(solved)) + 0.3 * solved, y)
    small = A(A.transpose(A.solve(y[:4], r2[:4], 0.0))) * r2[:4]
    torch.testing.assert_close(small, y[:4], rtol=1e-6, atol=1e-6)
    assert (
        A(x.float()).dtype == A.transpose(y.float()).dtype == A.solve(y.float(), r2.float(), 0.3).dtype == torch.float32
    )


def test_operators_measure_what_they_say():
    x = normal(2, 3, 4, 6)
    mask = torch.tensor([[1, 0, 0, 1, 1, 0]]).bool()
    assert torch.equal(Inpainting(mask)(x), torch.where(mask, 0, x))
    assert torch.equal(SuperResolution(1)(x), x)
    torch.testing.assert_close(SuperResolution(2)(x), torch.nn.functional.avg_pool2d(x, 2))
    padded = torch.nn.functional.pad(x, (2, 2, 1, 1), mode="circular").reshape(6, 1, 6, 10)
    printed = torch.nn.functional.conv2d(padded, UNEVEN.double().flip(0, 1)[None, None])
    torch.testing.assert_close(Blur(UNEVEN)(x), printed.reshape(x.shape))
    whole = Blur(torch.ones(9, 13) / 117)(x)  # it goes around twice and more
    torch.testing.assert_close(whole.mean((2, 3)), x.mean((2, 3)))
    assert (whole.std((2, 3)) < 0.1 * x.std((2, 3))).all()
    assert Blur.gaussian(1.0).kernel.shape == (7, 7) and Blur.gaussian(1.0).kernel.sum().item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SuperResolution(0), "factor = 0"),
        (lambda: SuperResolution(2.0), "factor = 2.0"),
        (lambda: SuperResolution(4)(torch.zeros(1, 1, 4, 6)), "factor = 4 does not divide 6x4"),
        (lambda: Blur(torch.ones(2, 3)), "odd sides"),
        (lambda: Blur.gaussian(0), "must be a number of pixels > 0"),
        (lambda: Blur.gaussian(math.nan), "must be a number of pixels > 0"),
    ],
)
def test_what_is_no_operator_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- guidance


@pytest.mark.equation("PiGDM (guidance)")
@pytest.mark.equation("PiGDM (r_t)")
@pytest.mark.parametrize("sigma_y", [0.05, 1.0])
@every_operator
def test_pigdm_is_exact_on_independent_gaussian_pixels(A, sigma_y):
    """The guided prediction is the exact prediction of the posterior given y, which is Gaussian too, at every t."""
    schedule = cosine(1000)
    oracle = GaussianOracle(schedule, 0.3, 0.2)
    y = A(normal(1, *SHAPE))
    known = matrix(A).abs().sum(1) > 0
    joint = JointGaussian(schedule, torch.full((24,), 0.3, dtype=torch.float64), 0.2 * torch.eye(24).double())
    exact = joint.posterior(matrix(A)[known], y.flatten()[known], sigma_y)
    guided = pigdm(schedule, oracle.denoise, A, y, sigma_y, variance=0.2)
    t = torch.tensor([1, 30, 500, 900, 999])
    x_t = normal(5, *SHAPE, seed=3)
    ours, theirs = guided(x_t, t), exact.denoise(x_t, t)
    torch.testing.assert_close(ours.x_0, theirs.x_0, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours.eps, theirs.eps, rtol=1e-6, atol=1e-7)


def test_samples_by_pigdm_are_those_of_the_exact_posterior():
    """Sampled by the probability flow: the same x_T to the same image, and what was measured is met."""
    schedule, A = cosine(1000), SuperResolution(2)
    oracle, y = GaussianOracle(schedule, 0.3, 0.2), A(normal(1, *SHAPE))
    joint = JointGaussian(schedule, torch.full((24,), 0.3, dtype=torch.float64), 0.2 * torch.eye(24).double())
    x_T = normal(200, *SHAPE, seed=4)
    x = DDIM(100)(schedule, pigdm(schedule, oracle.denoise, A, y, 0.1, variance=0.2), x_T)
    exact = joint.posterior(matrix(A), y.flatten(), 0.1)
    torch.testing.assert_close(x, DDIM(100)(schedule, exact.denoise, x_T), rtol=1e-6, atol=1e-6)
    assert (x.mean(0).flatten() - exact.mean).abs().max() < 4 * math.sqrt(0.2 / 200) + 0.01
    assert (A(x) - y).std() < 0.12 < 0.22 < (A(DDIM(100)(schedule, oracle.denoise, x_T)) - y).std()


@pytest.mark.equation("DPS (16)")
@every_operator
def test_dps_adds_the_gradient_to_the_score(A):
    """On Gaussian pixels the Jacobian of x_0 is a number, and the gradient is known."""
    schedule, t = cosine(1000), torch.tensor([1, 500, 990])
    oracle, y, x_t = GaussianOracle(schedule, 0.3, 0.2), A(normal(1, *SHAPE)), normal(3, *SHAPE, seed=3)
    free, ours = oracle.denoise(x_t, t), dps(schedule, oracle.denoise, A, y, 0.7)(x_t, t)
    alpha_bar = schedule.alpha_bar[t].reshape(3, 1, 1, 1)
    jacobian = alpha_bar.sqrt() * 0.2 / (alpha_bar * 0.2 + 1 - alpha_bar)
    score = -free.eps / (1 - alpha_bar).sqrt() + 0.7 * 2 * jacobian * A.transpose(y - A(free.x_0))
    torch.testing.assert_close(-ours.eps / (1 - alpha_bar).sqrt(), score)
    torch.testing.assert_close(alpha_bar.sqrt() * ours.x_0 + (1 - alpha_bar).sqrt() * ours.eps, x_t)


def test_dps_with_the_likelihoods_scale_is_exact_in_the_limit_of_little_noise():
    schedule, A, x_t = cosine(1000), SuperResolution(2), normal(1, *SHAPE, seed=3)
    oracle, y, sigma_y = GaussianOracle(schedule, 0.3, 0.2), A(normal(1, *SHAPE)), 0.5
    ours = dps(schedule, oracle.denoise, A, y, 1 / (2 * sigma_y**2))
    exact = pigdm(schedule, oracle.denoise, A, y, sigma_y, variance=0.2)
    errors = []
    for t in (200, 50, 10, 1):
        free = oracle.denoise(x_t, t).x_0
        errors.append(((ours(x_t, t).x_0 - exact(x_t, t).x_0).norm() / (exact(x_t, t).x_0 - free).norm()).item())
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.01 > 1e-4 > errors[-1]


@pytest.mark.parametrize("guide", [lambda *a: dps(*a, 0.5), lambda *a: pigdm(*a, 0.1)], ids=["dps", "pigdm"])
def test_guidance_comes_before_the_clip_and_leaves_no_graph_behind(guide):
    """By a network with weights, inside a sampler, which asks for no gradients; each image is guided by itself."""
    diffusion, A = GaussianDiffusion(cosine(1000), "v"), SuperResolution(2)
    torch.manual_seed(0)
    network = torch.nn.Conv2d(1, 1, 3, padding=1)
    raw = diffusion.predictor(lambda x_t, t: network(x_t))
    y = A(torch.rand(3, *SHAPE))
    guided = guide(diffusion.schedule, raw, A, y)
    x_T = torch.randn(3, *SHAPE)
    x = DDIM(5)(diffusion.schedule, diffusion.clipped(guided), x_T)
    assert x.abs().max() <= 1 and not x.requires_grad and network.weight.grad is None
    pred = guided(x_T, torch.full((3,), 500))
    assert not pred.eps.requires_grad and not pred.x_0.requires_grad
    single = guide(diffusion.schedule, raw, A, y[1:2])(x_T[1:2], 500)
    torch.testing.assert_close(single.x_0, pred.x_0[1:2])


def test_where_nothing_is_left_of_the_data_nothing_is_guided():
    schedule, A, y = zero_terminal_snr(cosine(50)), SuperResolution(2), torch.rand(1, 1, 2, 3)
    raw = GaussianDiffusion(schedule, "v").predictor(lambda x_t, t: 0.3 * x_t)
    x_T = torch.randn(2, *SHAPE)
    for guided in (dps(schedule, raw, A, y, 0.5), pigdm(schedule, raw, A, y, 0.1)):
        assert torch.equal(guided(x_T, 50).x_0, raw(x_T, 50).x_0) and guided(x_T, 49).x_0.isfinite().all()
        mixed = guided(x_T, torch.tensor([50, 25]))
        assert torch.equal(mixed.x_0[:1], raw(x_T[:1], 50).x_0)
        torch.testing.assert_close(mixed.x_0[1:], guided(x_T[1:], 25).x_0)
        assert DDIM(10)(schedule, guided, x_T).isfinite().all()


@pytest.mark.parametrize("guide", [lambda *a: dps(*a, 0.5), lambda *a: pigdm(*a, 0.1)], ids=["dps", "pigdm"])
@every_operator
def test_guidance_goes_where_the_images_are(A, guide, device):
    diffusion = GaussianDiffusion(cosine(100), "v")
    raw, x = diffusion.predictor(lambda x_t, t: 0.3 * x_t), torch.ones((2, *SHAPE), device=device)
    drawn = DDIM(3)(diffusion.schedule, diffusion.clipped(guide(diffusion.schedule, raw, A, A(x))), x)
    assert drawn.shape == x.shape and drawn.device.type == device


# --- redrawing


def test_the_error_of_a_round_trip_is_of_first_order():
    oracle, x_0 = GaussianOracle(cosine(1000), 0.3, 0.2), normal(4, 3)
    errors = []
    for steps in (50, 100, 200):
        back = redraw(DDIM(steps), oracle.schedule, oracle.denoise, x_0, oracle.denoise)
        errors.append((back - x_0).abs().max().item())
    assert errors[-1] < 0.03
    assert all(1.6 < a / b < 2.4 for a, b in itertools.pairwise(errors))


@pytest.mark.parametrize("strength", [0.2, 0.6, 1.0])
def test_another_denoiser_moves_the_image_as_the_two_flows_do(strength):
    """Up by the flow of one Gaussian, down by that of another, in as many steps as T has."""
    one, other = GaussianOracle(cosine(1000), 0.3, 0.2), GaussianOracle(cosine(1000), -0.5, 0.4)
    x_0, t = normal(4, 3).clamp(-1, 1), round(1000 * strength)
    t = min(t, 999)  # above which the last step of this schedule is a leap
    expected = other.exact_ode(one.exact_ode(x_0, 0, t), t, 0)
    ours = redraw(DDIM(1000, times=None), one.schedule, one.denoise, x_0, other.denoise, strength)
    assert (ours - expected).abs().max() < 0.02
    assert torch.equal(redraw(DDIM(10), one.schedule, one.denoise, x_0, other.denoise, 0), x_0)


def test_another_class_is_drawn_in_the_same_hand():
    """Two classes of points, each with a thin and a bold one: from the thin one of the first to that of the second."""
    first = torch.tensor([[1.0, 0.0, 0.2], [1.0, 0.0, 0.8]]) * 2 - 1
    second = torch.tensor([[0.0, 1.0, 0.2], [0.0, 1.0, 0.8]]) * 2 - 1
    one, other = (PointsOracle(cosine(1000), points, 1e-3) for points in (first, second))
    redrawn = redraw(DDIM(100), one.schedule, one.denoise, first.double(), other.denoise)
    assert (redrawn - second).abs().max() < 0.1


@pytest.mark.parametrize(
    ("sampler", "strength", "message"),
    [
        (Ancestral(5), 1, "Ancestral has no inverse"),
        (DDIM(5, eta=0.5), 1, "DDIM with eta = 0.5 has no inverse"),
        (DDIM(5), 1.5, "strength = 1.5"),
    ],
)
def test_what_cannot_be_redrawn_is_refused(sampler, strength, message):
    oracle = GaussianOracle(cosine(1000))
    with pytest.raises(ValueError, match=message):
        redraw(sampler, oracle.schedule, oracle.denoise, torch.zeros(1, 3), oracle.denoise, strength)
