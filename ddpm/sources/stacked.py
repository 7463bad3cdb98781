"""Stacked sampling: trained networks of one form are sampled as one program."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from ddpm.data.batch import Condition
from ddpm.randomness import SampleNoise
from ddpm.samplers.base import Callback
from ddpm.schedules import Time
from ddpm.sources.base import Range
from ddpm.sources.trained import TrainedSampler
from ddpm.targets import Denoise, Prediction

Way = list[tuple[int | float, Tensor]]
"""(t, x_t) at some moments; for samples alone (0, x_0)."""

PLAIN = (bool, int, float, str, tuple, list, type(None))
MOST_PENDING = 2**30  # bytes of samples that wait to be collected by their source


class StackedSampler(TrainedSampler):
    """S trained networks as one: of n numbers it draws n samples of the first, then n of the second, (S n, *shape).

    The sampling loop runs over all these rows. Each network predicts its own rows, with its own condition and
    guidance, by `torch.vmap` over the weights of all; noise is keyed by the seed of each. Samples therefore equal, up
    to rounding, those of the network alone.

    Args:
        sources: of one form, which differ in their weights, their seeds and their conditions. `with_seed` moves the
            seeds of all by as many as that of the first.
    Raises: ValueError with the reason why they cannot be drawn from as one.
    """

    def __init__(self, sources: Sequence[TrainedSampler]):
        if reason := next(filter(None, (_difference(sources[0], other) for other in sources)), None):
            raise ValueError(f"these networks cannot be stacked: {reason}")
        vars(self).update(vars(sources[0]))
        self.sources, self.range = list(sources), Range()
        self.weights = stack_module_state([_Bound(source.model, source.denoiser) for source in sources])

    def noise(self, numbers: range | list[int]) -> SampleNoise:
        """Return all noise of the samples of these numbers, for each network."""
        further = self.seed - self.sources[0].seed
        seeds = [source.seed + further for source in self.sources for _ in numbers]
        return SampleNoise(seeds, len(self.sources) * list(numbers))

    def condition(self, numbers: range | list[int]) -> Condition:
        """Return the conditions of the samples of these numbers, for each network its own."""
        each = [source.condition(numbers) for source in self.sources]
        return each[0].holding(map(torch.cat, zip(*(one.tensors() for one in each), strict=True)))

    def denoiser(self, condition: Condition) -> Denoise:
        """Return the predictions of all networks, guided and clipped, for t that is the same in each."""
        bound = _Bound(self.model, super().denoiser)

        def denoise(x_t: Tensor, t: Time) -> Prediction:
            t = self.of_each(t)[0] if isinstance(t, Tensor) and t.ndim else t
            of_any: list[Prediction] = []

            def of_one(weights: Any, x_t: Tensor, parts: list[Tensor]) -> list[Tensor]:
                pred = functional_call(bound, weights, (x_t, t, condition.holding(parts)))
                of_any.append(pred)
                return [x for x in (pred.eps, pred.x_0, pred.frac) if isinstance(x, Tensor)]

            parts = [self.of_each(x) for x in condition.tensors()]
            eps, x_0, *frac = (x.flatten(0, 1) for x in torch.vmap(of_one)(self.weights, self.of_each(x_t), parts))
            return replace(of_any[0], eps=eps, x_0=x_0, frac=frac[0] if frac else of_any[0].frac)

        return denoise

    def of_each(self, x: Tensor) -> Tensor:
        """Return the rows of all networks, (S n, *), as (S, n, *)."""
        return x.unflatten(0, (len(self.sources), -1))


class Shared:
    """Samples of several trained networks, drawn together and stored until each source collects its own.

    Args:
        sources: as of `StackedSampler`.
        tell: called once with the reason if they are sampled separately after all, such as too little memory.
    Raises: ValueError with the reason why they cannot be drawn from as one.
    """

    def __init__(self, sources: Sequence[TrainedSampler], tell: Callable[[str], None]):
        self.stacked: StackedSampler | None = StackedSampler(sources)
        self.seeds, self.tell = [source.seed for source in sources], tell
        self.pending: dict[str, dict[int, Way]] = {}  # by request, and by the source's place

    def drawn(self, source: "SharingSampler", what: str, draw: Callable[[TrainedSampler], Way]) -> Way | None:
        """Return the samples that `draw` takes of a source; None where the source is to be sampled alone.

        Args:
            what: names the samples; with the source's sampler, guidance and seed offset, it identifies a request.
        """
        further = source.seed - self.seeds[source.place]
        requested = repr((what, further, _settings(source.sampler), _settings(source.guidance)))
        if requested not in self.pending:
            self.pending[requested] = self._of_all(source, further, draw)
        return self.pending[requested].pop(source.place, None)

    def _of_all(self, source: "SharingSampler", further: int, draw: Callable[[TrainedSampler], Way]) -> dict[int, Way]:
        ways = (way for of_each in self.pending.values() for way in of_each.values())
        full = sum(x.nbytes for way in ways for _, x in way) > MOST_PENDING
        if self.stacked is None or full or _holds_more(source.guidance):
            return {}
        stacked = self.stacked.with_seed(self.seeds[0] + further).using(source.sampler).guided_by(source.guidance)
        try:
            way = draw(stacked)
        except RuntimeError as error:  # too little memory, or what torch.vmap cannot do
            self.stacked = None
            self.tell((str(error).strip() or type(error).__name__).splitlines()[0])
            return {}
        each = [(t, self.stacked.of_each(x)) for t, x in way]
        return {s: [(t, x[s].clone()) for t, x in each] for s in range(len(self.seeds))}


class SharingSampler(TrainedSampler):
    """A trained network whose samples are drawn together with those of others, see `Shared`.

    Args:
        source: the network, alone.
        place: its place among the sources of `shared`.
    """

    def __init__(self, source: TrainedSampler, shared: Shared, place: int):
        vars(self).update(vars(source))
        self.shared, self.place = shared, place

    def draw(self, numbers: range | list[int], callback: Callback | None = None) -> Tensor:
        """Return the samples of these numbers, (n, *shape), on the CPU; with a callback it is sampled alone."""
        if callback is not None:
            return super().draw(numbers, callback)
        way = self.shared.drawn(self, f"samples {list(numbers)}", lambda source: [(0, source.draw(numbers))])
        if way is None:
            return super().draw(numbers)
        self.range.note(way[-1][1])
        return way[-1][1]

    def way(self, n: int, pictures: int) -> Way:
        """Return (t, x_t) of the first n samples at evenly spaced moments from noise (t = T) to image (t = 0)."""
        way = self.shared.drawn(self, f"way {n} {pictures}", lambda source: source.way(n, pictures))
        if way is None:
            return super().way(n, pictures)
        self.range.note(way[-1][1])
        return way


class _Bound(nn.Module):
    """A Denoise as a module, whose weights are those of its network."""

    def __init__(self, model: nn.Module, denoiser: Callable[[Condition], Denoise]):
        super().__init__()
        self.model, self.denoiser = model, denoiser

    def forward(self, x_t: Tensor, t: Time, condition: Condition) -> Prediction:
        return self.denoiser(condition)(x_t, t)


def _difference(one: TrainedSampler, other: TrainedSampler) -> str | None:
    """Return why two sources cannot be sampled as one; None if they can."""
    a, b = ([_settings(module) for module in source.model.modules()] for source in (one, other))
    shapes = [
        [(name, x.shape, x.dtype) for name, x in (*s.model.named_parameters(), *s.model.named_buffers())]
        for s in (one, other)
    ]
    theirs, ours = other.diffusion, one.diffusion
    reasons = {
        "they differ in more than weights": a != b or shapes[0] != shapes[1],
        "their guidance has a network of its own": _holds_more(one.guidance),
        "they differ in guidance": _settings(one.guidance) != _settings(other.guidance),
        "they differ in sampler": _settings(one.sampler) != _settings(other.sampler),
        "they differ in schedule": not torch.equal(ours.schedule.beta.cpu(), theirs.schedule.beta.cpu()),
        "they differ in what is predicted, or how it is clipped": _settings(ours) != _settings(theirs),
    }
    for name in ("shape", "device", "precision", "requested", "styles"):
        reasons[f"they differ in {name}"] = getattr(one, name) != getattr(other, name)
    return next((reason for reason, holds in reasons.items() if holds), None)


def _settings(thing: object) -> tuple[str, dict[str, object]]:
    """Return an object's type, and its attributes that are numbers and names."""
    plain = {name: value for name, value in vars(thing).items() if type(value) in PLAIN}
    if "drop" in plain:  # how often a network was trained without its condition: drawing only needs whether it ever was
        plain["drop"] = bool(plain["drop"])
    return type(thing).__qualname__, plain


def _holds_more(thing: object) -> bool:
    """Whether an object has attributes other than numbers and names, such as a network."""
    return any(type(value) not in PLAIN for value in vars(thing).values())
