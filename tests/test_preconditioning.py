"""ddpm/preconditioning.py: EDM's D around F, by the identities that it is derived from."""

import re

import pytest
import torch

from ddpm.diffusion import GaussianDiffusion
from ddpm.forward import q_sample
from ddpm.guidance import classifier_free
from ddpm.oracle import GaussianOracle
from ddpm.preconditioning import edm
from ddpm.samplers import DDIM, Heun
from ddpm.schedules import NoiseSchedule, cosine, linear, zero_terminal_snr

t = torch.tensor([1, 30, 400, 1000])
SIGMA_DATA = (0.2, 0.5, 0.62, 1.0, 3.0)


def preconditioned(schedule: NoiseSchedule, sigma_data: float = 0.5, **options) -> GaussianDiffusion:
    return GaussianDiffusion(schedule, "x_0", clip_x_0=False, preconditioning="edm", sigma_data=sigma_data, **options)


class Network:
    """An F that is different at every x and t, and keeps what it was given."""

    def __call__(self, x, t, *y):
        self.given = x
        return torch.sin(3 * x) + t.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1)) / 1000


@pytest.fixture
def pair():
    """x_0 and eps, (4, 2, 3, 3), float64."""
    return torch.randn(2, 4, 2, 3, 3, dtype=torch.float64)


def of_table_1(schedule: NoiseSchedule, sigma_data: float):
    """c_in, c_skip and c_out as printed, and sigma; each (4, 1, 1, 1)."""
    a = schedule.alpha_bar[t].reshape(-1, 1, 1, 1)
    sigma = ((1 - a) / a).sqrt()
    total = sigma**2 + sigma_data**2
    return 1 / total.sqrt(), sigma_data**2 / total, sigma * sigma_data / total.sqrt(), sigma


# --- the scales


@pytest.mark.equation("EDM (table 1)")
@pytest.mark.parametrize("sigma_data", SIGMA_DATA)
@pytest.mark.parametrize("make", [linear, cosine])
def test_the_scales_are_those_of_the_paper_in_its_coordinates(make, sigma_data, pair):
    schedule, (x_0, eps) = make(1000), pair
    x_t = q_sample(schedule, x_0, t, eps)
    c_in, c_skip, c_out, sigma = of_table_1(schedule, sigma_data)
    x, c = x_0 + sigma * eps, edm(schedule, x_t, t, sigma_data)
    torch.testing.assert_close(c.c_in * x_t, c_in * x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(c.c_skip * x_t, c_skip * x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(c.c_out, c_out, rtol=1e-10, atol=0)


@pytest.mark.equation("EDM (7)")
def test_D_is_made_of_F_as_printed(pair):
    schedule, (x_0, eps), network = linear(1000), pair, Network()
    x_t = q_sample(schedule, x_0, t, eps)
    c_in, c_skip, c_out, sigma = of_table_1(schedule, 0.5)
    x = x_0 + sigma * eps
    D = c_skip * x + c_out * network(c_in * x, t)
    pred = preconditioned(schedule).predictor(network)(x_t, t)
    torch.testing.assert_close(pred.x_0, D, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(q_sample(schedule, pred.x_0, t, pred.eps), x_t, rtol=0, atol=1e-12)
    assert pred.target == "x_0"


@pytest.mark.parametrize("sigma_data", SIGMA_DATA)
def test_input_and_training_target_have_unit_variance_and_c_skip_makes_c_out_least(schedule, sigma_data):
    """The variances of independent x_0 and eps add up: they are computed, not drawn."""
    times = torch.arange(1, 1001)
    c = edm(schedule, torch.zeros(1000, 1, dtype=torch.float64), times, sigma_data)
    a, b = schedule.alpha_bar[1:, None].sqrt(), (1 - schedule.alpha_bar[1:, None]).sqrt()
    one = torch.ones_like(a)
    torch.testing.assert_close(c.c_in**2 * (a**2 * sigma_data**2 + b**2), one, rtol=0, atol=1e-13)

    def error_variance(c_skip):
        """Var[x_0 - c_skip x_t], what c_out^2 must be for a target of unit variance."""
        return (1 - c_skip * a) ** 2 * sigma_data**2 + (c_skip * b) ** 2

    torch.testing.assert_close(error_variance(c.c_skip) / c.c_out**2, one, rtol=0, atol=1e-9)
    c_skip = c.c_skip.clone().requires_grad_()
    (slope,) = torch.autograd.grad(error_variance(c_skip).sum(), c_skip)
    assert slope.abs().max() < 1e-14 * max(1, sigma_data**2)
    assert (error_variance(c.c_skip * 1.01) > error_variance(c.c_skip)).all()


@pytest.mark.parametrize("sigma_data", [0.5, 3.0])
def test_nothing_is_infinite_at_either_end(sigma_data):
    """At T x_t is eps and F is x_0 / sigma_data, at t = 0 D is x_t whatever F says."""
    schedule, x = zero_terminal_snr(linear(100)), torch.randn(4, 3)
    noise, data = (edm(schedule, x, end, sigma_data) for end in (100, 0))
    assert [scale.item() for scale in noise] == [1, 0, sigma_data]
    assert [scale.item() for scale in data] == pytest.approx([1 / sigma_data, 1, 0])
    diffusion = preconditioned(schedule, sigma_data)
    pred = diffusion.predictor(lambda x, t: 0.25 * x)(x, 100)
    assert torch.equal(pred.x_0, 0.25 * sigma_data * x) and torch.equal(pred.eps, x)
    loss = diffusion.loss(Network(), x, t=torch.full((4,), 100), eps=torch.randn(4, 3))
    assert loss.isfinite().all()


def test_a_real_time_and_a_number_and_a_tensor_of_t(schedule):
    x_t, denoise = torch.randn(4, 2, dtype=torch.float64), preconditioned(schedule).predictor(Network())
    for time in (300, 300.7):
        whole = denoise(x_t, torch.full((4,), time, dtype=torch.float64))
        torch.testing.assert_close(denoise(x_t, time).x_0, whole.x_0, rtol=0, atol=1e-13)


# --- what is trained


@pytest.mark.equation("EDM (8)")
@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 3.0])
def test_the_loss_is_the_squared_error_of_F_with_weight_1(sigma_data, pair):
    schedule, (x_0, eps), network = linear(1000), pair, Network()
    c_in, c_skip, c_out, sigma = of_table_1(schedule, sigma_data)
    x = x_0 + sigma * eps
    F, target = network(c_in * x, t), (x_0 - c_skip * x) / c_out
    loss = preconditioned(schedule, sigma_data).loss(network, x_0, t=t, eps=eps)
    torch.testing.assert_close(loss, ((F - target) ** 2).mean((1, 2, 3)), rtol=1e-8, atol=0)
    for low in (1e-5, 1e5):
        x_0, eps = (p.float() for p in pair)
        assert preconditioned(schedule, low).loss(network, x_0, t=t, eps=eps).isfinite().all()


@pytest.mark.parametrize("sigma_data", SIGMA_DATA)
def test_F_is_minus_v_of_the_data_in_units_of_sigma_data(schedule, sigma_data, pair):
    """On the schedule at which x_t / n is their x_t: for sigma_data = 1 the same schedule, and then to the last bit."""
    (x_0, eps), network = pair, Network()
    a = schedule.alpha_bar * sigma_data**2 / (1 + schedule.alpha_bar * (sigma_data**2 - 1))
    scaled = schedule if sigma_data == 1 else NoiseSchedule(1 - a[1:] / a[:-1])
    v = GaussianDiffusion(scaled, "v", clip_x_0=False)

    def minus(x, t):
        return -network(x, t)

    tolerance = {"rtol": 0, "atol": 0} if sigma_data == 1 else {"rtol": 1e-9, "atol": 1e-9}
    mine, x_t = preconditioned(schedule, sigma_data), q_sample(schedule, x_0, t, eps)
    one = mine.predictor(network)(x_t, t)
    given = network.given
    other = v.predictor(minus)(q_sample(scaled, x_0 / sigma_data, t, eps), t)
    torch.testing.assert_close(network.given, given, **tolerance)
    torch.testing.assert_close(one.x_0, sigma_data * other.x_0, **tolerance)
    torch.testing.assert_close(one.eps, other.eps, rtol=1e-9, atol=1e-9)
    losses = mine.loss(network, x_0, t=t, eps=eps), v.loss(minus, x_0 / sigma_data, t=t, eps=eps)
    torch.testing.assert_close(*losses, rtol=1e-8, atol=0)


@pytest.mark.parametrize("loss", ["x_0", "snr", "min_snr", "p2", "vlb"])
def test_other_losses_are_those_of_D(schedule, loss, pair):
    (x_0, eps), network = pair, Network()
    options = {"variance": "learned"} if loss == "vlb" else {}

    def wide(x, t):
        return torch.cat([network(x, t), 0.3 * torch.ones_like(x)], 1) if options else network(x, t)

    mine = preconditioned(schedule, 0.5, loss=loss, **options)
    plain = GaussianDiffusion(schedule, "x_0", clip_x_0=False, loss=loss, **options)

    def D(x_t, t):
        pred = mine.predictor(wide)(x_t, t)
        return torch.cat([pred.x_0, 2 * pred.frac - 1], 1) if options else pred.x_0

    found, expected = (d.loss(model, x_0, t=t, eps=eps) for d, model in ((mine, wide), (plain, D)))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_the_hybrid_loss_is_that_of_F_and_a_little_of_the_bound(schedule, pair):
    (x_0, eps), network = pair, Network()
    losses = {
        name: preconditioned(schedule, variance="learned", loss=name).loss(
            lambda x, t: torch.cat([network(x, t), 0.3 * torch.ones_like(x)], 1), x_0, t=t, eps=eps
        )
        for name in ("hybrid", "vlb")
    }
    simple = preconditioned(schedule).loss(network, x_0, t=t, eps=eps)
    torch.testing.assert_close(losses["hybrid"], simple + 1e-3 * losses["vlb"], rtol=1e-9, atol=0)


# --- what is drawn


@pytest.mark.parametrize("make", [linear, cosine, lambda T: zero_terminal_snr(linear(T))])
@pytest.mark.parametrize("sigma_data", [0.5, 2.0])
def test_the_exact_F_of_a_gaussian_is_zero(make, sigma_data):
    """Where the data are N(0, sigma_data^2) all of the denoiser is c_skip x, and what F is trained towards is noise."""
    schedule = make(1000)
    oracle, x_t = GaussianOracle(schedule, 0.0, sigma_data**2), torch.randn(4, 3, dtype=torch.float64)
    pred = preconditioned(schedule, sigma_data).predictor(lambda x, t: 0 * x)(x_t, t)
    torch.testing.assert_close(pred.x_0, oracle.denoise(x_t, t).x_0, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(pred.eps, oracle.denoise(x_t, t).eps, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("method", "bound", "order"), [(DDIM, 0.05, 1), (Heun, 0.005, 2)])
def test_samples_of_F_zero_are_the_flow_of_the_gaussian(schedule, method, bound, order):
    """But for what a solver errs, in its order; up to the last step, which is D for all of them."""
    oracle, x_T, errors = GaussianOracle(schedule, 0.0, 0.25), torch.randn(8, 2, dtype=torch.float64), []
    denoise = preconditioned(schedule).denoiser(lambda x, t: 0 * x)
    for steps in (50, 100):
        walk = []
        sampler = method(steps=steps, grid="continuous", spacing="karras")
        sampler(schedule, denoise, x_T, callback=lambda i, t, s, x_t, pred, walk=walk: walk.append((t, x_t)))
        last, x_last = walk[-1]
        errors.append((x_last - oracle.exact_ode(x_T, 1000, last)).abs().max().item())
    assert errors[1] < bound and errors[0] / errors[1] == pytest.approx(2**order, rel=0.2)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_guidance_combines_what_D_says(schedule, rescale):
    """The same as of a plain network that answers x_0 as D does."""
    x_t, network = torch.randn(4, 2, 3, 3, dtype=torch.float64), Network()
    mine = preconditioned(schedule)
    both = [mine.predictor(lambda x, t, w=w: w * network(x, t)) for w in (1.0, 0.4)]
    plain = GaussianDiffusion(schedule, "x_0", clip_x_0=False)
    answers = [plain.predictor(lambda x, t, denoise=denoise: denoise(x, t).x_0) for denoise in both]
    guided, expected = (
        classifier_free(*pair, 3.0, schedule=schedule, rescale=rescale)(x_t, t) for pair in (both, answers)
    )
    torch.testing.assert_close(guided.x_0, expected.x_0, rtol=0, atol=1e-12)
    torch.testing.assert_close(guided.eps, expected.eps, rtol=0, atol=1e-9)


def test_a_learned_variance_is_left_as_the_network_says_it(schedule):
    x_t, network = torch.randn(4, 2, 3, 3, dtype=torch.float64), Network()
    o = torch.linspace(-1, 1, 4, dtype=torch.float64).reshape(-1, 1, 1, 1).expand_as(x_t)
    learned = preconditioned(schedule, variance="learned", loss="hybrid")
    pred = learned.predictor(lambda x, t: torch.cat([network(x, t), o], 1))(x_t, t)
    assert torch.equal(pred.frac, (o + 1) / 2)
    assert torch.equal(pred.x_0, preconditioned(schedule).predictor(network)(x_t, t).x_0)


def test_low_precision_outputs_are_scaled_in_the_precision_of_x_t(schedule):
    x_t = torch.randn(4, 2)
    pred = preconditioned(schedule).predictor(lambda x, t: torch.zeros_like(x).bfloat16())(x_t, t)
    c = edm(schedule, x_t, t)
    assert pred.x_0.dtype == torch.float32 and torch.equal(pred.x_0, c.c_skip * x_t)


def test_it_follows_the_data_to_their_device(schedule, device):
    x = torch.zeros(4, 2, device=device)
    diffusion = preconditioned(schedule)
    assert diffusion.loss(lambda x, t: x, x).device.type == device
    assert diffusion.predictor(lambda x, t: x)(x, t.to(device)).eps.device.type == device


# --- what is refused


def test_sigma_data_is_of_no_effect_without_a_preconditioning(schedule, pair):
    (x_0, eps), network = pair, Network()
    losses = [GaussianDiffusion(schedule, sigma_data=s).loss(network, x_0, t=t, eps=eps) for s in (0.5, 2.0)]
    assert torch.equal(*losses)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preconditioning": "ve"}, "preconditioning = 've' is not known; allowed: null, edm"),
        *(
            ({"sigma_data": bad}, f"sigma_data = {bad!r} must be > 0, within [1e-05, 100000]")
            for bad in (0.0, -1.0, 1e-300, float("nan"), float("inf"), True)
        ),
    ],
)
def test_options_that_are_refused(schedule, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        GaussianDiffusion(schedule, **options)


@pytest.mark.parametrize("target", ["eps", "v", "flow"])
def test_a_preconditioning_takes_the_place_of_a_target(schedule, pair, target):
    (x_0, eps), network = pair, Network()
    made = [GaussianDiffusion(schedule, target=name, preconditioning="edm") for name in ("x_0", target)]
    assert torch.equal(*(one.loss(network, x_0, t=t, eps=eps) for one in made)) and made[1].target == "x_0"
