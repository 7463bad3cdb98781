"""Figures of a network on points in the plane: its score, its density, and sampling trajectories."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

POINTS, FRAMES, PANELS = 1000, 20, 10  # points of a panel; frames of the animation; panels of a row
WALKS, NOISY_WALKS = 40, 6  # trajectories in a panel; of a stochastic sampler
MOMENTS = 200  # of the trajectory that all figures are taken from
SIZE, FLOW_STEPS = 51, 30  # of the grid of a density; of the flow that computes a learned one
KNOWN_POINTS = 2000  # training points that approximate a density that is not known
LEVEL = 0.3  # noise level of the score fields: they still have the shape of the data there


def is_plane(source: Any) -> bool:
    """Whether a network's samples are points in the plane."""
    return tuple(source.shape) == (2,)


Way = Sequence[tuple[int | float, Any]]  # (t, x_t), from noise to data


def draw_plane(folder: Path, source: Any, data: Any, way: Way | None = None) -> list[Path]:
    """Write the figures of a network on points in the plane; return their paths.

    score.png: the score at one noise level, of the data, learned, and their difference; density.png: the density of the
    learned flow; process.png: the forward and the reverse process, these two if the schedule has more than one level;
    walks.png: trajectories of the sampler, and of the flow; field.gif: noise becomes data, with the score at each t.

    Args:
        source: the network.
        data: its density, if it is not known, is approximated by training points with noise.
        way: MOMENTS of the trajectory of POINTS samples, if they have been drawn.
    """
    import torch

    real = data.batch(data.train[: 10 * POINTS]).x.cpu()
    limit = 1.15 * torch.quantile(real.abs().max(1).values, 0.995).item()
    known, name = _reference(source, data)
    way = source.way(POINTS, MOMENTS) if way is None else way
    t = _score_time(source.diffusion.schedule)
    drawn = [
        _draw_score(folder / "score.png", source, known, name, t, limit),
        _draw_walks(folder / "walks.png", source, known, limit, way),
        _draw_animation(folder / "field.gif", source, real[:POINTS], limit, way),
    ]
    if source.diffusion.schedule.T > 1:
        drawn.append(_draw_process(folder / "process.png", source, real[:POINTS], way))
    if _has_flow(source.diffusion.schedule):
        drawn.append(_draw_density(folder / "density.png", source, known, name, limit))
    return drawn


def _reference(source: Any, data: Any) -> tuple[Any, str]:
    """Return the best known density of the data, with log_prob and denoise, and its name for figures."""
    from ddpm.oracle import JointMixture, PointsOracle

    schedule = source.diffusion.schedule.to("cpu")
    if JointMixture.knows(data):
        return JointMixture.of(schedule, data), data.name
    return PointsOracle(schedule, data.batch(data.train[:KNOWN_POINTS]).x.cpu()), "training points"


def _score_time(schedule: Any) -> int:
    """Return the time whose noise level is nearest to LEVEL."""
    import torch

    from ddpm.score import noise_level

    t = torch.arange(1, schedule.T + 1)
    return int(t[(noise_level(schedule, t) - LEVEL).abs().argmin()])


def _has_flow(schedule: Any) -> bool:
    return schedule.T > 1 and schedule.alpha_bar[-1].item() > 0


def _score(schedule: Any, denoise: Callable[..., Any], x_t: Any, t: int | float) -> Any:
    """Return the score (n, 2) of a denoiser at points x_t (n, 2), on the CPU."""
    import torch

    from ddpm.score import score_from_eps

    with torch.no_grad():
        return score_from_eps(schedule, denoise(x_t, t).eps, t).cpu()


def _learned(source: Any) -> Callable[..., Any]:
    """Return a denoiser for x_t on the CPU: the network's raw prediction under the condition of sample 0."""

    def denoise(x_t: Any, t: int | float) -> Any:
        return source.predictor(source.condition([0] * len(x_t)))(x_t.to(source.device), t)

    return denoise


def _field(source: Any, known: Any, limit: float, t: int | float, denoise: Any = None) -> Any:
    """Return the field of a denoiser (None: the data's) at t, in x_t / sqrt(alpha_bar_t), over the data's density."""
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
    """Draw the density of the learned flow at t = 1, next to that of the data at the same noise level."""
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
    """Return at most k evenly spaced moments of a trajectory, including its ends."""
    from ddpm.data.dataset import spread

    return [way[i] for i in spread(len(way), k).tolist()]


def _draw_process(path: Path, source: Any, real: Any, way: Way) -> Path:
    """Draw the forward and the reverse process, in panels evenly spaced in the noise sqrt(1 - alpha_bar_t)."""
    from ddpm.figures.fields import panels_of_points
    from ddpm.forward import q_sample
    from ddpm.randomness import SampleNoise

    noise = [(1 - source.diffusion.schedule.alpha_bar_at(t)).sqrt().item() for t, _ in way]
    even = [noise[0] + (noise[-1] - noise[0]) * i / (PANELS - 1) for i in range(PANELS)]
    chosen = [len(way) - 1]
    for share in reversed(even[1:-1]):  # from data on; no panel is repeated
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
    """Draw trajectories x_t of the run's sampler and of the flow, if there is one, over the data's density at t = 1."""
    import torch

    from ddpm.figures.fields import Field, chains, plane
    from ddpm.samplers import DDIM

    schedule = source.diffusion.schedule
    walks = {type(source.sampler).__name__: way}
    if _has_flow(schedule):
        walks["the flow"] = source.using(DDIM(min(100, schedule.T))).way(WALKS, MOMENTS)
    x, y, places = plane(max(limit, 3.2), SIZE)
    density = Field(x, y, known.log_prob(places.reshape(-1, 2), 1).reshape(SIZE, SIZE))
    counts = {name: NOISY_WALKS if source.sampler.stochastic and one is way else WALKS for name, one in walks.items()}
    panels = {name: (density, torch.stack([x_t[: counts[name]] for _, x_t in one])) for name, one in walks.items()}
    chains(path, panels, "from rings to dots")
    return path


def _draw_animation(path: Path, source: Any, real: Any, limit: float, way: Way) -> Path:
    """Write an animation of samples x_t with the score at each t; the last frame is without it."""
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
