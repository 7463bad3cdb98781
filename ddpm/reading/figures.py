"""Small figures of the modules, computed by the documented code when the pages are generated."""

from collections.abc import Callable, Mapping

import torch
from matplotlib import rc_context
from torch import Tensor

from ddpm import likelihood, losses, preconditioning, schedules, targets, times
from ddpm.distillation.consistency import curriculum, lognormal
from ddpm.distillation.progressive import one_step_for_two
from ddpm.forward import q_posterior
from ddpm.guidance.classifier_free import classifier_free
from ddpm.latent import elbo
from ddpm.latent.codec import Continuous
from ddpm.oracle import GaussianOracle, JointGaussian, JointMixture, MixtureOracle
from ddpm.randomness import generator
from ddpm.reading.drawing import LOOKS, axes, svg
from ddpm.samplers import DDIM, DPMSolverPP, Heun, Sampler
from ddpm.score.langevin import unadjusted
from ddpm.training import ema, post_hoc

NAMED: Mapping[str, Callable[..., schedules.NoiseSchedule]] = {
    "linear": schedules.linear,
    "cosine": schedules.cosine,
    "sigmoid": schedules.sigmoid,
}
POINTS = range(0, 1001, 10)


def figure_of(name: str) -> str:
    """Return the SVG figure of a module of `FIGURES`, in the style of the site."""
    with rc_context(LOOKS):
        return FIGURES[name][0]()


def of_schedules() -> str:
    """Plot alpha_bar and the log of the signal-to-noise ratio over t."""
    figure, (left, right) = axes(2)
    for name, make in NAMED.items():
        schedule = make(1000)
        left.plot(POINTS, schedule.alpha_bar[list(POINTS)], label=name)
        right.plot(POINTS[1:], 2 * schedule.lambda_[list(POINTS[1:])])
    left.set(xlabel="t", ylabel="alpha_bar")
    right.set(xlabel="t", ylabel="log-SNR")
    left.legend()
    return svg(figure, "schedules")


def of_the_posterior() -> str:
    """Plot the coefficients of x_0 and x_t in q_posterior's mean, and its variance."""
    schedule = schedules.linear(1000)
    t = torch.logspace(0, 3, 60).round().long().unique()
    one, none = torch.ones(len(t), 1, dtype=torch.float64), torch.zeros(len(t), 1, dtype=torch.float64)
    of_x_0, beta_tilde = q_posterior(schedule, one, none, t)
    of_x_t, _ = q_posterior(schedule, none, one, t)
    figure, (left, right) = axes(2)
    left.semilogx(t, of_x_0, label="of x_0")
    left.semilogx(t, of_x_t, label="of x_t")
    left.set(xlabel="t", ylabel="coefficient in mu_tilde")
    left.legend()
    right.semilogx(t, beta_tilde[:, 0] / schedule.beta[t])
    right.set(xlabel="t", ylabel="beta_tilde / beta", ylim=(-0.04, 1.04))
    return svg(figure, "posterior")


def of_weights() -> str:
    """Plot the weights of the squared error of x_0 over the log-SNR."""
    log_snr = torch.linspace(-6, 6, 97, dtype=torch.float64)
    figure, (plot,) = axes(1, 3.2)
    for name in ("snr", "min_snr", "truncated_snr", "snr_plus_one", "p2"):
        plot.semilogy(log_snr, losses.WEIGHTINGS[name](log_snr.exp()), label=name)
    plot.set(xlabel="log-SNR (from noise to data)", ylabel="weight of the error of x_0")
    plot.legend()
    return svg(figure, "weights")


def of_times() -> str:
    """Plot the distribution of training times, by 20,000 draws."""
    schedule = schedules.cosine(1000)
    figure, (plot,) = axes(1, 3.0)
    for kind in ("uniform", "lognormal"):
        t, _ = times.TimeSampler(kind, schedule).draw(20_000, generator(0, "reading"))
        share = torch.histc(t.double(), bins=25, min=0, max=1000) / len(t)
        plot.stairs(share.numpy(), [40 * i for i in range(26)], label=kind, linewidth=1.7)
    plot.set(xlabel="t", ylabel="share of a batch")
    plot.legend()
    return svg(figure, "times")


def of_orders() -> str:
    """Plot the error of solvers against the exact flow of Gaussian data, over their evaluations."""
    schedule = schedules.linear(1000)
    oracle = GaussianOracle(schedule, 0.7, 0.25)
    methods: Mapping[str, Callable[[int], Sampler]] = {
        "DDIM": lambda n: DDIM(n, spacing="log_snr", grid="continuous"),
        "DPM-Solver++ 2M": lambda n: DPMSolverPP(n, 2, spacing="log_snr", grid="continuous"),
        "DPM-Solver++ 3M": lambda n: DPMSolverPP(n, 3, spacing="log_snr", grid="continuous"),
        "Heun": lambda n: Heun(n // 2, spacing="log_snr", grid="continuous"),
    }
    x_T = torch.ones(1, 1, dtype=torch.float64)
    exact = oracle.exact_ode(x_T, schedule.T, 1)
    evaluations = (10, 16, 24, 36, 54, 80)
    figure, (plot,) = axes(1, 3.2)
    for name, make in methods.items():
        errors = []
        for n in evaluations:
            x_1 = make(n).ending_at(1)(schedule, oracle.denoise, x_T)
            errors.append((x_1 - exact).abs().item())
        plot.loglog(evaluations, errors, marker="o", markersize=3.5, label=name)
    plot.minorticks_off()
    plot.set_xticks(evaluations, map(str, evaluations))
    plot.set(xlabel="evaluations of the network", ylabel="error of x_1")
    plot.legend()
    return svg(figure, "orders")


def of_targets() -> str:
    """Plot the error of x_0 caused by an error of 1 in the network's output, by target."""
    schedule = schedules.cosine(1000)
    t = schedule.t_at(torch.linspace(4, -4, 81, dtype=torch.float64))
    x_t = torch.zeros(len(t), 1, dtype=torch.float64)
    figure, (plot,) = axes(1, 3.2)
    for target in targets.TARGETS:
        pred = targets.to_prediction(schedule, target, torch.ones_like(x_t), x_t, t)
        plot.semilogy(2 * schedule.lambda_at(t), pred.x_0.abs()[:, 0], label=target)
    plot.set(xlabel="log-SNR (from noise to data)", ylabel="error of x_0", ylim=(0.01, 100))
    plot.legend()
    return svg(figure, "targets")


def of_preconditioning() -> str:
    """Plot EDM's scales over the noise level."""
    schedule = schedules.cosine(1000)
    t = schedule.t_at(torch.linspace(4, -4, 81, dtype=torch.float64))
    scales = preconditioning.edm(schedule, torch.zeros(len(t), 1, dtype=torch.float64), t)
    figure, (plot,) = axes(1, 3.2)
    root = schedule.alpha_bar_at(t).sqrt()[:, None]  # c_in and c_skip are of x_t, the paper's of x_t / root
    for name, value in zip(scales._fields, (scales.c_in * root, scales.c_skip * root, scales.c_out), strict=True):
        plot.semilogx((-schedule.lambda_at(t)).exp(), value[:, 0], label=name)
    plot.set(xlabel="sigma", ylabel="scale")
    plot.legend()
    return svg(figure, "preconditioning")


def of_likelihood() -> str:
    """Plot the error of the flow's density over its steps, and the terms of the variational bound."""
    mean, covariance = torch.zeros(1), torch.tensor([[0.25]])
    schedule = schedules.linear(1000)
    oracle = JointGaussian(schedule, mean, covariance)
    x_0 = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]
    root = schedule.alpha_bar[1].sqrt()  # the density is that of x_1 / root
    exact = oracle.log_prob(root * x_0, 1) + root.log()
    figure, (left, right) = axes(2)
    steps = (3, 6, 12, 24)
    errors = [(likelihood.log_likelihood(schedule, oracle.denoise, x_0, steps=n) - exact).abs().max() for n in steps]
    left.loglog(steps, errors, marker="o", markersize=3.5)
    left.minorticks_off()
    left.set_xticks(steps, map(str, steps))
    left.set(xlabel="steps of the flow", ylabel="largest error of log p, nats")
    draws = generator(0, "reading")

    def noise(t: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
        return torch.randn(400, *shape, generator=draws, dtype=torch.float64)

    for name in ("linear", "cosine"):
        oracle = JointGaussian(NAMED[name](50), mean, covariance)
        bytes_ = ((127.5 * (oracle.sample(400, draws) + 1)).round() / 127.5 - 1).clamp(-1, 1)
        terms = likelihood.bits_per_dim(oracle.schedule, oracle.denoise, bytes_, noise).terms.mean(0)
        right.semilogy(range(50), terms, marker=".", markersize=3, linewidth=1, label=name)
    right.set(xlabel="s: the term of the step to s, L_0 first", ylabel="bits per dimension")
    right.legend()
    return svg(figure, "likelihood")


def of_guidance() -> str:
    """Plot samples of one of two classes in the plane for growing w, guided by exact predictions."""
    schedule = schedules.cosine(1000)
    means, covariance = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), torch.diag(torch.tensor([0.5, 0.5]))
    both = JointMixture(schedule, [0.5, 0.5], means, covariance.expand(2, 2, 2))
    one = JointMixture(schedule, [1.0], means[1:], covariance[None])
    x_T = torch.randn(120, 2, generator=generator(0, "reading"), dtype=torch.float64)
    figure, plots = axes(3, 3.0, sharex=True, sharey=True)
    grid = torch.linspace(-3.5, 3.5, 41, dtype=torch.float64)
    points = torch.cartesian_prod(grid, grid)
    density = both.log_prob(points, 0).exp().reshape(41, 41).T
    for plot, w in zip(plots, (1.0, 3.0, 7.0), strict=True):
        x_0 = DDIM(20)(schedule, classifier_free(one.denoise, both.denoise, w), x_T)
        plot.contour(grid, grid, density, levels=4, colors="#8a8f98", linewidths=0.8)
        plot.plot(*x_0.T, "o", markersize=2.5, markeredgewidth=0)
        plot.plot(*means[1], "x", color="#d9772b")
        plot.set(title=f"w = {w:g}, mean {x_0.mean(0)[0]:.2f}", aspect="equal", xlim=(-3.5, 4.5), ylim=(-3, 3))
    return svg(figure, "guidance")


def of_walks() -> str:
    """Plot DDIM trajectories from the same noise to data near -1 and 1, with eta = 0 and 1."""
    schedule = schedules.cosine(200)
    oracle = MixtureOracle(schedule, [0.5, 0.5], [-1.0, 1.0], [0.01, 0.01])
    x_T = torch.linspace(-1.8, 1.8, 12, dtype=torch.float64)[:, None]
    figure, plots = axes(2, 3.0, sharey=True)
    for plot, eta in zip(plots, (0.0, 1.0), strict=True):
        walked: list[tuple[float, Tensor]] = []
        x_0 = DDIM(50, eta=eta)(
            schedule,
            oracle.denoise,
            x_T,
            generator=generator(1, "reading"),
            callback=lambda i, t, s, x_t, pred, seen=walked: seen.append((float(t), x_t)),  # type: ignore[misc]
        )
        t, x = zip(*walked, (0.0, x_0), strict=True)
        plot.plot(t, torch.stack(x)[..., 0], color="#2f7fc1", linewidth=0.9)
        plot.set(title=f"eta = {eta:g}", xlabel="t", xlim=(200, 0))
    plots[0].set_ylabel("x_t")
    return svg(figure, "walks")


def of_langevin() -> str:
    """Plot the stationary variance of Langevin dynamics over its step size."""
    lengths = (0.05, 0.1, 0.2, 0.5, 1.0, 1.5, 2.0)
    draws, n = generator(0, "reading"), 4000
    variances = []
    for h in lengths:
        x = torch.randn(n, 1, generator=draws, dtype=torch.float64)
        for _ in range(int(6 / h) + 10):
            x = unadjusted(lambda x: -x, x, h, torch.randn(n, 1, generator=draws, dtype=torch.float64))
        variances.append(x.var().item())
    figure, (plot,) = axes(1, 3.0)
    exact = torch.linspace(0, 2, 41)
    plot.plot(exact, 1 / (1 - exact / 4), color="#8a8f98", label="1 / (1 - h / 4)")
    plot.plot(lengths, variances, "o", label=f"of {n} walks")
    plot.axhline(1, color="#d9772b", linewidth=1, label="of the data")
    plot.set(xlabel="h", ylabel="variance")
    plot.legend()
    return svg(figure, "langevin")


def of_elbo() -> str:
    """Plot the gap of the importance-weighted bound to the exact log likelihood, by the number of draws."""
    figure, (plot,) = axes(1, 3.0)
    draws, x, counts = generator(0, "reading"), torch.tensor(1.0, dtype=torch.float64), (1, 2, 4, 8, 16, 32, 64)
    exact = torch.distributions.Normal(0.0, 2.0**0.5).log_prob(x)  # x is z + noise, both standard normal
    for factor, name in ((1.0, "the exact posterior"), (2.0, "twice its variance"), (0.5, "half its variance")):
        mean, log_variance = x / 2, torch.tensor(factor / 2, dtype=torch.float64).log()
        bounds = []
        for k in counts:
            eps = torch.randn(k, 4000, 1, generator=draws, dtype=torch.float64)
            z = elbo.reparametrised(mean, log_variance, eps)
            log_p = torch.distributions.Normal(z, 1.0).log_prob(x)[..., 0]
            bounds.append((elbo.iwae(elbo.log_weight(log_p, z, mean, log_variance, eps)).mean() - exact).item())
        plot.semilogx(counts, bounds, marker="o", markersize=3.5, label=name)
    plot.minorticks_off()
    plot.set_xticks(counts, map(str, counts))
    plot.set(xlabel="draws k", ylabel="bound - log p(x), nats")
    plot.legend()
    return svg(figure, "elbo")


class _Wide:
    """Stand-in for an autoencoder whose latents are far from unit variance: N(2, 4^2)."""

    shape, latent_shape = (1, 1, 1), (1, 1, 1)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return 2 + 4 * x, torch.full_like(x, -12)

    def decode(self, z: Tensor) -> Tensor:
        return (z - 2) / 4


def of_latents() -> str:
    """Plot latents before and after the codec's scaling, and the share of noise in x_t."""
    codec, x = Continuous(_Wide()), torch.randn(20_000, 1, 1, 1, generator=generator(0, "reading"))
    posterior = codec.posterior(x)
    scaled, schedule = codec.fit(posterior), schedules.cosine(1000)
    figure, (left, right) = axes(2)
    signal, noise = schedule.alpha_bar[list(POINTS)], 1 - schedule.alpha_bar[list(POINTS)]
    for z, name in ((codec.sample(posterior), "as encoded"), (scaled.sample(posterior), "scaled")):
        share = torch.histc(z, bins=48, min=-12, max=16) / len(z)
        left.stairs(share.numpy(), torch.linspace(-12, 16, 49).numpy(), label=name, linewidth=1.7)
        power = z.double().square().mean()
        right.plot(POINTS, noise / (signal * power + noise))
    left.set(xlabel="a latent", ylabel="share")
    left.legend()
    right.set(xlabel="t", ylabel="share of noise in x_t")
    return svg(figure, "latents")


def of_two_steps() -> str:
    """Plot the error of one DDIM step against the exact flow, and of one by the distillation target for two steps."""
    schedule = schedules.cosine(1000)
    oracle = MixtureOracle(schedule, [0.5, 0.5], [-1.0, 1.0], [0.04, 0.04])
    starts = range(100, 1000, 50)
    errors: dict[str, list[float]] = {"one step of the teacher": [], "one step by x_tilde": []}
    for t in starts:
        s, u = t // 2, 3 * t // 4
        x_t = torch.linspace(-1.5, 1.5, 13, dtype=torch.float64)[:, None]
        exact = oracle.exact_ode(x_t, t, s)
        by_two = one_step_for_two(schedule, oracle.denoise, x_t, t, u, s)
        for name, x_0 in zip(errors, (oracle.denoise(x_t, t).x_0, by_two), strict=True):
            a, b = schedule.alpha_bar.sqrt(), (1 - schedule.alpha_bar).sqrt()
            x_s = a[s] * x_0 + b[s] * (x_t - a[t] * x_0) / b[t]
            errors[name].append((x_s - exact).square().mean().sqrt().item())
    figure, (plot,) = axes(1, 3.0)
    for name, error in errors.items():
        plot.semilogy(starts, error, label=name)
    plot.set(xlabel="t, for a step to t / 2", ylabel="error of x_s")
    plot.legend()
    return svg(figure, "two steps")


def of_consistency() -> str:
    """Plot the number of steps over training, and the distribution of training noise levels."""
    figure, (left, right) = axes(2)
    progress = torch.linspace(0, 1, 201).tolist()
    left.semilogy(progress, [curriculum(k, 10, 1280) for k in progress], drawstyle="steps-post")
    left.set(xlabel="progress of training", ylabel="steps N(k)")
    for N in (10, 40, 160):
        sigma = torch.linspace(0.002 ** (1 / 7), 80 ** (1 / 7), N + 1, dtype=torch.float64) ** 7
        width = sigma.log().diff()
        right.semilogx(sigma[:-1], lognormal(sigma) / width, marker=".", markersize=4, label=f"N = {N}")
    right.set(xlabel="sigma", ylabel="density in log sigma")
    right.legend()
    return svg(figure, "consistency")


def of_averages() -> str:
    """Plot the weight of each training step in an average of the weights."""
    figure, (plot,) = axes(1, 3.0)
    n = 2000
    for warmup in (1.0, 4.0, 9.0):
        average = ema.EMA(torch.nn.Identity(), decay=0.9999, warmup=warmup)
        d = torch.tensor([average.decay_at(i) for i in range(1, n + 1)], dtype=torch.float64)
        after = torch.cat([d.flip(0).cumprod(0).flip(0)[1:], torch.ones(1, dtype=torch.float64)])
        plot.plot(torch.arange(1, n + 1)[::20] / n, (n * (1 - d) * after)[::20], label=f"warmup = {warmup:g}")
    plot.set(xlabel="step, as a share of the training so far", ylabel="weight (1: as all others)")
    plot.legend()
    return svg(figure, "averages")


def of_profiles() -> str:
    """Plot an average reconstructed from snapshots of two tracked ones, and the error of reconstruction."""
    figure, (left, right) = axes(2)
    tau = torch.linspace(0, 1, 201, dtype=torch.float64)

    def profile(t: float, gamma: float) -> Tensor:
        return torch.where(tau <= t, (gamma + 1) / t * (tau / t) ** gamma, 0.0)

    def stored(snapshots: int) -> list[tuple[float, float]]:
        return [((i + 1) / snapshots, post_hoc.exponent(one)) for i in range(snapshots) for one in post_hoc.WIDTHS]

    gamma = post_hoc.exponent(0.15)
    left.plot(tau, profile(1, gamma), color="#8a8f98", linewidth=4, alpha=0.5, label="wanted: sigma_rel = 0.15")
    for snapshots in (2, 8):
        x, _ = post_hoc.coefficients(stored(snapshots), (1, gamma))
        made = sum(share * profile(*one) for share, one in zip(x.tolist(), stored(snapshots), strict=True))
        left.plot(tau, made, linewidth=1.2, label=f"of {snapshots} snapshots")
    left.set(xlabel="step, as a share of all", ylabel="weight")
    left.legend()
    widths = torch.linspace(0.02, 0.28, 53).tolist()
    for snapshots in (2, 8, 32):
        missed = [post_hoc.coefficients(stored(snapshots), (1, post_hoc.exponent(w)))[1] for w in widths]
        right.semilogy(widths, missed, label=f"{snapshots} snapshots")
    right.set(xlabel="wanted sigma_rel", ylabel="share of the profile missed", ylim=(1e-4, 2))
    right.legend()
    return svg(figure, "profiles")


FIGURES: Mapping[str, tuple[Callable[[], str], str]] = {
    "ddpm.schedules": (
        of_schedules,
        "The share of the data's variance left at t, and the signal-to-noise ratio, T = 1000.",
    ),
    "ddpm.forward": (
        of_the_posterior,
        "The weights of x_0 and x_t in the mean of a step back for known x_0, and its variance as a share of beta: "
        "linear, T = 1000.",
    ),
    "ddpm.losses": (
        of_weights,
        "How much the squared error of x_0 counts, by name. The squared error of eps is that of x_0 times the "
        "SNR: snr weighs it evenly.",
    ),
    "ddpm.times": (of_times, "The distribution of training times: cosine, T = 1000."),
    "ddpm.samplers.base": (
        of_orders,
        "The error of solvers against the exact flow from the same noise to t = 1: Gaussian data, whose denoiser "
        "is known. Steps are even in the log-SNR.",
    ),
    "ddpm.targets": (
        of_targets,
        "The error of x_0 caused by an error of 1 in the output, by target: no target is best at all noise levels.",
    ),
    "ddpm.preconditioning": (
        of_preconditioning,
        "The scales of EDM's table 1 over the noise level, sigma_data = 0.5.",
    ),
    "ddpm.likelihood": (
        of_likelihood,
        "Left: the flow's log density of Gaussian data against the exact one; the rest is the deviation of x_T from "
        "standard noise. Right: the terms of the bound on bytes with the exact denoiser, T = 50.",
    ),
    "ddpm.guidance.classifier_free": (
        of_guidance,
        "Samples of the right one of two classes (its mean is the cross), by the exact predictions and 20 steps of "
        "DDIM. Lines: the density of both. A larger w pushes away from the other class, beyond the data.",
    ),
    "ddpm.samplers.ddim": (
        of_walks,
        "Twelve walks to data near -1 and 1, whose denoiser is known: with eta = 0 they keep their order, with eta = 1 "
        "each step adds the noise of the process.",
    ),
    "ddpm.score.langevin": (
        of_langevin,
        "The stationary variance of Langevin dynamics without a correction, on data of variance 1.",
    ),
    "ddpm.latent.elbo": (
        of_elbo,
        "The gap of the bound to log p(x), for x = z + noise with a known posterior: with the exact one a draw is "
        "enough, with others more draws help.",
    ),
    "ddpm.latent.codec": (
        of_latents,
        "Latents with mean 2 and deviation 4, before and after scaling by the codec. Unscaled, the same schedule "
        "leaves them nearly clean until its end.",
    ),
    "ddpm.distillation.progressive": (
        of_two_steps,
        "The error of a step against the exact flow of data near -1 and 1: the student's target is better than a step "
        "of its teacher.",
    ),
    "ddpm.distillation.consistency": (
        of_consistency,
        "Left: steps from noise to data, s_0 = 10 and s_1 = 1280. Right: the trained noise levels, in EDM's spacing.",
    ),
    "ddpm.training.ema": (
        of_averages,
        "The weight of each step in the average: with a warmup it covers the same share of a training of any length. "
        "2,000 steps, so that decay = 0.9999 never caps it.",
    ),
    "ddpm.training.post_hoc": (
        of_profiles,
        "Left: the profile of sigma_rel = 0.15, from averages of 0.05 and 0.10 alone. Right: the error for any "
        "width: a wider one needs more snapshots, and a much narrower one cannot be reconstructed.",
    ),
}
"""Module -> (function that plots its figure, caption)."""
