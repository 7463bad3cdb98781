"""Validation of features, which every measure runs before it computes anything."""

from torch import Tensor


def finite_features(*, least: int = 2, **sets: Tensor) -> list[Tensor]:
    """Validate sets of features that are measured together, and return them in float64.

    Args:
        least: rows that each set must have.
        sets: features (n, D) under their names in error messages; n may differ, D may not.

    Returns: the sets in their order, (n, D), float64, detached, on their devices.
    Raises: ValueError for another shape, too few rows, sizes D that differ, and values that are not finite.
    """
    for name, features in sets.items():
        if features.ndim != 2 or len(features) < least or features.shape[1] == 0:
            raise ValueError(f"{name} must be (n, D) of at least {least} samples, not {tuple(features.shape)}")
        if broken := (~features.isfinite().all(1)).sum():
            raise ValueError(f"{name}: {broken} of {len(features)} samples have features that are not finite")
    if len({features.shape[1] for features in sets.values()}) > 1:
        sizes = ", ".join(f"{features.shape[1]} ({name})" for name, features in sets.items())
        raise ValueError(f"features that are compared must have one size D, not {sizes}")
    return [features.detach().double() for features in sets.values()]
