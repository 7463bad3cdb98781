"""Denoising of held-out data: bits per dimension of the variational bound, likelihood, loss by log-SNR."""

import csv
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from ddpm.checks import is_whole
from ddpm.data.dataset import Dataset, spread
from ddpm.likelihood import Bound, bits_of_bytes, bits_per_dim, dequantised, log_likelihood, rademacher
from ddpm.losses import errors_at_snr
from ddpm.metrics.intervals import half_width
from ddpm.oracle import JointMixture
from ddpm.randomness import SampleNoise
from ddpm.runs.files import replacing
from ddpm.schedules import NoiseSchedule, cosine
from ddpm.sources.trained import TrainedSampler
from ddpm.targets import Denoise

LOG_SNR_BINS = range(-10, 10)
"""The lower edges of the bins of log-SNR, each 1 wide: the same for every schedule."""
LOG_SNR_MIDDLE = range(-5, 5)
"""The bins over which a loss is averaged to one number: the usual schedules reach all of these."""
GOLDEN = (math.sqrt(5) - 1) / 2
LossBySNR = tuple[list[float], list[float | None], list[float | None]]
"""The centres of all bins, and the errors of x_0 and of eps in them; None in bins that were not measured."""


def measure_bits_per_dim(
    source: TrainedSampler,
    data: Dataset,
    n: int,
    times: list[int],
    batch: int,
    callback: Callable[[int], None] | None = None,
) -> tuple[str, str, dict[str, Any], Bound]:
    """Return protocol name, summary, record and terms of the variational bound, on held-out images.

    For data other than bytes it is a bound on the bits of a density, compared with those of one Gaussian fitted to the
    training part; and, where the density is known, with its own and with the exact denoiser's bound.

    Args:
        source: the network; its seed keys the noise by (image index, t).
        data: n of its held-out images are used, evenly spaced.
        times: ascending t to evaluate; all of 1..T, or fewer for the bound of a shorter chain.
        batch: images at a time; changes no result.
        callback: called with the number of images after each evaluation of the network.
    Raises: ValueError where the bound of an image is not finite.
    """
    schedule, parts = source.diffusion.schedule, []
    subset, of_bytes = _unless_all(times, schedule.T), "bytes" in data.holds
    for numbers, x_0, denoise in _held_out(source, data, n, batch):
        noise = SampleNoise(source.seed, numbers, "bits_per_dim")
        parts.append(bits_per_dim(schedule, denoise, x_0, noise, times=subset, discrete=of_bytes, callback=callback))
    bound = Bound(
        tuple(times),
        *(torch.cat([getattr(p, f).double().cpu() for p in parts]) for f in ("L_T", "terms", "x_0_mse", "eps_mse")),
    )
    values = interval(bound.total, data.units) | {
        name: getattr(bound, name).mean().item() for name in ("L_T", "L_t_1", "L_0")
    }
    share = bound.terms.mean(0).cumsum(0) >= bound.terms.mean(0).sum() / 2
    summary = (
        f"{_in_words(values, data.units)} = L_T {values['L_T']:.4g} + sum of L_{{t-1}} {values['L_t_1']:.4g} + "
        f"L_0 {values['L_0']:.4g}"
    )
    if of_bytes:
        summary += f"\nhalf of the bits lie at t <= {times[int(share.int().argmax())]} of {schedule.T}"
    else:
        references = _references(data, n) | _exact_bound(source, data, n, subset)
        values, summary = values | references, summary + _references_in_words(references)
    return f"bits_per_dim_vlb_{len(times)}of{schedule.T}_{n}_held_out", summary, values, bound


def measure_log_likelihood(
    source: TrainedSampler,
    data: Dataset,
    n: int,
    steps: int,
    probes: int,
    start: float,
    batch: int,
    callback: Callable[[int], None] | None = None,
) -> tuple[str, str, dict[str, Any]]:
    """Return protocol name, summary and record of the probability flow's bits per dimension, on held-out images.

    Args:
        steps, start: of `log_likelihood`.
        probes: random sign vectors of Hutchinson's estimator for each image.
        source, data, n, batch, callback: as in `measure_bits_per_dim`.
    Raises: ValueError where the likelihood of an image is not finite.
    """
    schedule, parts = source.diffusion.schedule, []
    of_bytes, dims = "bytes" in data.holds, math.prod(data.shape)
    for numbers, x_0, denoise in _held_out(source, data, n, batch):
        noise = SampleNoise(source.seed, numbers, "log_likelihood")
        x = dequantised(x_0, noise(0, data.shape, x_0.device)) if of_bytes else x_0
        e = torch.stack([rademacher(noise(k, data.shape, x_0.device)) for k in range(1, probes + 1)])
        log_p = log_likelihood(schedule, denoise, x, e, steps=steps, start=start, callback=callback)
        parts.append((bits_of_bytes(log_p, dims) if of_bytes else -log_p / (dims * math.log(2))).cpu())
    values = interval(torch.cat(parts), data.units) | {
        "solver": "rk4",
        "ode_steps": steps,
        "probes": probes,
        "start": start,
    }
    protocol = f"bits_per_dim_flow_rk4_{steps}_t{start:g}_probes{probes}_{n}_held_out"
    what = "of dequantised bytes, " if of_bytes else ""
    summary = f"{_in_words(values, data.units)}, {what}by the probability flow from t = {start:g}"
    if not of_bytes:
        references = _references(data, n)
        values, summary = values | references, summary + _references_in_words(references)
    return protocol, summary, values


def snr_bins(schedule: NoiseSchedule) -> list[int]:
    """Return the lower edges of the log-SNR bins that lie wholly between t = 1 and T, or T - 1 where beta_T = 1.

    `measure_loss_by_snr` evaluates the network once for each bin and image.

    Raises: ValueError where no bin of `LOG_SNR_MIDDLE` does.
    """
    log_snr = [2 * value for value in schedule.lambda_[1:].tolist() if value > -math.inf]
    bins = [low for low in LOG_SNR_BINS if log_snr and log_snr[-1] <= low and low + 1 <= log_snr[0]]
    if not set(bins) & set(LOG_SNR_MIDDLE):
        reach = f"from {log_snr[-1]:.3g} to {log_snr[0]:.3g}" if log_snr else "-inf alone"
        raise ValueError(
            f"the schedule's log-SNR is {reach}: that holds no whole bin of width 1 between {LOG_SNR_MIDDLE.start} and "
            f"{LOG_SNR_MIDDLE.stop} to measure the loss in"
        )
    return bins


@torch.no_grad()
def measure_loss_by_snr(
    source: TrainedSampler, data: Dataset, n: int, batch: int, callback: Callable[[int], None] | None = None
) -> tuple[str, str, dict[str, Any], LossBySNR]:
    """Return protocol name, summary, record and curves of the held-out loss by log-SNR, of eps and of x_0.

    Unlike the training loss it is comparable between schedules and targets. Each image is evaluated once in each bin,
    at a log-SNR and with noise that depend only on its index, n and the bin, so that all runs on the same data are
    paired. Predictions are not clipped, as in training. The record's value is the error of eps, averaged over the
    measured part of log-SNR -5 to 5, which the record states: twice what one unit of log-SNR adds to the variational
    bound in continuous time, in nats a dimension.

    Args:
        source: the network; its seed has no effect.
        data, n, batch, callback: as in `measure_bits_per_dim`.
    Raises: ValueError for fewer than n held-out images, as `snr_bins`, or where an error is not finite.
    Source: the bound after Variational Diffusion Models (arXiv 2107.00630), section 5.
    """
    must_hold_out(data, "loss_by_snr", n)
    schedule, parts, done = source.diffusion.schedule, [], 0
    bins = snr_bins(schedule)
    for numbers, x_0, denoise in _held_out(source, data, n, batch, clip=False):
        noise, i = SampleNoise(0, numbers, "loss_by_snr"), torch.arange(done, done + len(numbers), dtype=torch.float64)
        errors = []
        for low in bins:
            log_snr = low + (i + low * n) * GOLDEN % 1  # the images together fill the bin evenly
            eps = noise(low, data.shape, x_0.device)
            errors.append(torch.stack(errors_at_snr(schedule, denoise, x_0, log_snr, eps)))
            if callback is not None:
                callback(len(x_0))
        parts.append(torch.stack(errors, dim=2).double().cpu())
        done += len(numbers)
    x_0_error, eps_error = torch.cat(parts, dim=1)  # each (n, bins)
    lost = int((~(x_0_error + eps_error).isfinite()).any(1).sum())
    if lost:
        raise ValueError(f"{lost} of {n} {data.units} have errors that are not finite")
    middle = [j for j, low in enumerate(bins) if low in LOG_SNR_MIDDLE]
    over = [bins[middle[0]], bins[middle[-1]] + 1]
    x_0_curve, eps_curve = (dict(zip(bins, e.mean(0).tolist(), strict=True)) for e in (x_0_error, eps_error))
    curve = (
        [low + 0.5 for low in LOG_SNR_BINS],
        [x_0_curve.get(low) for low in LOG_SNR_BINS],
        [eps_curve.get(low) for low in LOG_SNR_BINS],
    )
    values = interval(eps_error[:, middle].mean(1), data.units) | {"value_log_snr": over}
    values |= dict(zip(("log_snr", "x_0", "eps"), curve, strict=True))
    between = "" if values["low"] is None else f" (95% over {data.units}: {values['low']:.4f} to {values['high']:.4f})"
    summary = (
        f"{values['value']:.4f} mean squared error of eps{between}, over log-SNR {over[0]} to {over[1]}\n"
        f"measured in {len(bins)} bins of log-SNR, {bins[0]} to {bins[-1] + 1}"
    )
    return f"loss_by_snr_w1_{n}_held_out", summary, values, curve


def write_loss_by_snr(path: Path, curve: LossBySNR) -> None:
    """Write a CSV file with the centre of each log-SNR bin and the errors of x_0 and eps, empty if not measured."""
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        csv.writer(file).writerows([("log_snr", "x_0_mse", "eps_mse"), *zip(*curve, strict=True)])


def bound_times(T: int, steps: int | None) -> list[int]:
    """Return the times of a bound of `steps` terms, evenly spaced up to T and rounded; ValueError unless in 1..T."""
    if steps is None:
        return list(range(1, T + 1))
    if not is_whole(steps, 1, T):
        raise ValueError(f"steps = {steps!r}: the number of terms of the bound must be an integer in 1..{T}")
    return [round(T * i / steps) for i in range(1, steps + 1)]


def write_terms(path: Path, bound: Bound) -> None:
    """Write a CSV file with, for each t, the mean over images of the bound's term and of the errors of x_0 and eps."""
    rows = torch.stack([bound.terms.mean(0), bound.x_0_mse.mean(0), bound.eps_mse.mean(0)], dim=1).tolist()
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        csv.writer(file).writerows([("t", "bits", "x_0_mse", "eps_mse")])
        csv.writer(file).writerows((t, *row) for t, row in zip(bound.times, rows, strict=True))


def must_hold_out(data: Dataset, metric: str, n: int) -> None:
    """Raise ValueError for data with fewer than n held-out images, before anything is evaluated."""
    if len(data.held_out) == 0:
        raise ValueError(f"{data.name} has no held-out part (data.validation=0), and this measure needs one")
    if n > len(data.held_out):
        raise ValueError(
            f"n = {n} {data.units}, but {data.name} holds out {len(data.held_out)} (of {len(data)}): n is at most "
            f"that for {metric}"
        )


def _held_out(
    source: TrainedSampler, data: Dataset, n: int, batch: int, clip: bool = True
) -> Iterator[tuple[list[int], Tensor, Denoise]]:
    """Yield indices, x_0 and denoiser (clip=False: never clipped) of n held-out images, evenly spaced, in batches."""
    bind = source.diffusion.denoiser if clip else source.diffusion.predictor
    for numbers in chosen(data, n).split(batch):
        real = data.batch(numbers, source.device)
        yield numbers.tolist(), real.x, bind(source.model, real.condition.for_network(source.model))


def _references(data: Dataset, n: int) -> dict[str, float]:
    """Return the bits per dimension of the same held-out points under the density, if known, and under one Gaussian."""
    x, train = (data.batch(part).x.double().flatten(1).cpu() for part in (chosen(data, n), data.train))
    fitted = MultivariateNormal(train.mean(0), torch.cov(train.T, correction=0).reshape(x.shape[1], x.shape[1]))
    bits = {"gaussian": fitted.log_prob(x)}
    if JointMixture.knows(data):
        bits = {"exact": JointMixture.of(cosine(), data).log_prob(x, 0)} | bits  # at t = 0 no schedule matters
    return {name: -log_p.mean().item() / (x.shape[1] * math.log(2)) for name, log_p in bits.items()}


def _exact_bound(source: TrainedSampler, data: Dataset, n: int, times: list[int] | None) -> dict[str, float]:
    """Return the exact denoiser's bound on the same points, with the same noise and the run's fixed variance.

    If the run learns its variance, the better bound of the two fixed ones; {} where the density is unknown.
    """
    schedule, numbers = source.diffusion.schedule, chosen(data, n)
    if not JointMixture.knows(data):
        return {}
    noise, x_0 = SampleNoise(source.seed, numbers.tolist(), "bits_per_dim"), data.batch(numbers).x.double()
    fracs = {"beta_tilde": [0.0], "beta": [1.0]}.get(source.diffusion.variance, [0.0, 1.0])
    exact = (JointMixture.of(schedule, data, frac=frac).denoise for frac in fracs)
    bounds = [bits_per_dim(schedule, denoise, x_0, noise, times=times, discrete=False) for denoise in exact]
    return {"exact_bound": min(bound.total.mean().item() for bound in bounds)}


def _references_in_words(references: dict[str, float]) -> str:
    """Format the reference bits of points."""
    names = {"exact": "the density itself", "exact_bound": "the exact denoiser's bound", "gaussian": "one Gaussian"}
    return "\n" + ", ".join(f"{names[name]} {bits:.4f}" for name, bits in references.items())


def chosen(data: Dataset, n: int) -> Tensor:
    """Return the indices of n held-out samples, evenly spaced."""
    return data.held_out[spread(len(data.held_out), n)]


def _unless_all(times: list[int], T: int) -> list[int] | None:
    return None if len(times) == T else times


def interval(bits: Tensor, units: str, what: str = "bits per dimension") -> dict[str, Any]:
    """Return the record of a mean of (n,) values and its 95 % interval; ValueError for values that are not finite."""
    lost = int((~bits.isfinite()).sum())
    if lost:
        raise ValueError(f"{lost} of {len(bits)} {units} have {what} that are not finite")
    mean, n = bits.mean().item(), len(bits)
    half = half_width(bits.std().item() / math.sqrt(n)) if n > 1 else None
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return {"value": mean, "low": low, "high": high, "real_vs_real": None, "n": n}


def _in_words(values: dict[str, Any], units: str) -> str:
    between = "" if values["low"] is None else f" (95% over {units}: {values['low']:.4f} to {values['high']:.4f})"
    return f"{values['value']:.4f} bits/dim{between}"
