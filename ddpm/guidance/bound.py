"""Guidance as a sampler's settings, bound to a network and a condition."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ddpm.data.batch import Condition, classes_of, takes
from ddpm.diffusion import GaussianDiffusion
from ddpm.guidance.classifier import classifier
from ddpm.guidance.classifier_free import autoguidance, classifier_free, must_be_settings
from ddpm.schedules import NoiseSchedule, Time
from ddpm.targets import Denoise


class Trained(NamedTuple):
    """A trained network with its diffusion."""

    diffusion: GaussianDiffusion
    model: nn.Module


class ClassifierOf(NamedTuple):
    """A classifier of x_t, and the noise schedule that it was trained on."""

    schedule: NoiseSchedule
    model: nn.Module  # (x_t, t) -> logits (B, K)


class Guidance:
    """No guidance: a network's own prediction. The base class of every other guidance."""

    num_classes: int | None = None
    """The number of classes that can be requested because of the guidance, besides the network's own."""

    def __str__(self) -> str:
        """Return the guidance in words, to describe samples; empty for none."""
        return ""

    def check(self, diffusion: GaussianDiffusion, model: nn.Module) -> None:
        """Raise ValueError for a network that cannot be guided so."""

    def check_null(self, label: int) -> None:
        """Raise ValueError if samples whose label of this index is null cannot be guided so."""

    def __call__(
        self, diffusion: GaussianDiffusion, model: nn.Module, condition: Condition, against: Condition | None = None
    ) -> Denoise:
        """Return the raw prediction for a condition, on the model's device.

        Args:
            against: the condition that `ClassifierFree` leads away from; None for the condition without any part.
        """
        return diffusion.predictor(model, condition.for_network(model))


class ClassifierFree(Guidance):
    """Classifier-free guidance by predictions with and without the condition, see `ddpm.guidance.classifier_free`.

    Args:
        w: the weight; 0 is without the condition, 1 with it.
        rescale: in [0, 1].
        interval: [low, high] of the log-SNR within which it is guided; None for everywhere.
    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, w: float = 2.0, rescale: float = 0.0, interval: Sequence[float] | None = None):
        must_be_settings(w, rescale, interval)
        self.w, self.rescale = w, rescale
        self.interval = None if interval is None else (interval[0], interval[1])

    def __str__(self) -> str:
        """Return the weight, and the other settings in use."""
        more = f", rescale {self.rescale:g}" if self.rescale else ""
        more += f", within log-SNR {self.interval[0]:g} to {self.interval[1]:g}" if self.interval else ""
        return f"classifier-free guidance w = {self.w:g}{more}"

    def check(self, diffusion: GaussianDiffusion, model: nn.Module) -> None:
        """Raise ValueError for a network that has no condition, or was never trained without it."""
        if not takes(model):
            raise ValueError(
                "guidance=classifier_free needs a conditional network; train one with model.num_classes=K task.drop=0.1"
            )
        if not getattr(model, "drop", 0):
            raise ValueError(
                "guidance=classifier_free needs a network that was trained without its condition too; train one with "
                "task.drop=0.1"
            )

    def __call__(
        self, diffusion: GaussianDiffusion, model: nn.Module, condition: Condition, against: Condition | None = None
    ) -> Denoise:
        """Return the guided raw prediction."""
        if against is None:
            condition, against = condition.nulled(torch.zeros(len(condition), dtype=torch.bool)), condition.nulled()
        pair = diffusion.pair(model, condition.for_network(model), against.for_network(model))
        return classifier_free(
            pair, w=self.w, schedule=diffusion.schedule, rescale=self.rescale, interval=self.interval
        )


class Auto(Guidance):
    """Autoguidance away from the prediction of a worse network, see `ddpm.guidance.autoguidance`.

    Args:
        bad: the worse network: smaller, or an earlier checkpoint of the same run, on the same device.
        w: the weight; 1 is the network itself.
    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, bad: Trained, w: float = 2.0):
        must_be_settings(w)
        self.bad, self.w = bad, w

    def __str__(self) -> str:
        """Return the weight in words."""
        return f"autoguidance w = {self.w:g}"

    def check(self, diffusion: GaussianDiffusion, model: nn.Module) -> None:
        """Raise ValueError for a bad network of another schedule, sample shape or conditions."""
        ours, theirs = diffusion.schedule.alpha_bar.cpu(), self.bad.diffusion.schedule.alpha_bar.cpu()
        if ours.shape != theirs.shape or not (ours == theirs).all():
            raise ValueError(
                "guidance.bad was trained on another noise schedule: its x_t are not those of this network"
            )
        for name in ("shape", "takes", "num_classes"):
            mine, others = getattr(model, name, None), getattr(self.bad.model, name, None)
            if mine != others:
                raise ValueError(f"guidance.bad has {name} = {others}, but this network {mine}")

    def check_null(self, label: int) -> None:
        """Raise ValueError if the bad network was never trained without its labels."""
        if not getattr(self.bad.model, "drop", 0):
            raise ValueError("guidance.bad was trained with task.drop=0, and has no prediction without a label")

    def __call__(
        self, diffusion: GaussianDiffusion, model: nn.Module, condition: Condition, against: Condition | None = None
    ) -> Denoise:
        """Return the guided raw prediction."""
        good = diffusion.predictor(model, condition.for_network(model))
        bad = self.bad.diffusion.predictor(self.bad.model, condition.for_network(self.bad.model))
        return autoguidance(good, bad, self.w)


class ByClassifier(Guidance):
    """Classifier guidance by the gradient of log p(y given x_t), see `ddpm.guidance.classifier`.

    Args:
        run: the classifier, on the same device; on the command line the run that trained it.
        w: the weight; 0 is without it.
    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, run: ClassifierOf, w: float = 1.0):
        must_be_settings(w)
        self.classifier, self.w = run, w
        self.num_classes = classes_of(run.model)

    def __str__(self) -> str:
        """Return the weight in words."""
        return f"classifier guidance w = {self.w:g}"

    def check(self, diffusion: GaussianDiffusion, model: nn.Module) -> None:
        """Raise ValueError for a classifier of another schedule, sample shape or classes."""
        _must_be_of_one_process("guidance.run", diffusion.schedule, self.classifier.schedule)
        mine, others = (getattr(network, "shape", None) for network in (model, self.classifier.model))
        if mine != others:
            raise ValueError(f"guidance.run names samples of shape {others}, but this network draws {mine}")
        count = classes_of(model)
        if count is not None and count != self.num_classes:
            raise ValueError(f"guidance.run knows {self.num_classes} classes, but this network {count}")

    def check_null(self, label: int) -> None:
        """Raise ValueError for a null class; further labels do not concern a classifier."""
        if label == 0:
            raise ValueError("guidance=classifier leads to a class")

    def __call__(
        self, diffusion: GaussianDiffusion, model: nn.Module, condition: Condition, against: Condition | None = None
    ) -> Denoise:
        """Return the guided raw prediction."""
        labels = condition.classes
        assert labels is not None  # as the classifier has classes
        y = labels if labels.ndim == 1 else labels[:, 0]

        def log_prob(x_t: Tensor, t: Time) -> Tensor:
            each = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
            return self.classifier.model(x_t, each).log_softmax(1).gather(1, y[:, None])[:, 0]

        denoise = diffusion.predictor(model, condition.for_network(model))
        return classifier(diffusion.schedule, denoise, log_prob, self.w)


def _must_be_of_one_process(name: str, ours: NoiseSchedule, theirs: NoiseSchedule) -> None:
    """Raise ValueError for schedules that differ: the x_t of one are not those of the other."""
    if ours.T != theirs.T or not torch.equal(ours.alpha_bar.cpu(), theirs.alpha_bar.cpu()):
        raise ValueError(f"{name} was trained on another noise schedule: its x_t are not those of this network")
