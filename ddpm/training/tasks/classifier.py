"""A classifier of noisy data, p(y | x_t), for classifier guidance."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.data.batch import Batch
from ddpm.data.dataset import Dataset, spread
from ddpm.forward import q_sample
from ddpm.randomness import Keyed
from ddpm.schedules import NoiseSchedule
from ddpm.training.task import Losses, Task, must_take
from ddpm.training.tasks.diffusion import Noised, noised_evenly

SHOWN, MEASURED = 21, 1000  # times of the figure of accuracy; its held-out samples


class Classifier(Task):
    r"""Train a network to classify x_t, at times t that are drawn uniformly.

    .. math:: L = E_{t, x_0, \epsilon}\left[ -\log p_\phi(y \mid x_t) \right] \qquad \text{[ADM (classifier)]}

    Args:
        model: (x_t, t) -> logits (B, K).
        schedule: of the diffusion to be guided.
        only: as in `Task`.
    Source: Diffusion Models Beat GANs on Image Synthesis (arXiv 2105.05233), section 4.
    """

    replayable = True

    def __init__(self, model: nn.Module, schedule: NoiseSchedule, only: Sequence[str] | None = None):
        super().__init__({"model": model}, only=only)
        self.schedule = schedule

    @property
    def model(self) -> nn.Module:
        return self.modules["model"]

    def draw(self, batch: Batch, random: Keyed, progress: float) -> Noised:
        """Draw t and eps for a step's whole batch."""
        x_0, together = batch.x, random("t and eps")
        t = torch.randint(1, self.schedule.T + 1, (len(x_0),), device=x_0.device, generator=together)
        eps = torch.randn(x_0.shape, device=x_0.device, generator=together)
        return Noised(x_0=x_0, condition=batch.condition, t=t, eps=eps)

    def losses(self, drawn: Noised, progress: float) -> Losses:  # type: ignore[override]  # its own draws
        """Return one part, "loss": the cross-entropy, (B,)."""
        x_t = q_sample(self.schedule, drawn.x_0, drawn.t, drawn.eps)
        return {"loss": F.cross_entropy(self.model(x_t, drawn.t), _classes(drawn), reduction="none")}

    def facts(self, drawn: Noised) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the times."""
        return {"t": drawn.t}

    def draw_held_out(self, batch: Batch, random: Keyed) -> Noised:
        """Return t evenly spread over the schedule, and eps always the same."""
        return noised_evenly(batch, self.schedule.T, random)

    def check(self, data: Dataset) -> None:
        """Raise ValueError for data without labels, or that the network does not take."""
        if data.labels is None:
            raise ValueError(f"task=classifier needs labels, and {data.name} has none")
        must_take(self.model, data)

    @torch.no_grad()
    def accuracy(self, data: Dataset, times: Sequence[int]) -> list[float]:
        """Return the accuracy on held-out samples at each time; t = 0 is without noise."""
        model, numbers = self.model.eval(), data.held_out[spread(len(data.held_out), MEASURED)]
        device = next(model.parameters()).device
        batch, shares = data.batch(numbers, device), []
        for t in times:
            eps = torch.randn(batch.x.shape, device=device, generator=Keyed(0, t, device=device)("accuracy"))
            x_t = q_sample(self.schedule, batch.x, t, eps)
            right = [
                model(x, torch.full((len(x),), t, device=device)).argmax(1) == y
                for x, y in zip(x_t.split(256), _labels(batch).split(256), strict=True)
            ]
            shares.append(torch.cat(right).double().mean().item())
        return shares

    def draw_results(self, folder: Path, data: Dataset) -> None:
        """Draw accuracy.png: the accuracy over t."""
        if len(data.held_out) == 0:
            return
        from ddpm.figures import plots

        T = self.schedule.T
        times = [round(T * i / (SHOWN - 1)) for i in range(SHOWN)]
        plots.accuracy(folder / "accuracy.png", times, self.accuracy(data, times), 1 / data.num_classes)


def _classes(drawn: Noised) -> Tensor:
    """Return the classes (B,) of a step's draws."""
    assert drawn.condition.classes is not None  # of labelled data
    return drawn.condition.classes


def _labels(batch: Batch) -> Tensor:
    """Return the classes (B,) of a batch."""
    assert batch.y is not None  # of labelled data
    return batch.y
