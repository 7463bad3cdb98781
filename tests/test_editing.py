"""ddpm/editing: on Gaussian data every edit is affine, and its mean and covariance are known without chance."""

import itertools
import math

import pytest
import torch
from conftest import GaussianOracle, Probes
from torch import Tensor

from ddpm.diffusion import GaussianDiffusion
from ddpm.editing import img2img, inpaint, mask_of_latents, redraw
from ddpm.editing.img2img import last_steps
from ddpm.editing.inpaint import walk
from ddpm.forward import q_sample
from ddpm.oracle import JointGaussian
from ddpm.randomness import SampleNoise
from ddpm.samplers import DDIM, Ancestral, DPMSolverPP, Heun, Sampler, integrate
from ddpm.schedules import cosine

SAMPLERS = {
    "ddim": DDIM(10),
    "ddim with noise": DDIM(10, eta=1.0),
    "ancestral": Ancestral(10),
    "dpm": DPMSolverPP(10),
    "churn": Heun(10, churn=2.0, grid="continuous"),
}
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)


@pytest.fixture(scope="module")
def oracle() -> GaussianOracle:
    return GaussianOracle(cosine(1000), 0.3, 0.2)


def image(n: int = 3) -> Tensor:
    return torch.linspace(-1, 1, n * 6).double().reshape(n, 1, 2, 3)


# --- img2img


@every_sampler
def test_strength_0_is_the_image_and_strength_1_is_sampling_bit_for_bit(sampler, oracle):
    x_0, noise = image(), SampleNoise(4, [7, 2, 9])
    assert torch.equal(img2img(sampler, oracle.schedule, oracle.denoise, x_0, 0, noise), x_0)
    sampled = sampler(oracle.schedule, oracle.denoise, noise.x_T((1, 2, 3)).double(), generator=noise)
    for strength in (1, 1.0, 0.96):
        assert torch.equal(img2img(sampler, oracle.schedule, oracle.denoise, x_0, strength, noise), sampled)
    other = img2img(sampler, oracle.schedule, oracle.denoise, x_0, 0.9, noise)
    assert not torch.equal(other, sampled) and not torch.equal(other, x_0)


@pytest.mark.equation("SDEdit (start)")
@pytest.mark.parametrize("strength", [0.1, 0.5, 0.9])
@every_sampler
def test_img2img_moments_on_gaussian_data(sampler, strength, oracle):
    """The start is N(a x_0, 1 - a^2), and the rest is affine in it and in the noise of each step."""
    times = sampler.times(oracle.schedule)[-1 - round(10 * strength) :]
    alpha_bar = oracle.schedule.alpha_bar_at(times[0]).item()

    def end(x_t: Tensor, noise: Probes) -> Tensor:
        return integrate(sampler, oracle.schedule, oracle.denoise, x_t, times, generator=noise)

    rest = Probes(len(times) - 1)
    shift, slope, *others = end(rest.x_T((1,)), rest).flatten().tolist()
    slope, variance = slope - shift, sum((k - shift) ** 2 for k in others)
    x = img2img(
        sampler,
        oracle.schedule,
        oracle.denoise,
        torch.full((len(rest.indices), 1), 0.8, dtype=torch.float64),
        strength,
        rest,
    )
    mean, *ends = x.flatten().tolist()
    assert mean == pytest.approx(shift + slope * math.sqrt(alpha_bar) * 0.8, rel=1e-9)
    assert sum((k - mean) ** 2 for k in ends) == pytest.approx(slope**2 * (1 - alpha_bar) + variance, rel=1e-9)


def test_the_mean_of_an_edit_is_what_the_flow_makes_of_it(oracle):
    """With steps without end DDIM follows the flow: the mean of x_t moves to the data's by the ratio of the spreads."""
    x_0 = torch.full((3, 1), -0.9).double()
    for strength in (0.25, 0.5, 0.75):
        mean = img2img(DDIM(1000), oracle.schedule, oracle.denoise, x_0, strength, Probes(1))[0].item()
        t = 1000 * strength
        start = q_sample(oracle.schedule, x_0[:1], int(t), torch.zeros(1, 1).double())
        assert mean == pytest.approx(oracle.exact_ode(start, t, 0).item(), abs=3e-3)


def test_more_strength_leaves_less_of_the_image(oracle):
    """How much of a change of x_0 is still there, by DDIM without noise."""
    kept = []
    for strength in (0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
        ends = [
            img2img(
                DDIM(20), oracle.schedule, oracle.denoise, torch.full((1, 1), x).double(), strength, SampleNoise(0, [0])
            )
            for x in (-1.0, 1.0)
        ]
        kept.append((ends[1] - ends[0]).item() / 2)
    assert kept == sorted(kept, reverse=True) and kept[0] > 0.9 and kept[-1] == 0


@pytest.mark.parametrize(
    ("strength", "steps"), [(0, 0), (1e-9, 1), (0.25, 3), (0.58, 6), (0.96, 10), (1, 10), (1.0, 10)]
)
def test_strength_counts_steps(strength, steps):
    assert last_steps(strength, 10) == steps


@pytest.mark.parametrize("strength", [-0.1, 1.1, math.nan, math.inf, True, "0.5", None])
def test_what_is_no_strength_is_refused(strength, oracle):
    with pytest.raises(ValueError, match=r"strength = .* must be a number in \[0, 1\]"):
        img2img(DDIM(5), oracle.schedule, oracle.denoise, image(), strength)


def test_a_torch_generator_repeats(oracle):
    a, b = (
        img2img(Ancestral(5), oracle.schedule, oracle.denoise, image(), 0.5, torch.Generator().manual_seed(3))
        for _ in range(2)
    )
    assert torch.equal(a, b)


def test_editing_goes_where_the_images_are(device):
    diffusion, x = GaussianDiffusion(cosine(100), "v"), torch.ones((2, 1, 4, 4), device=device)
    denoise = diffusion.denoiser(lambda x_t, t: 0.3 * x_t)
    for noise in (None, SampleNoise(0, range(2))):
        edited = [
            img2img(Ancestral(5), diffusion.schedule, denoise, x, 0.5, noise),
            inpaint(Ancestral(5), diffusion.schedule, denoise, x, torch.eye(4), resamples=2, generator=noise),
            redraw(DDIM(5), diffusion.schedule, denoise, x, denoise, 0.5),
        ]
        assert all(y.shape == x.shape and y.device.type == device for y in edited)


# --- inpainting


class Everywhere(SampleNoise):
    """A row for each number that is drawn, in either stream: unit noise there, none elsewhere; row 0 has none."""

    def __init__(self, draws: int, d: int):
        super().__init__(0, range(1 + 2 * draws * d))
        self.draws, self.d = draws, d

    def __call__(self, draw: int, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
        first = 1 + self.d * (draw + self.draws * (self.stream == "known"))
        eps = torch.zeros(len(self.indices), self.d, dtype=torch.float64)
        eps[first : first + self.d] = torch.eye(self.d, dtype=torch.float64)
        return eps.reshape(-1, *shape)


def inpainted(
    sampler: Sampler, oracle: JointGaussian, x_0: Tensor, mask: Tensor, **options: int
) -> tuple[Tensor, Tensor]:
    """Exact mean and covariance of what inpainting draws, (d,) and (d, d)."""
    steps = len(sampler.times(oracle.schedule)) - 1
    noise = Everywhere(len(walk(steps, options.get("resamples", 1), options.get("jump", 1))), len(x_0))
    rows = x_0.expand(len(noise.indices), -1)
    x = inpaint(sampler, oracle.schedule, oracle.denoise, rows, mask, generator=noise, **options)
    return x[0], (x[1:] - x[0]).T @ (x[1:] - x[0])


def test_a_latent_is_drawn_anew_where_any_of_its_pixels_is():
    mask = torch.zeros(2, 1, 6, 9, dtype=torch.bool)
    mask[0, 0, 1, 2] = mask[1, 0, 5, 3] = mask[1, 0, 4, 8] = True
    drawn = mask_of_latents(mask, (3, 3))
    assert drawn.dtype == torch.bool and drawn.shape == (2, 1, 3, 3)
    assert drawn.nonzero().tolist() == [[0, 0, 0, 0], [1, 0, 2, 1], [1, 0, 2, 2]]


def test_the_walk_is_the_papers_schedule_of_jumps():
    """RePaint's own: from t = 1 and every jump above it that fits, resamples - 1 times."""

    def printed(T: int, r: int, j: int) -> list[int]:
        jumps, t, ts = {k: r - 1 for k in range(0, T - j, j)}, T, []
        while t >= 1:
            t -= 1
            ts.append(t)
            if jumps.get(t, 0) > 0:
                jumps[t] -= 1
                for _ in range(j):
                    t += 1
                    ts.append(t)
        return [*ts, -1]

    for T, r, j in [(10, 1, 1), (10, 3, 1), (25, 2, 10), (12, 3, 4), (5, 4, 7), (1, 3, 1), (9, 2, 8), (9, 2, 9)]:
        single = [T - 1 - place for place in walk(T, r, j)]
        ups = [[*range(a + 1, b)] if b > a + 1 else [] for a, b in itertools.pairwise(single)]
        assert [t for up, t in zip([[], *ups], single, strict=True) for t in [*up, t]] == printed(T, r, j)
    assert walk(3, 2, 1) == [0, 1, 0, 1, 2, 1, 2, 3] and walk(4, 1, 2) == [0, 1, 2, 3, 4]


@every_sampler
@pytest.mark.parametrize("options", [{}, {"resamples": 3}, {"resamples": 2, "jump": 4}], ids=str)
def test_kept_pixels_are_the_images_own_and_an_all_one_mask_is_sampling(sampler, options, oracle):
    x_0, noise = image(), SampleNoise(3, range(3))
    mask = torch.tensor([[1, 0, 1], [0, 0, 1]])
    x = inpaint(sampler, oracle.schedule, oracle.denoise, x_0, mask, generator=noise, **options)
    drawn = mask.bool().expand(x_0.shape)
    assert torch.equal(x[~drawn], x_0[~drawn]) and (x[drawn] != x_0[drawn]).all()
    nothing = inpaint(sampler, oracle.schedule, oracle.denoise, x_0, torch.zeros(1), generator=noise, **options)
    assert torch.equal(nothing, x_0)
    if not options:
        sampled = sampler(oracle.schedule, oracle.denoise, noise.x_T((1, 2, 3)).double(), generator=noise)
        everything = inpaint(sampler, oracle.schedule, oracle.denoise, x_0, torch.ones(1, 1, 1, 1), generator=noise)
        assert torch.equal(everything, sampled)


def test_what_lies_under_the_mask_is_not_looked_at(oracle):
    mask = torch.tensor([[True, False, True]])
    changed = torch.where(mask, -0.3, image())
    a, b = (
        inpaint(
            Ancestral(6), oracle.schedule, oracle.denoise, x_0, mask, resamples=2, generator=SampleNoise(1, range(3))
        )
        for x_0 in (image(), changed)
    )
    assert torch.equal(a[mask.expand(a.shape)], b[mask.expand(b.shape)])


@pytest.mark.equation("RePaint (8)")
def test_x_t_is_put_together_as_printed(oracle):
    """What the network sees: known pixels with noise of their own, unknown ones as the walk has them."""
    seen, noise, x_0 = [], SampleNoise(5, range(3)), image()
    mask = torch.tensor([[1, 0, 1], [0, 0, 1]]).double()

    def denoise(x_t: Tensor, t: Tensor) -> object:
        seen.append((t[0].item(), x_t))
        return oracle.denoise(x_t, t)

    inpaint(DDIM(5), oracle.schedule, denoise, x_0, mask, generator=noise)
    unknown = noise.x_T((1, 2, 3)).double()
    for i, (t, x_t) in enumerate(seen):
        a = oracle.schedule.alpha_bar[t].sqrt()
        eps = SampleNoise(5, range(3), "known")(i + 1, (1, 2, 3)).double()
        torch.testing.assert_close(x_t, mask * unknown + (1 - mask) * (a * x_0 + (1 - a**2).sqrt() * eps))
        if i < 4:
            unknown = integrate(DDIM(), oracle.schedule, oracle.denoise, x_t, [t, seen[i + 1][0]])


def pair() -> JointGaussian:
    covariance = 0.25 * torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    return JointGaussian(cosine(1000), torch.tensor([0.2, 0.2]), covariance)


KNOWN = 1.2  # the second pixel of a pair: 2 standard deviations above its mean


def recursion(sampler: Sampler, resamples: int, jump: int) -> tuple[float, float]:
    """Mean and variance of the first pixel of a pair, step by step: each step is affine in x_t and its noise."""
    oracle, times, steps = pair(), sampler.times(cosine(1000)), {}
    a_of = {t: math.sqrt(oracle.schedule.alpha_bar_of(t)) for t in times}
    mean, variance = 0.0, 1.0
    for t, s in itertools.pairwise([times[n] for n in walk(len(times) - 1, resamples, jump)]):
        if s > t:
            k = a_of[s] / a_of[t]
            mean, variance = k * mean, k**2 * variance + 1 - k**2
            continue
        if (t, s) not in steps:
            x_t, noise = torch.tensor([[0, 0], [1, 0], [0, 1], [0, 0]]).double(), Last(0, range(4))
            x_s = integrate(sampler, oracle.schedule, oracle.denoise, x_t, [t, s], generator=noise)[:, 0]
            steps[t, s] = (x_s[0].item(), *(x_s[1:] - x_s[0]).tolist())
        shift, own, known, z = steps[t, s]
        mean = shift + own * mean + known * a_of[t] * KNOWN
        variance = own**2 * variance + known**2 * (1 - a_of[t] ** 2) + z**2
    return mean, variance


class Last(SampleNoise):
    """Unit noise of the first pixel in the last row."""

    def __call__(self, draw: int, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
        eps = torch.zeros(len(self.indices), *shape, dtype=torch.float64)
        eps[-1, 0] = 1
        return eps


@pytest.mark.parametrize("sampler", [DDIM(8), DDIM(8, eta=0.6), Ancestral(8)], ids=["ddim", "eta 0.6", "ancestral"])
@pytest.mark.parametrize(("resamples", "jump"), [(1, 1), (3, 1), (2, 3)])
def test_inpainting_has_the_moments_that_its_steps_have(sampler, resamples, jump):
    x_0 = torch.tensor([0.0, KNOWN], dtype=torch.float64)
    mean, covariance = inpainted(sampler, pair(), x_0, torch.tensor([1, 0]), resamples=resamples, jump=jump)
    expected = recursion(sampler, resamples, jump)
    assert (mean[0].item(), covariance[0, 0].item()) == pytest.approx(expected, rel=1e-9)
    assert mean[1] == KNOWN and covariance[1].abs().max() == 0


def bias(sampler: Sampler, resamples: int, jump: int = 1) -> tuple[float, float]:
    """Error of the mean in standard deviations of the data, and the variance over the exact one."""
    exact = pair().posterior(torch.tensor([[0.0, 1.0]]), torch.tensor([KNOWN], dtype=torch.float64))
    mean, variance = recursion(sampler, resamples, jump)
    return (mean - exact.mean[0].item()) / 0.5, variance / exact.covariance[0, 0].item()


TABLE = {1: (-0.548, 1.62), 2: (-0.27, 1.25), 5: (-0.09, 1.06), 10: (-0.04, 0.99)}  # that of experiments/guidance.md


@pytest.mark.slow
def test_replacement_is_biased_and_resampling_takes_the_bias_away():
    found = {n: bias(Ancestral(), n) for n in TABLE}
    print("\n".join(f"| {n} | {mean:.3f} | {variance:.2f} |" for n, (mean, variance) in found.items()))
    for n, expected in TABLE.items():
        assert found[n] == pytest.approx(expected, abs=0.006)
    jumps = {n: bias(Ancestral(250), n, jump=10) for n in (1, 2, 5)}
    for errors in (found, jumps):
        means, variances = zip(*errors.values(), strict=True)
        assert list(means) == sorted(means) and means[-1] < 0
        assert list(variances) == sorted(variances, reverse=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": torch.tensor([0.5, 1, 0])}, "1 where pixels are drawn anew"),
        ({"mask": torch.tensor([math.nan, 1, 0])}, "1 where pixels are drawn anew"),
        ({"mask": torch.ones(2)}, r"shape \(2,\) does not broadcast to images \(3, 1, 2, 3\)"),
        ({"mask": torch.ones(2, 3, 1, 2, 3)}, "does not broadcast"),
        ({"resamples": 0}, "resamples = 0 must be an integer >= 1"),
        ({"resamples": 1.5}, "resamples = 1.5 must be"),
        ({"jump": True}, "jump = True must be"),
    ],
)
def test_what_cannot_be_inpainted_is_refused(options, message, oracle):
    options = {"mask": torch.ones(3)} | options
    with pytest.raises(ValueError, match=message):
        inpaint(Ancestral(5), oracle.schedule, oracle.denoise, image(), **options)
