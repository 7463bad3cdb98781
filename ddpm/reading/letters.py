"""The glossary: the meaning of each letter, its shape, and its names in other papers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

from ddpm.reading.equations import symbol

DIFFUSION = tuple(
    f"ddpm.{name}"
    for name in [
        "schedules",
        "forward",
        "targets",
        "preconditioning",
        "reverse",
        "losses",
        "times",
        "likelihood",
        "diffusion",
        "oracle",
        "samplers",
        "guidance",
        "editing",
        "score",
        "distillation",
    ]
)
"""Modules in which the letters of diffusion have the meaning of the glossary."""
OF_A_LEVEL: tuple[str, ...] = (
    "ddpm.preconditioning",
    "ddpm.times",
    "ddpm.score",
    "ddpm.distillation",
    "ddpm.schedules",
)
OF_A_LEVEL += tuple(f"ddpm.samplers.{name}" for name in ("base", "edm", "lms", "langevin", "consistency"))


@dataclass(frozen=True)
class Letter:
    """A letter of the papers.

    Args:
        name: in code.
        latex: its LaTeX; several where it is written in several ways.
        meaning: one sentence.
        shape: of the array.
        elsewhere: paper, or kind of code -> its name there.
        code: other names in code.
        modules: the modules where it has this meaning: their names, or prefixes of them.
    """

    name: str
    latex: tuple[str, ...]
    meaning: str
    shape: str
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    code: tuple[str, ...] = ()
    modules: tuple[str, ...] = DIFFUSION


LETTERS = (
    Letter(
        "t",
        ("t",),
        "The time: 0 is data, T is noise.",
        "an int, or (B,), in 0..T",
        {"EDM": "σ is the time", "common code": "counts from 0: our t - 1"},
    ),
    Letter(
        "s",
        ("s",),
        "The time that a step leads to, s < t.",
        "as t",
        {"DDPM": "t - 1", "DDIM": "τ of i - 1", "DPM-Solver++": "t, from s"},
    ),
    Letter("T", ("T",), "The number of steps of the forward process.", "an int", {"DPM-Solver": "1: time is real"}),
    Letter(
        "beta",
        (r"\beta",),
        "The variance of the noise that a step adds.",
        "(T + 1,)",
        {"common code": "betas", "score SDE": "β(t) dt"},
    ),
    Letter(
        "alpha",
        (r"\alpha",),
        "The share of the variance that a step retains: 1 - beta.",
        "(T + 1,)",
        {"DDIM": "means our alpha_bar", "DPM-Solver": "means the root of our alpha_bar", "common code": "alphas"},
    ),
    Letter(
        "alpha_bar",
        (r"\bar\alpha",),
        "The share of the data's variance left at t: the product of alpha.",
        "(T + 1,), alpha_bar[0] == 1",
        {"DDIM": "α", "DPM-Solver": "α squared", "VDM": "α squared", "common code": "alphas_cumprod"},
        ("alpha_bar_t", "alpha_bar_s", "alpha_bar_T", "alpha_bar_m"),
    ),
    Letter(
        "beta_tilde",
        (r"\tilde\beta",),
        "The variance of the posterior of a step, given the data.",
        "(T + 1,)",
        {"common code": "posterior_variance"},
    ),
    Letter(
        "lambda_",
        (r"\lambda",),
        "Half the log of the signal-to-noise ratio; it falls as t grows.",
        "(T + 1,), +inf at 0",
        {"DPM-Solver": "λ", "VDM": "half of -γ", "common code": "half the log-SNR"},
        ("lambda_t", "lambda_s"),
        tuple(f"ddpm.{name}" for name in ("schedules", "likelihood", "samplers", "distillation")),
    ),
    Letter(
        "sigma_t",
        (r"\sigma_t",),
        "The standard deviation of the noise of a step back.",
        "broadcasts against x_t",
        {"DDIM": "σ(η)", "DPM-Solver": "means the root of 1 - our alpha_bar", "common code": "model_variance"},
        ("sigma2",),
        ("ddpm.reverse", "ddpm.losses", "ddpm.samplers.ancestral", "ddpm.samplers.ddim"),
    ),
    Letter(
        "sigma",
        (r"\sigma", r"\sigma_t"),
        "A noise level: of x_0 + sigma eps, the root of (1 - alpha_bar) / alpha_bar.",
        "a number, or (B,)",
        {"EDM": "σ", "NCSN": "σ", "VDM": "σ / α"},
        ("sigmas", "levels"),
        OF_A_LEVEL,
    ),
    Letter(
        "eta",
        (r"\eta",),
        "How much of the posterior's noise a step of DDIM adds: 0 none, 1 all.",
        "a number in [0, 1]",
        {"DDIM": "η"},
        modules=("ddpm.samplers",),
    ),
    Letter("x_0", ("x_0",), "Data.", "(B, *)", {"EDM": "y", "VDM": "x", "common code": "x_start"}),
    Letter("x_t", ("x_t",), "Data with the noise of time t.", "(B, *)", {"VDM": "z of t", "CFG": "z of λ"}),
    Letter("x_s", ("x_s", "x_{t-1}"), "The result of a step from t.", "(B, *)", {"DDPM": "x of t - 1"}),
    Letter("x_T", ("x_T",), "Noise, from which a sampler starts.", "(B, *)"),
    Letter("eps", (r"\epsilon",), "Standard normal noise.", "(B, *)", {"EDM": "n / σ", "common code": "noise"}),
    Letter(
        "v",
        ("v",),
        "A mixture of noise and data: sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0.",
        "(B, *)",
        {"progressive distillation": "v"},
        modules=tuple(f"ddpm.{name}" for name in ("targets", "losses", "diffusion", "distillation", "likelihood")),
    ),
    Letter(
        "eps_theta",
        (r"\epsilon_\theta",),
        "The noise that the network predicts.",
        "(B, *)",
        {"score SDE": "-σ s_θ", "common code": "pred_noise, model_output"},
    ),
    Letter(
        "x_0_theta",
        (r"x_{0,\theta}", r"\hat x_0"),
        "The data that the network predicts.",
        "(B, *)",
        {"DDIM": "f_θ", "EDM": "D_θ", "DPM-Solver++": "x_θ", "VDM": "x̂_θ", "common code": "pred_xstart"},
    ),
    Letter(
        "mu_tilde",
        (r"\tilde\mu",),
        "The mean of the posterior of a step, given the data.",
        "(B, *)",
        {"common code": "posterior_mean"},
    ),
    Letter(
        "mu_theta",
        (r"\mu_\theta",),
        "The mean of a step back, by the network.",
        "(B, *)",
        {"common code": "model_mean"},
        ("mu",),
        ("ddpm.reverse", "ddpm.losses", "ddpm.likelihood"),
    ),
    Letter(
        "s_theta",
        (r"s_\theta",),
        "The score predicted by a network: the gradient of the log density.",
        "(B, *)",
        {"DDPM": "-eps_theta / sqrt(1 - alpha_bar)"},
        ("score",),
        ("ddpm.score", "ddpm.editing"),
    ),
    Letter("z", ("z",), "Fresh noise of one step.", "(B, *)", {"DDIM": "ε of t"}, ("noise",), ("ddpm.samplers",)),
    Letter(
        "h",
        ("h",),
        "The length of a step in lambda.",
        "a number",
        {"DPM-Solver++": "h"},
        (),
        ("ddpm.samplers.dpm_solver", "ddpm.samplers.unipc"),
    ),
    Letter(
        "y",
        ("y",),
        "The class, or another condition of a sample.",
        "(B,)",
        {"CFG": "c", "common code": "label"},
        modules=("ddpm.guidance", "ddpm.diffusion"),
    ),
    Letter(
        "w",
        ("w",),
        "The weight of the condition: 0 ignores it, 1 is the conditional model.",
        "a number",
        {"CFG": "our w - 1", "common code": "guidance_scale"},
        modules=("ddpm.guidance",),
    ),
    Letter(
        "snr", (r"\text{SNR}",), "The signal-to-noise ratio: alpha_bar / (1 - alpha_bar).", "(B,)", {"VDM": "SNR(t)"}
    ),
    Letter("pred", (), "The network's prediction at x_t, as noise and as data: a `Prediction`.", "(B, *) each"),
    Letter("denoise", (), "The network with condition and guidance bound: (x_t, t) to a `Prediction`.", "a function"),
    Letter("schedule", (), "The constants of the forward process: a `NoiseSchedule`.", "(T + 1,) each"),
)

SHAPES = {
    "B": "images of the batch",
    "*": "any further dimensions",
    "C": "channels",
    "H": "height in pixels",
    "W": "width in pixels",
    "T + 1": "one entry a time, from t = 0",
    "L": "tokens of a text",
    "D": "length of a vector",
    "d": "dimensions of a vector",
    "k": "number of draws",
    "n": "a number",
    "N": "a number",
    "K": "parts of a mixture, or selected times",
    "h": "height of the grid",
    "w": "width of the grid",
    "c": "channels of the latents",
    "1": "broadcasts",
    "...": "and so on",
}
"""Letters of shapes."""


def known_in(module: str) -> dict[str, Letter]:
    """Return name in code -> its letter in a module; the first in the list that applies there."""
    found: dict[str, Letter] = {}
    for letter in LETTERS:
        if module.startswith(letter.modules):
            for name in (letter.name, *letter.code):
                found.setdefault(name, letter)
    return found


def symbols_in(module: str) -> dict[str, str]:
    """Return symbol, as of `equations.symbol` -> name of its letter in a module."""
    found: dict[str, str] = {}
    for letter in LETTERS:
        if module.startswith(letter.modules):
            for latex in letter.latex:
                found.setdefault(_symbol(latex), letter.name)
    return found


@cache
def _symbol(latex: str) -> str:
    return symbol(latex)
