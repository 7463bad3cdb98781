"""The pictures of a network on points in the plane: its score, its density, and its walks."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SHOWN, FRAMES, PANELS = 1000, 20, 10  # points of a panel; frames of the animation; panels of a row
WALKS, NOISY_WALKS = 40, 6  # that are shown; of a sampler with noise
MOMENTS = 200  # of the samples' way, from which all of them are taken
SIZE, FLOW_STEPS = 51, 30  # of the grid that densities are shown on; of the flow that gives a learned one
KNOWN_POINTS = 2000  # training points that stand for the data, where their density is not known
LEVEL = 0.3  # of noise, about which fields are shown: they still have the shape of the data there


def is_plane(source: Any) -> bool:
    """Whether a network's samples are points in the plane."""
    return tuple(source.shape) == (2,)


Way = Sequence[tuple[int | float, Any]]  # (t, x_t), from noise to data


def draw_plane(folder: Path, source: Any, data: Any, way: Way | None = None) -> list[Path]:
    """Write the pictures of a network on points in the plane; returns their paths.

    score.png: the score at one level of noise, of the data, learned, and the difference; density.png: the density that
    the flow gives to the network's samples; process.png: forward, and back again, these two where the schedule has more
    than one level; walks.png: ways of the sampler, and of the flow; field.gif: noise becomes data, with the score of
    each t.

    Args:
        source: the network.
        data: whose density, if it is not known, is that of its training points with noise.
        way: MOMENTS of the way of SHOWN samples, if they have been drawn.
    """
    import torch

    real = data.batch(data.train[: 10 * SHOWN]).x.cpu()
    limit = 1.15 * torch.quantile(real.abs().max(1).values, 0.995).item()
    known, name = _truth(source, data)
    way = source.way(SHOWN, MOMENTS) if way is None else way
    t = _shown_time(source.diffusion.schedule)
    drawn = [
        _draw_score(folder / "score.png", source, known, name, t, limit),
        _draw_walks(folder / "walks.png", source, known, limit, way),
        _draw_animation(folder / "field.gif", source, real[:SHOWN], limit, way),
    ]
    if source.diffusion.schedule.T > 1:
        drawn.append(_draw_process(folder / "process.png", source, real[:SHOWN], way))
    if _has_flow(source.diffusion.schedule):
        drawn.append(_draw_density(folder / "density.png", source, known, name, limit))
    return drawn


def _truth(source: Any, data: Any) -> tuple[Any, str]:
    """What is known of the data, with log_prob and score, and what it is called."""
    from ddpm.oracle import JointMixture, PointsOracle

    schedule = source.diffusion.schedule.to("cpu")
    if JointMixture.knows(data):
        return JointMixture.of(schedule, data), data.name
    return PointsOracle(schedule, data.batch(data.train[:KNOWN_POINTS]).x.cpu()), "training points"


def _shown_time(schedule: Any) -> int:
    """The time whose level of noise is nearest to LEVEL."""
    import torch

    from ddpm.score import noise_level

    t = torch.arange(1, schedule.T + 1)
    return int(t[(noise_level(schedule, t) - LEVEL).abs().argmin()])


def _has_flow(schedule: Any) -> bool:
    return schedule.T > 1 and schedule.alpha_bar[-1].item() > 0


def _score(schedule: Any, denoise: Callable[..., Any], x_t: Any, t: int | float) -> Any:
    """By a denoiser, at (n, 2) places of x_t."""
    import torch

    from ddpm.score import score_from_eps

    with torch.no_grad():
        return score_from_eps(schedule, denoise(x_t, t).eps, t).cpu()


def _learned(source: Any) -> Callable[..., Any]:
    """The network's raw prediction at places on the CPU; of one with classes, without or of the first that is asked."""

    def denoise(x_t: Any, t: int | float) -> Any:
        return source.predictor(source.condition([0] * len(x_t)))(x_t.to(source.device), t)

    return denoise


def _field(source: Any, known: Any, limit: float, t: int | float, denoise: Any = None) -> Any:
    """The field of a denoiser (of the data, if None) at t, in x_t / sqrt(alpha_bar_t), over the data's density."""
    from ddpm.figures.fields import Field, plane

    schedule = source.diffusion.schedule
    x, y, places = plane(limit, SIZE)
    root = schedule.alpha_bar_at(t).sqrt().item()
    x_t = root * places.reshape(-1, 2)
    vectors = _score(schedule, denoise or known.denoise, x_t, t).reshape(SIZE, SIZE, 2)
    return Field(x, y, known.log_prob(x_t, t).reshape(SIZE, SIZE), root * vectors)


def _draw_score(path: Path, source: Any, known: Any, name: str, t: int, limit: float) -> Path:
    from ddpm.figures.fields import Field, vector_field
    from ddpm.score import noise_level

    exact, learned = (_field(source, known, limit, t, denoise) for denoise in (None, _learned(source)))
    panels = {
        f"score of {name}": exact,
        "learned": learned,
        "difference": Field(exact.x, exact.y, None, learned.vectors - exact.vectors),
    }
    sigma = noise_level(source.diffusion.schedule, t).item()
    vector_field(path, panels, f"noise level {sigma:.2g} (t = {t} of {source.diffusion.schedule.T})")
    return path


def _draw_density(path: Path, source: Any, known: Any, name: str, limit: float) -> Path:
    """That of the flow at t = 1, beside what is known at that level of noise."""
    from ddpm.figures.fields import Field, density_map, plane
    from ddpm.likelihood import log_likelihood

    schedule = source.diffusion.schedule
    x, y, places = plane(limit, SIZE)
    flat = places.reshape(-1, 2)
    by_flow = log_likelihood(schedule, _learned(source), flat.to(source.device), steps=FLOW_STEPS).cpu()
    of_data = known.log_prob(schedule.alpha_bar_at(1).sqrt().item() * flat, 1)
    panels = {f"{name}, t = 1": of_data, "learned, by its flow": by_flow}
    density_map(path, {title: Field(x, y, value.reshape(SIZE, SIZE)) for title, value in panels.items()})
    return path


def some(way: Way, k: int) -> Way:
    """At most k moments of a way, evenly spaced, its ends among them."""
    from ddpm.data.dataset import spread

    return [way[i] for i in spread(len(way), k).tolist()]


def _draw_process(path: Path, source: Any, real: Any, way: Way) -> Path:
    """Both ways, in panels that are evenly spaced by the noise that is there, sqrt(1 - alpha_bar_t)."""
    from ddpm.figures.fields import panels_of_points
    from ddpm.forward import q_sample
    from ddpm.randomness import SampleNoise

    noise = [(1 - source.diffusion.schedule.alpha_bar_at(t)).sqrt().item() for t, _ in way]
    even = [noise[0] + (noise[-1] - noise[0]) * i / (PANELS - 1) for i in range(PANELS)]
    chosen = [len(way) - 1]
    for share in reversed(even[1:-1]):  # from data on; two panels are never the same
        chosen.append(min(chosen[-1] - 1, min(range(len(way)), key=lambda i: abs(noise[i] - share))))
    way = [way[i] for i in sorted({0, *(i for i in chosen if i > 0)})]
    times = [t for t, _ in way]
    eps = SampleNoise(source.seed, range(len(real))).of("forward").x_T(source.shape)
    forward = [q_sample(source.diffusion.schedule, real, t, eps) if t > 0 else real for t in reversed(times)]
    rows = [("data to noise", forward), ("noise to data", [x_t for _, x_t in way])]
    labels = [f"{s:.4g} | {t:.4g}" if s != t else f"t = {t:.4g}" for s, t in zip(reversed(times), times, strict=True)]
    panels_of_points(path, rows, labels, title="t of the upper row | of the lower one")
    return path


def _draw_walks(path: Path, source: Any, known: Any, limit: float, way: Way) -> Path:
    """Ways of the run's sampler and, where there is a flow, of it, in x_t, over the density of the data at t = 1."""
    import torch

    from ddpm.figures.fields import Field, chains, plane
    from ddpm.samplers import DDIM

    schedule = source.diffusion.schedule
    walks = {type(source.sampler).__name__: way}
    if _has_flow(schedule):
        walks["the flow"] = source.using(DDIM(min(100, schedule.T))).way(WALKS, MOMENTS)
    x, y, places = plane(max(limit, 3.2), SIZE)
    density = Field(x, y, known.log_prob(places.reshape(-1, 2), 1).reshape(SIZE, SIZE))
    shown = {name: NOISY_WALKS if source.sampler.stochastic and one is way else WALKS for name, one in walks.items()}
    panels = {name: (density, torch.stack([x_t[: shown[name]] for _, x_t in one])) for name, one in walks.items()}
    chains(path, panels, "from rings to dots")
    return path


def _draw_animation(path: Path, source: Any, real: Any, limit: float, way: Way) -> Path:
    """Samples on their way, in x_t, with the score of each t; the last frame is without it."""
    from ddpm.figures.fields import Field, field_animation, plane

    x, y, places = plane(max(limit, 3.2), SIZE)
    frames = []
    for t, x_t in some(way, FRAMES):
        vectors, flat = None, places.reshape(-1, 2)
        if t > 0:
            vectors = _score(source.diffusion.schedule, _learned(source), flat, t).reshape(SIZE, SIZE, 2)
        frames.append((f"t = {t:.4g}", x_t, Field(x, y, None, vectors)))
    field_animation(path, frames, behind=real)
    return path
