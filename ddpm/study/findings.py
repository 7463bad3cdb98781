"""Data classes of a report: computed by `report` from the arms of `reading`, rendered by `page` and `formatting`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddpm.study.statistics import Comparison, Estimate


@dataclass(frozen=True)
class Arm:
    """Runs that differ in nothing but the seed."""

    label: str  # unique in the study
    settings: Mapping[str, str]  # factor -> level of the settings that differ between arms; factors of the design
    runs: tuple[Path, ...]  # one for each seed that is done
    seeds: tuple[int, ...]  # of those runs
    parameters: int | None  # of the network
    gflop: float | None  # of a forward pass for one image
    seconds: float | None  # of training, mean over runs
    flags: tuple[str, ...] = ()  # reasons why it may not be comparable with its baseline
    commands: tuple[str, ...] = ()  # command lines of its runs


@dataclass(frozen=True)
class Blocks:
    """Blocks of a grid: arms at a baseline level of one factor are compared with other levels, all else equal."""

    factor: str  # the factor whose levels are compared
    level: str  # its baseline level
    others: tuple[str, ...]  # the factors whose levels define a block
    levels: Mapping[str, str]  # label -> level of the factor, as in labels: LEVEL or FACTOR=LEVEL
    names: Mapping[str, str]  # label -> levels of the others, likewise: the name of its block
    against: Mapping[str, str]  # label -> the arm of its block at the baseline's level


@dataclass(frozen=True)
class Measure:
    """A measured number of every run, with the estimates and comparisons of arms."""

    name: str  # the protocol's, as in evaluation.json, or that of the held-out loss in metrics.jsonl
    title: str  # readable name: "Frechet distance"
    unit: str  # "", "%", "bits/dim"
    better: str  # "lower", "higher" or "neither"
    arms: Mapping[str, Estimate]  # label -> mean and interval over training seeds
    differences: Mapping[str, Comparison]  # label -> against its baseline, paired by training seed; not a baseline's
    real: float | None = None  # the same of held-out images
    noise: float | None = None  # half the width of the widest interval within a run
    noise_of: str = "samples"  # the random choice behind that interval
    units: str = "images"  # name of the data
    note: str = ""  # such as: the arms were measured over different ranges


@dataclass(frozen=True)
class Effect:
    """Main effect of a factor in a grid: the mean of all runs at each level, over all other factors."""

    factor: str
    levels: Mapping[str, Estimate]  # level -> mean and interval over seeds
    differences: Mapping[str, Comparison] = field(default_factory=dict)
    """level -> comparison with the mean at the baseline's level, where the factor has one; tested separately"""


@dataclass(frozen=True)
class Interaction:
    """Interaction of two factors of a grid: the mean at each pair of levels."""

    rows: str
    columns: str
    row_levels: tuple[str, ...]
    column_levels: tuple[str, ...]
    means: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class Front:
    """Pareto front of quality against a cost: every arm as a point, and those that no other dominates."""

    cost: str  # "parameters", "GFLOP an image", "seconds of training", "evaluations a sample"
    points: Mapping[str, tuple[float, float]]  # label -> (cost, quality)
    best: tuple[str, ...]  # labels on the front, by cost


@dataclass(frozen=True)
class TradeOff:
    """Two measures against each other: a point for every run that has both."""

    x: str  # what the axes show, with the better direction
    y: str
    runs: Mapping[str, tuple[tuple[float, float], ...]]  # label -> (x, y) of each training seed


@dataclass(frozen=True)
class Curve:
    """A line of a figure with its range over seeds."""

    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...]  # (), like high, where there is no range
    high: tuple[float, ...]


@dataclass(frozen=True)
class Failure:
    """A run that is not done."""

    arm: str
    seed: int | None
    path: Path
    state: str  # FAILED, INTERRUPTED, RUNNING
    reason: str
    traceback: str | None


@dataclass(frozen=True)
class Findings:
    """All findings of a study that a report contains."""

    study: str
    question: str | None
    design: tuple[str, ...]  # sentences: factors and levels, seeds, fixed settings, how arms are compared
    baseline: str  # an arm's label, or with blocks a level
    arms: tuple[Arm, ...]  # the baseline first, and so in each block
    measures: tuple[Measure, ...]  # the first is the one that fronts, effects and verdict are about
    verdict: tuple[str, ...]  # sentences: the answer
    effects: tuple[Effect, ...] = ()  # of grids with two factors or more
    interactions: tuple[Interaction, ...] = ()
    fronts: tuple[Front, ...] = ()
    trade_offs: tuple[TradeOff, ...] = ()  # quality, coverage and speed of sampling, each pair
    losses: Mapping[str, Curve] = field(default_factory=dict)  # label -> loss over steps
    losses_of: str = "Held-out loss"  # title of `losses`
    by_snr: Mapping[str, Curve] = field(default_factory=dict)  # label -> error of eps over log-SNR
    by_steps: Mapping[str, Curve] = field(default_factory=dict)  # "label, sampler" -> Frechet distance over evaluations
    schedules: Mapping[str, Curve] = field(default_factory=dict)  # label -> sqrt(alpha_bar) over t / T, if they differ
    sheet: Mapping[str, Any] = field(default_factory=dict)
    """label -> (H, W, C) uint8, samples from the same x_T: a row of tiles, not enlarged, two pixels between them; for
    points one picture of all"""
    sheet_of_points: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)  # commit, machine, versions ...
    commands: tuple[str, ...] = ()  # command lines of the runs
    failures: tuple[Failure, ...] = ()
    warnings: tuple[str, ...] = ()  # of the study as a whole
    blocks: Blocks | None = None  # where the baseline is a level of a factor

    @property
    def against(self) -> Mapping[str, str]:
        """label -> the arm that it is compared with; a baseline's is itself."""
        return {arm.label: self.baseline for arm in self.arms} if self.blocks is None else self.blocks.against
