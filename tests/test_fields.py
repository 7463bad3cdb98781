"""ddpm/figures/fields.py: densities, fields and points lie where they belong, in small files."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ddpm.figures import fields
from ddpm.figures.fields import Field, plane

X, Y, PLACES = plane(3, 41)
ORANGE, INK = np.array([213, 94, 0]), np.array([28, 32, 39])


def hill(x: float, y: float) -> Tensor:
    """log of a normal density around a place, on the grid."""
    return -2 * (PLACES - torch.tensor([x, y])).square().sum(-1)


def read(path: Path, most: int = 300_000) -> np.ndarray:
    """The picture (H, W, 3), after the checks that every picture passes."""
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    height, width = picture.shape[:2]
    assert 100 < width <= 900 and 100 < height < 1000 and path.stat().st_size < most
    assert (picture == 255).all(2).mean() > 0.05 and [file.name for file in path.parent.iterdir()] == [path.name]
    return picture


def near(picture: np.ndarray, colour: np.ndarray, within: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels of a colour."""
    return np.nonzero((abs(picture - colour) <= within).all(2))


def blue(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of what is darkest blue, above the bar."""
    return np.nonzero((picture[..., 2] - picture[..., 0] > 90)[: int(0.8 * len(picture))])


def test_the_grid_is_in_the_order_of_a_field():
    assert X.shape == Y.shape == (41,) and PLACES.shape == (41, 41, 2)
    assert PLACES[7, 30].tolist() == [X[30].item(), Y[7].item()] and X[0] == -3 and Y[-1] == 3


def test_a_density_is_upwards_and_to_the_right(tmp_path):
    fields.density_map(tmp_path / "a.png", {"left": Field(X, Y, hill(-1.5, 0)), "right": Field(X, Y, hill(1.5, 1.5))})
    picture = read(tmp_path / "a.png")
    y, x = blue(picture)
    middle = picture.shape[1] / 2
    low, high = y[x < middle], y[x > middle]
    unit = (x[x > middle].mean() - middle * 1.5 - (x[x < middle].mean() - middle / 2)) / 3  # pixels
    assert unit > 30 and low.mean() - high.mean() == pytest.approx(1.5 * unit, rel=0.15)


def test_points_lie_on_their_density(tmp_path):
    cloud = torch.tensor([1.5, -1.5]) + 0.02 * torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    fields.density_map(tmp_path / "a.png", {"one": Field(X, Y, hill(1.5, -1.5))}, {"one": cloud}, "title")
    picture = read(tmp_path / "a.png")
    (y, x), (y_blue, x_blue) = near(picture, ORANGE), blue(picture)
    assert len(x) > 20 and abs(x.mean() - x_blue.mean()) < 4 and abs(y.mean() - y_blue.mean()) < 4


def test_streamlines_follow_the_field(tmp_path):
    """Level ones of a constant field: rows of ink that are long. Upright ones if it is turned."""
    runs = {}
    for name, direction in (("level", [1.0, 0.0]), ("upright", [0.0, 1.0])):
        field = Field(X, Y, hill(0, 0), torch.tensor(direction).expand(41, 41, 2))
        fields.vector_field(tmp_path / "a.png", {"one": field})
        picture = read(tmp_path / "a.png")
        dark = (picture.max(2) < 120)[60:-90, 60:-30]
        runs[name] = dark.sum(1).max(), dark.sum(0).max()
    assert runs["level"][0] > 2 * runs["level"][1] and runs["upright"][1] > 2 * runs["upright"][0]


@pytest.mark.slow
def test_a_field_without_a_density_is_shaded_by_its_length(tmp_path):
    vectors = torch.stack([torch.exp(hill(1.5, 0)), 0 * hill(0, 0)], dim=-1)
    panels = {"score": Field(X, Y, hill(0, 0), PLACES * -4), "difference": Field(X, Y, vectors=vectors)}

    def drawn(scale: float) -> np.ndarray:
        changed = panels | {"difference": Field(X, Y, vectors=scale * vectors)}
        fields.vector_field(tmp_path / "a.png", changed, "two")
        return read(tmp_path / "a.png")

    shades = []
    for scale in (1.0, 100.0):  # the same but for the numbers at its bar, by whose width all of it may be moved
        picture = drawn(scale)
        dark = (picture[..., 0] - picture[..., 2] > 90)[: int(0.75 * len(picture))]
        y, x = np.nonzero(dark)
        assert x.min() > picture.shape[1] / 2 and x.mean() > 0.75 * picture.shape[1]
        shades.append(dark[y.min() : y.max() + 1, x.min() : x.max() + 1])
    assert np.array_equal(*shades)


def test_walks_go_from_rings_to_dots(tmp_path):
    line = torch.linspace(-2, 2, 50)
    walks = torch.stack([torch.stack([line, 0 * line + y], dim=1) for y in (-1.0, 1.0)], dim=1)
    fields.chains(tmp_path / "a.png", {"a": (Field(X, Y, hill(0, 0)), walks)})
    picture = read(tmp_path / "a.png")
    y, x = near(picture, ORANGE, 70)
    assert np.ptp(x) > 0.5 * picture.shape[1] and len(np.unique(y)) < 16
    _, x_dots = near(picture[40:-40, 60:-60], INK)
    assert (x_dots + 60 > x.mean()).mean() > 0.55  # the rings are hollow


def test_panels_of_points_are_in_their_place_within_the_same_limits(tmp_path):
    def cloud(x: float, y: float) -> Tensor:
        return torch.tensor([x, y]) + 0.05 * torch.randn(100, 2, generator=torch.Generator().manual_seed(0))

    rows = [("forward", [cloud(-1, 0), cloud(1, 0)]), ("back", [cloud(0, -1), cloud(0, 1)])]
    fields.panels_of_points(tmp_path / "a.png", rows, ["t = 0", "t = 9"], behind=cloud(0, 0), title="a process")
    picture = read(tmp_path / "a.png")
    y, x = near(picture, ORANGE, 60)
    height, width = picture.shape[:2]
    places = {}
    for i in range(2):
        for j in range(2):
            there = (y * 2 // height == i) & (x * 2 // width == j)
            places[i, j] = x[there].mean(), y[there].mean()
    side = places[0, 1][0] - places[0, 0][0]  # the panels' distance and two units
    units = places[1, 0][1] - places[1, 1][1]
    assert units > 60 and places[1, 1][0] - places[1, 0][0] == pytest.approx(side - units, abs=6)
    with pytest.raises(ValueError, match="rows of \\[2, 2\\] panels, but 1 labels"):
        fields.panels_of_points(tmp_path / "a.png", rows, ["t"])
    with pytest.raises(ValueError, match=r"one or more points \(n, 2\), not \[\(3, 3\)\]"):
        fields.panels_of_points(tmp_path / "a.png", [("a", [torch.zeros(3, 3)])], ["t"])


@pytest.mark.slow
def test_ten_panels_fit_the_width_of_a_page(tmp_path):
    for count in (5, 10):
        row = [torch.randn(1000, 2) for _ in range(count)]
        fields.panels_of_points(
            tmp_path / "a.png", [("forward", row), ("back", row)], [f"t = {i}" for i in range(count)]
        )
        assert read(tmp_path / "a.png").shape[1] > 800
    fields.panels_of_points(tmp_path / "a.png", [("a", [torch.full((2, 2), torch.nan)])], ["t"])  # nothing to scale by


def test_an_animation_has_a_frame_for_each_time(tmp_path):
    frames = []
    for i in range(3):
        field = Field(X, Y, hill(0, 0), -PLACES / (i + 1))
        frames.append((f"t = {i}", torch.tensor([[i - 1.0, 0.0]]) + 0.1 * torch.randn(300, 2), field))
    fields.field_animation(tmp_path / "a.gif", frames, behind=torch.randn(50, 2))
    film: Any = Image.open(tmp_path / "a.gif")
    assert film.n_frames == 3 and film.info["duration"] == 120 and (tmp_path / "a.gif").stat().st_size < 300_000
    centres = []
    for i in range(3):
        film.seek(i)
        picture = np.asarray(film.convert("RGB")).astype(int)
        centres.append(np.nonzero(picture[..., 0] - picture[..., 2] > 80)[1].mean())
    assert np.diff(centres) == pytest.approx([centres[1] - centres[0]] * 2, rel=0.15) and centres[1] > centres[0] + 30


@pytest.mark.slow
def test_what_is_not_finite_is_left_white(tmp_path):
    density, vectors = hill(0, 0), -PLACES.clone()
    density[:5], density[5, 5], vectors[:7] = -math.inf, math.nan, math.nan
    fields.density_map(tmp_path / "a.png", {"a": Field(X, Y, density)})
    assert len(blue(read(tmp_path / "a.png"))[0]) > 100
    fields.vector_field(tmp_path / "a.png", {"a": Field(X, Y, density, vectors), "b": Field(X, Y, vectors=vectors)})
    read(tmp_path / "a.png")


DRAW: dict[str, Callable[[Path, Field], None]] = {
    "vectors": lambda path, field: fields.vector_field(path, {"a": field}),
    "log_density": lambda path, field: fields.density_map(path, {"a": field}),
}


@pytest.mark.parametrize("name", DRAW)
def test_what_cannot_be_drawn_is_refused(name, tmp_path):
    path, whole = tmp_path / "a.png", {"log_density": hill(0, 0), "vectors": PLACES}
    with pytest.raises(ValueError, match=f"a: the field has no {name}"):
        DRAW[name](path, Field(X, Y, **{key: value for key, value in whole.items() if key != name}))
    with pytest.raises(ValueError, match=f"a: {name} has the shape .* and its grid"):
        DRAW[name](path, Field(X, Y, **whole | {name: whole[name][:-1]}))
    with pytest.raises(ValueError, match="one or more panels"):
        fields.vector_field(path, {})
    with pytest.raises(ValueError, match="one or more panels"):
        fields.field_animation(tmp_path / "a.gif", [])
    with pytest.raises(ValueError, match=r"walks are \(k, n, 2\), not \[\(3, 2\)\]"):
        fields.chains(path, {"a": (Field(X, Y, hill(0, 0)), torch.zeros(3, 2))})
    assert list(tmp_path.iterdir()) == []
