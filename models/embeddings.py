"""Embeddings of a network's inputs besides x_t: time, class and the other parts of a condition."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn


class SinusoidalEmbedding(nn.Module):
    r"""The sinusoidal embedding: sines and cosines of t at geometrically spaced frequencies.

    .. math:: \omega_k = 10000^{-k / (d/2 - \text{freq\_shift})}, \quad k = 0 .. d/2 - 1, \quad
        (\sin \omega_0 t, \ldots, \cos \omega_0 t, \ldots)

    Args:
        dim: length d of the vector; an odd one is padded with a zero.
        flip_sin_to_cos: put the cosines first.
        freq_shift: 1 makes the last frequency 1/10000 exactly (Ho et al.), 0 is that of Vaswani et al.
    Source: DDPM (arXiv 2006.11239), appendix B; Attention Is All You Need (arXiv 1706.03762), section 3.5.
    """

    omega: Tensor

    def __init__(self, dim: int, flip_sin_to_cos: bool = False, freq_shift: float = 1):
        super().__init__()
        half = dim // 2
        if half <= freq_shift:
            raise ValueError(
                f"an embedding of {dim} channels is too narrow for freq_shift = {freq_shift:g}; allowed: "
                f"at least {2 * (math.floor(freq_shift) + 1)}"
            )
        self.dim, self.flip_sin_to_cos = dim, flip_sin_to_cos
        omega = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64) / (half - freq_shift))
        self.register_buffer("omega", omega.float(), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        """t: (B,), integer or real -> (B, dim)."""
        angle = t[:, None].to(self.omega.dtype) * self.omega
        parts = [angle.cos(), angle.sin()] if self.flip_sin_to_cos else [angle.sin(), angle.cos()]
        return nn.functional.pad(torch.cat(parts, dim=1), (0, self.dim % 2))


class FourierEmbedding(nn.Module):
    r"""The random Fourier embedding: sines and cosines of t at random frequencies, which are not trained.

    .. math:: (\sin 2\pi b_k t, \ldots, \cos 2\pi b_k t, \ldots), \quad b_k \sim \mathcal N(0, \text{scale}^2),
        \quad k = 1 .. d/2

    Args:
        dim: length d >= 2 of the vector; an odd one is padded with a zero.
        scale: standard deviation of the frequencies, > 0, in turns for each unit of t.
    Attributes:
        b: the frequencies, (d/2,), initialised by torch's global generator; a buffer, saved in a checkpoint.
    Raises:
        ValueError: an argument out of range.
    Source: Tancik et al. (arXiv 2006.10739), section 4; of t, Song et al. (arXiv 2011.13456), with scale 16 for t in
        [0, 1].
    """

    b: Tensor

    def __init__(self, dim: int, scale: float):
        super().__init__()
        if dim < 2 or not 0 < scale < math.inf:
            raise ValueError(f"an embedding has dim >= 2 and scale > 0, not dim = {dim}, scale = {scale:g}")
        self.dim = dim
        self.register_buffer("b", scale * torch.randn(dim // 2))

    def forward(self, t: Tensor) -> Tensor:
        """t: (B,), integer or real -> (B, dim)."""
        angle = 2 * math.pi * t[:, None].to(self.b.dtype) * self.b
        return nn.functional.pad(torch.cat([angle.sin(), angle.cos()], dim=1), (0, self.dim % 2))


class TimeEmbedding(nn.Sequential):
    """The time embedding, t (B,) -> (B, out): an embedding of size `channels`, sinusoidal by default, and an MLP."""

    def __init__(
        self,
        channels: int,
        out: int,
        flip_sin_to_cos: bool = False,
        freq_shift: float = 1,
        embedding: nn.Module | None = None,
    ):
        super().__init__(
            SinusoidalEmbedding(channels, flip_sin_to_cos, freq_shift) if embedding is None else embedding,
            nn.Linear(channels, out),
            nn.SiLU(),
            nn.Linear(out, out),
        )


class ClassEmbedding(nn.Embedding):
    """A learned vector for each class and, in a network that is trained without its condition too, a null vector.

    Args:
        num_classes: number of classes.
        out: length E of the vectors.
        null: whether there is a vector for rows without a class: the parameter `null` (E,), 0 at first. Without it
            the parameters, their names and their first values are those of `nn.Embedding`.
    """

    null: nn.Parameter | None

    def __init__(self, num_classes: int, out: int, null: bool = False):
        super().__init__(num_classes, out)
        self.register_parameter("null", nn.Parameter(torch.zeros(out)) if null else None)

    def forward(self, classes: Tensor, null: Tensor | None = None) -> Tensor:
        """Return the vectors of classes.

        Args:
            classes: integers (B,) in 0..num_classes-1; where null, any.
            null: true for the rows without a class, (B,); None for none.
        Returns:
            (B, E).
        Raises:
            ValueError: null rows given to an embedding without a vector for them.
        """
        if null is None:
            return super().forward(classes)
        if self.null is None:
            raise ValueError(NO_NULL)
        return torch.where(null[:, None], self.null, super().forward(classes.masked_fill(null, 0)))


class LabelEmbeddings(nn.ModuleList):
    """The sum of a `ClassEmbedding` for each of K labels of a sample.

    Args:
        num_classes: the number of classes of each label.
        out: length E of the vectors.
        null: whether each label has a vector for rows without it.
    Attributes:
        embedding: the class of the summed embeddings.
    """

    embedding: Callable[[int, int, bool], nn.Module] = ClassEmbedding

    def __init__(self, num_classes: Sequence[int], out: int, null: bool = False):
        super().__init__(self.embedding(count, out, null) for count in num_classes)

    def forward(self, labels: Tensor, null: Tensor | None = None) -> Tensor:
        """Return the sums (B, E) of the vectors of labels.

        Args:
            labels: integers (B, K).
            null: true where a row lacks a label, (B, K); None for none.
        Raises:
            ValueError: null labels given to embeddings without a vector for them.
        """
        embedded = (embed(labels[:, k], None if null is None else null[:, k]) for k, embed in enumerate(self))
        return torch.stack(list(embedded)).sum(0)


class Condition(Protocol):
    """The interface of a network's condition besides x_t and t; each part may be None.

    classes (B,), or (B, K) for K labels at once; tokens, ids (B, L) or embeddings (B, L, D); image (B, C', H, W); mask
    of tokens, (B, L); null: a part's name -> true for the rows that the network replaces by its learned null, (B,),
    of K labels (B, K) too; augment (B, K), parameters of the images' augmentation, None for none.
    """

    @property
    def classes(self) -> Tensor | None: ...

    @property
    def tokens(self) -> Tensor | None: ...

    @property
    def image(self) -> Tensor | None: ...

    @property
    def mask(self) -> Tensor | None: ...

    @property
    def null(self) -> Mapping[str, Tensor]: ...

    @property
    def augment(self) -> Tensor | None: ...


NO_NULL = (
    "the condition has null rows, but this network was trained with drop = 0 and has no null condition; task.drop > 0 "
    "makes one"
)


def parts_of(
    y: Tensor | Condition | None,
    num_classes: int | Sequence[int] | None,
    condition_channels: int = 0,
    drop: float = 0.0,
    token_channels: int = 0,
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Return the parts of a condition that a network takes, each with its null rows.

    Args:
        y: classes (B,) or (B, K), or a condition, or None.
        num_classes: of the network; of each of K labels, where it takes several; None for one that takes no classes.
        condition_channels: of the image that the network takes; 0 for none.
        drop: share of conditions that the network's training nulls; with 0 it has no learned null.
        token_channels: D of the tokens that the network takes; 0 for none.
    Returns:
        "classes" -> ((B,), null rows), "tokens" -> ((B, L, D), null rows), "image" -> ((B, C', H, W), null rows), as
        the network takes them. Null rows are (B,), or None for none. Of K labels both classes and null rows are
        (B, K).
    Raises:
        ValueError: a part that is given and not taken, or the reverse; another number of classes a row; tokens that are
            ids, or of another length; null rows, where the network has no learned null, or of another shape or type
            than bool (B,).
    """
    null: Mapping[str, Tensor] = {}
    classes = image = tokens = None
    if isinstance(y, Tensor):
        classes = y
    elif y is not None:
        classes, image, tokens, null = y.classes, y.image, y.tokens, y.null
    _check_tokens(tokens, token_channels)
    if (classes is None) != (num_classes is None):
        raise ValueError(
            "y must be given exactly when the network has classes: "
            f"num_classes = {num_classes}, y is {'missing' if classes is None else 'given'}"
        )
    several = () if num_classes is None or isinstance(num_classes, int) else (len(num_classes),)
    if classes is not None and (classes.ndim < 1 or tuple(classes.shape[1:]) != several):
        takes = f"{several[0]} labels a row, (B, {several[0]})" if several else "one class a row, (B,)"
        raise ValueError(f"classes have shape {tuple(classes.shape)}; this network takes {takes}")
    if (image is None) != (condition_channels == 0):
        raise ValueError(
            "an image must be given exactly when the network takes one: "
            f"condition_channels = {condition_channels}, image is {'missing' if image is None else 'given'}"
        )
    parts = {}
    for name, part in {"classes": classes, "tokens": tokens, "image": image}.items():
        if part is not None:
            parts[name] = part, _null_rows(name, part, null.get(name), drop)
    return parts


def encoded(y: Tensor | Condition | None, text: Callable[[Tensor], Tensor]) -> Tensor | Condition | None:
    """Return a condition with its token ids (B, L) encoded by `text`; all else is unchanged."""
    if y is None or isinstance(y, Tensor) or y.tokens is None or y.tokens.is_floating_point():
        return y
    return replace(y, tokens=text(y.tokens))  # type: ignore[type-var]  # a dataclass, of which nothing else is known


def _check_tokens(tokens: Tensor | None, token_channels: int) -> None:
    """Raise ValueError unless the tokens are those that a network takes."""
    if tokens is None:
        if token_channels:
            raise ValueError(
                "tokens must be given exactly when the network takes them: "
                f"token_channels = {token_channels}, tokens are missing"
            )
        return
    tokens_are, takes = f"tokens of shape {tuple(tokens.shape)}", f"embeddings (B, L, {token_channels})"
    if not token_channels:
        raise ValueError(f"{tokens_are} are given, but this network takes none")
    if not tokens.is_floating_point():
        raise ValueError(
            f"{tokens_are} and type {tokens.dtype} are ids, but this network has no text encoder; it takes {takes}: "
            "give what an encoder makes of them"
        )
    if tokens.ndim != 3 or tokens.shape[2] != token_channels or not tokens.shape[1]:
        raise ValueError(f"{tokens_are} are given; this network takes {takes} with L >= 1")


def _null_rows(name: str, part: Tensor, null: Tensor | None, drop: float) -> Tensor | None:
    """Return a part's null rows; ValueError if the network has no learned null, or they are not bool (B,)."""
    if null is None:
        return None
    if not drop:
        raise ValueError(NO_NULL)
    labels = name == "classes" and part.ndim == 2
    if labels and null.shape == part.shape[:1]:
        null = null[:, None].expand_as(part)
    if null.shape != part.shape[: 1 + labels] or null.dtype != torch.bool:
        raise ValueError(
            f"null rows of {name} are {null.dtype} of shape {tuple(null.shape)}; allowed: torch.bool of shape "
            f"{tuple(part.shape[: 1 + labels])}"
        )
    return null


def augment_of(y: Tensor | Condition | None, augment_dim: int) -> Tensor | None:
    """Return the augmentation parameters (B, augment_dim) of a condition; None for none.

    Raises:
        ValueError: another number of parameters than the network takes.
    """
    augment = None if y is None or isinstance(y, Tensor) else y.augment
    if augment is not None and (augment.ndim != 2 or augment.shape[1] != augment_dim):
        raise ValueError(
            f"the parameters of an augmentation have shape {tuple(augment.shape)}; this network takes "
            + (f"(B, {augment_dim})" if augment_dim else "none: augment_dim = 0")
        )
    return augment


def image_like(x_t: Tensor, channels: int, image: Tensor, null: Tensor | None, null_image: Tensor | None) -> Tensor:
    """Return the image of a condition as concatenated to x_t: of its type, null rows replaced.

    Args:
        x_t: (B, C, H, W).
        channels: C', of the image that the network takes.
        image: (B, C', H, W).
        null: true for the rows without an image, (B,); None for none.
        null_image: the constant of each channel that replaces them, (C',).
    Returns:
        (B, C', H, W).
    Raises:
        ValueError: an image of another shape.
    """
    taken = (len(x_t), channels, *x_t.shape[2:])
    if tuple(image.shape) != taken:
        raise ValueError(f"the condition's image has shape {tuple(image.shape)}; this network takes {taken}")
    image = image.to(x_t.dtype)
    if null is None:
        return image
    assert null_image is not None  # as there are null rows
    return torch.where(null[:, None, None, None], null_image[:, None, None].to(x_t.dtype), image)


def tokens_like(
    x_t: Tensor, tokens: Tensor, null: Tensor | None, null_tokens: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the tokens of a condition as a network attends to them, and their mask.

    Args:
        x_t: (B, C, H, W).
        tokens: embeddings (B, L, D).
        null: true for the rows without tokens, (B,); None for none.
        null_tokens: the vector at each of their positions, (D,).
        mask: true for tokens to attend to, bool (B, L); None for all. Rows without any attend to all.
    Returns:
        (B, L, D) of x_t's type, and the mask (B, L), or None.
    Raises:
        ValueError: another number of rows than x_t has; a mask of another shape or type.
    """
    if len(tokens) != len(x_t):
        raise ValueError(f"tokens have {len(tokens)} rows, but x_t has {len(x_t)}")
    if mask is not None:
        if mask.shape != tokens.shape[:2] or mask.dtype != torch.bool:
            raise ValueError(
                f"the mask of tokens is {mask.dtype} of shape {tuple(mask.shape)}; allowed: torch.bool of shape "
                f"{tuple(tokens.shape[:2])}"
            )
        mask = mask | ~mask.any(dim=1, keepdim=True)
    tokens = tokens.to(x_t.dtype)
    if null is None:
        return tokens, mask
    assert null_tokens is not None  # as there are null rows
    return torch.where(null[:, None, None], null_tokens.to(x_t.dtype), tokens), mask  # of equal tokens any will do
