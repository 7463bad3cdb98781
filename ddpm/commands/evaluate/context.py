"""The context of an evaluation: a run's network and data, shared by its measures."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from omegaconf import DictConfig

from ddpm.commands.console import how_drawn, say, warn_of_range, with_bar
from ddpm.commands.load import NONE, untrained_judge
from ddpm.commands.train.codec import trained_on
from ddpm.commands.validate import width_of_average
from ddpm.config import InvalidInput

ENOUGH_FOR_PCA = 4096  # training images that PCA is computed from, at most
CHEAP = ("pca", "pixels", "coordinates")  # features that are not stored in a file


class PlannedMeasure(NamedTuple):
    """A measure whose input has been checked, and that has not started."""

    plan: str  # what it will do, for the terminal
    evaluations: int  # of the network, counted by image
    carry_out: Callable[[], None]
    features: tuple[str, ...] = ()  # kinds of features that it computes


class EvaluationContext:
    """The run's network and data, and cached features and classifiers that its measures share."""

    def __init__(self, config: DictConfig, source: Any, run: Any, trained: DictConfig, step: int, data: Any):
        self.config, self.source, self.every = config, source, data.original
        self._unfiltered = data
        try:
            self.data = self.every.of_labels(source.requested, source.styles)  # real data, to compare samples with
        except ValueError as error:
            raise InvalidInput(str(error)) from error
        self.run, self.trained, self.step = run, trained, step
        self.seeds = [config.seed + k for k in range(config.seeds)]
        self.cache = run.path.parent.parent / "judges"
        self.features, self.real = functools.cache(self._features), functools.cache(self._real)  # by kind

    @functools.cached_property
    def trained_on(self) -> Any:
        """The data as the network sees them: `data`, or their latents or codes."""
        data = self._unfiltered
        if self.source.codec is not None and data.codec is None:
            data = trained_on(self.config, self.run, self.trained, self.source.device)
        return data.of_labels(self.source.requested, self.source.styles)

    def settings(self, n: int, sampler: Any = None) -> dict[str, Any]:
        """Return the part of a record that states what was evaluated and, with a sampler, how samples were drawn."""
        from ddpm.runs.directory import git_commit

        diffusion = self.source.diffusion
        schedule = None if diffusion is None else diffusion.schedule
        settings = how_drawn(n, self.config, self.config.weights, sampler, schedule, git_commit())
        data = str(self.data.identity()["sha256"])
        return settings | {"checkpoint": self.step, "precision": self.source.precision, "data_sha256": data}

    def record(self, protocol: str, values: dict[str, Any], words: str) -> None:
        """Write a result into the run's evaluation.json, and print it."""
        from ddpm.runs import results

        protocol = self.named(protocol)
        results.record(self.run.path, protocol, values)
        say(f"{protocol}:\n{words}")

    def named(self, protocol: str) -> str:
        """Return the protocol's name with requested classes and styles, the temperature and the width of an average."""
        for one, requested in (("class", self.source.requested), ("style", self.source.styles)):
            if requested is not None:
                protocol += f"_{one}{'-'.join(map(str, sorted(set(requested)))) or NONE}"
        if (temperature := self.config.get("temperature", 1.0)) != 1.0:
            protocol += f"_temperature{temperature:g}"
        width = width_of_average(self.config)  # each width is a protocol of its own
        return protocol if width is None else f"{protocol}_ema{width!r}"

    def samples(
        self, numbers: list[int], seed: int, sampler: Any = None, guidance: Any = None, conditions_of: Any = None
    ) -> tuple[Any, Any]:
        """Return the samples of a seed with these numbers (n, *shape), and their requested classes (n,) or None.

        Args:
            conditions_of: numbers of the data's samples whose conditions are used, in turn; None for the held-out ones.
        """
        import torch

        source = self.source.with_seed(seed)
        source = source if sampler is None else source.using(sampler)
        source = source if guidance is None else source.guided_by(guidance)
        source = source if conditions_of is None else source.conditioned_on(conditions_of)
        batches = source.batches(numbers, self.config.batch)
        x = torch.cat([x for _, x in with_bar(batches, len(numbers))])
        warn_of_range(source)
        return x, source.classes(numbers)

    @functools.cached_property
    def judge(self) -> Any:
        """The classifier of the data, not yet trained."""
        judge = self.new_judge(0)
        if self.data.labels is None:
            raise InvalidInput(
                f"{self.data.name} has no labels, and features=classifier needs them; features=inception, pca and "
                "pixels do not"
            )
        return judge

    def new_judge(self, seed: int) -> Any:
        """Build a classifier of the data, not trained, with the initial weights of a seed."""
        return untrained_judge(self.config.judge, "judge", self.data, seed=seed)

    @property
    def has_judge(self) -> bool:
        """Whether the classifier has been trained and stored."""
        from ddpm.metrics import quality

        return quality.judge_path(self.every, self.judge, self.cache).exists()

    def _features(self, kind: str) -> tuple[int, Callable[[], tuple[Any, float | None]]]:
        """Return the number of features of a kind, and a function that returns (extractor, accuracy or None)."""
        from ddpm.metrics import features, quality

        config, data, device = self.config, self.every, self.source.device
        if kind == "classifier":
            judge = self.judge
            size = features.Judge(judge, "").size
            return size, lambda: quality.judge_of(data, judge, self.cache, device, say)
        made: Any
        try:
            if kind == "inception":
                features.Inception.must_be_there(self._weights)
                return features.Inception.size, lambda: (self._inception, None)
            if kind in ("pixels", "coordinates"):
                made = (features.Pixels if kind == "pixels" else features.Coordinates)(data.shape)
            else:
                some = data.train[:: -(-len(data.train) // ENOUGH_FOR_PCA)]
                made = features.PCA(data.batch(some).x, config.pca, quality.data_key(data))
        except (ValueError, ImportError, OSError) as error:
            raise InvalidInput(f"features={kind}: {error}") from error
        return made.size, lambda: (made, None)

    @property
    def _weights(self) -> str | None:
        """The file of Inception's weights, if one is configured."""
        weights = self.config.inception.weights
        return None if weights is None else str(weights)

    @functools.cached_property
    def _inception(self) -> Any:
        from ddpm.metrics import features

        try:
            return features.Inception(self._weights, self.source.device)
        except (ValueError, ImportError, OSError) as error:
            raise InvalidInput(f"features=inception: {error}") from error

    def _real(self, kind: str) -> tuple[Any, float | None]:
        """Return the real images with their features of a kind, and a classifier's accuracy or None."""
        from ddpm.metrics import quality

        try:
            extractor, accuracy = self.features(kind)[1]()
            return quality.Real(self.data, extractor, None if kind in CHEAP else self.cache / "features"), accuracy
        except (ValueError, OSError) as error:  # a judge that is damaged, a folder that cannot be written to
            raise InvalidInput(f"features={kind}: {error}") from error
