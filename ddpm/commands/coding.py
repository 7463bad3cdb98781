"""Measures of held-out data by what draws without a sampler: bounds, reconstructions, codes."""

from ddpm.commands.console import progress_bar
from ddpm.commands.evaluation_context import EvaluationContext, PlannedMeasure
from ddpm.commands.load import must_match
from ddpm.commands.validate import must_be_whole
from ddpm.config import InvalidInput

OF_LIKELIHOOD = ("elbo", "log_likelihood")  # measures that need one


def measure_codings(context: EvaluationContext, metric: str) -> PlannedMeasure:
    """Check the input of `elbo`, `log_likelihood`, `reconstruction` or `codes`; returns what measures it."""
    from ddpm.metrics import denoising

    config, source, data = context.config, context.source, context.trained_on
    n = config.n or min(512, len(data.held_out))
    must_match(source.model, data)
    try:
        if metric in OF_LIKELIHOOD:
            _ = source.reconstruction.likelihood  # of which there must be one
        denoising.must_hold_out(data, metric, n)
        if metric == "log_likelihood":
            must_be_whole(config.log_likelihood, "draws", least=1)
    except (ValueError, InvalidInput) as error:
        raise InvalidInput(f"{metric}: {error}") from error
    cost = n * (config.log_likelihood.draws if metric == "log_likelihood" else 1)
    plan = f"{metric}: {n:,} held-out {data.units}"
    plan += f", {cost:,} draws of the posterior" if metric in OF_LIKELIHOOD else ""
    return PlannedMeasure(plan, cost, lambda: _carry_out(context, metric, n, cost))


def _carry_out(context: EvaluationContext, metric: str, n: int, cost: int) -> None:
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
