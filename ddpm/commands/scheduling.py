"""`ddpm-schedule`: a table and a figure that compare noise schedules."""

from omegaconf import DictConfig

from ddpm.commands.console import say, schedule_name
from ddpm.commands.validate import must_be_writable, trusted
from ddpm.config import InvalidInput, build, compose, must_be_finite, plain, resolved


def schedule(config: DictConfig) -> None:
    """Print the table, with warnings about each schedule, and draw the figure."""
    from ddpm.figures import plots
    from ddpm.schedules import concerns
    from ddpm.targets import TARGETS

    must_be_finite(resolved(config), "")
    if config.target not in TARGETS:
        raise InvalidInput(f"target={config.target} is not known; allowed: {', '.join(TARGETS)}")
    if not str(config.out).endswith(".png"):
        raise InvalidInput(f"out={config.out} must be the name of a .png file")
    must_be_writable(config.out)
    others = plain(config.compare)
    if not isinstance(others, list) or not all(isinstance(name, str) for name in others):
        raise InvalidInput(f"compare={others} must be a list of names, such as compare=[linear,sigmoid]")
    named = {schedule_name(config.schedule): build(config.schedule, "schedule", trusted(config))}
    T = next(iter(named.values())).T
    for name in dict.fromkeys(others):
        other = compose("schedule_report", [f"schedule={name}"]).schedule
        _set_T(other, T)
        named[f"{name} (default)" if name in named else name] = build(other, f"compare, {name}")
    table = plots.schedule_table(named)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for name, *cells in table:
        say("  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]))
    for name, noise_schedule in named.items():
        for concern in concerns(noise_schedule, config.target):
            say(f"warning: {name}: {concern}")
    plots.schedules(str(config.out), named)
    say(f"wrote {config.out}")


def _set_T(config: DictConfig, T: int) -> None:
    """Set T of a schedule, or of the schedule that it wraps; one defined by its betas keeps its own."""
    if "T" in config:
        config.T = T
    elif "schedule" in config:
        _set_T(config.schedule, T)
