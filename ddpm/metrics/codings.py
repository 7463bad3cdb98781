"""Held-out measures of autoencoders: likelihood bounds, reconstruction error, and use and prediction of codes."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ddpm.data.batch import Batch
from ddpm.data.dataset import Dataset
from ddpm.latent.codec import Discrete
from ddpm.latent.elbo import active_units, importance_weighted, kl, reparametrised
from ddpm.metrics.denoising import chosen, interval
from ddpm.randomness import SampleNoise, generator
from ddpm.runs.precision import computing
from ddpm.sources.autoregressive import Autoregressive
from ddpm.sources.decoded import Decoded
from ddpm.sources.reconstructed import Reconstructed

AT_A_TIME = 50  # posterior samples that are decoded at once


@torch.no_grad()
def measure_elbo(
    source: Decoded, data: Dataset, n: int, batch: int, callback: Callable[[int], None] | None = None
) -> tuple[str, str, dict[str, Any]]:
    """Return protocol name, summary and record of the two terms of the ELBO on n held-out samples.

    With one fixed posterior sample for each. The value is -ELBO: reconstruction plus KL, whatever weights they were
    trained with. The record also has the KL of each coding, sorted, and the number of active ones.

    Raises: ValueError where the loss has no likelihood.
    """
    model, reconstruction, parts = source.model, source.reconstruction, list[tuple[Tensor, Tensor, Tensor]]()
    name = reconstruction.likelihood
    for numbers, x, y in held_out(source, data, n, batch):
        mean, log_variance = model.encode(x, y)
        eps = SampleNoise(0, numbers, "elbo")(0, (source.model.codings,), source.device)
        output = model.decode(reparametrised(mean, log_variance, eps), y)
        parts.append((reconstruction(output, x, model.log_scale)[name].cpu(), kl(mean, log_variance).cpu(), mean.cpu()))
        if callback:
            callback(len(x))
    nats_of_x, of_codings, means = (torch.cat(column).double() for column in zip(*parts, strict=True))
    nats = nats_of_x + of_codings.sum(1)
    active = int(active_units(means).sum()) if n > 1 else None
    values = interval(nats, data.units, "nats") | {
        "reconstruction": nats_of_x.mean().item(),
        "kl": of_codings.sum(1).mean().item(),
        "kl_of_codings": sorted(of_codings.mean(0).tolist(), reverse=True),
        "active_units": active,
        "codings": means.shape[1],
    }
    summary = f"{values['value']:.2f} nats = {name} {values['reconstruction']:.2f} + KL {values['kl']:.2f}"
    return f"elbo_{n}_held_out", f"{summary}; {active} of {means.shape[1]} codings are active", values


@torch.no_grad()
def measure_log_likelihood(
    source: Decoded, data: Dataset, n: int, draws: int, batch: int, callback: Callable[[int], None] | None = None
) -> tuple[str, str, dict[str, Any]]:
    """Return protocol name, summary and record of the importance-weighted bound on -log p(x) of n held-out samples.

    Args:
        draws: posterior samples for each; the more, the tighter the bound.
    Raises: ValueError where the loss has no likelihood.
    """
    model, reconstruction, at_least, elbo = source.model, source.reconstruction, list[Tensor](), list[Tensor]()
    for numbers, x, y in held_out(source, data, n, max(1, batch // 8)):
        noise = SampleNoise(source.seed, numbers, "iwae")

        def of_chunk(i: int, noise: SampleNoise = noise) -> Tensor:
            return noise(i, (AT_A_TIME, source.model.codings), source.device).movedim(1, 0)

        bound, single = importance_weighted(model, reconstruction, x, y, draws, of_chunk, callback)
        at_least.append(bound.cpu())
        elbo.append(single.cpu())
    nats = -torch.cat(at_least)
    values = interval(nats, data.units, "nats") | {
        "draws": draws,
        "elbo": -torch.cat(elbo).mean().item(),
        "likelihood": reconstruction.likelihood,
    }
    values["bits_per_dim"] = values["value"] / (math.log(2) * math.prod(data.shape))
    words = f"{values['value']:.2f} nats"
    words += f" (95% over {data.units}: {values['low']:.2f} to {values['high']:.2f})" if n > 1 else ""
    words += f", {values['bits_per_dim']:.4f} bits/dim, by {draws:,} draws; by one {values['elbo']:.2f}"
    return f"nats_iwae_{draws}_{n}_held_out", words, values


@torch.no_grad()
def measure_reconstruction(
    source: Reconstructed, data: Dataset, n: int, batch: int, callback: Callable[[int], None] | None = None
) -> tuple[str, str, dict[str, Any]]:
    r"""Return protocol name, summary and record of the reconstruction error (PSNR) on n held-out samples.

    The value is the mean of

    .. math:: \text{PSNR} = 10 \log_{10} \frac{2^2}{\text{mean}_i (x_i - \hat x_i)^2}

    in dB, over samples in [-1, 1]. The record also has the mean squared error, `mse`, and for a codebook the number of
    codes in use and their perplexity.
    """
    autoencoder, squares, codes = source.autoencoder, list[Tensor](), list[Tensor]()
    for part in chosen(data, n).split(batch):
        x = data.batch(part, source.device).x
        posterior = autoencoder.posterior(x)
        error = autoencoder.decode(autoencoder.sample(posterior)) - x
        squares.append(error.square().flatten(1).mean(1).double().cpu())
        codes += [posterior.flatten().cpu()] if isinstance(autoencoder, Discrete) else []
        if callback:
            callback(len(part))
    of_each = torch.cat(squares)
    values = interval(10 * (4 / of_each).log10(), data.units, "dB") | {"mse": of_each.mean().item()}
    words = f"PSNR {values['value']:.2f} dB, mean square {values['mse']:.4f}"
    if isinstance(autoencoder, Discrete):
        used = torch.cat(codes).bincount(minlength=autoencoder.codes)
        values |= {"used": int((used > 0).sum()), "perplexity": _perplexity(used)}
        words += f"; {values['used']} of {len(used)} codes in use, perplexity {values['perplexity']:.1f}"
    return f"psnr_{n}_held_out", words, values


def _perplexity(counts: Tensor) -> float:
    """Return exp of the entropy of counts (K,)."""
    p = counts.double() / counts.sum()
    return torch.special.entr(p).sum().exp().item()


@torch.no_grad()
def measure_codes(
    source: Autoregressive, data: Dataset, n: int, batch: int, callback: Callable[[int], None] | None = None
) -> tuple[str, str, dict[str, Any]]:
    """Return protocol name, summary and record of the autoregressive prediction of the codes of n held-out samples.

    The value is the mean of -log2 p(code | those before it), in bits. The record also has `accuracy`, the share of
    codes that are the likeliest; `independent`, the bits of a code under the frequencies of codes in the training
    part, at any place; `perplexity`, 2 to the power of the entropy of those; and `share`, the value over `independent`.
    Accuracies of codebooks of different sizes cannot be compared; bits can.
    """
    bits, right, every = list[Tensor](), list[Tensor](), list[Tensor]()
    for part in chosen(data, n).split(batch):
        real = data.batch(part, source.device)
        with computing(source.device, source.precision):
            logits = source.model(real.x, real.condition.for_network(source.model)).float()
        nats = F.cross_entropy(logits, real.x, reduction="none")
        bits.append((nats / math.log(2)).mean((1, 2)).double().cpu())
        right.append((logits.argmax(1) == real.x).double().mean((1, 2)).cpu())
        every.append(real.x.flatten().cpu())
        if callback:
            callback(len(part))
    trained = torch.cat([data.batch(part).x.flatten() for part in data.train.split(4096)])
    counts = trained.bincount(minlength=source.model.codes).double()
    p = (counts + 1) / (counts + 1).sum()  # add-one smoothing: a new code has finite cost
    independent = -p.log2()[torch.cat(every)].mean().item()
    values = interval(torch.cat(bits), data.units, "bits") | {
        "accuracy": torch.cat(right).mean().item(),
        "independent": independent,
        "perplexity": _perplexity(counts),
        "codes": len(counts),
    }
    values["share"] = values["value"] / independent if independent else None
    words = f"{values['value']:.3f} bits a code, {independent:.3f} by their frequencies alone"
    words += f" ({values['share']:.1%})" if independent else ""
    words += f"; {values['accuracy']:.1%} predicted, perplexity {values['perplexity']:.1f} of {len(counts)}"
    return f"bits_per_code_{n}_held_out", words, values


def held_out(source: Decoded, data: Dataset, n: int, batch: int) -> Iterator[tuple[list[int], Tensor, Any]]:
    """Yield indices, x and condition of n held-out samples, evenly spaced, `batch` at a time.

    Pixels that are modelled as black or white are binarised at random, keyed by the index of the sample.
    """
    for part in chosen(data, n).split(batch):
        real, numbers = data.batch(part), part.tolist()

        def uniform(real: Batch = real, numbers: list[int] = numbers) -> Tensor:
            rows = [torch.rand(real.x.shape[1:], generator=generator(0, "binarise", i)) for i in numbers]
            return torch.stack(rows)

        x, y = source.reconstruction.drawn(real.x, uniform), real.condition.to(source.device)
        yield numbers, x.to(source.device), y.for_network(source.model)
