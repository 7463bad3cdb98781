"""Points: vectors of a few numbers, of which a fixed part is held out."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ddpm.data.batch import Batch
from ddpm.data.dataset import InMemory, check_options

LEAST, MOST = 2, 10_000_000  # points: fewer have no spread, more are a slip
LEVEL = 1e-9  # standard deviation below which a coordinate, before it is standardised, does not vary


class Points(InMemory):
    r"""Points of d coordinates, with labels or without, of which a fixed part is held out.

    Each coordinate is standardised by itself, with the mean and the standard deviation of all N points (those of the
    population, divided by N), in float64:

    .. math:: x_i = \frac{p_i - m}{s}, \quad m = \frac 1 N \sum_i p_i, \quad s^2 = \frac 1 N \sum_i (p_i - m)^2

    Args:
        name, validation: as in `Dataset`.
        points: p, real numbers (N, d), N >= 2, d >= 1.
        labels: whole numbers (N,) in 0..num_classes-1, or None.
        classes: the classes' names; without them, labels name themselves.
        standardise: false leaves the points as they are: m = 0, s = 1.
    Attributes:
        mean, std: m and s, float64 (d,), by which `x * std + mean` are the original points.
    Raises: ValueError for arguments outside these ranges, numbers that are not finite (as float32), and a
        coordinate that does not vary where it is to be standardised.
    """

    units = "points"

    def __init__(
        self,
        name: str,
        points: Tensor,
        labels: Tensor | None = None,
        classes: Sequence[str] = (),
        *,
        validation: float = 0.2,
        standardise: bool = True,
    ):
        check_options(None, None, validation)
        if not points.is_floating_point() or points.ndim != 2 or points.shape[1] < 1 or len(points) < LEAST:
            raise ValueError(
                f"{name}: points are floats (N, d), N >= {LEAST}, d >= 1, not {points.dtype} {tuple(points.shape)}"
            )
        finite = points.float().isfinite().all(1)  # as the network takes them
        if not finite.all():
            raise ValueError(
                f"{name}: point {int(finite.int().argmin())} has a coordinate that is no finite number, as float32"
            )
        p = points.double()
        self.mean, self.std = torch.zeros_like(p[0]), torch.ones_like(p[0])
        if standardise:
            self.mean, self.std = p.mean(0), p.std(0, correction=0)
        if not (self.std > LEVEL).all():
            raise ValueError(
                f"{name}: the coordinates have the standard deviations {self.std.tolist()}, and all must vary to be "
                "standardised; where noise is added, choose noise > 0"
            )
        super().__init__(name, "all", ((p - self.mean) / self.std).float(), labels, classes, validation)

    @property
    def points(self) -> Tensor:
        """The samples: x, float32 (N, d)."""
        return self.samples

    def batch(
        self, indices: Tensor, device: torch.device | str = "cpu", generator: torch.Generator | None = None
    ) -> Batch:
        """Return points as the network sees them.

        Args:
            indices: their indices (B,), whole numbers in 0..N-1.
            device: where the result goes.
            generator: without effect, for nothing is drawn anew.

        Returns: x float32 (B, d), and as condition the classes int64 (B,) of labelled data.
        """
        return self._taken(indices, device)
