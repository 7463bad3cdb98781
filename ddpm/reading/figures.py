"""Small figures that the code draws of itself, as SVG that takes the colours of its page."""

import io
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from ddpm import losses, schedules, times
from ddpm.oracle import GaussianOracle
from ddpm.randomness import generator
from ddpm.samplers import DDIM, DPMSolverPP, Heun, Sampler

INK = "#010203"
"""Stands for the text's colour, whatever it is: light on dark, or dark on light."""
COLOURS = ("#2f7fc1", "#d9772b", "#3c9d6b", "#b0559b", "#8a8f98")
LOOKS: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": f"cycler('color', {list(COLOURS)})",
    "lines.linewidth": 1.7,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}
NAMED: Mapping[str, Callable[..., schedules.NoiseSchedule]] = {
    "linear": schedules.linear,
    "cosine": schedules.cosine,
    "sigmoid": schedules.sigmoid,
}
POINTS = range(0, 1001, 10)


def svg(figure: Figure, name: str) -> str:
    """A figure as an SVG element, the same whenever it is made.

    Args:
        name: of the figure, from which the ids within it are made: a page may hold several.
    """
    file = io.StringIO()
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None}, bbox_inches="tight")
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", text)  # nobody refers to them, and another figure has the same
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(name)}" ', 1)


def _axes(n: int, height: float = 3.0) -> tuple[Figure, Sequence[Any]]:
    figure = Figure(figsize=(4.6 * n, height), layout="constrained")
    return figure, [figure.add_subplot(1, n, i + 1) for i in range(n)]


def drawn(name: str) -> str:
    """The figure of a module of `FIGURES`, in the looks of the site."""
    with rc_context(LOOKS):
        return FIGURES[name][0]()


def of_schedules() -> str:
    """How much of the data is left, and the log of the signal-to-noise ratio."""
    figure, (left, right) = _axes(2)
    for name, make in NAMED.items():
        schedule = make(1000)
        left.plot(POINTS, schedule.alpha_bar[list(POINTS)], label=name)
        right.plot(POINTS[1:], 2 * schedule.lambda_[list(POINTS[1:])])
    left.set(xlabel="t", ylabel="alpha_bar")
    right.set(xlabel="t", ylabel="log-SNR")
    left.legend()
    return svg(figure, "schedules")


def of_the_posterior() -> str:
    """What q_posterior's mean takes of x_0 and of x_t, and its variance."""
    schedule = schedules.linear(1000)
    t = torch.logspace(0, 3, 60).round().long().unique()
    of_x_0 = schedule.alpha_bar[t - 1].sqrt() * schedule.beta[t] / (1 - schedule.alpha_bar[t])
    of_x_t = schedule.alpha[t].sqrt() * (1 - schedule.alpha_bar[t - 1]) / (1 - schedule.alpha_bar[t])
    figure, (left, right) = _axes(2)
    left.semilogx(t, of_x_0, label="of x_0")
    left.semilogx(t, of_x_t, label="of x_t")
    left.set(xlabel="t", ylabel="coefficient in mu_tilde")
    left.legend()
    right.semilogx(t, schedule.beta_tilde[t] / schedule.beta[t])
    right.set(xlabel="t", ylabel="beta_tilde / beta", ylim=(-0.04, 1.04))
    return svg(figure, "posterior")


def of_weights() -> str:
    """The weights of the squared error of x_0 over the log-SNR."""
    log_snr = torch.linspace(-6, 6, 97, dtype=torch.float64)
    figure, (axes,) = _axes(1, 3.2)
    for name in ("snr", "min_snr", "truncated_snr", "snr_plus_one", "p2"):
        axes.semilogy(log_snr, losses.WEIGHTINGS[name](log_snr.exp()), label=name)
    axes.set(xlabel="log-SNR (from noise to data)", ylabel="weight of the error of x_0")
    axes.legend()
    return svg(figure, "weights")


def of_times() -> str:
    """Which times are trained: shares of 20,000 that are drawn."""
    schedule = schedules.cosine(1000)
    figure, (axes,) = _axes(1, 3.0)
    for kind in ("uniform", "lognormal"):
        t, _ = times.TimeSampler(kind, schedule).draw(20_000, generator(0, "reading"))
        share = torch.histc(t.double(), bins=25, min=0, max=1000) / len(t)
        axes.stairs(share.numpy(), [40 * i for i in range(26)], label=kind, linewidth=1.7)
    axes.set(xlabel="t", ylabel="share of a batch")
    axes.legend()
    return svg(figure, "times")


def of_orders() -> str:
    """How far a walk ends from where the exact flow of Gaussian data ends, over its steps."""
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
    figure, (axes,) = _axes(1, 3.2)
    for name, make in methods.items():
        errors = []
        for n in evaluations:
            x_1 = make(n).ending_at(1)(schedule, oracle.denoise, x_T)
            errors.append((x_1 - exact).abs().item())
        axes.loglog(evaluations, errors, marker="o", markersize=3.5, label=name)
    axes.minorticks_off()
    axes.set_xticks(evaluations, map(str, evaluations))
    axes.set(xlabel="evaluations of the network", ylabel="error of x_1")
    axes.legend()
    return svg(figure, "orders")


class Stage(NamedTuple):
    """A part of a network: what it is called, its kind, and the shape of what leaves it, (B, C, H, W)."""

    name: str
    kind: str
    shape: tuple[int, ...]


BOX, APART, BELOW = (66, 36), 10, 24  # pixels: of a box; between boxes and between levels
MAP_STYLE = """.map text{font:11px system-ui,sans-serif;fill:currentColor;text-anchor:middle}
.map .size{text-anchor:start;opacity:.7}.map .n{opacity:.75}.map rect{fill:none;stroke:currentColor;stroke-opacity:.45}
.map .attention{stroke:#d9772b;stroke-opacity:1}
.map .middle{stroke:#2f7fc1;stroke-opacity:1}.map path{stroke:currentColor;stroke-opacity:.35;fill:none}"""


def of_network(stages: Sequence[Stage]) -> str:
    """The map of a U-Net in the order in which it computes: a level of its resolutions is a row.

    Args:
        stages: of the network; boxes say the kind and how many channels leave it.
    """
    sizes = sorted({stage.shape[-1] for stage in stages}, reverse=True)
    places = [
        (64 + i * (BOX[0] + APART), 12 + sizes.index(s.shape[-1]) * (BOX[1] + BELOW)) for i, s in enumerate(stages)
    ]
    parts = [
        f'<path d="M{x0 + BOX[0]} {y0 + BOX[1] // 2}L{x1} {y1 + BOX[1] // 2}"/>'
        for (x0, y0), (x1, y1) in itertools.pairwise(places)
    ]
    for (x, y), stage in zip(places, stages, strict=True):
        middle = x + BOX[0] // 2
        parts.append(
            f"<g><title>{escape(stage.name)}: (B, {', '.join(map(str, stage.shape[1:]))})</title>"
            f'<rect x="{x}" y="{y}" width="{BOX[0]}" height="{BOX[1]}" rx="6" class="{escape(stage.kind)}"/>'
            f'<text x="{middle}" y="{y + 15}">{escape(stage.kind)}</text>'
            f'<text x="{middle}" y="{y + 28}" class="n">{stage.shape[1]}</text></g>'
        )
    for i, size in enumerate(sizes):
        parts.append(f'<text x="6" y="{12 + i * (BOX[1] + BELOW) + 22}" class="size">{size} px</text>')
    width, height = 70 + len(stages) * (BOX[0] + APART), 20 + len(sizes) * (BOX[1] + BELOW)
    return (
        f'<svg class="map" role="img" aria-label="map of the network" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" style="max-width:none"><style>{MAP_STYLE}</style>{"".join(parts)}</svg>'
    )


FIGURES: Mapping[str, tuple[Callable[[], str], str]] = {
    "ddpm.schedules": (
        of_schedules,
        "How much of the data is left at t, and what that is as a signal-to-noise ratio, T = 1000.",
    ),
    "ddpm.forward": (
        of_the_posterior,
        "What a step back takes of x_0 and of x_t where x_0 is known, and its variance as a share of beta: "
        "linear, T = 1000.",
    ),
    "ddpm.losses": (
        of_weights,
        "How much the squared error of x_0 counts, by name. The squared error of eps is that of x_0 times the "
        "SNR: snr weighs it evenly.",
    ),
    "ddpm.times": (of_times, "Which times a batch has: cosine, T = 1000."),
    "ddpm.samplers.base": (
        of_orders,
        "How far from the exact flow a walk ends that begins at the same noise: Gaussian data, whose denoiser "
        "is known, to t = 1. Steps are even in the log-SNR.",
    ),
}
"""Module -> what draws its figure, and the caption."""
