"""Adapters of trained networks: low-rank changes of layers (LoRA), and learned words (textual inversion).

The network's own weights stay bit for bit; the trained ones are few, and can be added and removed again.
"""

import math
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Protocol, cast

import torch
from einops import einsum
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import check_counts

TARGETS = ("*to_q", "*to_k", "*to_v", "*to_out")  # the projections of attention, to pixels and to words
MOST_RANK, MOST_WORDS = 2**16, 2**10


class Adapted(nn.Module):
    r"""A layer with a learned low-rank change of its weight.

    .. math:: h = W_0 x + \frac{\alpha}{r} B A x \qquad \text{[LoRA (3)]}

    with A (r, C) initialised as the weights of a layer, and B (C', r) as zero, so that nothing changes at first. Of a
    convolution A is one with its kernel, stride and padding to r channels, and B one of 1x1.

    Args:
        r: the rank.
        alpha: strength of the change, independent of r.
    Source: LoRA (arXiv 2106.09685), section 4.1, where alpha / r stands below the equation.
    """

    weight: Tensor
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def add(self, r: int, alpha: float) -> None:
        """Add A and B to the layer, on its weight's device."""
        self.r, self.alpha = r, alpha
        self.lora_A = nn.Parameter(torch.empty(r, *self.weight.shape[1:]).to(self.weight))
        self.lora_B = nn.Parameter(self.weight.new_zeros(len(self.weight), r, *(1,) * (self.weight.ndim - 2)))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as nn.Linear draws its own

    def put(self, A: Tensor, B: Tensor) -> None:
        """Set the values of A and B, of any type, in the shape of a linear layer's or a convolution's."""
        with torch.no_grad():
            self.lora_A.copy_(A.reshape(self.lora_A.shape))
            self.lora_B.copy_(B.reshape(self.lora_B.shape))

    def delta(self) -> Tensor:
        """Return (alpha / r) B A, of the weight's shape."""
        change = einsum(self.lora_B.flatten(1), self.lora_A.flatten(1), "out r, r rest -> out rest")
        return (self.alpha / self.r) * change.reshape(self.weight.shape)

    def low_rank(self, x: Tensor) -> Tensor:
        """Return (alpha / r) B A x."""
        raise NotImplementedError


class AdaptedLinear(nn.Linear, Adapted):
    """A linear layer with a low-rank change, around the parameters of a plain one."""

    def __init__(self, layer: nn.Linear, r: int, alpha: float):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.add(r, alpha)

    def low_rank(self, x: Tensor) -> Tensor:
        """(*, C) -> (*, C')."""
        return (self.alpha / self.r) * F.linear(F.linear(x, self.lora_A), self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """(*, C) -> (*, C')."""
        return super().forward(x) + self.low_rank(x)


class AdaptedConv2d(nn.Conv2d, Adapted):
    """A convolution with a low-rank change, around the parameters of a plain one."""

    def __init__(self, layer: nn.Conv2d, r: int, alpha: float):
        super().__init__(**_shape_of(layer), device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.add(r, alpha)

    def low_rank(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        inner = F.conv2d(x, self.lora_A, None, self.stride, self.padding, self.dilation)
        return (self.alpha / self.r) * F.conv2d(inner, self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        return super().forward(x) + self.low_rank(x)


def _shape_of(layer: nn.Conv2d) -> dict[str, Any]:
    """Return the constructor's arguments of a convolution."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {name: getattr(layer, name) for name in names} | {"bias": layer.bias is not None}


class AddedWords(nn.Embedding):
    """An embedding with some rows as parameters of their own: the learned words.

    Args:
        table: the original embedding, whose other rows are unchanged.
        first: the index of the first of these rows, at most the number of rows: there the table grows.
        n: their number.
        like: ids of tokens whose mean vector each of them begins with, see `begin`; empty for small random ones.
    Source: Textual Inversion (arXiv 2208.01618), section 3.
    """

    def __init__(self, table: nn.Embedding, first: int, n: int, like: Sequence[int] = ()):
        super().__init__(table.num_embeddings, table.embedding_dim, device="meta")
        self.weight, self.first, self.like = table.weight, first, tuple(like)
        self.added = nn.Parameter(torch.empty(n, table.embedding_dim).to(table.weight))
        nn.init.normal_(self.added, std=0.02)

    def begin(self) -> None:
        """Initialise the words with the mean vector of the tokens in `like`."""
        if self.like:
            with torch.no_grad():
                self.added.copy_(self.weight[list(self.like)].mean(0).expand_as(self.added))

    def forward(self, ids: Tensor) -> Tensor:
        """(*) -> (*, D)."""
        last = self.first + len(self.added)
        return F.embedding(ids, torch.cat([self.weight[: self.first], self.added, self.weight[last:]]))


class HasWords(Protocol):
    """The interface of a text encoder, see `models.text.TextEncoder`."""

    vocabulary: int
    token_embedding: nn.Embedding


# --------------------------------------------------------------------------------------------------------- adding


def adapt(
    model: nn.Module,
    rank: int = 4,
    alpha: float | None = None,
    targets: Sequence[str] = TARGETS,
    without: Sequence[str] = (),
) -> nn.Module:
    """Give layers of a network a low-rank change, in place; all other parameters are frozen.

    Args:
        model: whose layers are chosen among its linear ones and convolutions; its outputs are unchanged.
        rank: r, at most the smaller width of each layer.
        alpha: see `Adapted`; None for r, so that the change is B A.
        targets: patterns of names of layers, as in `fnmatch`, such as "*to_q" or "down.*.conv_1".
        without: patterns of layers to leave out, such as "text.*".
    Returns: the network.
    Raises: ValueError for a rank or a strength out of range, a pattern without such a layer, patterns that leave
        nothing, a network that is adapted already.
    """
    alpha = rank if alpha is None else alpha
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ValueError(f"alpha = {alpha!r} must be a finite number, or null for that of rank")
    _must_be_plain(model)
    left_out = set(chosen(model, without, "without") if without else ())
    names = [name for name in chosen(model, targets) if name not in left_out]
    if not names:
        raise ValueError(f"without = {list(without)} leaves none of the layers that targets choose")
    for name in names:  # all before the first is changed
        must_take(model, name, rank)
    for name in names:
        adapt_layer(model, name, rank, alpha)
    return _frozen(model)


def with_words(model: nn.Module, first: int, words: int = 1, like: Sequence[int] | None = None) -> nn.Module:
    """Add words with learned vectors to a network's text encoder, in place; all else is frozen.

    Args:
        model: with an encoder of texts as its `text`.
        first: id of the first of these words: rows from there on are theirs, within the vocabulary or after its end.
        words: their number.
        like: ids of the tokens whose mean each of them begins with, see `begin`; none for small random vectors.
    Returns: the network.
    Raises: ValueError for a network that reads no texts, ids beyond its vocabulary, a network that is adapted already.
    """
    check_counts(MOST_WORDS, words=words)
    like = [] if like is None else like
    text = cast(HasWords | None, getattr(model, "text", None))
    if text is None:
        raise ValueError("the network reads no texts, and has no words to learn")
    _must_be_plain(model)
    known = text.vocabulary
    for name, value, most in (("first", first, known), *(("like", token, known - 1) for token in like)):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
            raise ValueError(f"{name} = {value!r} is no id of {known:,} tokens; allowed: 0 to {most}")
    text.token_embedding = AddedWords(text.token_embedding, first, words, like)
    text.vocabulary = max(known, first + words)
    return _frozen(model)


def begin(model: nn.Module) -> None:
    """Initialise what depends on the network's weights in its adapters; call it once these are loaded."""
    for module in model.modules():
        if isinstance(module, AddedWords):
            module.begin()


def chosen(model: nn.Module, targets: Sequence[str], key: str = "targets") -> list[str]:
    """Return the names of layers that match the patterns of a key; ValueError for a pattern without match."""
    there = [name for name, module in model.named_modules() if type(module) in (nn.Linear, nn.Conv2d)]
    if not targets:
        raise ValueError(f"targets = [] adapts nothing; allowed: patterns of layers, such as {', '.join(TARGETS)}")
    for pattern in targets:
        if not any(fnmatchcase(name, str(pattern)) for name in there):
            ends = sorted({f"*{name.rpartition('.')[2]}" for name in there})
            near = get_close_matches(str(pattern), ends, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{key}: no layer matches {pattern!r}; there are {', '.join(ends)}{hint}")
    return [name for name in there if any(fnmatchcase(name, str(pattern)) for pattern in targets)]


def must_take(model: nn.Module, name: str, r: int) -> None:
    """Raise ValueError where `adapt_layer` would, and change nothing."""
    check_counts(MOST_RANK, rank=r)
    layer = model.get_submodule(name)
    if type(layer) not in (nn.Linear, nn.Conv2d) or getattr(layer, "groups", 1) != 1:
        raise ValueError(
            f"{name} is a {type(layer).__name__}; only linear layers and convolutions of one group can be adapted"
        )
    weight = cast(Tensor, layer.weight)
    out, into = len(weight), weight[0].numel()
    if r > min(out, into):
        raise ValueError(f"rank = {r} is more than {name} has, {into} to {out}; allowed: 1 to {min(out, into)}")


def adapt_layer(model: nn.Module, name: str, r: int, alpha: float) -> Adapted:
    """Give one layer of a network a low-rank change, in place; returns the layer.

    Raises: ValueError for an invalid rank, or one above the layer's smaller width; layers of other kinds.
    """
    must_take(model, name, r)
    layer = model.get_submodule(name)
    made: Adapted | None = AdaptedLinear(layer, r, alpha) if isinstance(layer, nn.Linear) else None
    if isinstance(layer, nn.Conv2d):
        made = AdaptedConv2d(layer, r, alpha)
    assert made is not None  # as the layer is of one of the two kinds
    _replace(model, name, made.train(layer.training))
    return made


def _must_be_plain(model: nn.Module) -> None:
    if any(isinstance(module, Adapted | AddedWords) for module in model.modules()):
        raise ValueError("the network is adapted already; merge it first, or take the network that it was made from")


def _frozen(model: nn.Module) -> nn.Module:
    """Return the network with all parameters frozen but its adapters'."""
    own = adapters(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in own)
    return model


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


# ------------------------------------------------------------------------------------------- inspection and merging


def adapted(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """Return the layers of a network that are adapted, by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Adapted))


def adapters(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that were added to a network, by their names in it: *.lora_A, *.lora_B, *.added."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, Adapted):
            found |= {f"{name}.lora_A": module.lora_A, f"{name}.lora_B": module.lora_B}
        elif isinstance(module, AddedWords):
            found[f"{name}.added"] = module.added
    return found


def merge(model: nn.Module) -> nn.Module:
    """Make a network's adapted layers plain ones of the weight W + (alpha / r) B A, in place; returns it.

    Cost and names of weights are then those of the original network; added words stay.
    """
    for name, layer in list(adapted(model)):
        plain: nn.Linear | nn.Conv2d
        if isinstance(layer, nn.Linear):
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        else:
            assert isinstance(layer, nn.Conv2d)  # the other kind
            plain = nn.Conv2d(**_shape_of(layer), device="meta")
        with torch.no_grad():
            merged = layer.weight + layer.delta()
        plain.weight, plain.bias = nn.Parameter(merged, requires_grad=False), layer.bias
        plain.before = (layer,)  # type: ignore[assignment]  # in a tuple, so that it is no part of the network
        _replace(model, name, plain.train(layer.training))
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Undo `merge`, in place, restoring the earlier weights bit for bit; returns the network."""
    for name, plain in list(model.named_modules()):
        if (before := getattr(plain, "before", None)) is not None:
            (layer,) = before
            _replace(model, name, layer.to(plain.weight.device).train(plain.training))
    return model
