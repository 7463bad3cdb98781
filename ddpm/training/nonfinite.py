"""Guard against non-finite numbers: steps are skipped and counted; too many in a row end the run with an autopsy."""

import json
import math
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from ddpm.runs import checkpoint
from ddpm.runs.files import replacing

SMALLEST_SCALE = 1.0  # of fp16's loss: below it gradients overflow even unscaled


class Seen(NamedTuple):
    """The inputs of a step, recorded for an autopsy as tensors on their device, without synchronisation."""

    step: int
    facts: dict[str, Tensor]  # of each row of the batch, such as its t: (B,)
    losses: Tensor  # (B,)


class NonFiniteGuard:
    """Take the optimizer's steps, skipping and counting those whose loss or gradient is not finite.

    If the optimizer can skip a step by itself (the fused ones) there is no synchronisation with the device until a
    count is read. The EMA goes over all steps: a skipped one leaves the weights as they were.

    Args:
        limit: the most steps skipped in a row; one more ends the run. With fp16 an overflowing gradient is part of
            the search for a loss scale and is not one of the row, until the scale has collapsed below 1.
        device: where the losses are.
    """

    def __init__(self, limit: int, device: torch.device):
        self.limit = limit
        self.counts = torch.zeros(3, dtype=torch.long, device=device)  # skipped, in a row now, longest row
        self.recent: deque[tuple[Seen, Tensor, Tensor]] = deque(maxlen=2 * limit + 1)  # checked every limit + 1 steps

    def step(
        self,
        seen: Seen,
        loss: Tensor,
        grad_norm: Tensor,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler,
    ) -> None:
        """Take the optimizer's step, with gradients already unscaled, unless loss or gradient is not finite."""
        finite = loss.isfinite() & grad_norm.isfinite()
        if scaler.is_enabled():
            scaler.step(optimizer)
            scaler.update()
        elif getattr(optimizer, "_step_supports_amp_scaling", False):  # as the scaler asks
            setattr(optimizer, "found_inf", (~finite).float())  # noqa: B010  # torch declares no such attribute
            optimizer.step()
        elif finite:
            optimizer.step()
        broken = ~(loss.isfinite() if scaler.is_enabled() else finite)
        skipped, row, longest = self.counts.unbind()
        row = torch.where(broken, row + 1, 0)
        self.counts = torch.stack([skipped + ~finite, row, torch.maximum(row, longest)])
        self.recent.append((seen, loss, grad_norm))

    @property
    def skipped(self) -> int:
        """The number of steps skipped so far."""
        return int(self.counts[0])

    def must_be_sound(self, scaler: torch.amp.GradScaler, last: bool = False) -> None:
        """Raise FloatingPointError if too many steps were skipped in a row, or fp16's loss scale has collapsed.

        Args:
            last: whether no step will follow; then also if every one of them was skipped.
        """
        longest = int(self.counts[2])
        self.counts[2] = self.counts[1]
        seen, loss, grad_norm = self.recent[-1]
        if longest > self.limit:
            raise FloatingPointError(
                f"loss or gradient not finite in {longest} steps in a row, up to step {seen.step} (loss "
                f"{loss.item():g}, gradient norm {grad_norm.item():g}; trainer.max_skipped = {self.limit})"
            )
        if last and self.skipped >= seen.step:
            raise FloatingPointError(
                f"nothing was learned: loss or gradient not finite in each of the {seen.step} steps (at last: loss "
                f"{loss.item():g}, gradient norm {grad_norm.item():g})"
            )
        if scaler.is_enabled() and scaler.get_scale() < SMALLEST_SCALE:
            raise FloatingPointError(
                f"the loss scale of fp16 has collapsed to {scaler.get_scale():g} at step {seen.step}: gradients "
                "overflow at every scale; use trainer.precision=bf16 or fp32, or a smaller optimizer.lr"
            )

    def report(self) -> list[dict[str, Any]]:
        """Return the last steps as plain data: step, loss, gradient norm, and per row loss and facts, such as t."""
        return [
            {
                "step": seen.step,
                "loss": loss.item(),
                "grad_norm": grad_norm.item(),
                **{name: fact.tolist() for name, fact in seen.facts.items()},
                "losses": seen.losses.tolist(),
            }
            for seen, loss, grad_norm in self.recent
        ]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state that a resumed run needs."""
        return {"counts": self.counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore `state_dict`; an empty one, of a version without a guard, leaves all at 0."""
        if "counts" in state:
            self.counts.copy_(state["counts"])


def write_autopsy(folder: Path, reason: str, seed: int, steps: list[dict[str, Any]], last: Path | None) -> None:
    """Write folder/report.json, a line a step, and keep the last whole checkpoint next to it, safe from deletion.

    Args:
        steps: plain data; numbers that are not finite become the words "nan", "inf" and "-inf".
        last: the checkpoint's folder.
    """
    folder.mkdir(exist_ok=True)
    if last is not None:
        checkpoint.keep(last, folder / "checkpoint")
    lines = ",\n".join(json.dumps(_in_words(step)) for step in steps)
    with replacing(folder / "report.json", durable=True) as temporary:
        temporary.write_text(f'{{"reason": {json.dumps(reason)}, "seed": {seed}, "steps": [\n{lines}\n]}}\n')


def _in_words(node: Any) -> Any:
    """Return plain data with words for numbers that JSON cannot represent."""
    if isinstance(node, dict):
        return {key: _in_words(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_in_words(value) for value in node]
    return str(node) if isinstance(node, float) and not math.isfinite(node) else node
