"""ddpm/diffusion.py: what the network is asked, what is made of its answer, and what is drawn."""

import re

import pytest
import torch

from ddpm.diffusion import GaussianDiffusion
from ddpm.forward import q_sample
from ddpm.losses import L_vlb
from ddpm.reverse import variance
from ddpm.schedules import cosine, linear, zero_terminal_snr
from ddpm.targets import TARGETS, Prediction, eps_from_x_0, from_prediction, velocity, x_0_from_eps

t = torch.tensor([1, 30, 400, 1000])
LEARNED = {"variance": "learned", "loss": "hybrid"}


@pytest.fixture
def pair():
    """x_0 in [-1, 1] and eps, (4, 2, 3, 3), float64."""
    return torch.rand(4, 2, 3, 3, dtype=torch.float64) * 2 - 1, torch.randn(4, 2, 3, 3, dtype=torch.float64)


class Recorder:
    """A network that answers `output` and keeps what it was called with."""

    def __init__(self, output):
        self.output, self.calls = output, []

    def __call__(self, *args):
        self.calls.append(args)
        return self.output


# --- loss


@pytest.mark.parametrize("target", TARGETS)
def test_the_loss_of_the_true_target_is_zero_and_that_of_an_offset_its_square(schedule, pair, target):
    x_0, eps = pair
    truth = {"eps": eps, "x_0": x_0, "v": velocity(schedule, Prediction(eps, x_0), t), "flow": eps - x_0}[target]
    loss = GaussianDiffusion(schedule, target).loss
    assert torch.equal(loss(Recorder(truth), x_0, t=t, eps=eps), torch.zeros(4).double())
    offset = torch.tensor([0.0, 1, 2, 3]).double()[:, None, None, None]
    torch.testing.assert_close(
        loss(Recorder(truth + offset), x_0, t=t, eps=eps), torch.tensor([0.0, 1, 4, 9]).double(), rtol=1e-13, atol=0
    )


def test_the_network_sees_x_t_and_t_and_the_labels_only_if_there_are_any(schedule, pair):
    (x_0, eps), y, model = pair, torch.tensor([3, 1, 4, 1]), Recorder(torch.zeros(4, 2, 3, 3))
    diffusion = GaussianDiffusion(schedule)
    diffusion.loss(model, x_0, t=t, eps=eps)
    diffusion.loss(model, x_0, y, t=t, eps=eps)
    diffusion.denoiser(model)(x_0, t)
    diffusion.denoiser(model, y)(x_0, 7)
    assert [len(call) for call in model.calls] == [2, 3, 2, 3]
    assert torch.equal(model.calls[0][0], q_sample(schedule, x_0, t, eps)) and torch.equal(model.calls[0][1], t)
    assert torch.equal(model.calls[1][2], y) and torch.equal(model.calls[3][2], y)
    assert torch.equal(model.calls[3][0], x_0) and model.calls[3][1].tolist() == [7, 7, 7, 7]


def test_t_and_eps_are_drawn_only_when_they_are_not_given(schedule, pair):
    (x_0, eps), model = pair, Recorder(torch.zeros(4, 2, 3, 3))
    loss = GaussianDiffusion(schedule).loss
    generator = torch.Generator().manual_seed(3)
    before, theirs = torch.get_rng_state(), generator.get_state()
    loss(model, x_0, t=t, eps=eps, generator=generator)
    assert torch.equal(generator.get_state(), theirs)
    loss(model, x_0, t=t, generator=generator)
    assert torch.equal(model.calls[-1][1], t) and not torch.equal(generator.get_state(), theirs)
    loss(model, x_0, eps=eps, generator=generator)
    assert torch.equal(model.calls[-1][0], q_sample(schedule, x_0, model.calls[-1][1], eps))
    loss(model, x_0, generator=generator)
    assert torch.equal(torch.get_rng_state(), before)  # torch's own generator is left alone
    loss(model, x_0)
    assert not torch.equal(torch.get_rng_state(), before)


def test_the_same_generator_gives_the_same_loss(schedule, pair):
    loss, model = GaussianDiffusion(schedule).loss, Recorder(torch.zeros(4, 2, 3, 3))
    first, again, other = (loss(model, pair[0], generator=torch.Generator().manual_seed(n)) for n in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_drawn_t_are_uniform_on_1_to_T_and_drawn_eps_normal():
    model = Recorder(torch.zeros(4000, 3))
    loss = GaussianDiffusion(linear(4, rescale=False)).loss(model, torch.zeros(4000, 3))
    counts = torch.bincount(model.calls[0][1], minlength=6).tolist()
    assert counts[0] == counts[5] == 0 and all(abs(n - 1000) < 4.5 * 750**0.5 for n in counts[1:5])
    assert loss.mean().item() == pytest.approx(1, abs=4.5 * (2 / 12000) ** 0.5)  # E eps^2


def test_gradients_flow_to_the_network_and_low_precision_outputs_are_compared_in_that_of_the_data(schedule, pair):
    x_0, eps = (p.float() for p in pair)
    scale = torch.tensor(0.5, requires_grad=True)
    loss = GaussianDiffusion(schedule).loss(lambda x_t, t: scale * x_t, x_0, t=t, eps=eps)
    loss.mean().backward()
    x_t = q_sample(schedule, x_0, t, eps)
    torch.testing.assert_close(scale.grad, (2 * (0.5 * x_t - eps) * x_t).mean())
    low = GaussianDiffusion(schedule).loss(lambda x_t, t: x_t.bfloat16(), x_0, t=t, eps=eps)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, ((x_t.bfloat16().float() - eps) ** 2).mean((1, 2, 3)))


# --- denoiser


@pytest.mark.parametrize("target", TARGETS)
def test_the_true_output_becomes_the_true_pair(schedule, pair, target):
    x_0, eps = pair
    x_t = q_sample(schedule, x_0, t, eps)
    truth = from_prediction(schedule, target, Prediction(eps, x_0), t)
    for clip in (False, True):  # x_0 lies in [-1, 1], so clipping changes nothing
        pred = GaussianDiffusion(schedule, target, clip_x_0=clip).denoiser(Recorder(truth))(x_t, t)
        torch.testing.assert_close(pred.x_0, x_0, rtol=0, atol=1e-12)
        torch.testing.assert_close(pred.eps, eps, rtol=0, atol=1e-12)


@pytest.mark.parametrize("target", TARGETS)
def test_a_clipped_x_0_and_its_eps_still_compose_x_t(schedule, target):
    x_t, output = torch.randn(2, 4, 2, 3, 3, dtype=torch.float64) * 3
    raw = GaussianDiffusion(schedule, target, clip_x_0=False).denoiser(Recorder(output))(x_t, t)
    pred = GaussianDiffusion(schedule, target).denoiser(Recorder(output))(x_t, t)
    outside = raw.x_0.abs() > 1
    assert outside.any() and not outside.all()
    assert torch.equal(pred.x_0, raw.x_0.clamp(-1, 1)) and (pred.x_0.abs() <= 1).all()
    torch.testing.assert_close(q_sample(schedule, pred.x_0, t, pred.eps), x_t, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pred.eps[~outside], raw.eps[~outside], rtol=1e-10, atol=1e-10)
    assert ((pred.eps - raw.eps)[outside].abs() > 1e-6).all()
    assert torch.equal(from_prediction(schedule, target, raw, t), output) or target in ("v", "flow")


def test_the_variance_by_name(schedule, pair):
    default = GaussianDiffusion(schedule)
    assert (default.target, default.variance, default.clip_x_0) == ("eps", "beta", True)
    for name, frac in (("beta_tilde", 0.0), ("beta", 1.0)):
        for clip in (False, True):
            diffusion = GaussianDiffusion(schedule, variance=name, clip_x_0=clip)
            assert diffusion.denoiser(Recorder(pair[1]))(pair[0], t).frac == frac


@pytest.mark.parametrize("time", [300, 300.7])
def test_a_number_and_a_tensor_of_t_agree(schedule, pair, time):
    x_t, output = pair
    denoise = GaussianDiffusion(schedule, "v").denoiser(Recorder(output))
    whole = denoise(x_t, torch.full((4,), time, dtype=torch.float64 if time == 300.7 else torch.int64))
    assert torch.equal(denoise(x_t, time).eps, whole.eps) and torch.equal(denoise(x_t, time).x_0, whole.x_0)


@pytest.mark.parametrize("target", TARGETS)
def test_the_true_output_becomes_the_true_pair_at_real_times(schedule, pair, target):
    (x_0, eps), times = pair, torch.tensor([0.25, 30.5, 400.75, 999.5], dtype=torch.float64)
    truth = from_prediction(schedule, target, Prediction(eps, x_0), times)
    model = Recorder(truth)
    pred = GaussianDiffusion(schedule, target).denoiser(model)(q_sample(schedule, x_0, times, eps), times)
    assert torch.equal(model.calls[0][1], times)
    torch.testing.assert_close(pred.x_0, x_0, rtol=0, atol=1e-12)
    torch.testing.assert_close(pred.eps, eps, rtol=0, atol=1e-12)


# --- prediction, guidance, clip


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "options", [{}, {"dynamic_threshold": 0.9}, {"clip_x_0": False}], ids=["clip", "dynamic", "none"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_denoiser_is_a_prediction_and_then_the_clip(schedule, target, options, dtype):
    """The prediction is that of the same diffusion without a clip, for every kind of t, and its frac survives."""
    x_t, output, o = 3 * torch.randn(3, 4, 2, 3, 3, dtype=dtype)
    diffusion = GaussianDiffusion(schedule, target, **options, **LEARNED)
    raw = GaussianDiffusion(schedule, target, clip_x_0=False, **LEARNED)
    model, y = Recorder(torch.cat([output, o], 1)), torch.tensor([3, 1, 4, 1])
    for time in (7, 300.7, t, t.double() - 0.5):
        whole = diffusion.denoiser(model, y)(x_t, time)
        stages = diffusion.clipped(diffusion.predictor(model, y))(x_t, time)
        prediction, expected = (d.predictor(model, y)(x_t, time) for d in (diffusion, raw))
        for name in ("eps", "x_0", "frac"):
            assert torch.equal(getattr(stages, name), getattr(whole, name))
            assert torch.equal(getattr(prediction, name), getattr(expected, name))
        assert torch.equal(whole.frac, (o + 1) / 2)
        assert prediction.x_0.abs().max() > 1 and (whole.x_0.abs().max() <= 1) == diffusion.clip_x_0
        torch.testing.assert_close(q_sample(schedule, whole.x_0, time, whole.eps), x_t, rtol=1e-4, atol=1e-4)
    assert {tuple(call[1].shape) for call in model.calls} == {(4,)} and all(call[2] is y for call in model.calls)


def test_without_clipping_the_last_stage_returns_what_it_is_given(schedule):
    predictor = GaussianDiffusion(schedule).predictor(Recorder(torch.zeros(4, 2)))
    assert GaussianDiffusion(schedule, clip_x_0=False).clipped(predictor) is predictor


@pytest.mark.parametrize("target", TARGETS)
def test_predictions_are_combined_before_the_clip_which_is_not_combining_clipped_ones(schedule, target):
    """eps = eps_u + w (eps_c - eps_u), and the x_0 of that clipped, on pixels where each stage is known."""
    diffusion, w = GaussianDiffusion(schedule, target), 3.0
    x_0 = torch.tensor([[0.2, 0.9, -1.5], [0.3, 1.2, -0.9]], dtype=torch.float64)  # unconditional, conditional
    x_t, times = torch.randn(2, 1, 3, dtype=torch.float64), torch.tensor([400, 700])

    def model(x_t, t, y):
        """Answers the x_0 of its class."""
        pred = Prediction(eps_from_x_0(schedule, x_t, t, x_0[y][:, None]), x_0[y][:, None])
        return from_prediction(schedule, target, pred, t)

    def guided(conditional, unconditional):
        def denoise(x_t, t):
            c, u = conditional(x_t, t), unconditional(x_t, t)
            eps = u.eps + w * (c.eps - u.eps)
            return Prediction(eps, x_0_from_eps(schedule, x_t, t, eps), u.frac)

        return denoise

    conditional, unconditional = (diffusion.predictor(model, torch.full((2,), y)) for y in (1, 0))
    pred = diffusion.clipped(guided(conditional, unconditional))(x_t, times)
    expected = torch.tensor([[[0.5, 1.0, 0.3]]] * 2, dtype=torch.float64)  # of 0.5, 1.8, 0.3
    torch.testing.assert_close(pred.x_0, expected, rtol=1e-10, atol=1e-10)
    a, b = (c[:, None, None] for c in (schedule.alpha_bar[times].sqrt(), (1 - schedule.alpha_bar[times]).sqrt()))
    torch.testing.assert_close(pred.eps, (x_t - a * expected) / b, rtol=1e-10, atol=1e-10)
    after = guided(diffusion.clipped(conditional), diffusion.clipped(unconditional))(x_t, times)
    expected = torch.tensor([[[0.5, 1.2, -0.7]]] * 2, dtype=torch.float64)  # of 0.2 and 0.3, 0.9 and 1, -1 and -0.9
    torch.testing.assert_close(after.x_0, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("target", TARGETS)
def test_low_precision_outputs_are_used_in_the_precision_of_x_t(schedule, target):
    x_t = torch.randn(4, 2, 3, 3)
    pred = GaussianDiffusion(schedule, target, clip_x_0=False).denoiser(lambda x, t: x.bfloat16())(x_t, t)
    assert pred.eps.dtype == pred.x_0.dtype == torch.float32


def test_the_diffusion_follows_the_data_to_its_device(schedule, device):
    x = torch.zeros(4, 2, device=device)
    for target in TARGETS:
        diffusion = GaussianDiffusion(schedule, target)
        assert diffusion.loss(lambda x_t, t: x_t, x).device.type == device
        assert diffusion.loss(lambda x_t, t: x_t, x, t=t.to(device), eps=x).device.type == device
        for step in (5, 5.5, t, t.to(device), t.to(device) - 0.5):
            assert diffusion.denoiser(lambda x_t, t: x_t)(x, step).eps.device.type == device


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "noise"}, "target = 'noise' is not known; allowed: eps, x_0, v, flow"),
        ({"variance": "fixed"}, "variance = 'fixed' is not known; allowed: beta_tilde, beta, learned"),
        (
            {"loss": "mse"},
            "loss = 'mse' is not known; allowed: simple, x_0, snr, min_snr, truncated_snr, snr_plus_one, p2, vlb, hyb",
        ),
        ({"loss_options": {"gamma": 5}}, "has 'gamma'; loss = 'simple' has the options: none"),
        ({"loss": "snr", "loss_options": {"k": 1}}, "has 'k'; loss = 'snr' has the options: none"),
        ({"loss": "min_snr", "loss_options": {"k": 1}}, "has 'k'; loss = 'min_snr' has the options: gamma"),
        ({"loss": "p2", "loss_options": {"weight": 1}}, "has 'weight'; loss = 'p2' has the options: k, gamma"),
        ({"loss": "hybrid", "loss_options": {"t": 1}}, "has 't'; loss = 'hybrid' has the options: weight"),
        ({"loss": "p2", "loss_options": {"k": 0}}, "loss_options.k = 0 must be a number > 0"),
        ({"loss": "p2", "loss_options": {"k": True}}, "loss_options.k = True must be a number > 0"),
        ({"loss": "p2", "loss_options": {"gamma": "5"}}, "loss_options.gamma = '5' must be a number > 0"),
        ({"loss": "p2", "loss_options": {"gamma": float("nan")}}, "loss_options.gamma = nan must be a number > 0"),
        ({"loss": "p2", "loss_options": [5]}, "loss_options = [5] must map names to numbers"),
        ({"dynamic_threshold": 0.0}, "dynamic_threshold = 0.0 must lie in (0, 1], with clip_x_0 = true"),
        ({"dynamic_threshold": 1.5}, "dynamic_threshold = 1.5 must lie in (0, 1]"),
        ({"dynamic_threshold": 0.9, "clip_x_0": False}, "dynamic_threshold = 0.9 must lie in (0, 1], with clip_x_0"),
    ],
)
def test_options_that_are_refused(schedule, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        GaussianDiffusion(schedule, **options)


def test_eps_is_refused_where_x_T_is_pure_noise():
    schedule = zero_terminal_snr(linear(100))
    with pytest.raises(
        ValueError, match="'eps' does not determine x_0 at T where alpha_bar_T = 0; allowed there: x_0, v, flow"
    ):
        GaussianDiffusion(schedule, "eps")
    x_T = torch.randn(3, 1, 2, 2)
    for target, expected in {"v": -0.5, "x_0": 0.5, "flow": 0.5}.items():
        pred = GaussianDiffusion(schedule, target, clip_x_0=False).denoiser(lambda x, t: 0.5 * x)(x_T, 100)
        torch.testing.assert_close(pred.x_0, expected * x_T)
        torch.testing.assert_close(pred.eps, x_T)


# --- learned variance


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("clip", [False, True])
def test_the_second_half_of_the_output_lies_between_beta_tilde_and_beta(schedule, pair, target, clip):
    """-1 says beta_tilde, 1 says beta, also at strides and real times; the first half is the target."""
    x_t, output = pair
    o = torch.tensor([-1.0, 0.0, 0.5, 1.0]).double()[:, None, None, None].expand(4, 2, 3, 3)
    plain = GaussianDiffusion(schedule, target, clip_x_0=clip).denoiser(Recorder(output))
    learned = GaussianDiffusion(schedule, target, clip_x_0=clip, **LEARNED).denoiser(
        Recorder(torch.cat([output, o], 1))
    )
    for start, s in [(400, 399), (400, 350), (1000, 20), (700.5, 3.25)]:
        pred = learned(x_t, start)
        assert torch.equal(pred.eps, plain(x_t, start).eps) and torch.equal(pred.x_0, plain(x_t, start).x_0)
        bar_t, bar_s = schedule.alpha_bar_at(start).item(), schedule.alpha_bar_at(s).item()
        beta = 1 - bar_t / bar_s
        beta_tilde = (1 - bar_s) / (1 - bar_t) * beta
        sigma2 = variance(schedule, pred, x_t, start, s)
        assert sigma2.shape == x_t.shape
        for i, frac in enumerate((0, 0.5, 0.75, 1)):
            expected = torch.full((2, 3, 3), beta**frac * beta_tilde ** (1 - frac), dtype=torch.float64)
            torch.testing.assert_close(sigma2[i], expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize(("channels", "options", "takes"), [(2, LEARNED, 4), (4, {}, 2), (3, LEARNED, 4), (1, {}, 2)])
def test_outputs_of_other_channels_are_refused(schedule, pair, channels, options, takes):
    diffusion, model = GaussianDiffusion(schedule, **options), Recorder(torch.zeros(4, channels, 3, 3))
    message = f"output has {channels} channels, but .* with 2 channels of x takes {takes}; set model.out_channels"
    with pytest.raises(ValueError, match=message):
        diffusion.loss(model, pair[0])
    with pytest.raises(ValueError, match=message):
        diffusion.denoiser(model)(pair[0], 5)


# --- clipping


def test_dynamic_thresholding_by_hand(schedule):
    """k = ceil(0.5 * 5) = 3: where an image's third smallest |x_0| is above 1, clip to it and divide by it."""
    output = torch.tensor([[0.5, -1.5, 2, 3, -4], [0.1, 0.2, -0.9, 5, -6], [1, -1, 1, 0, 0], [-8, 8, -8, 8, 8]])
    expected = torch.tensor([[0.25, -0.75, 1, 1, -1], [0.1, 0.2, -0.9, 1, -1], [1, -1, 1, 0, 0], [-1, 1, -1, 1, 1]])
    output, expected = output.double()[:, None], expected.double()[:, None]
    x_t = torch.randn(4, 1, 5, dtype=torch.float64)
    pred = GaussianDiffusion(schedule, "x_0", dynamic_threshold=0.5).denoiser(Recorder(output))(x_t, t)
    torch.testing.assert_close(pred.x_0, expected, rtol=1e-15, atol=0)
    torch.testing.assert_close(q_sample(schedule, pred.x_0, t, pred.eps), x_t, rtol=1e-12, atol=1e-12)
    largest = GaussianDiffusion(schedule, "x_0", dynamic_threshold=1).denoiser(Recorder(output))(x_t, t).x_0
    size = output.abs().amax((1, 2), keepdim=True).clamp(min=1)
    torch.testing.assert_close(largest, output / size, rtol=1e-15, atol=0)


def test_without_clipping_the_output_is_left_alone(schedule, pair):
    x_t, output = pair
    pred = GaussianDiffusion(schedule, "x_0", clip_x_0=False).denoiser(Recorder(5 * output))(x_t, t)
    assert torch.equal(pred.x_0, 5 * output)


# --- other losses


def test_the_vlb_is_T_times_its_terms_for_a_fixed_variance_too(pair):
    schedule, (x_0, eps), output = linear(1200), pair, torch.randn(4, 2, 3, 3, dtype=torch.float64)
    for target in TARGETS:
        for name, frac in (("beta", 1.0), ("beta_tilde", 0.0)):
            diffusion = GaussianDiffusion(schedule, target, variance=name, clip_x_0=False, loss="vlb")
            x_t = q_sample(schedule, x_0, t, eps)
            pred = diffusion.denoiser(Recorder(output))(x_t, t)
            expected = 1200 * L_vlb(schedule, Prediction(pred.eps, pred.x_0, frac), x_0, x_t, t)
            torch.testing.assert_close(diffusion.loss(Recorder(output), x_0, t=t, eps=eps), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("loss", ["simple", "x_0", "snr", "min_snr", "p2", "vlb", "hybrid"])
@pytest.mark.parametrize("make", [linear, cosine])
def test_every_loss_of_a_true_answer_is_smaller_than_that_of_a_wrong_one(make, loss, pair):
    (x_0, eps), schedule = pair, make(1000)
    for target in TARGETS:
        diffusion = GaussianDiffusion(schedule, target, loss=loss)
        true = from_prediction(schedule, target, Prediction(eps, x_0), t)
        right, wrong = (diffusion.loss(Recorder(true + by), x_0, t=t, eps=eps) for by in (0.0, 0.5))
        assert right.shape == (4,) and (right < wrong).all()


@pytest.mark.parametrize("loss", ["simple", "min_snr"])
def test_a_learned_variance_is_sampled_with_any_loss_but_trained_with_two(schedule, pair, loss):
    (x_0, eps), model = pair, Recorder(torch.zeros(4, 4, 3, 3, dtype=torch.float64))
    diffusion = GaussianDiffusion(schedule, variance="learned", loss=loss)
    assert (diffusion.denoiser(model)(x_0, t).frac == 0.5).all()
    with pytest.raises(ValueError, match=f"not trained by loss = '{loss}'; allowed with it: hybrid, vlb"):
        diffusion.loss(model, x_0, t=t, eps=eps)
