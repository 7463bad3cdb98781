"""Contrastive pretraining (CLIP): encoders of pictures and captions, trained to match the pairs of a batch."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.data.batch import Batch
from ddpm.data.dataset import Dataset
from ddpm.randomness import Keyed
from ddpm.sources.base import Silent
from ddpm.training.task import Drawn, Losses, Task, must_take


@dataclass(frozen=True, kw_only=True)
class Pairs(Drawn):
    """Pictures with their captions.

    Args:
        x: pictures, (B, C, H, W).
        ids: captions, (B, L).
    """

    x: Tensor
    ids: Tensor


def contrastive(u: Tensor, v: Tensor, s: Tensor, apart: Tensor) -> Tensor:
    r"""Return the symmetric cross-entropy of matching each picture to its text, and each text to its picture.

    .. math:: L_i = -\frac12 \log \frac{e^{s\, u_i \cdot v_i}}{\sum_j m_{ij} e^{s\, u_i \cdot v_j}}
        - \frac12 \log \frac{e^{s\, u_i \cdot v_i}}{\sum_j m_{ij} e^{s\, u_j \cdot v_i}} \qquad \text{[CLIP (loss)]}

    With m_ij = 1 for all it is that of CLIP; here it is 0 for another pair with the same text, which is not wrong.

    Args:
        u, v: embeddings of B pictures and of their texts, each (B, d), of length 1.
        s: the factor of the products, ().
        apart: whether texts i and j are different ones, (B, B) bool; the diagonal is ignored.
    Returns: L, (B,).
    Source: CLIP (arXiv 2103.00020), section 2.3 and figure 3.
    """
    m = apart | torch.eye(len(u), dtype=torch.bool, device=u.device)
    exact = contextlib.nullcontext() if u.is_meta else torch.autocast(u.device.type, enabled=False)
    with exact:  # s is up to 100, and bfloat16 would round such products by 0.25
        logits = (s * u @ v.mT).masked_fill(~m, -torch.inf)
    own = torch.arange(len(u), device=u.device)
    of_pictures, of_texts = (F.cross_entropy(z, own, reduction="none") for z in (logits, logits.mT))
    return (of_pictures + of_texts) / 2


class Contrastive(Task):
    """Train two encoders to match the pictures and captions of a batch.

    Args:
        model: (x, ids) -> (u, v), with `scale` and a text encoder `text`, such as `models.dual_encoder.DualEncoder`.
        only: as in `Task`.
    Source: CLIP (arXiv 2103.00020).
    """

    couples_batch = True
    instead = "metric=retrieval of ddpm-evaluate measures it, and init_text=RUN of ddpm-train takes its text encoder"

    def __init__(self, model: nn.Module, only: Sequence[str] | None = None):
        super().__init__({"model": model}, only=only)

    @property
    def model(self) -> Any:
        return self.modules["model"]

    def draw(self, batch: Batch, random: Keyed, progress: float) -> Pairs:
        """Return the pairs of a step's whole batch; nothing is random."""
        assert batch.condition.tokens is not None  # see `check`
        return Pairs(x=batch.x, ids=batch.condition.tokens)

    def losses(self, drawn: Pairs, progress: float) -> Losses:  # type: ignore[override]  # its own draws
        """Return one part, "loss", (B,)."""
        u, v = self.model(drawn.x, drawn.ids)
        apart = (drawn.ids[:, None] != drawn.ids[None]).any(-1)
        return {"loss": contrastive(u, v, self.model.scale, apart)}

    def check(self, data: Dataset) -> None:
        """Raise ValueError for data without captions, or that the networks do not take."""
        if data.tokens is None:
            raise ValueError(
                f"task=contrastive reads captions, and {data.name} has none as tokens; set tokenizer=byte_pairs"
            )
        if data.tokenizer.end != data.tokenizer.vocabulary - 1:
            raise ValueError(
                f"the tokenizer ends a text with {data.tokenizer.end}, which is not the highest of its ids, "
                f"{data.tokenizer.vocabulary - 1}; take tokenizer=byte_pairs"
            )
        must_take(self.model, data)

    def source(
        self,
        data: Dataset | None,
        seed: int,
        device: torch.device,
        precision: str = "fp32",
        requested: Sequence[int] | None = None,
    ) -> Silent:
        """Return the source for measurements; it draws no samples."""
        return Silent(self.model, self.model.shape, seed, device, precision, requested, measures=("retrieval",))
