"""Measures of held-out data by networks without a sampler: bounds, reconstructions, codes."""

import functools

from ddpm.commands.console import progress_bar, say
from ddpm.commands.evaluate.context import EvaluationContext, PlannedMeasure
from ddpm.commands.load import must_match
from ddpm.commands.validate import must_be_whole
from ddpm.config import InvalidInput

OF_LIKELIHOOD = ("elbo", "log_likelihood")  # measures that need a likelihood of the reconstruction
STRUCTURE = "latent_structure"
MOST_PLOTTED = 2000  # posterior means in a plot: t-SNE is slow


def measure_codings(context: EvaluationContext, metric: str) -> PlannedMeasure:
    """Check the input of a measure of held-out data, such as `elbo` or `codes`; return the planned measure."""
    from ddpm.metrics import denoising

    config, source, data = context.config, context.source, context.trained_on
    n = config.n or min(512, len(data.held_out))
    must_match(source.model, data)
    try:
        if metric in OF_LIKELIHOOD:
            _ = source.reconstruction.likelihood  # raises ValueError without one
        denoising.must_hold_out(data, metric, n)
        if metric == "log_likelihood":
            must_be_whole(config.log_likelihood, "draws", least=1)
        if metric == STRUCTURE:
            from ddpm.metrics.structure import must_have_structure  # scikit-learn is slow to import

            must_have_structure(data, n)
    except (ValueError, InvalidInput) as error:
        raise InvalidInput(f"{metric}: {error}") from error
    cost = n * (config.log_likelihood.draws if metric == "log_likelihood" else 1)
    plan = f"{metric}: {n:,} held-out {data.units}"
    plan += f", {cost:,} draws of the posterior" if metric in OF_LIKELIHOOD else ""
    carry_out = _draw_structure if metric == STRUCTURE else functools.partial(_carry_out, metric=metric, cost=cost)
    return PlannedMeasure(plan, cost, lambda: carry_out(context, n=n))


def _carry_out(context: EvaluationContext, metric: str, n: int, cost: int) -> None:
    """Measure, and record the results."""
    from ddpm.metrics import codings

    config, source, data = context.config, context.source, context.trained_on
    with progress_bar(cost) as bar:
        try:
            if metric != "log_likelihood":
                measured = getattr(codings, f"measure_{metric}")
                protocol, words, values = measured(source, data, n, config.batch, bar.update)
            else:
                draws = config.log_likelihood.draws
                protocol, words, values = codings.measure_log_likelihood(
                    source, data, n, draws, config.batch, bar.update
                )
        except ValueError as error:
            raise InvalidInput(f"metric={metric}: {error}") from error
    context.record(protocol, context.settings(n) | values, words)


def _draw_structure(context: EvaluationContext, n: int) -> None:
    """Record what the posterior means reveal of the classes, and plot them."""
    from ddpm.data.dataset import spread
    from ddpm.figures import plots
    from ddpm.metrics import structure

    config, source, data, folder = context.config, context.source, context.trained_on, context.run.path
    with progress_bar(n) as bar:
        means = structure.posterior_means(source, data, n, config.batch, bar.update)
    try:
        found = structure.measure_structure(means, data.units, source.model.codings)
    except ValueError as error:  # means that are not finite
        raise InvalidInput(f"metric={STRUCTURE}: {error}") from error
    for protocol, (words, values) in found.items():
        context.record(protocol, context.settings(n) | values, words)
    chosen = spread(n, MOST_PLOTTED)
    pictures = means.x[chosen] if "pictures" in data.holds else None
    titles = {"pca": "two largest principal components", "tsne": "t-SNE"}
    for name, xy in structure.in_plane(means.z[chosen]).items():
        path, title = folder / f"latent_{name}.png", f"posterior means of {len(chosen):,} held-out {data.units}: "
        plots.places(path, xy, means.y[chosen], list(data.classes), pictures, title + titles[name])
        say(f"wrote {path}")
