"""A residual network of linear layers, for points and other vectors: what the U-Net is for images."""

from torch import Tensor, nn
from torch.nn import functional as F

from models.embeddings import ClassEmbedding, Condition, TimeEmbedding, parts_of
from models.layers import zeroed

MOST, MOST_BLOCKS = 2**20, 100  # of any count: beyond it are slips, which would take all memory or no end of time
LEAST_WIDTH = 4  # of a sinusoidal embedding that has more than one frequency


class ResidualLinear(nn.Module):
    """Linear - SiLU - linear, the embedded time added after the first; the input added at the end.

    Args:
        width: of input and output, and of the embedding.
        dropout: before the second linear layer.
    """

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.linear_1 = nn.Linear(width, width)
        self.embedding = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        """h (B, W), emb (B, W), which SiLU was applied to -> (B, W)."""
        return h + self.linear_2(self.dropout(F.silu(self.linear_1(h) + self.embedding(emb))))


class MLP(nn.Module):
    """Residual blocks of linear layers, each of which is told the time, and the class if there are classes.

    Args:
        features: numbers F of one sample x_t, such as 2 for points in the plane.
        width: W, of all layers and of the time embedding.
        depth: residual blocks.
        num_classes: classes that may be given as y; None for an unconditional network.
        dropout: inside residual blocks, in [0, 1).
        out_features: numbers of the output; None for `features`. A learned variance takes 2 * features.
        drop: share of conditions that training nulls, in [0, 1). More than 0 gives a network with classes a learned
            null: a vector in place of the class.
    Attributes:
        shape: (features,), of one x_t.
        out_channels: numbers of the output.
        takes: the parts of a condition that the network takes: "classes" or none.
    Raises:
        ValueError: a count or a share out of range.
    """

    def __init__(
        self,
        features: int = 2,
        width: int = 128,
        depth: int = 3,
        num_classes: int | None = None,
        dropout: float = 0.0,
        out_features: int | None = None,
        drop: float = 0.0,
    ):
        super().__init__()
        out_features = features if out_features is None else out_features
        _check(features, width, depth, num_classes, dropout, out_features, drop)
        self.shape, self.out_channels = (features,), out_features
        self.num_classes, self.drop = num_classes, drop
        self.takes: tuple[str, ...] = () if num_classes is None else ("classes",)

        self.time_embedding = TimeEmbedding(width, width)
        self.class_embedding = ClassEmbedding(num_classes, width, drop > 0) if num_classes is not None else None
        self.linear_in = nn.Linear(features, width)
        self.residual = nn.ModuleList(ResidualLinear(width, dropout) for _ in range(depth))
        self.linear_out = zeroed(nn.Linear(width, out_features))

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | Condition | None = None) -> Tensor:
        """The network's output at time t; zero before training.

        Args:
            x_t: (B, features).
            t: (B,), integer or real, in 0..T.
            y: classes, integers (B,), or a condition with classes alone, if the network has classes. Rows that are null
                have the learned null instead; with `drop` = 0 there is none.
        Returns:
            (B, out_features).
        Raises:
            ValueError: x_t of another shape than the network's, a part of a condition given to one that does not take
                it (or the reverse), null rows given to one without a learned null.
        """
        if tuple(x_t.shape[1:]) != self.shape:
            raise ValueError(f"x_t has shape {tuple(x_t.shape)}; this network takes (B, {self.shape[0]})")
        parts = parts_of(y, self.num_classes, drop=self.drop)
        emb = self.time_embedding(t)
        if self.class_embedding is not None:
            emb = emb + self.class_embedding(*parts["classes"])
        emb = F.silu(emb)
        h = self.linear_in(x_t)
        for residual in self.residual:
            h = residual(h, emb)
        return self.linear_out(F.silu(h))


def _check(
    features: int,
    width: int,
    depth: int,
    num_classes: int | None,
    dropout: float,
    out_features: int,
    drop: float,
) -> None:
    """Raise ValueError for arguments of the network that are out of range."""
    counts = {"features": features, "width": width, "depth": depth, "out_features": out_features}
    counts |= {} if num_classes is None else {"num_classes": num_classes}
    for name, value in counts.items():
        least, most = LEAST_WIDTH if name == "width" else 1, MOST_BLOCKS if name == "depth" else MOST
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"{name} = {value!r} must be an integer >= {least}, and at most {most:,}")
    for name, share in {"dropout": dropout, "drop": drop}.items():
        if not 0 <= share < 1:
            raise ValueError(f"{name} = {share:g} must lie in [0, 1)")
