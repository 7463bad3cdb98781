"""Checks of a U-Net's arguments, and levels fitted to an image size."""

from collections.abc import Sequence
from typing import Any

MOST, MOST_BLOCKS = 2**20, 100  # of any count: beyond it are slips, which would take all memory or no end of time
# Of networks that are fitted to a size: pixels of a side, at least and at most; of the last level's shorter side, at
# least, and of its whole, at most; of a whole with attention, at most; and the channel_mults by the number of levels.
FITTED, DEEPEST, LARGEST_DEEPEST, ATTENDED = (16, 128), 8, 32 * 32, 16 * 16
WIDTHS = {2: (1, 2), 3: (1, 2, 3), 4: (1, 2, 3, 4), 5: (1, 1, 2, 3, 4)}
RESAMPLES = ("conv", "resnet")
LEAST_EPS = 1e-12  # less vanishes in float32 next to a variance, and a constant group is divided by 0


def fitted_channel_mults(image_size: Sequence[int], patch: int = 1) -> tuple[int, ...]:
    """Return the level widths fitted to a size: the shorter side is halved to 8..15 pixels, if both sides can be.

    As in the networks of Dhariwal and Nichol (arXiv 2105.05233) for 64 and 128 pixels, whose widths these are; fewer
    levels have the first of them. Runs store None in place of the result, which must therefore never change.

    Args:
        image_size: (H, W) in pixels: of squares, even ones up to 64 and multiples of 4 beyond; times patch.
        patch: as in `UNet`; H / patch and W / patch are halved.

    Returns: channel_mults: 2 levels from 16 pixels on, 3 from 32, 4 from 64, 5 at 128, and fewer where a half would not
        be whole.

    Raises: ValueError, with the nearest sizes that are allowed, for sides outside 16..128 pixels, times patch, that
        cannot be halved, or only to more than 32 x 32 pixels.
    """
    height, width = image_size
    levels = _fitted_levels(height, width, patch)
    if levels == 0:
        least, most = FITTED
        rows, columns = ([min(max(n // patch, least), most) + i for i in range(-4, 5)] for n in image_size)
        sizes = [(h * patch, w * patch) for h in rows for w in columns if height != width or h == w]
        legal = [size for size in sizes if _fitted_levels(*size, patch)]
        near = sorted(legal, key=lambda size: abs(size[0] - height) + abs(size[1] - width))[:2]
        raise ValueError(
            f"image_size = {height}x{width} with patch = {patch}: a network is fitted to sides of {least * patch} to "
            f"{most * patch} pixels that can be halved to 32x32 or less; nearest legal sizes: "
            f"{', '.join(f'{h}x{w}' for h, w in near)}; for others set channel_mults"
        )
    return WIDTHS[levels]


def _fitted_levels(height: int, width: int, patch: int) -> int:
    """Return the number of levels that are fitted to a size; 0 for an unsuitable size."""
    least, most = (side * patch for side in FITTED)
    if min(height, width) < least or max(height, width) > most:
        return 0
    for levels in range((min(height, width) // patch // DEEPEST).bit_length(), 1, -1):
        unit = patch * 2 ** (levels - 1)
        if height % unit == width % unit == 0 and height * width <= LARGEST_DEEPEST * unit**2:
            return levels
    return 0


def fitted_attention_resolutions(image_size: Sequence[int], levels: int, patch: int = 1) -> tuple[int, ...]:
    """Return the resolutions whose feature maps have at most 16 x 16 pixels, where full attention is cheap.

    Args:
        image_size: (H, W) in pixels.
        levels: of the network.
        patch: as in `UNet`.

    Returns: the longer sides of those feature maps in pixels, from the largest on; none if all are larger.
    """
    sides = [[-(-(n // patch) // 2**level) for n in image_size] for level in range(levels)]
    return tuple(max(height, width) for height, width in sides if height * width <= ATTENDED)


def check_size(size: Sequence[int], patch: int) -> None:
    """Raise ValueError for an invalid size or patch."""
    if isinstance(patch, bool) or not isinstance(patch, int) or not 1 <= patch <= MOST:
        raise ValueError(f"patch = {patch!r} must be an integer >= 1, and at most {MOST:,}")
    if len(size) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MOST for n in size):
        raise ValueError(f"image_size = {size} must be one integer >= 1, or two (H, W), and at most {MOST:,}")


def check(
    *,
    size: Sequence[int],
    in_channels: int,
    out_channels: int,
    channels: int,
    channel_mults: Sequence[int],
    blocks: Sequence[int],
    attention_resolutions: Sequence[int],
    dropout: float,
    num_classes: int | Sequence[int] | None,
    patch: int,
    norm_eps: float,
    drop: float,
    condition_channels: int,
    class_channels: int,
    augment_dim: int,
    token_channels: int,
    unit: int,
) -> None:
    """Raise ValueError for arguments of the U-Net that do not fit together.

    Args:
        unit: must divide both sides of the image; the others are those of the U-Net, blocks one number a level.
    """
    levels = len(channel_mults)
    if levels == 0:
        raise ValueError("channel_mults is empty: give one multiple of `channels` a level, such as [1, 2, 2]")
    positive = {"in_channels": in_channels, "out_channels": out_channels, "channels": channels}
    positive |= {f"channel_mults[{i}]": m for i, m in enumerate(channel_mults)}
    positive |= {f"blocks[{i}]": b for i, b in enumerate(blocks)}
    if isinstance(num_classes, Sequence):
        if not num_classes:
            raise ValueError("num_classes is empty: give the number of classes, of several labels a list, or null")
        positive |= {f"num_classes[{i}]": n for i, n in enumerate(num_classes)}
    elif num_classes is not None:
        positive["num_classes"] = num_classes
    for name, value in positive.items():
        most = MOST_BLOCKS if name.startswith("blocks") else MOST
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise ValueError(f"{name} = {value!r} must be an integer >= 1, and at most {most:,}")
    if channels * max(channel_mults) > MOST:
        raise ValueError(f"channel_mults of {max(channel_mults)} times channels = {channels} is more than {MOST:,}")
    if len(blocks) != levels:
        raise ValueError(f"blocks has {len(blocks)} entries, but channel_mults has {levels} levels")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout = {dropout:g} must lie in [0, 1)")
    if not 0 <= drop < 1:
        raise ValueError(f"drop = {drop:g} must lie in [0, 1)")
    optional = {"condition_channels": condition_channels, "class_channels": class_channels, "augment_dim": augment_dim}
    optional["token_channels"] = token_channels
    for name, value in optional.items():
        if type(value) is not int or not 0 <= value <= MOST:
            raise ValueError(f"{name} = {value!r} must be an integer >= 0, and at most {MOST:,}")
    if class_channels and num_classes is None:
        raise ValueError(
            f"class_channels = {class_channels} are those of classes: set num_classes, or class_channels = 0"
        )
    if not LEAST_EPS <= norm_eps <= 1:
        raise ValueError(f"norm_eps = {norm_eps:g} must lie in [{LEAST_EPS:g}, 1]")
    for n in size:
        if n % unit:
            near = sorted({max(unit, n // unit * unit), (n // unit + 1) * unit})
            raise ValueError(
                f"image_size = {size[0]}x{size[1]} with {levels} levels and patch = {patch}: {n} is not divisible by "
                f"{unit}; nearest legal sizes: {', '.join(map(str, near))}"
            )
    occurring = resolutions_of(size, levels, patch)
    for resolution in attention_resolutions:
        if resolution not in occurring:
            raise ValueError(
                f"attention_resolutions has {resolution}, which never occurs; a {size[0]}x{size[1]} image with "
                f"{levels} levels and patch = {patch} has the resolutions {', '.join(map(str, occurring))}"
            )


def resolutions_of(size: Sequence[int], levels: int, patch: int = 1) -> list[int]:
    """Return the longer side of each level's maps, in pixels; odd sizes are halved to the next larger whole number."""
    return [-(-(max(size) // patch) // 2**level) for level in range(levels)]


def per_level(name: str, value: Any, levels: int) -> list[Any]:
    """Return one entry a level, from one value or as many; ValueError for another number of entries."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [value] * levels
    if len(value) != levels:
        raise ValueError(f"{name} has {len(value)} entries, but channel_mults has {levels} levels")
    return list(value)


def check_together(
    *,
    plain: dict[str, Any],
    magnitude_preserving: bool,
    attention: str,
    any_size: bool,
    patch: int,
    downsample_padding: int,
    by_conv: bool,
) -> None:
    """Raise ValueError for kinds of layers that exclude each other.

    Args:
        plain: options that exclude magnitude_preserving, by name; true where they are set.
        by_conv: whether levels are joined by convolutions; the others are arguments of the U-Net.
    """
    for name, active in plain.items():
        if active and magnitude_preserving:
            raise ValueError(f"{name} and magnitude_preserving = true exclude each other: leave out one of them")
    if plain["token_channels"] and attention != "full":
        raise ValueError(f"attention = {attention!r} with token_channels: transformers have attention = full alone")
    needed = {"patch = 1": patch == 1, "downsample_padding = 1": downsample_padding == 1, "resample = conv": by_conv}
    missing = [name for name, there in needed.items() if not there]
    if any_size and missing:
        raise ValueError(f"any_size = true needs {', '.join(missing)}; or set any_size = false")
