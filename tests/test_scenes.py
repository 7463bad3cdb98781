"""ddpm/data/scenes.py and raycast.py: what the camera sees against closed forms, and captions against the picture."""

import hashlib
import itertools
import math

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from ddpm.commands.load import augmentation
from ddpm.config import InvalidInput, _condition_channels
from ddpm.data import Scenes, raycast, scenes
from ddpm.data.encoded import Encoded
from ddpm.data.raycast import EYE, HALF_EDGE, HEIGHT, KEY, PITCH, RADIUS, SHAPES, SPREAD, Solids, View
from ddpm.data.scenes import COLOURS, RELATIONS, Layout, Scene, Solid, arranged, caption, combinations, drawn, parse
from ddpm.randomness import generator

LIGHT = torch.tensor(KEY, dtype=torch.float64) / math.hypot(*KEY)
UP, BEFORE = (0, 1, 0), RELATIONS.index("in front of")


def one(shape: str, x: float = 0.3, z: float = -0.4, angle: float = 0.0, r: float = 0.9, shiny: bool = False) -> Solids:
    return Solids(
        torch.tensor([[SHAPES.index(shape)]]), torch.tensor([[r]]), torch.tensor([[[0.9, 0.1, 0.1]]]),
        torch.tensor([[shiny]]), torch.tensor([[[x, z, angle]]]),
    )  # fmt: skip


@pytest.fixture(scope="module")
def layout() -> Layout:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "BLOCK", 150)
        return drawn(150, (2, 3, 4), seed=1)


@pytest.fixture(scope="module")
def view(layout) -> View:
    return scenes.render(layout, 32)


@pytest.fixture
def few(monkeypatch, tmp_path):
    """Scenes of small blocks, which take no time."""
    monkeypatch.setattr(scenes, "BLOCK", 60)
    return lambda count=60, **options: Scenes(tmp_path, count, **{"image_size": 8} | options)


# ------------------------------------------------------------------------------------------------- the camera


@pytest.mark.equation("Pinhole (ray)")
@pytest.mark.equation("Pinhole (projection)")
def test_a_ray_is_seen_at_its_pixel_and_as_deep_as_it_is_long():
    """Against a camera that is turned by a matrix."""
    cos, sin = math.cos(PITCH), math.sin(PITCH)
    turn = torch.tensor([[1, 0, 0], [0, cos, sin], [0, -sin, cos]]).double()  # to (right, upwards, ahead)
    w = raycast.rays((4, 6), 3).double()
    seen = w @ turn.T
    torch.testing.assert_close(seen[:, 2], torch.ones(4 * 6 * 9).double())
    centre = seen.reshape(4, 6, 9, 3)[2, 5, 4] / SPREAD  # row 2 of 4, column 5 of 6
    torch.testing.assert_close(
        centre[:2], torch.tensor([(2 * 5.5 - 6) / 6, (4 - 2 * 2.5) / 6]).double(), rtol=1e-5, atol=1e-6
    )
    corner = seen.reshape(4, 6, 9, 3)[0, 0, 0] / SPREAD
    torch.testing.assert_close(
        corner[:2], torch.tensor([(2 / 6 - 6) / 6, (4 - 2 / 6) / 6]).double(), rtol=1e-5, atol=1e-6
    )
    t = torch.linspace(3, 20, len(w)).double()[:, None]
    place = raycast.projected(torch.tensor(EYE).double() + t * w)
    torch.testing.assert_close(place, torch.cat([seen[:, :2] / SPREAD, t], 1), rtol=1e-5, atol=1e-5)


@pytest.mark.equation("Quadric (sphere)")
def test_the_silhouette_and_the_depth_of_a_sphere():
    """It is seen within the angle asin(r / d) of its centre; nearer than that by the chord's half."""
    r, size = 0.9, 48
    depth, masks = raycast.surfaces(one("sphere", r=r), size)
    w = raycast.rays(size).double()
    axis = torch.tensor([0.3, r, -0.4]).double() - torch.tensor(EYE).double()
    d, along = axis.norm(), w @ axis / w.norm(dim=1)
    theta = (along / d).acos()
    inside = theta < torch.asin(r / d)
    assert 100 < inside.sum() < 500 and torch.equal(masks[0, 1].flatten(), inside)
    near = (along - (r**2 - (d * theta.sin()) ** 2).clamp(min=0).sqrt()) / w.norm(dim=1)
    torch.testing.assert_close(depth.flatten()[inside], near[inside].float(), rtol=1e-4, atol=1e-4)
    ground = EYE[1] / -w[:, 1]
    torch.testing.assert_close(depth.flatten()[~inside], ground[~inside].float())


# ------------------------------------------------------------------------------------------------- the solids


def inside(shape: str, p: Tensor, r: float) -> Tensor:
    """Whether points (..., 3) lie in a solid at the origin."""
    x, y, z = p.unbind(-1)
    rho = torch.hypot(x, z)
    if shape == "sphere":
        return rho**2 + (y - r) ** 2 < r**2
    if shape == "cube":
        a = HALF_EDGE * r
        return (x.abs() < a) & (z.abs() < a) & (y > 0) & (y < 2 * a)
    if shape == "cylinder":
        return (rho < RADIUS * r) & (y > 0) & (y < HEIGHT * r)
    return (y > 0) & (rho < raycast.BASE * r * (1 - y / (raycast.TIP * r))) & (y < raycast.TIP * r)


def met(shape: str, o: Tensor, w: Tensor, r: float) -> Tensor:
    return raycast.ENTERED[SHAPES.index(shape)](o.T.unbind(0), w.T.unbind(0), torch.tensor(r).double())


@pytest.mark.equation("Slabs (cube)")
@pytest.mark.equation("Quadric (cylinder)")
@pytest.mark.equation("Quadric (cone)")
@pytest.mark.parametrize("shape", SHAPES)
def test_a_solid_is_entered_where_a_walk_along_the_ray_first_is_inside(shape):
    random, r = generator(0, "rays"), 0.9
    angle = torch.rand(300, generator=random).double() * 2 * math.pi
    o = torch.stack([4 * angle.cos(), 5 * torch.rand(300, generator=random).double() + 0.1, 4 * angle.sin()], 1)
    towards = (torch.rand(300, 3, generator=random).double() - 0.5) * 2 + torch.tensor([0, 0.9, 0])
    w, steps = towards - o, torch.linspace(0, 2, 4001).double()
    w[0] = torch.tensor([0, -1.0, 0])  # straight down, beside
    within = inside(shape, o[:, None] + steps[:, None] * w[:, None], r)
    walked = torch.where(within.any(1), steps[within.int().argmax(1)], math.inf)
    t = met(shape, o, w, r)
    touched = t.isfinite() & walked.isfinite()
    assert 100 < touched.sum() < 290 and (t.isfinite() != walked.isfinite()).sum() <= 3  # grazed, between two steps
    assert ((walked - t)[touched] >= -1e-9).all() and (walked - t)[touched].quantile(0.95) < 1.01 * steps[1]
    assert met(shape, o, -w, r).isinf().all()  # behind


@pytest.mark.parametrize("shape", SHAPES)
def test_normals_lead_out_of_the_solid_and_stand_upright_on_it(shape):
    solids, size = one(shape, angle=0.4), 48
    w = raycast.rays(size)
    hits = raycast.first_hits(solids, w)
    ray = hits.which[0].nonzero()[:, 0]
    points = torch.tensor(EYE) + hits.depth[0, ray, None] * w[ray]
    n = raycast.normals(solids, points, torch.zeros_like(ray), torch.zeros_like(ray))
    torch.testing.assert_close(n.norm(dim=1), torch.ones(len(ray)))
    cos, sin = math.cos(0.4), math.sin(0.4)
    moved = points - torch.tensor([0.3, 0, -0.4])
    turn = torch.tensor([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]]) if shape == "cube" else torch.eye(3)
    p, out = (moved @ turn.T).double(), (n @ turn.T).double()
    across = torch.linalg.cross(out, torch.tensor([0.3, 0.5, -0.8]).double().expand_as(out))
    h = 1e-3
    assert inside(shape, p - h * out, 0.9).double().mean() > 0.99
    assert not inside(shape, p + h * out, 0.9).any()
    for step in (across, -across):  # along the surface it stays on it, to the second order
        assert inside(shape, p + h * step - 10 * h**2 * out - 2e-5 * out, 0.9).double().mean() > 0.97
        assert inside(shape, p + h * step + 10 * h**2 * out + 2e-5 * out, 0.9).double().mean() < 0.03


# --------------------------------------------------------------------------------------------------- the light


@pytest.mark.equation("Phong (light)")
def test_light_on_faces_that_look_at_it_and_away():
    c, l = torch.tensor([[0.4, 0.2, 0.1]]).double(), LIGHT[None]  # noqa: E741
    yes, no = torch.tensor([True]), torch.tensor([False])
    full = c * (raycast.AMBIENT * (3 + l[0, 1]) / 4 + raycast.DIFFUSE)
    torch.testing.assert_close(raycast.shaded(c, no, l, l, yes), full)
    dark = c * raycast.AMBIENT * (3 - l[0, 1]) / 4
    torch.testing.assert_close(raycast.shaded(c, no, -l, l, yes), dark)
    torch.testing.assert_close(raycast.shaded(c, no, l, l, no), c * raycast.AMBIENT * (3 + l[0, 1]) / 4)
    back = torch.tensor(raycast.BACK).double() / math.hypot(*raycast.BACK)
    n, v = torch.tensor([UP]).double(), torch.tensor([[0, back[1], -back[2]]])  # the window is mirrored to the eye
    gloss = raycast.shaded(c, yes, n, v, no) - raycast.shaded(c, no, n, v, no)
    torch.testing.assert_close(gloss, torch.full((1, 3), raycast.GLOSS[1]).double())
    key = raycast.shaded(c, yes, l, l, yes) - raycast.shaded(c, no, l, l, yes)
    half = (l[0] @ torch.nn.functional.normalize(back + l[0], dim=0)) ** raycast.POLISH * raycast.GLOSS[1]
    torch.testing.assert_close(key, (raycast.GLOSS[0] + half).expand(1, 3))


def test_the_shadow_of_a_sphere_on_the_ground_is_what_its_light_does_not_reach():
    r, solids = 0.9, one("sphere", r=0.9)
    x, z = torch.meshgrid(torch.linspace(-4, 4, 60), torch.linspace(-4, 4, 60), indexing="ij")
    ground = torch.stack([x.flatten(), torch.zeros(3600), z.flatten()], 1)
    dark = raycast.shadowed(solids, ground[None], torch.zeros(1, 3600).long())[0]
    away = ground.double() - torch.tensor([0.3, r, -0.4])
    distance = (away - (away @ LIGHT)[:, None] * LIGHT).norm(dim=1)  # from the line to the light through the centre
    assert torch.equal(dark, distance < r) and dark.any()
    assert away[dark].mean(0)[0] > 0.5 and away[dark].mean(0)[2] > 0.3  # to the right and behind
    assert not raycast.shadowed(solids, ground[None], torch.ones(1, 3600).long()).any()  # a solid's own is its shading


def test_shadows_lights_and_highlights_are_in_the_picture():
    (matt,), (shiny,) = (raycast.seen(one("sphere", shiny=s), 48).picture.int() for s in (False, True))
    _, masks = raycast.surfaces(one("sphere"), 48)
    there, rows, columns = masks[0, 1], *torch.meshgrid(torch.arange(48), torch.arange(48), indexing="ij")
    red = matt[0] * there
    assert (columns * red).sum() / red.sum() < (columns * there).sum() / there.sum() - 0.3  # brighter on the left
    assert (rows * red).sum() / red.sum() < (rows * there).sum() / there.sum() - 0.3  # and above
    assert shiny[1][there].max() > 180 > 90 > matt[1][there].max()  # white on red
    ground = matt[:, masks[0, 0]]
    assert ground[0].min() < 0.6 * ground[0].max()
    assert torch.equal(matt[:, ~there][:, :40], shiny[:, ~there][:, :40])


# ---------------------------------------------------------------------------------------------------- the scenes


def test_masks_part_the_picture_and_show_every_solid(layout, view):
    assert view.picture.shape == (150, 3, 32, 32) and view.masks.shape == (150, 5, 32, 32)
    assert (view.masks.sum(1) == 1).all()
    area, there = view.masks[:, 1:].sum((2, 3)), layout.attributes[..., 0] >= 0
    assert ((area > 0) == there).all() and area[there].min() >= 4 and area[there].float().quantile(0.05) >= 8
    assert {int(n) for n in there.sum(1)} == {2, 3, 4}
    depth, masks = scenes.surfaces(scenes.solids_of(layout), 32)
    assert torch.equal(depth, view.depth) and torch.equal(masks, view.masks)
    told = 1 - 2 * (depth - scenes.NEAR) / (scenes.FAR - scenes.NEAR)
    assert told.abs().max() <= 1 and told.max() - told.min() > 1.5


def test_the_nearer_solid_is_seen_in_whatever_order_they_are_given(layout, view):
    solids = scenes.solids_of(layout.rows(slice(40)))
    turned = raycast.seen(Solids(*(values.flip(1) for values in solids[:5])), 32)
    assert torch.equal(turned.depth, view.depth[:40]) and torch.equal(turned.picture, view.picture[:40])
    assert torch.equal(turned.masks[:, 1:].flip(1), view.masks[:40, 1:])
    alone = torch.stack([raycast.surfaces(Solids(*(v[:, s : s + 1] for v in solids[:5])), 32)[0] for s in range(4)])
    assert torch.equal(alone.amin(0), turned.depth)


def test_no_solid_reaches_beyond_the_picture(layout, monkeypatch):
    """A camera that sees an eighth more on all sides sees them no larger."""
    inner = raycast.surfaces(scenes.solids_of(layout), 64)[1][:, 1:].sum((2, 3))
    monkeypatch.setattr(raycast, "SPREAD", SPREAD * 72 / 64)
    assert torch.equal(raycast.surfaces(scenes.solids_of(layout), 72)[1][:, 1:].sum((2, 3)), inner)


def test_relations_are_those_of_the_masks(layout):
    _, masks = scenes.surfaces(scenes.solids_of(layout), 48)
    masks = masks[:, 1:].double()
    at = [(masks.sum(axis) * torch.arange(48)).sum(2) / masks.sum((2, 3)) for axis in (2, 3)]  # (N, 4): column, row
    seen = set()
    for row, relations in enumerate(layout.relations.tolist()):
        for other, relation in enumerate(relations, 1):
            if relation < 0:
                continue
            (column_1, column_2), (row_1, row_2) = (values[row, [0, other]].tolist() for values in at)
            right, down = column_2 - column_1, row_2 - row_1
            assert [right > 0, right < 0, down < 0, down > 0][relation]
            x, z = (layout.places[row, other] - layout.places[row, 0])[:2].tolist()
            assert [x, -x, z, -z][relation] >= math.cos(scenes.ASIDE) * math.hypot(x, z) - 1e-9
            seen.add(relation)
    assert seen == {0, 1, 2, 3}


def test_what_is_red_is_red_and_what_is_large_is_larger(layout, view):
    for number, (name, pure) in enumerate(COLOURS.items()):
        scene, solid = (layout.attributes[..., 0] == number).nonzero()[0].tolist()
        mean = view.picture[scene][:, view.masks[scene, 1 + solid]].float().mean(1)
        hue = torch.tensor(pure) - sum(pure) / 3
        assert (mean - mean.mean()) @ hue > 0.5 * mean.std() * hue.norm() or name == "white"
    size, there = layout.attributes[..., 2], layout.attributes[..., 0] >= 0
    area = view.masks[:, 1:].sum((2, 3)).float()
    assert area[there & (size == 1)].mean() > 2 * area[there & (size == 0)].mean()


def test_no_two_solids_agree_and_all_values_occur(layout):
    pair = layout.attributes[..., 0] * len(SHAPES) + layout.attributes[..., 1]
    for row in pair.tolist():
        there = [value for value in row if value >= 0]
        assert len(set(there)) == len(there)
    for column, names in enumerate(scenes.NAMES):
        assert set(layout.attributes[..., column].flatten().tolist()) == {-1, *range(len(names))}


def checksum(layout: Layout, n: int) -> str:
    return hashlib.sha256(layout.attributes[:n].numpy().astype("<i8").tobytes()).hexdigest()[:12]


def test_scenes_are_those_of_their_seed_and_the_first_are_the_same(monkeypatch):
    long = drawn(5, seed=3)
    assert checksum(long, 5) == "a802945653aa"
    monkeypatch.setattr(scenes, "BLOCK", 20)
    long, short, other = drawn(30, (2, 3), 3), drawn(13, (2, 3), 3), drawn(30, (2, 3), 4)
    assert all(torch.equal(a[:13], b) for a, b in zip(long, short, strict=True))
    assert not torch.equal(long.attributes, other.attributes)
    assert not torch.equal(long.attributes[:10], long.attributes[20:])


def test_given_scenes_are_placed_as_they_say_and_drawn():
    scene = arranged(parse("a red cube behind a large blue cone and left of a small shiny white sphere"), seed=2)
    assert caption(scene, "colour") == "a red cube behind a blue cone and left of a white sphere"
    assert scene.solids[1].size == 1 and scene.solids[2][2:] == (0, 1) and scene.places is not None
    (x_1, z_1, _), (_, z_2, _), (x_3, _, _) = scene.places
    assert z_1 > z_2 and x_1 < x_3
    assert arranged(scene, 2).solids == scene.solids and arranged(parse(caption(scene)), 3).places != scene.places
    assert torch.equal(scenes.render([scene], 16).picture, scenes.render(Layout.of([scene]), 16).picture)
    with pytest.raises(ValueError, match="needs all sizes, materials and places; see `arranged`"):
        scenes.render([parse("a red cube left of a blue cube")], 16)
    crowd = ", left of a ".join(f"large matt {colour} cube" for colour in ("red", "blue", "green"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="no room was found for a large matt"):
        patch.setattr(scenes, "ROUNDS", 2)
        patch.setattr(scenes, "DEEP", 0.0)
        arranged(parse(f"a {crowd} and behind a large matt white cube".replace(", left", " left", 1)))


# -------------------------------------------------------------------------------------------------- the words


def test_captions_say_what_there_is():
    two = Scene((Solid(0, 0, 0, 0), Solid(5, 1, 1, 1)), (0,))
    assert caption(two) == "a small matt red sphere left of a large shiny blue cube"
    assert caption(two, "size") == "a small red sphere left of a large blue cube"
    assert caption(two, "colour") == "a red sphere left of a blue cube"
    four = Scene((Solid(1, 3), Solid(0, 1), Solid(3, 2), Solid(7, 0)), (3, 1, 2))
    words = "an orange cone behind a red cube, right of a green cylinder and in front of a white sphere"
    assert caption(four) == words and parse(words) == four
    with pytest.raises(ValueError, match="2 solids and 2 relations"):
        caption(two._replace(relations=(0, 1)))
    with pytest.raises(ValueError, match="wording='every': choose one of all, size, colour"):
        caption(two, "every")


def test_every_caption_is_read_back(layout):
    for n in range(150):
        scene = layout.scene(n)
        unplaced = scene._replace(places=None)
        assert parse(caption(scene)) == unplaced
        for wording, kept in (("size", 3), ("colour", 2)):
            said = parse(caption(scene, wording))
            assert said == unplaced._replace(solids=tuple(Solid(*solid[:kept]) for solid in scene.solids))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a redd cube left of a blue cube", "'redd' is not known, or one word too many; .* did you mean red?"),
        ("a red green cube left of a blue cube", "'green' is not known, or one word too many"),
        ("a red left of a blue cube", "a colour and a shape are needed"),
        ("a red cube", "1 solids and 0 relations"),
        ("an red cube left of a blue cube", "one like it is 'a red cube left of a blue cube'"),
        ("a red small cube left of a blue cube", "one like it is 'a small red cube left of a blue cube'"),
        ("a red cube left of a blue cube behind a green cone", "one like it is 'a red cube left of a blue cube and b"),
        ("", "a colour and a shape are needed"),
    ],
)
def test_what_is_no_caption(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


@pytest.mark.parametrize("wording", ["colour", "size"])
def test_combinations_are_as_many_as_there_are_captions(wording):
    pairs = itertools.permutations(itertools.product(range(len(COLOURS)), range(len(SHAPES))), 2)
    sizes = [(None, None)] if wording == "colour" else list(itertools.product((0, 1), (0, 1)))
    said = {
        caption(Scene((Solid(*one, a), Solid(*other, b)), (relation,)), wording)
        for one, other in pairs
        for a, b in sizes
        for relation in range(4)
    }
    assert len(said) == combinations(2, wording) == {"colour": 3_968, "size": 15_872}[wording]
    assert combinations(2) == 63_488 and combinations(3, "colour") == 32 * 31 * 30 * 16


# ------------------------------------------------------------------------------------------------------ data


def test_samples_have_their_picture_and_their_caption(few, capsys, tmp_path):
    data = few(solids=[2, 4], image_size=16)
    assert (data.name, data.split, data.shape, data.labels) == ("scenes", "all", (3, 16, 16), None)
    assert len(data.captions) == 60 == len(data) and all(len(parse(text).solids) in (2, 4) for text in data.captions)
    scene = data.layout.scene(7)
    assert caption(scene) == data.captions[7]
    assert torch.equal(scenes.render([scene], 16).picture[0], data.images[7])
    assert "drawing 60 scenes, once" in capsys.readouterr().out
    again = few(solids=[4, 2], image_size=16, wording="colour")
    assert capsys.readouterr().out == "" and torch.equal(again.images, data.images)
    assert again.captions[7] == caption(scene, "colour") and again.identity()["sha256"] == data.identity()["sha256"]
    assert again.identity()["captions"] != data.identity()["captions"]
    assert len(list((tmp_path / "scenes").iterdir())) == 1
    assert few(image_size=16).identity()["sha256"] != data.identity()["sha256"]
    assert few(image_size=[8, 16], channels=1, seed=1).shape == (1, 8, 16)


def test_held_out_pairs_are_nowhere_in_training(few):
    data = few(without=["red cube", "blue cone"], solids=3)

    def shows(number: int) -> bool:
        return any((solid.colour, solid.shape) in ((0, 1), (5, 3)) for solid in data.layout.scene(number).solids)

    barred = [number for number in range(60) if shows(number)]
    assert 3 < len(barred) < 30 and data.composed.tolist() == barred
    assert not any("red cube" in data.captions[n] or "blue cone" in data.captions[n] for n in data.train.tolist())
    assert torch.equal(torch.cat([data.train, data.held_out]).sort().values, torch.arange(60))
    assert len(data.held_out) == len(barred) + round(0.1 * (60 - len(barred)))
    assert set(barred) < set(data.held_out.tolist())
    assert few(without=["red cube", "blue cone"], solids=3, validation=0).held_out.tolist() == barred
    other, plain = few(without=["blue cone", "red cube"], solids=3), few(solids=3)
    assert data.identity() == other.identity() and data.identity() != plain.identity()
    assert data.identity()["without"] == ["red cube", "blue cone"] and "without" not in plain.identity()
    assert not len(plain.composed) and data.captions == plain.captions
    every = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    with pytest.raises(ValueError, match="every one of 60 scenes shows one of them"):
        few(without=every)


def test_a_network_is_told_of_depths_and_masks(few):
    numbers = torch.tensor([5, 2, 59])
    data = few(condition="depth", image_size=[16, 24])
    depth, masks = data.surfaces(numbers)
    told = data.batch(numbers).condition.image
    assert told.shape == (3, 1, 16, 24)
    torch.testing.assert_close((1 - told) / 2 * (scenes.FAR - scenes.NEAR) + scenes.NEAR, depth)
    told = few(condition="masks", image_size=[16, 24]).batch(numbers).condition.image
    assert torch.equal(told == 1, masks[:, 1:]) and torch.equal(told.unique(), torch.tensor([-1.0, 1]))
    assert (told[:, 2:] == -1).all() and (masks[:, 1:3].sum((2, 3)) > 0).all()
    assert few(condition="edges").batch(numbers).condition.image.shape == (3, 1, 8, 8)
    square, wide = scenes.render(data.layout, 24), scenes.render(data.layout, (16, 24))
    assert torch.equal(square.masks[:, :, 4:20], wide.masks)


def test_an_augmentation_is_refused_that_moves_what_is_measured(few):
    config = OmegaConf.create({"augment": {"_target_": "ddpm.data.augment.Augment", "rotation": 8}})
    for condition in (None, "edges"):
        assert augmentation(config, [], few(condition=condition)).active
    with pytest.raises(InvalidInput, match=r"data\.condition=depth; set augment=none"):
        augmentation(config, [], few(condition="depth"))
    assert augmentation(OmegaConf.create({"augment": None}), [], few(condition="depth")) is None


def test_a_network_has_channels_for_what_it_is_told():
    for kind, channels in (("depth", 1), ("masks", 4), ("gray", 1), ("deep", 0)):
        assert _condition_channels(kind, 3) == channels


def test_encoded_scenes_keep_their_captions(few):
    class Codec:
        kind, of, shape = "maps", (3, 8, 8), (1, 2, 2)

        def fit(self, posterior: Tensor) -> "Codec":
            return self

    data = few()
    assert Encoded(data, Codec(), torch.zeros(60, 1, 2, 2)).captions == data.captions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "train"}, "split='train': choose one of auto"),
        ({"image_size": 7}, "scenes are drawn at 8 pixels and more"),
        ({"channels": 2}, "channels=2"),
        ({"count": 0}, "count=0 must be an integer >= 1"),
        ({"count": 10**7}, "count=10000000 must be at most 1,000,000"),
        ({"count": 10**6, "image_size": 10**4}, "of memory are available"),
        ({"seed": -1}, "seed=-1"),
        ({"flip": True}, "flip=True: a mirror image swaps left of and right of"),
        ({"solids": 5}, r"solids=5: give 2, 3 or 4, or a list"),
        ({"solids": [2, 2]}, "solids="),
        ({"solids": []}, "solids="),
        ({"solids": "2"}, "solids="),
        ({"wording": "none"}, "wording='none': choose one of all, size, colour"),
        ({"without": ["redd cube"]}, "without has 'redd cube': .* did you mean red cube?"),
        ({"without": [3]}, "without has 3"),
        ({"condition": "deep"}, "condition='deep': choose one of mask, low_resolution, gray, edges, depth, masks"),
    ],
)
def test_options_that_are_refused(few, options, message):
    with pytest.raises(ValueError, match=message):
        few(**options)
