"""A residual network of linear layers, for points and other vectors."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.embeddings import ClassEmbedding, Condition, FourierEmbedding, TimeEmbedding, parts_of
from models.layers import one_of, zeroed

MOST, MOST_BLOCKS = 2**20, 100  # of any count: beyond it are slips, which would take all memory or no end of time
MOST_OCTAVES = 16  # then float32 holds no more of the phase
LEAST_WIDTH = 4  # of a sinusoidal embedding that has more than one frequency
TIMES = ("sinusoidal", "fourier", "none")


class ResidualLinear(nn.Module):
    """Linear - SiLU - linear, with an embedding added after the first; the input is added at the end.

    Args:
        width: of input and output, and of the embedding.
        dropout: before the second linear layer.
        conditioned: whether there is an embedding to be added.
    """

    def __init__(self, width: int, dropout: float, conditioned: bool = True):
        super().__init__()
        self.linear_1 = nn.Linear(width, width)
        self.embedding = nn.Linear(width, width) if conditioned else None
        self.dropout = nn.Dropout(dropout)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, h: Tensor, emb: Tensor | None) -> Tensor:
        """h (B, W), emb (B, W), after SiLU, or None without conditioning -> (B, W)."""
        inner = self.linear_1(h)
        if self.embedding is not None:
            inner = inner + self.embedding(emb)
        return h + self.linear_2(self.dropout(F.silu(inner)))


def with_octaves(x: Tensor, L: int) -> Tensor:
    r"""Return coordinates with their sines and cosines at L wavelengths, each half of the one before.

    .. math:: \gamma(x) = \left(x, \sin(2^0 \omega x), \cos(2^0 \omega x), \ldots, \sin(2^{L-1} \omega x),
        \cos(2^{L-1} \omega x)\right), \quad \omega = \frac{\pi}{4} \qquad \text{[NeRF (4)]}

    The longest wavelength, 8, is that of standardised data from end to end. (The paper has omega = pi, for x in -1..1,
    and not x itself.)

    Args:
        x: (B, F).
        L: octaves, 0 for x alone.
    Returns:
        (B, F (1 + 2 L)).
    Source: NeRF (arXiv 2003.08934), section 5.1.
    """
    waves = [2**k * math.pi / 4 * x for k in range(L)]
    return torch.cat([x, *(f(wave) for wave in waves for f in (torch.sin, torch.cos))], dim=1) if L else x


class MLP(nn.Module):
    r"""A residual MLP, each of whose blocks is conditioned on the time, and on the class if there are classes.

    The output is f(x_t, t), of any form, or with `energy` the gradient of a scalar, with the same parameters:

    .. math:: E(x_t, t) = -x_t^T f(x_t, t), \quad
        -\nabla_{x_t} E = f + \left(\frac{\partial f}{\partial x_t}\right)^T x_t

    A score is a gradient, -E then being log q(x_t) but for a constant; so are the eps, x_0 and v that a perfect network
    predicts, which are a x_t + b score with a and b of t alone: E is theirs, scaled as they are. No scale is put on it
    besides. A field of any form can rotate, this one cannot.

    Args:
        features: numbers F of one sample x_t, such as 2 for points in the plane.
        width: W, of all layers and of the time embedding.
        depth: residual blocks.
        num_classes: classes that may be given as y; None for an unconditional network.
        dropout: inside residual blocks, in [0, 1).
        out_features: numbers of the output; None for `features`. A learned variance takes 2 * features, which no energy
            gives.
        drop: share of conditions that training nulls, in [0, 1). More than 0 gives a network with classes a learned
            null: a vector in place of the class.
        time: the embedding of t: "sinusoidal", see `SinusoidalEmbedding`; "fourier", with random frequencies, see
            `FourierEmbedding`; "none", for a field at one level of noise: t is taken, and has no effect.
        fourier_scale: standard deviation of those frequencies, in turns for each unit of t, > 0. The 0.016 of Song et
            al. is for t in 0..1000.
        energy: whether the output is the gradient.
        octaves: number L of frequencies of sines and cosines that are added as features of each coordinate, see
            `with_octaves`; 0 for none. Linear layers alone learn fine structure late.
    Attributes:
        shape: (features,), of one x_t.
        out_channels: numbers of the output.
        takes: the parts of a condition that the network takes: "classes" or none.
    Raises:
        ValueError: a count or a share out of range, another time, an energy with out_features.
    Source: energies of diffusion, Salimans and Ho, Should EBMs model the energy or the score? (2021), and Du et al.
        (arXiv 2302.11552), section 3.
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
        time: str = "sinusoidal",
        fourier_scale: float = 0.016,
        energy: bool = False,
        octaves: int = 0,
    ):
        super().__init__()
        out_features = features if out_features is None else out_features
        _check(features, width, depth, num_classes, dropout, out_features, drop)
        one_of("time", time, TIMES)
        if not 0 < fourier_scale < math.inf:
            raise ValueError(f"fourier_scale = {fourier_scale:g} must be a number > 0")
        if isinstance(octaves, bool) or not isinstance(octaves, int) or not 0 <= octaves <= MOST_OCTAVES:
            raise ValueError(f"octaves = {octaves!r} must be an integer in 0..{MOST_OCTAVES}")
        if energy and out_features != features:
            raise ValueError(
                f"out_features = {out_features}: the gradient of an energy has as many numbers as x_t, {features}; set "
                "energy=false, or out_features=null"
            )
        self.shape, self.out_channels = (features,), out_features
        self.num_classes, self.drop, self.is_gradient = num_classes, drop, energy
        self.takes: tuple[str, ...] = () if num_classes is None else ("classes",)

        fourier = FourierEmbedding(width, fourier_scale) if time == "fourier" else None
        self.time_embedding = TimeEmbedding(width, width, embedding=fourier) if time != "none" else None
        self.class_embedding = ClassEmbedding(num_classes, width, drop > 0) if num_classes is not None else None
        self.octaves = octaves
        self.linear_in = nn.Linear(features * (1 + 2 * octaves), width)
        conditioned = self.time_embedding is not None or self.class_embedding is not None
        self.residual = nn.ModuleList(ResidualLinear(width, dropout, conditioned) for _ in range(depth))
        self.linear_out = zeroed(nn.Linear(width, out_features))

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | Condition | None = None) -> Tensor:
        """Return the network's output at time t; zero before training.

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
            RuntimeError: an energy in inference mode.
        """
        if not self.is_gradient:
            return self._f(x_t, t, y)
        if torch.is_inference_mode_enabled():  # where some versions of torch.func answer 0
            raise RuntimeError("an energy is differentiated: take torch.no_grad() in place of torch.inference_mode()")
        gradient: Tensor = torch.func.grad(lambda x: -self.energy(x, t, y).sum())(x_t)  # rows depend on no others
        return gradient

    def energy(self, x_t: Tensor, t: Tensor, y: Tensor | Condition | None = None) -> Tensor:
        """Return E(x_t, t), (B,), of which the output is the negative gradient.

        Args: as of `forward`.

        Raises: ValueError for a network without energy, and as `forward`.
        """
        if not self.is_gradient:
            raise ValueError("this network has no energy: it was made with energy = False")
        return -(x_t * self._f(x_t, t, y)).sum(1)

    def _f(self, x_t: Tensor, t: Tensor, y: Tensor | Condition | None) -> Tensor:
        """Return the output of the network itself, (B, out_features)."""
        if tuple(x_t.shape[1:]) != self.shape:
            raise ValueError(f"x_t has shape {tuple(x_t.shape)}; this network takes (B, {self.shape[0]})")
        emb = self._embedding(t, y)
        h = self.linear_in(with_octaves(x_t, self.octaves))
        for residual in self.residual:
            h = residual(h, emb)
        out: Tensor = self.linear_out(F.silu(h))
        return out

    def _embedding(self, t: Tensor, y: Tensor | Condition | None) -> Tensor | None:
        """Return the embedding (B, W) that conditions every block; None for none."""
        parts = parts_of(y, self.num_classes, drop=self.drop)
        embeddings = [] if self.time_embedding is None else [self.time_embedding(t)]
        if self.class_embedding is not None:
            embeddings.append(self.class_embedding(*parts["classes"]))
        return F.silu(sum(embeddings[1:], embeddings[0])) if embeddings else None


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
