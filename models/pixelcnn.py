"""The gated PixelCNN of van den Oord et al. (arXiv 1606.05328): an autoregressive distribution over grids of codes."""

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from models.embeddings import ClassEmbedding, Condition, parts_of
from models.layers import check_counts, one_of

FIRST, REST = 7, 3  # sides of the kernels of the first layer and of the others, before they are masked
MOST, MOST_LAYERS = 2**20, 100  # of any count: beyond it are slips, which would take all memory or no end of time


def gated(a: Tensor) -> Tensor:
    r"""Return the gated activation: half of the channels through tanh, times the sigmoid of the other half.

    .. math:: y = \tanh(W_f * x) \odot \sigma(W_g * x) \qquad \text{[PixelCNN (2)]}

    Args:
        a: both convolutions, (B, 2C, H, W): those with W_f, then those with W_g.
    Returns:
        (B, C, H, W).
    """
    f, g = a.chunk(2, dim=1)
    return f.tanh() * g.sigmoid()


def inverse_cdf(p: Tensor, u: Tensor) -> Tensor:
    r"""Return draws from a distribution over 0..K-1 by uniform numbers.

    .. math:: k = \min \{ j : F_j > u\, F_{K-1} \}, \quad F_j = p_0 + \ldots + p_j

    Args:
        p: (B, K), not negative, in any scale. Codes with p = 0 are never drawn.
        u: (B,), in [0, 1).
    Returns:
        (B,), integers.
    """
    cdf = p.double().cumsum(1)
    return torch.searchsorted(cdf, u.double()[:, None] * cdf[:, -1:], right=True).squeeze(1)


class GatedLayer(nn.Module):
    r"""A gated layer of two stacks: the vertical one sees all rows above, the horizontal one the row's left part too.

    .. math:: y = \tanh(W_f * x + V_f^T h) \odot \sigma(W_g * x + V_g^T h) \qquad \text{[PixelCNN (4)]}

    with h the class, one-hot, in each stack. The vertical stack's convolution output enters the gates of the
    horizontal one by a 1x1 convolution. Neither sees a code that comes later, and together they see all
    that come before: a single masked stack misses some above on the right, its blind spot.

    A mask takes a part of the kernel away, and that part does not exist here: of `kernel` rows (or columns) those that
    come before are left and, with mask "B", the middle one. Both convolutions take their input with `kernel // 2` rows
    of zeros above, and columns of zeros at both sides; from there on row r (column c) sees the rows r..r+n-1.

    Args:
        channels: C, of both stacks.
        kernel: side of the kernels, odd.
        mask: "A" does not see its own place, for the first layer, where it is the code to predict; "B" does.
        num_classes: of the condition; None for none.
    Attributes:
        n: rows, or columns, that are left of a kernel.
        edge: rows or columns of zeros around.
    Source: figure 2 and section 2.2 of the paper.
    """

    def __init__(self, channels: int, kernel: int, mask: str, num_classes: int | None):
        super().__init__()
        one_of("mask", mask, ("A", "B"))
        self.edge, self.n = kernel // 2, kernel // 2 + (mask == "B")
        self.vertical = nn.Conv2d(channels, 2 * channels, (self.n, kernel))
        self.to_horizontal = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.horizontal = nn.Conv2d(channels, 2 * channels, (1, self.n))
        self.out = nn.Conv2d(channels, channels, 1)
        self.of_class = ClassEmbedding(num_classes, 4 * channels) if num_classes is not None else None
        self.residual = mask == "B"  # not around the first layer, which would show the code itself

    def class_bias(self, y: Tensor | None) -> tuple[Tensor | float, Tensor | float]:
        """Return V^T h of both stacks, each (B, 2C, 1, 1), for classes (B,); 0 where there are none."""
        if self.of_class is None:
            return 0.0, 0.0
        v, h = self.of_class(y)[:, :, None, None].chunk(2, dim=1)
        return v, h

    def above(self, v: Tensor, bias: Tensor | float) -> tuple[Tensor, Tensor]:
        """Run the vertical stack on (B, C, rows + n - 1, W + 2 edge): (B, C, rows, W), and its input to the other."""
        a = self.vertical(v) + bias
        return gated(a), self.to_horizontal(a)

    def left(self, h: Tensor, from_above: Tensor, bias: Tensor | float) -> Tensor:
        """Run the horizontal stack on (B, C, rows, columns + n - 1), from_above (B, 2C, rows, columns).

        Returns: (B, C, rows, columns).
        """
        y: Tensor = self.out(gated(self.horizontal(h) + from_above + bias))
        return y + h[..., self.n - 1 :] if self.residual else y

    def forward(self, v: Tensor, h: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run both stacks over the whole map: v, h (B, C, H, W), y classes (B,) -> the same shapes."""
        (bias_v, bias_h), last = (
            self.class_bias(y),
            self.n - 1 - self.edge,
        )  # with mask A, none sees the last row or column
        v, from_above = self.above(F.pad(v, (self.edge, self.edge, self.edge, last)), bias_v)
        return v, self.left(F.pad(h, (self.edge, last)), from_above, bias_h)


class PixelCNN(nn.Module):
    r"""An autoregressive distribution of codes: of each code of a grid, given those before it, row by row.

    .. math:: p(z \mid y) = \prod_{i=1}^{HW} p(z_i \mid z_1, \ldots, z_{i-1}, y) \qquad \text{[PixelCNN (3)]}

    A code sees `layers` + 2 rows up, and as many columns to each side: 7 layers see all of a grid of up to 10 x 10.

    Args:
        codes: K, number of codes.
        size: of the grid, one number or (H, W).
        channels: C, width of both stacks and length of the vectors that codes become.
        layers: gated layers; the first has kernels of side 7 and mask A, the others 3 and mask B.
        num_classes: classes that may be given as y; None for none.
    Attributes:
        shape: (H, W), of one z.
        takes: the parts of a condition that the network takes: "classes" or none.
    Raises:
        ValueError: a count out of range, an invalid size.
    Source: Conditional Image Generation with PixelCNN Decoders (arXiv 1606.05328); as the prior of a VQ-VAE (arXiv
        1711.00937), section 3.3.
    """

    def __init__(
        self,
        codes: int,
        size: int | Sequence[int],
        channels: int = 64,
        layers: int = 7,
        num_classes: int | None = None,
    ):
        super().__init__()
        shape = (size, size) if isinstance(size, int) else tuple(size)
        if len(shape) != 2:
            raise ValueError(f"size = {shape} must be one integer >= 1, or two (H, W)")
        counts = {"codes": codes, "size[0]": shape[0], "size[1]": shape[1], "channels": channels}
        check_counts(MOST, **counts, **({} if num_classes is None else {"num_classes": num_classes}))
        check_counts(MOST_LAYERS, layers=layers)
        self.shape, self.codes, self.num_classes = shape, codes, num_classes
        self.takes: tuple[str, ...] = () if num_classes is None else ("classes",)

        self.embedding = nn.Embedding(codes, channels)
        kernels = [(FIRST, "A")] + [(REST, "B")] * (layers - 1)
        self.layers = nn.ModuleList(GatedLayer(channels, *kernel, num_classes) for kernel in kernels)
        self.head = nn.Sequential(nn.ReLU(), nn.Conv2d(channels, channels, 1), nn.ReLU(), nn.Conv2d(channels, codes, 1))

    def forward(self, z: Tensor, y: Tensor | Condition | None = None) -> Tensor:
        """Return logits of the code at each place, which depend on the codes before it alone.

        Args:
            z: codes (B, H, W), integers in 0..K-1; `check` validates them.
            y: classes, integers (B,), or a condition with classes alone, if the network has classes.
        Returns:
            (B, K, H, W).
        Raises:
            ValueError: z of another shape, or not of integers; y given to a network without classes, or the reverse, or
                for another number of grids.
        """
        if tuple(z.shape[1:]) != self.shape or z.is_floating_point() or z.dtype == torch.bool:
            height, width = self.shape
            raise ValueError(
                f"z is {z.dtype} of shape {tuple(z.shape)}; this network takes integers (B, {height}, {width})"
            )
        return self.logits(rearrange(self.embedding(z.long()), "b h w c -> b c h w"), y)

    def logits(self, x: Tensor, y: Tensor | Condition | None = None) -> Tensor:
        """Return `forward` of embedded codes: x (B, C, H, W) -> (B, K, H, W)."""
        classes = self._classes(y, len(x))
        v = h = x
        for layer in self.layers:
            v, h = layer(v, h, classes)
        return self.head(h)

    def log_prob(self, z: Tensor, y: Tensor | Condition | None = None) -> Tensor:
        r"""Return the logarithm of p(z | y), in nats.

        .. math:: \log p(z) = \sum_{i=1}^{HW} \log p(z_i \mid z_1, \ldots, z_{i-1}) \qquad \text{[PixelCNN (1)]}

        Args and errors: as of `forward`.

        Returns: (B,).
        """
        return -F.cross_entropy(self(z, y), z.long(), reduction="none").sum((1, 2))

    def check(self, z: Tensor, y: Tensor | None = None) -> None:
        """Raise ValueError for codes z (any shape) or classes y (B,) that are out of range.

        It reads their values, and so waits for a GPU: for data as they come, not for each step.
        """
        for name, values, count in (("codes", z, self.codes), ("classes", y, self.num_classes)):
            if values is not None and count is not None and values.numel():
                low, high = (int(end) for end in values.aminmax())
                if low < 0 or high >= count:
                    raise ValueError(f"{name} are {low}..{high}; this network takes 0..{count - 1}")

    @torch.no_grad()
    def sample(self, u: Tensor, y: Tensor | Condition | None = None, temperature: float = 1.0) -> Tensor:
        r"""Sample grids code by code, each by the inverse distribution function at its u.

        .. math:: p_k \propto \exp(\text{logit}_k / \text{temperature})

        It computes what no earlier code has: the vertical stack once a row, the horizontal one once a place. In total
        that is one pass over the map, instead of one for each code.

        Args:
            u: uniform numbers in [0, 1), (B, H, W); all chance is in them.
            y: as of `forward`.
            temperature: 1 for the network's own distribution, less for more likely codes; 0 takes the likeliest.
        Returns:
            z (B, H, W), integers in 0..K-1.
        Raises:
            ValueError: u of another shape or not in [0, 1), a temperature below 0, and as `forward`.
        """
        height, width = self.shape
        if tuple(u.shape[1:]) != self.shape:
            raise ValueError(f"u has shape {tuple(u.shape)}; this network takes (B, {height}, {width})")
        if not ((u >= 0) & (u < 1)).all():
            raise ValueError("u must lie in [0, 1)")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature = {temperature:g} must be a number >= 0; 0 takes the likeliest code")
        layers = [layer for layer in self.layers if isinstance(layer, GatedLayer)]
        classes = self._classes(y, len(u))
        biases = [layer.class_bias(classes) for layer in layers]

        def seen(rows: int, columns: int) -> Tensor:
            return self.embedding.weight.new_zeros(len(u), self.embedding.embedding_dim, rows, columns)

        # The input of each layer: of the whole map, for its vertical stack, and of the row, for its horizontal one.
        maps = [seen(layer.edge + height, width + 2 * layer.edge) for layer in layers]
        rows = [seen(1, layer.edge + width) for layer in layers]
        z = torch.zeros(u.shape, dtype=torch.long, device=u.device)
        for r in range(height):
            from_above = []
            for i, layer in enumerate(layers):
                v, found = layer.above(maps[i][:, :, r : r + layer.n], biases[i][0])
                from_above.append(found)
                if i + 1 < len(layers):
                    edge = layers[i + 1].edge
                    maps[i + 1][:, :, edge + r, edge : edge + width] = v[:, :, 0]
            for c in range(width):
                for i, layer in enumerate(layers):
                    h = layer.left(rows[i][..., c : c + layer.n], from_above[i][..., c : c + 1], biases[i][1])
                    if i + 1 < len(layers):
                        rows[i + 1][..., layers[i + 1].edge + c] = h[..., 0]
                z[:, r, c] = self.drawn(self.head(h)[:, :, 0, 0], u[:, r, c], temperature)
                x = self.embedding(z[:, r, c])
                rows[0][:, :, 0, layers[0].edge + c] = x
                maps[0][:, :, layers[0].edge + r, layers[0].edge + c] = x
        return z

    @staticmethod
    def drawn(logits: Tensor, u: Tensor, temperature: float) -> Tensor:
        """Return the codes (B,) that uniform numbers (B,) select by logits (B, K), see `sample`."""
        if temperature == 0:
            return logits.argmax(1)
        below = logits.double() - logits.double().amax(1, keepdim=True)  # so that the least temperature divides 0
        return inverse_cdf((below / temperature).exp(), u)

    def _classes(self, y: Tensor | Condition | None, n: int) -> Tensor | None:
        """Return the classes (n,) of a condition; None for a network that takes none."""
        parts = parts_of(y, self.num_classes)
        if not parts:
            return None
        classes, _ = parts["classes"]
        if len(classes) != n:  # one class would be spread over all rows
            raise ValueError(f"{len(classes)} classes are given for {n} grids")
        return classes
