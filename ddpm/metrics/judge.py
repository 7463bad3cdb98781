"""Training of the judge: the classifier whose predictions and features the other measures use."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.randomness import generator


def train_judge(
    classifier: nn.Module,
    x: Tensor,
    y: Tensor,
    seed: int = 0,
    epochs: int = 6,
    batch_size: int = 128,
    lr: float = 4e-3,
    weight_decay: float = 0.01,
    shift: int = 2,
    label_smoothing: float = 0.05,
) -> nn.Module:
    """Train a classifier with AdamW, one cycle of the learning rate and random shifts.

    On a CPU the same seed, weights and thread count give the same classifier.

    Args:
        classifier: maps images (B, C, H, W) to logits (B, K); trained in place.
        x: images (N, C, H, W) in [-1, 1], on the classifier's device.
        y: their classes (N,), integers.
        seed: of order, shifts and dropout.
        epochs: passes over the images.
        batch_size: images a step.
        lr: the peak of the cycle.
        weight_decay: of AdamW.
        shift: largest random shift in pixels along each axis; edges are replicated.
        label_smoothing: share of the target that is spread over all classes.

    Returns: the classifier, in evaluation mode.
    """
    if len(x) != len(y) or len(x) == 0:
        raise ValueError(f"a judge learns from as many images as classes, not from {len(x)} and {len(y)}")
    batches = max(1, len(x) // batch_size)  # an epoch drops the remainder; each has a new order
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=lr, weight_decay=weight_decay)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * batches)
    classifier.train()
    with torch.random.fork_rng([x.device] if x.is_cuda else []):  # dropout takes no generator
        torch.manual_seed(seed)
        for epoch in range(epochs):
            order = torch.randperm(len(x), generator=generator(seed, "judge order", epoch)).to(x.device)
            for step, chosen in enumerate(order[: batches * batch_size].split(batch_size)):
                moved = random_shift(x[chosen], shift, generator(seed, "judge shift", epoch, step))
                loss = F.cross_entropy(classifier(moved), y[chosen].long(), label_smoothing=label_smoothing)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                cycle.step()
    return classifier.eval()


def passes(n: int) -> int:
    """Return the number of epochs to train a judge on n images, from 60 for few down to 3 for many."""
    return min(60, max(3, math.ceil(54_000 / n)))


def random_shift(x: Tensor, shift: int, rng: torch.Generator) -> Tensor:
    """Shift every image (B, C, H, W) at random by up to `shift` pixels along both axes; edges are replicated."""
    height, width = x.shape[2:]
    down, right = torch.randint(2 * shift + 1, (2, len(x)), generator=rng).to(x.device)
    padded = F.pad(x, [shift] * 4, mode="replicate")
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B, C, 2 shift + 1, 2 shift + 1, H, W)
    return windows[torch.arange(len(x), device=x.device), :, down, right]


@torch.no_grad()
def in_batches(function: Callable[[Tensor], Tensor], x: Tensor, batch_size: int = 500) -> Tensor:
    """Apply a function to N images in batches, without gradients, and return its results (N, *)."""
    return torch.cat([function(part) for part in x.split(batch_size)])


def accuracy(classifier: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of images (N, C, H, W) whose largest logit is that of their class y (N,)."""
    if len(x) != len(y) or len(x) == 0:
        raise ValueError(f"accuracy compares as many images as classes, not {len(x)} and {len(y)}")
    return (in_batches(classifier.eval(), x).argmax(1) == y).float().mean().item()
