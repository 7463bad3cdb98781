"""Measures of held-out data by what draws without a sampler: a variational autoencoder's bounds."""

from ddpm.commands.console import progress_bar
from ddpm.commands.evaluation_context import EvaluationContext, PlannedMeasure
from ddpm.commands.load import must_match
from ddpm.commands.validate import must_be_whole
from ddpm.config import InvalidInput


def measure_codings(context: EvaluationContext, metric: str) -> PlannedMeasure:
    """Check the input of `elbo` or `log_likelihood`; returns what measures it."""
    from ddpm.metrics import denoising

    config, source, data = context.config, context.source, context.data
    n = config.n or min(512, len(data.held_out))
    must_match(source.model, data)
    try:
        _ = source.reconstruction.likelihood  # of which there must be one
        denoising.must_hold_out(data, metric, n)
        if metric == "log_likelihood":
            must_be_whole(config.log_likelihood, "draws", least=1)
    except (ValueError, InvalidInput) as error:
        raise InvalidInput(f"{metric}: {error}") from error
    cost = n * (config.log_likelihood.draws if metric == "log_likelihood" else 1)
    plan = f"{metric}: {n:,} held-out {data.units}, {cost:,} draws of the posterior"
    return PlannedMeasure(plan, cost, lambda: _carry_out(context, metric, n, cost))


def _carry_out(context: EvaluationContext, metric: str, n: int, cost: int) -> None:
    from ddpm.metrics import codings

    config, source, data = context.config, context.source, context.data
    with progress_bar(cost) as bar:
        try:
            if metric == "elbo":
                protocol, words, values = codings.measure_elbo(source, data, n, config.batch, bar.update)
            else:
                draws = config.log_likelihood.draws
                protocol, words, values = codings.measure_log_likelihood(
                    source, data, n, draws, config.batch, bar.update
                )
        except ValueError as error:
            raise InvalidInput(f"metric={metric}: {error}") from error
    context.record(protocol, context.settings(n) | values, words)
