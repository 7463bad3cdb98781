"""models/reader.py, ddpm/metrics/reader.py: what places say, the loss by hand, relations as scenes have them."""

import math

import pytest
import torch
from torch import Tensor, nn

from ddpm.data import scenes
from ddpm.data.scenes import PAIRS, RELATIONS, Layout, drawn, render
from ddpm.figures.images import to_float
from ddpm.metrics import reader
from ddpm.metrics.reader import (
    UNIT,
    Facts,
    Reading,
    facts_of,
    pair_of,
    read,
    reader_loss,
    reader_of,
    relation_between,
    seen,
    train_reader,
)
from models.reader import Reader

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def layout() -> Layout:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "BLOCK", 40)
        return drawn(40, (2, 3, 4), seed=3)


def true(layout: Layout) -> Reading:
    """What a reader says that is never wrong, and sure of it."""
    facts = facts_of(layout)
    return Reading(*(20 * (2 * values - 1) for values in facts[:3]), facts.place)


class Says(nn.Module):
    """The same maps (1, K (1 + J), H, W), whatever there is to see."""

    def __init__(self, maps: Tensor):
        super().__init__()
        self.maps = maps

    def forward(self, x: Tensor) -> Tensor:
        return self.maps.expand(len(x), -1, -1, -1)


@pytest.mark.equation("Reader (places)")
def test_what_is_said_of_a_thing_is_what_the_places_say_that_speak_of_it():
    network = Reader((8, 4), 1, things=2, facts=3, channels=4, blocks=1).eval()
    maps = torch.randn(1, 8, 2, 1, generator=torch.Generator().manual_seed(0))
    network.says = Says(maps)
    said = network(torch.zeros(3, 1, 8, 4))
    assert said.shape == (3, 2, 4) and torch.equal(said[0], said[2])
    for k in range(2):
        e = [math.exp(maps[0, 4 * k, p, 0]) for p in range(2)]
        assert said[0, k, 0].item() == pytest.approx(math.log(sum(e)))
        for j in range(1, 4):
            m = [maps[0, 4 * k + j, p, 0].item() for p in range(2)]
            assert said[0, k, j].item() == pytest.approx((e[0] * m[0] + e[1] * m[1]) / sum(e), rel=1e-5)


def test_a_reader_takes_any_size_and_refuses_another():
    for size in ((9, 7), 8):
        network = Reader(size, 3, things=5, facts=2, channels=4, blocks=2).eval()
        assert network(torch.zeros(2, *network.image_shape)).shape == (2, 5, 3)
        with pytest.raises(ValueError, match="takes pictures of shape"):
            network(torch.zeros(2, 3, 16, 16))
    with pytest.raises(ValueError, match="at least 1, not"):
        Reader(8, channels=0)


def test_a_reader_knows_where_it_sees_something():
    """The same spot moved within a picture is said of otherwise: places are told to the network."""
    torch.manual_seed(0)
    network = Reader(16, 1, things=1, facts=1, channels=4, blocks=1).eval()
    near, far = (torch.zeros(1, 1, 16, 16) for _ in range(2))
    near[..., 6, 6], far[..., 6, 10] = 1, 1
    assert not torch.allclose(network(near), network(far), atol=1e-4)


@pytest.mark.equation("Reader (loss)")
def test_the_loss_of_a_hand_made_picture():
    """One solid of pair 5, which the network doubts, and one that it sees though it is not there."""
    presence, others = torch.full((1, PAIRS), -50.0), torch.zeros(1, PAIRS)
    presence[0, 5], presence[0, 9] = 0.5, 1.5
    reading = Reading(presence, others.clone(), others.clone(), torch.zeros(1, PAIRS, 2))
    reading.size[0, 5], reading.material[0, 5], reading.place[0, 5] = 0.7, -1.2, torch.tensor([1.0, -2.0])
    facts = Facts(*(torch.zeros(1, PAIRS) for _ in range(3)), torch.zeros(1, PAIRS, 2))
    facts.present[0, 5], facts.size[0, 5], facts.place[0, 5] = 1, 1, torch.tensor([0.5, 1.0])
    there = math.log(1 + math.exp(0.5)) - 0.5 + math.log(1 + math.exp(1.5))
    like = math.log(1 + math.exp(0.7)) - 0.7 + math.log(1 + math.exp(-1.2))
    place = (0.5**2 + 3**2) / UNIT**2
    assert reader_loss(reading, facts).tolist() == pytest.approx([there + like + place])
    reading.size[0, 9], reading.material[0, 9], reading.place[0, 9] = 8.0, 8.0, torch.tensor([8.0, 8.0])
    assert reader_loss(reading, facts).tolist() == pytest.approx([there + like + place])  # of what is not there


def test_facts_are_those_of_the_layout(layout):
    facts = facts_of(layout)
    for row in range(40):
        scene = layout.scene(row)
        pairs = [4 * solid.colour + solid.shape for solid in scene.solids]
        assert facts.present[row].nonzero()[:, 0].tolist() == sorted(pairs)
        for pair, solid, place in zip(pairs, scene.solids, scene.places, strict=True):
            assert (facts.size[row, pair], facts.material[row, pair]) == (solid.size, solid.material)
            assert facts.place[row, pair].tolist() == pytest.approx(place[:2])


@pytest.mark.equation("Relation (nearest axis)")
def test_relations_are_those_that_scenes_are_drawn_by(layout):
    for of_some in (drawn(2000, seed=5), layout):
        first, others = of_some.places[:, :1, :2], of_some.places[:, 1:, :2]
        there = of_some.relations >= 0
        assert torch.equal(relation_between(first, others)[there], of_some.relations[there])
        assert there[:, 0].all() and there.any(0).all() == (of_some is layout)
    named = [RELATIONS[relation_between(torch.zeros(2), torch.tensor(q))] for q in [(2.0, 1), (-2.0, 1), (1.0, 2)]]
    assert named == ["left of", "right of", "in front of"]


def test_a_picture_is_read_as_its_most_probable_pairs(layout):
    reading = true(layout)
    for row in range(40):
        scene = layout.scene(row)
        found = seen(reading, row, len(scene.solids))
        assert set(found.pair) == {4 * solid.colour + solid.shape for solid in scene.solids}
        for pair, size, material, place in zip(*found, strict=True):
            (solid,) = (i for i, s in enumerate(scene.solids) if 4 * s.colour + s.shape == pair)
            assert (size, material) == scene.solids[solid][2:] and place.tolist() == pytest.approx(
                scene.places[solid][:2]
            )
    assert seen(reading, 0, 1).pair[0] in seen(reading, 0, 2).pair


def test_pictures_are_read_as_files_hold_them_with_places_in_the_world():
    network = Reader(8, channels=4, blocks=1).eval()
    x = to_float(torch.randint(0, 256, (3, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8))
    reading = read(network, x)
    assert all(torch.equal(a, b) for a, b in zip(reading, read(network, x + 1e-4), strict=True))
    said = network(x)
    torch.testing.assert_close(reading.place, UNIT * said[..., 3:])
    torch.testing.assert_close(torch.stack(reading[:3], -1), said[..., :3])


def test_a_reader_is_trained_once_by_its_seed_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "BLOCK", 40)
    told: list[str] = []

    def made(folder: str, **options: int) -> tuple[str, nn.Module]:
        torch.manual_seed(1)
        network, asked = Reader(8, channels=4, blocks=1), {"count": 40, "epochs": 2} | options
        return reader_of(network, (8, 8), (2,), tmp_path / folder, **asked, say=told.append), network

    name, network = made("a")
    (file,) = (tmp_path / "a").glob("*.safetensors")
    assert file.name.startswith("reader-8x8-solids2-40x2-") and not network.training and len(told) == 3
    monkeypatch.setattr(reader, "train_reader", None)  # no second time
    assert made("a")[0] == name
    monkeypatch.undo()
    monkeypatch.setattr(scenes, "BLOCK", 40)
    assert made("b")[0] == name
    paths = {
        reader.reader_path(network, (8, 8), (2,), tmp_path, 40, 2),
        reader.reader_path(Reader(8), (8, 8), (2,), tmp_path, 40, 2),
    }
    paths |= {
        reader.reader_path(network, size, solids, tmp_path, 40, 3)
        for size, solids in (((8, 8), (2,)), ((8, 8), (2, 3)))
    }
    assert len(paths) == 4 and file.name in {path.name for path in paths}
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="remove it to have the reader trained anew"):
        made("a")
    with pytest.raises(ValueError, match="as many pictures as scenes"):
        train_reader(network, drawn(3), torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


@pytest.mark.slow
def test_a_reader_that_is_trained_shortly_reads_well_above_chance():
    layout, held_out = drawn(3000, seed=1), drawn(300, seed=2)
    pictures, others = (render(scenes_of, 16).picture for scenes_of in (layout, held_out))
    torch.manual_seed(0)
    network = train_reader(Reader(16), layout, pictures, epochs=8)
    reading = read(network, to_float(others))
    pair = pair_of(held_out.attributes[:, :2, 0], held_out.attributes[:, :2, 1])
    right = (reading.presence.topk(2).indices.sort(1).values == pair.sort(1).values).all(1).double().mean()
    rows = torch.arange(300)[:, None]
    place = reading.place[rows, pair]
    relation = (relation_between(place[:, 0], place[:, 1]) == held_out.relations[:, 0]).double().mean()
    assert right > 0.2 and relation > 0.6  # by chance 0.002 and 0.25
