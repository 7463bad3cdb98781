"""Text-to-image sampling: a network of latents conditioned on the tokens of a prompt, with its encoders and codec."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.checks import check_one_of, check_whole
from ddpm.data.batch import Condition, takes
from ddpm.diffusion import GaussianDiffusion
from ddpm.guidance import ClassifierFree, Guidance
from ddpm.latent.codec import Continuous
from ddpm.runs.precision import PRECISIONS, computing
from ddpm.samplers.base import Callback, Sampler
from ddpm.sources.base import Source
from ddpm.sources.published import STEPS, Scheduler
from ddpm.sources.trained import TrainedSampler
from ddpm.targets import Denoise

W = 7.5  # the weight of the prompt, as in published pipelines
KINDS = {0: "text", 1: "depth", 5: "inpainting"}  # channels concatenated to x_t -> the kind of conditioning


class Prompted(TrainedSampler):
    """The source of samples of prompts: sample number i is of prompt i, modulo their number.

    A `Source` like every other, so it can be drawn from and edited by the same functions. Made by `Pipeline.of`.

    Args:
        diffusion, sampler, seed, device, precision: as in `TrainedSampler`.
        model: conditioned on tokens, and on an image if it `takes` one.
        codec: of the size of the samples; decodes one sample at a time, to save memory.
        tokens: of the prompts, (P, L, D).
        negative: of the negative prompt, (1, L, D), in place of the null condition: guidance leads away from it.
        guidance: None or `ClassifierFree`.
        image: the conditioning image, (1, C', h, w); None for none.
    Attributes:
        own: number of steps -> the pipeline's own sampler, where samples are drawn by that; else None.
    """

    own: Callable[[int], Sampler] | None = None

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        model: nn.Module,
        sampler: Sampler,
        codec: Continuous,
        seed: int,
        device: torch.device,
        precision: str,
        tokens: Tensor,
        negative: Tensor,
        guidance: Guidance,
        image: Tensor | None = None,
    ):
        self.guidance = guidance
        Source.__init__(self, model, codec.shape, seed, device, precision)
        self.diffusion, self.sampler, self.codec = diffusion, sampler, codec
        self.tokens, self.negative, self.image = tokens, negative, image

    def condition(self, numbers: range | list[int]) -> Condition:
        """Return the tokens of these numbers' prompts, and the conditioning image.

        Raises: ValueError for a network that needs a conditioning image without one.
        """
        if self.image is None and "image" in takes(self.model):
            raise ValueError(
                f"the network is conditioned on more than a text ({kind_of(self.model)}), which is missing"
            )
        tokens = self.tokens[torch.tensor(list(numbers), device=self.tokens.device) % len(self.tokens)]
        image = None if self.image is None else self.image.expand(len(tokens), -1, -1, -1)
        return Condition(tokens=tokens, image=image)

    def predictor(self, condition: Condition) -> Denoise:
        """Return the raw prediction for a condition, guided away from the negative prompt; both are one batch.

        w = 1 evaluates the prompt alone, w = 0 the negative one alone.
        """
        assert self.negative is not None  # set by the constructor
        away = replace(condition, tokens=self.negative.expand(len(condition), -1, -1))
        return self.guidance(self.diffusion, self.model, condition, away)

    def conditioned_on_image(self, image: Tensor) -> "Prompted":
        """Return a copy with a conditioning image, (1, C', h, w): `masked` or `deep`."""
        other = copy.copy(self)
        other.image = image.to(self.device)
        return other

    def decode(self, x: Tensor) -> Tensor:
        """Decode latents (n, c, h, w) to pictures on the CPU, one after another, as the decoder's maps are large.

        Tiles would change the result: its group norms take their mean over the whole map, and attention sees all of it.
        Attention needs little memory: `F.scaled_dot_product_attention` stores no matrix of all pairs.
        """
        return torch.cat([super(Prompted, self).decode(row) for row in x.split(1)])


@dataclass
class Pipeline:
    """A published text-to-image model: text encoder, tokenizer, U-Net, autoencoder and scheduler.

    Args:
        model: the U-Net of latents: (x_t, t, condition with tokens) -> (B, c, h, w).
        codec: the autoencoder, whose size is that of samples if none is requested.
        encoder: ids (B, L) -> (B, L, D).
        tokenizer: texts -> ids (B, L).
        scheduler: the process, and the default sampler.
        device, precision: of the networks' computation; the codec decodes in float32.
        about: its licence, its origin, what was left out.
    Raises: ValueError for an unknown precision, or parts that do not fit each other.
    """

    model: nn.Module
    codec: Continuous
    encoder: nn.Module
    tokenizer: Callable[[list[str]], Tensor]
    scheduler: Scheduler
    device: torch.device
    precision: str = "fp32"
    about: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_one_of("precision", self.precision, PRECISIONS)
        _must_fit(self.model, self.codec, self.encoder, self.tokenizer)
        for network in (self.model, self.encoder, self.codec.model):
            network.to(self.device).eval().requires_grad_(False)

    @property
    def kind(self) -> str:
        """The kind of its U-Net: "text" (nothing besides a text), "inpainting" or "depth"."""
        return kind_of(self.model)

    @torch.no_grad()
    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Return the text encoder's tokens (B, L, D) of texts, on the device."""
        with computing(self.device, self.precision):
            tokens: Tensor = self.encoder(self.tokenizer(list(texts)).to(self.device))
        return tokens.float()

    def of(
        self,
        prompt: str | Sequence[str],
        negative: str = "",
        w: float = W,
        sampler: Sampler | int | None = None,
        size: tuple[int, int] | None = None,
        seed: int = 0,
        *,
        guidance: Guidance | None = None,
        image: Tensor | None = None,
    ) -> Prompted:
        """Return the `Source` of samples of prompts; nothing is drawn yet.

        Args:
            prompt: a text, which may be empty, or several.
            negative: the text that guidance leads away from; its tokens replace the null condition.
            w: the weight of the prompt, as in `classifier_free`: 1 is the prompt alone, 0 the negative one.
            sampler: any of `ddpm.samplers`; None for the scheduler's own with its own times, a number for that many
                steps of it.
            size: (H, W) in pixels, divisible by the codec's factor.
            seed: of all noise.
            guidance: in place of w: `ClassifierFree`, with its rescale and interval, or `Guidance()` for the prompt
                alone.
            image: the conditioning image of a network for inpainting or depth, see `masked` and `deep`.
        Raises:
            ValueError: a size that the factor does not divide, with the nearest that it does; no prompt, or one that
                is not a text; a weight that is not finite; more steps than the scheduler has.
        """
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not texts or not all(isinstance(text, str) for text in (*texts, negative)):
            raise ValueError(f"prompt = {prompt!r}, negative = {negative!r}: a text is needed, or several prompts")
        guidance = ClassifierFree(w) if guidance is None else guidance
        codec = self.codec if size is None else self.codec.of_size(*size)
        if not isinstance(sampler, Sampler):
            sampler = self.scheduler.sampler(STEPS if sampler is None else sampler)
        diffusion, tokens, away = self.scheduler.diffusion, self.tokens(texts), self.tokens([negative])
        drawing = (codec, seed, self.device, self.precision, tokens, away, guidance, image)
        return Prompted(diffusion, self.model, sampler, *drawing)

    def draw(
        self,
        prompt: str | Sequence[str],
        negative: str = "",
        w: float = W,
        sampler: Sampler | int | None = None,
        size: tuple[int, int] | None = None,
        seed: int = 0,
        n: int | None = None,
        *,
        batch: int = 4,
        callback: Callback | None = None,
    ) -> Tensor:
        """Draw images of prompts.

        Args:
            n: images, each from its own noise; None for one a prompt. Sample i is of prompt i, modulo their number,
                and depends on the seed and on i alone.
            batch: samples drawn at once; changes them only by rounding.
            callback: as samplers call it, with latents: `codec.decode(pred.x_0)` is a preview.
            All else: as in `of`.
        Returns:
            (n, 3, H, W) in [-1, 1], on the CPU.
        Raises: ValueError as `of`, and for n or a batch below 1.
        """
        n = n if n is not None else 1 if isinstance(prompt, str) else max(1, len(prompt))
        for name, value in (("n", n), ("batch", batch)):
            check_whole(name, value, 1)
        source = self.of(prompt, negative, w, sampler, size, seed)
        parts = [list(range(start, min(start + batch, n))) for start in range(0, n, batch)]
        return torch.cat([source.draw(numbers, callback) for numbers in parts])


def kind_of(model: nn.Module) -> str:
    """Return the kind of a U-Net by its channels concatenated to x_t, one of `KINDS`; ValueError for another number."""
    channels = getattr(model, "condition_channels", 0)
    if channels not in KINDS:
        known = ", ".join(f"{count} ({kind})" for count, kind in KINDS.items())
        raise ValueError(f"the network takes {channels} channels in addition to x_t; known: {known}")
    return KINDS[channels]


def masked(codec: Continuous, x: Tensor, mask: Tensor) -> Tensor:
    """Return the conditioning image for inpainting: the mask of latents to draw, and the latents of the known image.

    Args:
        x: the image, (1, 3, H, W) in [-1, 1]; its content in the hole is ignored.
        mask: true where pixels are drawn anew, (1, 1, H, W).
    Returns:
        (1, 1 + c, h, w): the mask, of which a latent has the pixel at its corner, as published; then the latents.
    """
    known = x.masked_fill(mask, 0)  # grey
    hole = F.interpolate(mask.to(x), size=tuple(codec.shape[1:]), mode="nearest")
    return torch.cat([hole, codec.sample(codec.posterior(known))], dim=1)


def deep(codec: Continuous, depth: Tensor) -> Tensor:
    """Return the conditioning image of a network conditioned on depth.

    Args:
        depth: of each pixel in any unit, near things high, (1, 1, H, W).
    Returns:
        (1, 1, h, w), resized to the latents and scaled to [-1, 1].
    Raises: ValueError for a depth that is the same everywhere.
    """
    small = F.interpolate(depth.float(), size=tuple(codec.shape[1:]), mode="bicubic", align_corners=False)
    low, high = small.amin(), small.amax()
    if not low < high:
        raise ValueError(f"the depth is {low.item():g} everywhere, and carries no information")
    return 2 * (small - low) / (high - low) - 1


def _must_fit(model: Any, codec: Continuous, encoder: Any, tokenizer: Any) -> None:
    """Raise ValueError for parts that do not fit each other, as far as their attributes tell."""
    kind_of(model)
    wrong = []
    if getattr(model, "num_classes", None) is not None:
        wrong.append("the U-Net is conditioned on classes, which no prompt names")
    if "tokens" not in takes(model):
        wrong.append("the U-Net takes no tokens")
    pairs = [
        ("channels of a token", "U-Net", model, "token_channels", "text encoder", encoder, "channels"),
        ("tokens of a text", "tokenizer", tokenizer, "length", "text encoder", encoder, "length"),
    ]
    for what, one, a, name, other, b, theirs in pairs:
        mine, yours = getattr(a, name, None), getattr(b, theirs, None)
        if mine is not None and yours is not None and mine != yours:
            wrong.append(f"the {one} has {mine} {what}, the {other} {yours}")
    known, all_ids = getattr(encoder, "vocabulary", None), getattr(tokenizer, "vocabulary", None)
    if known is not None and all_ids is not None and all_ids > known:
        wrong.append(f"the tokenizer has {all_ids:,} tokens, of which the text encoder knows {known:,}")
    if getattr(model, "in_channels", codec.shape[0]) != codec.shape[0]:
        wrong.append(f"the U-Net draws latents of {model.in_channels} channels, the autoencoder has {codec.shape[0]}")
    if wrong:
        raise ValueError(f"the parts do not fit each other: {'; '.join(wrong)}")
