"""ddpm/guidance: on mixtures whose classes are their components all of it is known exactly, without a network."""

import math

import pytest
import torch
from conftest import GaussianOracle, MixtureOracle
from torch import Tensor, nn

from ddpm.data import ImageData
from ddpm.data.batch import Condition
from ddpm.diffusion import GaussianDiffusion
from ddpm.forward import q_sample
from ddpm.guidance import (
    Auto,
    ByClassifier,
    ClassifierFree,
    ClassifierOf,
    Guidance,
    Trained,
    autoguidance,
    classifier,
    classifier_free,
)
from ddpm.randomness import Keyed
from ddpm.samplers import DDIM, DPMSolverPP, Heun, UniPC, integrate
from ddpm.schedules import NoiseSchedule, Time, cosine, linear, zero_terminal_snr
from ddpm.sources.trained import TrainedSampler
from ddpm.targets import TARGETS, Denoise, Prediction
from ddpm.training.tasks.classifier import Classifier
from models.noisy_classifier import NoisyClassifier
from models.unet import UNet

WEIGHTS, MEANS, VARIANCES = [0.2, 0.5, 0.3], [-0.9, 0.1, 0.8], [0.04, 0.01, 0.09]
TIMES = [1, 7, 200, 600, 999, 1000]
X = torch.linspace(-2.5, 2.5, 41, dtype=torch.float64)[:, None]


class Classes:
    """A mixture, each component of which is a class: predictions with a class and without, and p(y | x_t)."""

    def __init__(self, schedule: NoiseSchedule):
        self.schedule = schedule
        self.mixture = MixtureOracle(schedule, WEIGHTS, MEANS, VARIANCES)
        self.of = [GaussianOracle(schedule, m, c2) for m, c2 in zip(MEANS, VARIANCES, strict=True)]

    def log_prob(self, y: int) -> object:
        """log p(y | x_t), of one-pixel samples."""
        return lambda x_t, t: self.mixture.joint(x_t, t).log_softmax(-1)[:, 0, y]


@pytest.fixture(scope="module", params=[linear, cosine])
def classes(request) -> Classes:
    return Classes(request.param(1000))


def counting(denoise: Denoise) -> tuple[Denoise, list[Time]]:
    calls: list[Time] = []
    return lambda x_t, t: calls.append(t) or denoise(x_t, t), calls


def bound(denoise: Denoise, x_t: Tensor, t: int) -> Prediction:
    return denoise(x_t, torch.full((len(x_t),), t))


# --- On exact data


@pytest.mark.equation("ADM (14)")
def test_the_exact_classifier_at_weight_1_gives_the_exact_conditional(classes):
    for y, conditional in enumerate(classes.of):
        guided = classifier(classes.schedule, classes.mixture.denoise, classes.log_prob(y), 1.0)
        for t in TIMES:
            ours, exact = bound(guided, X, t), bound(conditional.denoise, X, t)
            torch.testing.assert_close(ours.eps, exact.eps, rtol=0, atol=1e-10)
            alpha_bar = classes.schedule.alpha_bar[t].item()
            error = 1e-10 * math.sqrt((1 - alpha_bar) / alpha_bar)  # of eps, in x_0
            torch.testing.assert_close(ours.x_0, exact.x_0, rtol=0, atol=max(1e-10, error))


@pytest.mark.equation("CFG (6)")
@pytest.mark.parametrize("w", [-1.0, 0.5, 2.0, 7.5])
def test_classifier_and_classifier_free_guidance_are_the_same_function_of_the_weight(classes, w):
    for y, conditional in enumerate(classes.of):
        free = classifier_free(conditional.denoise, classes.mixture.denoise, w)
        by_gradient = classifier(classes.schedule, classes.mixture.denoise, classes.log_prob(y), w)
        for t in TIMES:
            torch.testing.assert_close(bound(free, X, t).eps, bound(by_gradient, X, t).eps, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("combine", [classifier_free, autoguidance])
def test_weights_0_and_1_are_the_branches_themselves(classes, combine):
    one, other = classes.of[0].denoise, classes.mixture.denoise
    assert combine(one, other, 1.0) is one and combine(one, other, 0.0) is other
    assert classifier(classes.schedule, other, classes.log_prob(0), 0.0) is other


@pytest.mark.equation("AutoGuidance (4)")
def test_every_coordinate_is_combined_alike(classes):
    """x_0 = (x_t - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar) holds for the guided pair too."""
    for t in (1, 300, 900):
        c, u = (bound(denoise, X, t) for denoise in (classes.of[2].denoise, classes.mixture.denoise))
        guided = bound(autoguidance(classes.of[2].denoise, classes.mixture.denoise, 3.0), X, t)
        torch.testing.assert_close(guided.eps, 3 * c.eps - 2 * u.eps, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(guided.x_0, 3 * c.x_0 - 2 * u.x_0, rtol=1e-12, atol=1e-12)
        a = classes.schedule.alpha_bar[t]
        torch.testing.assert_close(a.sqrt() * guided.x_0 + (1 - a).sqrt() * guided.eps, X, rtol=0, atol=1e-9)


@pytest.mark.slow
def test_the_flow_under_guidance_is_that_of_an_independent_integration():
    """dx/d sigma = eps_w in x / sqrt(alpha_bar), by Runge-Kutta in 1,500 even steps of log sigma."""
    classes, w = Classes(linear(1000)), 3.0
    guided = classifier_free(classes.of[0].denoise, classes.mixture.denoise, w)
    schedule, x_T = classes.schedule, torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]

    def score_eps(x: Tensor, sigma: float) -> Tensor:
        """eps_w at noise level sigma of x = x_t / sqrt(alpha_bar_t), written from the densities alone."""
        variance = torch.tensor(VARIANCES, dtype=torch.float64) + sigma**2
        z = x - torch.tensor(MEANS, dtype=torch.float64)
        share = (
            torch.tensor(WEIGHTS, dtype=torch.float64).log() - 0.5 * variance.log() - z**2 / (2 * variance)
        ).softmax(1)
        without = sigma * (share * z / variance).sum(1, keepdim=True)
        return without + w * (sigma * z[:, :1] / variance[0] - without)

    sigmas = [math.exp(-schedule.lambda_[t].item()) for t in (1000, 1)]
    steps, x = 1500, x_T / schedule.alpha_bar[1000].sqrt()
    ratio = math.log(sigmas[1] / sigmas[0]) / steps
    for i in range(steps):
        s = [sigmas[0] * math.exp(ratio * (i + f)) for f in (0, 0.5, 1)]
        k_1 = ratio * s[0] * score_eps(x, s[0])
        k_2 = ratio * s[1] * score_eps(x + k_1 / 2, s[1])
        k_3 = ratio * s[1] * score_eps(x + k_2 / 2, s[1])
        k_4 = ratio * s[2] * score_eps(x + k_3, s[2])
        x = x + (k_1 + 2 * k_2 + 2 * k_3 + k_4) / 6
    exact = x * schedule.alpha_bar[1].sqrt()
    samplers = {
        DDIM(400, spacing="log_snr", grid="continuous"): 4e-2,
        DPMSolverPP(400, spacing="log_snr", grid="continuous"): 4e-3,
        UniPC(400, spacing="log_snr", grid="continuous"): 2e-3,
        Heun(400): 4e-3,
    }
    for sampler, most in samplers.items():
        ours = integrate(sampler, schedule, guided, x_T, sampler.times(schedule)[:-1])
        assert (ours - exact).abs().max() < most, type(sampler)


@pytest.mark.parametrize(
    ("make", "order"),
    [(DDIM, 1), (DPMSolverPP, 2), (lambda n, **o: Heun(n, **o), 2), (lambda n, **o: UniPC(n, 1, **o), 2)],
)
def test_solvers_keep_their_order_where_both_branches_are_one_gaussian(make, order):
    """eps_w is then affine, and dx/d sigma = eps_w has a closed form: with c = 0.25 in the one branch, 1 in the other.

    eps = sigma (x - m) / (c + sigma^2) in each, so x - m is multiplied by (c + sigma^2)^(w/2) (1 + sigma^2)^((1-w)/2).
    """
    schedule, w, m = linear(1000), 3.0, 0.3
    one, other = GaussianOracle(schedule, m, 0.25), GaussianOracle(schedule, m, 1.0)
    guided = classifier_free(one.denoise, other.denoise, w)
    end = 200
    a_T, a_s = (schedule.alpha_bar[t].sqrt().item() for t in (1000, end))
    s_T, s_s = (math.exp(-2 * schedule.lambda_[t].item()) for t in (1000, end))
    x_T = torch.tensor([[-1.5], [0.2], [2.0]], dtype=torch.float64)
    factor = ((0.25 + s_s) / (0.25 + s_T)) ** (w / 2) * ((1 + s_s) / (1 + s_T)) ** ((1 - w) / 2)
    exact = a_s * (m + (x_T / a_T - m) * factor)
    errors = []
    for steps in (100, 200):
        times = [
            schedule.t_at(at).item() for at in torch.linspace(schedule.lambda_[1000], schedule.lambda_[end], steps + 1)
        ]
        times[0], times[-1] = 1000.0, float(end)
        x = integrate(make(steps, grid="continuous"), schedule, guided, x_T, times)
        errors.append((x - exact).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


# --- What is evaluated


def test_outside_of_the_interval_the_conditional_stands_alone(classes):
    t, log_snr = 300, 2 * classes.schedule.lambda_[300].item()
    for options in (
        {"interval": (250, 350)},
        {"schedule": classes.schedule, "interval": (log_snr - 0.1, log_snr + 0.1)},
    ):
        (c, of_c), (u, of_u) = counting(classes.of[0].denoise), counting(classes.mixture.denoise)
        guided, whole = classifier_free(c, u, 3.0, **options), classifier_free(classes.of[0].denoise, u, 3.0)
        assert torch.equal(bound(guided, X, 600).eps, bound(classes.of[0].denoise, X, 600).eps)
        assert (len(of_c), len(of_u)) == (1, 0)
        assert torch.equal(bound(guided, X, t).eps, bound(whole, X, t).eps) and len(of_c) == 2
        mixed = guided(X[:2], torch.tensor([t, 600]))
        rows = torch.cat([bound(whole, X[:1], t).eps, bound(classes.of[0].denoise, X[1:2], 600).eps])
        torch.testing.assert_close(mixed.eps, rows, rtol=1e-12, atol=1e-12)


def test_weight_0_within_an_interval_asks_the_unconditional_alone(classes):
    (c, of_c), (u, of_u) = counting(classes.of[0].denoise), counting(classes.mixture.denoise)
    guided = classifier_free(c, u, 0.0, interval=(250, 350))
    bound(guided, X, 300), bound(guided, X, 600)
    assert (len(of_c), len(of_u)) == (1, 1)


@pytest.mark.equation("Lin (16)")
@pytest.mark.parametrize("target", TARGETS)
def test_rescaling_acts_on_the_networks_own_target(target):
    schedule, x_t = cosine(100), torch.randn(3, 1, 4, 4, dtype=torch.float64)
    diffusion = GaussianDiffusion(schedule, target, clip_x_0=False)
    outputs = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    c, u = (diffusion.predictor(lambda x, t, output=output: output) for output in outputs)
    for phi in (0.0, 0.3, 1.0):
        guided = classifier_free(c, u, 4.0, schedule=schedule, rescale=phi)(x_t, torch.full((3,), 40))
        y = outputs[1] + 4 * (outputs[0] - outputs[1])
        factor = (outputs[0].flatten(1).std(1) / y.flatten(1).std(1))[:, None, None, None]
        rescaled = (phi * factor + 1 - phi) * y
        said = diffusion.predictor(lambda x, t, rescaled=rescaled: rescaled)(x_t, 40)
        torch.testing.assert_close(guided.eps, said.eps, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(guided.x_0, said.x_0, rtol=1e-9, atol=1e-9)


def test_an_even_picture_is_not_rescaled():
    schedule, x_t = cosine(20), torch.zeros(2, 1)
    one, other = (lambda x, t: Prediction(x + 1, x, target="eps")), (lambda x, t: Prediction(x, x, target="eps"))
    guided = classifier_free(one, other, 3.0, schedule=schedule, rescale=1.0)(x_t, torch.tensor([5, 5]))
    assert torch.equal(guided.eps, torch.full((2, 1), 3.0))


def test_where_x_t_is_pure_noise_a_classifier_says_nothing():
    schedule = zero_terminal_snr(linear(100))
    classes = Classes(schedule)
    guided = bound(classifier(schedule, classes.mixture.denoise, classes.log_prob(0), 2.0), X, 100)
    assert torch.equal(guided.x_0, bound(classes.mixture.denoise, X, 100).x_0) and guided.eps.isfinite().all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"w": math.nan}, "w = nan must be a finite number"),
        ({"w": math.inf}, "w = inf must be a finite number"),
        ({"rescale": 1.5}, r"rescale = 1.5 must lie in \[0, 1\]"),
        ({"rescale": 0.5}, "rescale = 0.5 acts on the network's own target, and needs the schedule"),
        ({"interval": (3, 1)}, r"interval = \(3, 1\) must be \(low, high\) with low < high"),
    ],
)
def test_what_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        classifier_free(*[lambda x_t, t: None] * 2, **{"w": 2.0} | options)
    if "schedule" not in words:
        with pytest.raises(ValueError, match=words.replace(r"\(3, 1\)", ".*").replace(r"\(low", r".*low")):
            ClassifierFree(**options)


# --- With networks


def network(seed: int = 0, **options: object) -> UNet:
    torch.manual_seed(seed)
    settings = {"channels": 8, "channel_mults": (1,), "blocks": 1, "attention_resolutions": (), "groups": 4}
    model = UNet(8, 1, **settings | {"num_classes": 3, "drop": 0.1} | options)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model.eval()


@pytest.mark.parametrize("variance", ["beta", "learned"])
def test_a_pair_is_evaluated_as_one_batch(variance):
    model = network(out_channels=2 if variance == "learned" else 1)
    diffusion = GaussianDiffusion(cosine(50), "v", variance=variance)
    y, x_t = Condition(classes=torch.tensor([0, 2, 1])), torch.randn(3, 1, 8, 8)
    with_it = y.nulled(torch.zeros(3, dtype=torch.bool))
    pair, sizes = diffusion.pair(model, with_it, y.nulled()), []
    model.register_forward_pre_hook(lambda module, arguments: sizes.append(len(arguments[0])))
    with torch.no_grad():
        c, u = pair.both(x_t, 7)
        assert sizes == [6]
        for one, other in ((c, pair.conditional(x_t, 7)), (u, pair.unconditional(x_t, 7))):
            torch.testing.assert_close(one.eps, other.eps, rtol=0, atol=1e-5)
            torch.testing.assert_close(torch.as_tensor(one.frac), torch.as_tensor(other.frac), rtol=0, atol=1e-5)
            assert one.target == other.target == "v"
        assert not torch.allclose(c.eps, u.eps, atol=1e-3)
        plain = diffusion.predictor(model, y.classes)(x_t, 7)
        assert torch.equal(plain.eps, pair.conditional(x_t, 7).eps)


def drawn(model: nn.Module, guidance: Guidance | None, **options: object) -> Tensor:
    diffusion = GaussianDiffusion(cosine(50), "v", **options)
    source = TrainedSampler(diffusion, model, DDIM(5), (1, 8, 8), 0, torch.device("cpu"), guidance=guidance)
    return source.draw(range(4))


def test_samples_are_guided_before_the_clip():
    model = network()
    plain = drawn(model, None)
    assert torch.equal(drawn(model, ClassifierFree(1.0)), plain)
    guided = drawn(model, ClassifierFree(3.0))
    assert not torch.allclose(guided, plain, atol=1e-3) and guided.abs().max() <= 1
    assert not torch.allclose(drawn(model, ClassifierFree(3.0, rescale=1.0)), guided, atol=1e-3)
    torch.testing.assert_close(drawn(model, ClassifierFree(3.0, interval=[-99, -98])), plain, rtol=0, atol=1e-6)
    calls = []
    model.register_forward_pre_hook(lambda module, arguments: calls.append(len(arguments[0])))
    drawn(model, ClassifierFree(3.0))
    assert calls == [8] * 5


def test_autoguidance_by_an_earlier_network():
    good, bad = network(0), network(1)
    worse = Trained(GaussianDiffusion(cosine(50), "eps"), bad)
    assert torch.equal(drawn(good, Auto(worse, 1.0)), drawn(good, None))
    assert not torch.allclose(drawn(good, Auto(worse, 2.0)), drawn(good, None), atol=1e-3)
    with pytest.raises(ValueError, match=r"guidance.bad was trained on another noise schedule"):
        drawn(good, Auto(Trained(GaussianDiffusion(cosine(40)), bad)))
    with pytest.raises(ValueError, match=r"guidance.bad has num_classes = 4, but this network 3"):
        drawn(good, Auto(Trained(GaussianDiffusion(cosine(50)), network(num_classes=4))))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"num_classes": None, "drop": 0.0},
            r"needs a conditional network; train one with model.num_classes=K task.drop=0.1",
        ),
        ({"drop": 0.0}, r"trained without its condition too; train one with task.drop=0.1"),
    ],
)
def test_a_network_that_was_not_trained_for_guidance_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        drawn(network(**options), ClassifierFree(2.0))


@pytest.mark.parametrize(("asked", "styles"), [([2, 0], [1]), ([1], []), (None, None)])
def test_of_several_labels_guidance_leads_away_from_none_of_them(asked, styles):
    """[CFG (6)] between what the network says with the labels that are asked for, and with all of them null."""
    model, diffusion, w = network(num_classes=[3, 2]), GaussianDiffusion(cosine(50), "v"), 3.0
    for embedding in model.class_embedding:
        nn.init.normal_(embedding.null)
    settings = (diffusion, model, DDIM(5), (1, 8, 8), 0, torch.device("cpu"))
    plain, guided = (
        TrainedSampler(*settings, requested=asked, styles=styles, guidance=g) for g in (None, ClassifierFree(w))
    )
    x_t, told = torch.randn(4, 1, 8, 8), plain.condition(range(4))
    every = Condition(classes=told.classes, null={"classes": torch.ones(4, 2).bool()})
    with torch.no_grad():
        c, u = (diffusion.predictor(model, one.for_network(model))(x_t, 30).eps for one in (told, every))
        eps = guided.predictor(told)(x_t, 30).eps
    torch.testing.assert_close(eps, u + w * (c - u), rtol=0, atol=1e-5)
    assert (c - u).abs().max() > 1e-2
    assert not torch.allclose(guided.draw(range(4)), plain.draw(range(4)), atol=1e-3)


def test_a_bad_network_that_knows_no_null_guides_no_sample_without_a_label():
    worse = Auto(Trained(GaussianDiffusion(cosine(50)), network(1, num_classes=[3, 2], drop=0.0)))
    settings = (GaussianDiffusion(cosine(50)), network(num_classes=[3, 2]), DDIM(5), (1, 8, 8), 0, torch.device("cpu"))
    TrainedSampler(*settings, styles=[1], guidance=worse).draw([0])
    with pytest.raises(ValueError, match=r"style = none: guidance.bad was trained with task.drop=0"):
        TrainedSampler(*settings, styles=[], guidance=worse)
    with pytest.raises(ValueError, match=r"style = none: guidance.bad was trained with task.drop=0"):
        TrainedSampler(*settings, styles=[]).guided_by(worse)


# --- By a classifier


class Bayes(nn.Module):
    """The exact classifier of images whose every pixel is of the mixture's component of their class."""

    shape, num_classes, takes = (1, 8, 8), 3, ()

    def __init__(self, schedule: NoiseSchedule):
        super().__init__()
        self.of = [MixtureOracle(schedule, [1.0], [m], [c2]) for m, c2 in zip(MEANS, VARIANCES, strict=True)]
        self.prior = torch.tensor(WEIGHTS).log()

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return torch.stack([one.log_prob(x_t, t).sum((1, 2, 3)) for one in self.of], 1) + self.prior


class OfClass(nn.Module):
    """The exact network for such images, told of their class."""

    shape, num_classes, takes = (1, 8, 8), None, ()

    def __init__(self, schedule: NoiseSchedule, bayes: Bayes):
        super().__init__()
        self.bayes, self.one = bayes, nn.Parameter(torch.zeros(()))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """E[eps | x_t], the mean of the classes' by their probabilities."""
        share = self.bayes(x_t, t).softmax(1)
        eps = torch.stack([one.denoise(x_t, t).eps for one in self.bayes.of], 1)
        return (share[:, :, None, None, None] * eps).sum(1)


def test_samples_that_a_classifier_guides_are_of_the_class_that_is_asked_for():
    schedule = cosine(50)
    bayes = Bayes(schedule)
    guidance, diffusion = ByClassifier(ClassifierOf(schedule, bayes), 1.0), GaussianDiffusion(schedule)
    source = TrainedSampler(
        diffusion,
        OfClass(schedule, bayes),
        DDIM(25),
        (1, 8, 8),
        0,
        torch.device("cpu"),
        requested=[2],
        guidance=guidance,
    )
    x = source.draw(range(6))
    assert (x.mean((1, 2, 3)) - MEANS[2]).abs().max() < 0.15
    assert source.classes(range(3)).tolist() == [2, 2, 2] and "classifier guidance w = 1" in str(guidance)
    free = TrainedSampler(diffusion, OfClass(schedule, bayes), DDIM(25), (1, 8, 8), 0, torch.device("cpu"))
    assert free.classes(range(3)) is None and (free.draw(range(6)).mean((1, 2, 3)) - MEANS[2]).abs().max() > 0.3


def test_a_classifier_guides_by_the_first_label():
    classifies = NoisyClassifier(8, 1, 3, channels=8, groups=4).eval()
    guidance = ByClassifier(ClassifierOf(cosine(50), classifies), 5.0)
    diffusion, model, x_t = GaussianDiffusion(cosine(50)), network(num_classes=[3, 2]), torch.randn(4, 1, 8, 8)
    for p in classifies.parameters():
        nn.init.normal_(p, std=0.2)
    settings = (diffusion, model, DDIM(5), (1, 8, 8), 0, torch.device("cpu"))
    source = TrainedSampler(*settings, requested=[2], styles=[1], guidance=guidance)
    told = source.condition(range(4))
    by_hand = classifier(
        diffusion.schedule,
        diffusion.predictor(model, told.classes),
        lambda x, t: classifies(x, torch.as_tensor(t).expand(len(x))).log_softmax(1)[:, 2],
        5.0,
    )
    with torch.no_grad():
        torch.testing.assert_close(source.predictor(told)(x_t, 20).eps, by_hand(x_t, 20).eps)
    TrainedSampler(*settings, styles=[], guidance=guidance).draw([0])
    with pytest.raises(ValueError, match="class = none: guidance=classifier leads to a class"):
        TrainedSampler(*settings, requested=[], guidance=guidance)


@pytest.mark.parametrize(
    ("schedule", "options", "words"),
    [
        (cosine(40), {}, "guidance.run was trained on another noise schedule"),
        (cosine(50), {"num_classes": 4}, "guidance.run knows 3 classes, but this network 4"),
    ],
)
def test_a_classifier_that_does_not_fit_is_refused(schedule, options, words):
    classifies = NoisyClassifier(8, 1, 3, channels=8, groups=4)
    with pytest.raises(ValueError, match=words):
        drawn(network(**options), ByClassifier(ClassifierOf(schedule, classifies)))
    with pytest.raises(ValueError, match=r"samples of shape \(1, 16, 16\), but this network draws \(1, 8, 8\)"):
        drawn(network(), ByClassifier(ClassifierOf(cosine(50), NoisyClassifier(16, 1, 3, channels=8, groups=4))))
    with pytest.raises(ValueError, match="w = nan must be a finite number"):
        ByClassifier(ClassifierOf(cosine(50), classifies), math.nan)


@pytest.mark.slow
@pytest.mark.equation("ADM (classifier)")
def test_a_classifier_learns_the_class_of_what_is_noisy():
    """Two classes of even images: its loss falls well below log 2, and its accuracy from 1 to chance with the noise."""
    labels = torch.arange(200) % 2
    images = (100 + 60 * labels).to(torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8).contiguous()
    data = ImageData("gray", "all", images, labels, validation=0.5)
    torch.manual_seed(0)
    task = Classifier(NoisyClassifier(8, 1, 2, channels=8, groups=4, dropout=0.0), cosine(50))
    task.check(data)
    optimizer = torch.optim.Adam(task.model.parameters(), 1e-2)
    for step in range(60):
        drawn = task.draw(data.batch(data.order(0, step + 1, 50)), Keyed(0, step), 0.0)
        loss = task.losses(drawn, 0.0)["loss"]
        assert loss.shape == (50,)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    assert loss.mean() < 0.5
    clean, middle, noise = task.accuracy(data, [0, 20, 50])
    assert clean == 1 and middle > 0.9 and abs(noise - 0.5) < 0.2
    expected = -task.model(q_sample(task.schedule, drawn.x_0, drawn.t, drawn.eps), drawn.t).log_softmax(1)
    rows = expected.gather(1, drawn.condition.classes[:, None])[:, 0]
    torch.testing.assert_close(task.losses(drawn, 0.0)["loss"], rows)
    with pytest.raises(ValueError, match="needs labels"):
        task.check(ImageData("gray", "all", images, validation=0.5))
