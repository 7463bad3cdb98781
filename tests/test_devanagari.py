"""Characters drawn from fonts: shaped, within bounds, the same again; by a font made here, and by installed ones."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.path import Path as Outline

from ddpm.config import compose, resolved, science
from ddpm.data import Devanagari, devanagari, glyphs
from ddpm.data.devanagari import CHARACTERS, CLASSES, GLYPHS, Variation, draw, names_of, styles, vary
from ddpm.data.splines import basis, field
from ddpm.diffusion import GaussianDiffusion
from ddpm.randomness import generator
from ddpm.samplers import DDIM
from ddpm.schedules import cosine
from ddpm.sources.trained import TrainedSampler
from ddpm.training.cost import gflop
from ddpm.training.task import must_take
from models.unet import UNet

LIGATURES = {"kssa": "क्ष", "tra": "त्र", "jnya": "ज्ञ"}


OTHERS = [(1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (0, 2), (1, 2)]


def pattern(number: int) -> list[tuple[int, int]]:
    """Cells (column, row) of a 3x3 board that a glyph fills: two opposite corners, and others by its number's bits."""
    return [(0, 0), (2, 2), *(cell for i, cell in enumerate(OTHERS) if number >> i & 1)]


def make_font(path: Path, ligatures: bool = True, without: str = "") -> Path:
    """A font whose letters are patterns of squares; its conjuncts are ligatures, or fall apart."""
    letters = sorted({letter for text in GLYPHS for letter in text} - set(without))
    names = {letter: f"u{ord(letter):04X}" for letter in letters}
    order = [".notdef", *names.values(), *LIGATURES]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(order)
    builder.setupCharacterMap({ord(letter): name for letter, name in names.items()})
    drawn = {}
    for number, name in enumerate(order):
        pen = TTGlyphPen(None)
        for column, row in pattern(number):
            x, y = 300 * column, 300 * row
            pen.moveTo((x, y))
            for corner in ((x, y + 300), (x + 300, y + 300), (x + 300, y)):
                pen.lineTo(corner)
            pen.closePath()
        drawn[name] = pen.glyph()
    builder.setupGlyf(drawn)
    builder.setupHorizontalMetrics({name: (1000, 0) for name in order})
    builder.setupHorizontalHeader(ascent=900, descent=0)
    builder.setupOS2()
    builder.setupPost()
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    if ligatures:
        rules = [f"sub {' '.join(names[c] for c in text)} by {name};" for name, text in LIGATURES.items()]
        builder.addOpenTypeFeatures(
            f"languagesystem DFLT dflt; languagesystem dev2 dflt; feature akhn {{ {' '.join(rules)} }} akhn;"
        )
    builder.save(path)
    return path


@pytest.fixture(scope="module")
def font(tmp_path_factory) -> Path:
    return make_font(tmp_path_factory.mktemp("fonts") / "squares.ttf")


@pytest.fixture(scope="module")
def source(font, tmp_path_factory):
    """Builds a source from the one font, kept in a folder of its own."""
    root = tmp_path_factory.mktemp("data")
    return lambda **options: Devanagari(**{"root": root, "fonts": font.parent, "count": 100} | options)


# ---------------------------------------------------------------------------------------------------------- glyphs


def test_a_font_draws_all_characters_or_is_left_out(tmp_path):
    whole = make_font(tmp_path / "whole.ttf")
    apart = make_font(tmp_path / "apart.ttf", ligatures=False)  # a conjunct would be two letters and a virama
    lacking = make_font(tmp_path / "lacking.ttf", without="ह")
    (tmp_path / "no_font.ttf").write_bytes(b"no font")
    fonts = glyphs.font_files(tmp_path)
    assert sorted(fonts) == sorted([whole, apart, lacking, tmp_path / "no_font.ttf"])
    assert glyphs.fonts_with(GLYPHS, fonts) == [whole]
    assert glyphs.fonts_with(GLYPHS[:33], fonts) == [apart, whole]
    with pytest.raises(ValueError, match=r"apart\.ttf does not draw each of these texts as one glyph"):
        glyphs.distances(apart, GLYPHS)


def test_a_conjunct_is_drawn_as_its_ligature(font):
    """Its pattern is that of the ligature's glyph, the 3 last of the font, and of no letter."""
    distance = glyphs.distances(font, GLYPHS)
    order = [".notdef", *sorted({c for text in GLYPHS for c in text}), *LIGATURES.values()]
    for text in ("क", "ह", *LIGATURES.values()):
        ink = distance[GLYPHS.index(text)] > 0
        expected = torch.zeros(3, 3, dtype=torch.bool)
        for column, row in pattern(order.index(text)):
            expected[2 - row, column] = True  # a font's rows run upwards
        cell = glyphs.SIDE * glyphs.LETTER / 3
        at = [round(glyphs.SIDE / 2 + (i - 1) * cell) for i in range(3)]
        assert torch.equal(ink[at][:, at], expected), text


def test_distances_are_those_to_the_edge():
    """Of a square, however large in the font's units: half its side is LETTER."""
    square = Outline([(100, 100), (100, 900), (900, 900), (900, 100), (100, 100)], [1, 2, 2, 2, 79])
    at = (torch.arange(glyphs.SIDE) + 0.5) * 2 / glyphs.SIDE - 1
    beyond = torch.stack(torch.meshgrid(at.abs(), at.abs(), indexing="ij")) - glyphs.LETTER
    expected = -beyond.clamp(min=0).norm(dim=0) - beyond.amax(0).clamp(max=0)
    torch.testing.assert_close(glyphs._distance(square), expected, atol=1 / glyphs.SIDE, rtol=0)


# ------------------------------------------------------------------------------------------------------ variations


def test_splines_are_averages_and_hold_straight_lines():
    weights = basis(20, 4)
    assert weights.shape == (20, 7) and (weights >= 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(20))
    at = (torch.arange(20) + 0.5) / 20 * 4
    torch.testing.assert_close(weights @ (torch.arange(7.0) - 1), at)  # coefficient k lies at node k - 1
    bend = field(torch.ones(2, 2, 7, 7) * torch.tensor([[1.0, -2], [3, 4]])[..., None, None], 5, 9)
    assert bend.shape == (2, 2, 5, 9)
    torch.testing.assert_close(bend[0, 1], torch.full((5, 9), -2.0))
    rough = 2 * torch.rand(50, 2, 7, 7) - 1
    assert field(rough, 30, 30).abs().max() <= 1


def test_variations_stay_within_their_bounds():
    drawn = Variation.drawn(4000, generator(0, "test"))
    assert devanagari.STROKE[0] <= drawn.stroke.min() and drawn.stroke.max() <= devanagari.STROKE[1]
    assert drawn.bend.abs().max() <= devanagari.BENDING and drawn.size.min() >= devanagari.SMALLEST
    torch.testing.assert_close(drawn.map.det(), torch.ones(4000), atol=1e-5, rtol=0)  # area is kept
    along = torch.linalg.inv(drawn.map) @ torch.tensor([1.0, 0.0])  # where the head line goes: slant leaves it
    degrees = torch.atan2(along[:, 1], along[:, 0]).rad2deg()
    assert 9.9 < degrees.abs().max() <= devanagari.ROTATION + 1e-3
    stretch = along.norm(dim=1)
    assert 1.0 < stretch.max() ** 2 <= devanagari.STRETCH + 1e-4


def test_without_variation_a_square_is_a_square():
    """Distances of a square of half the side, at full size: it fills the room, and nothing else is white."""
    at = (torch.arange(96) + 0.5) / 48 - 1
    square = 0.5 - torch.maximum(at.abs()[:, None], at.abs())
    still = Variation(
        torch.zeros(1), torch.eye(2)[None], torch.zeros(1, 2, 7, 7), torch.ones(1), torch.full((1, 2), 0.5)
    )
    picture = vary(square[None], still, 32)
    expected = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    expected[..., 2:30, 2:30] = 255
    assert picture.dtype == torch.uint8 and torch.equal(picture[..., 3:29, 3:29], expected[..., 3:29, 3:29])
    assert (picture[..., :2, :] == 0).all() and (picture[..., 30:] == 0).all() and picture[0, 0, 2, 2:30].min() > 100
    thicker = vary(square[None] - 0.1, still._replace(stroke=torch.tensor([0.1])), 32)
    torch.testing.assert_close(thicker, picture, atol=1, rtol=0)  # the stroke's width is a level of the distance


# ---------------------------------------------------------------------------------------------------------- source


def test_images_have_their_margin_their_classes_and_their_size(source):
    data = source(count=200)
    assert (data.name, data.split, len(data), data.shape, data.classes) == (
        "devanagari", "train", 200, (1, 32, 32), CLASSES,
    )  # fmt: skip
    assert data.labels.tolist() == [i % 46 for i in range(200)]
    pictures = data.images[:, 0]
    assert not pictures[:, :2].any() and not pictures[:, 30:].any()
    assert not pictures[..., :2].any() and not pictures[..., 30:].any()
    inked = pictures > 0
    longest = torch.stack([last - first for first, last in map(devanagari._extent, (inked.any(1), inked.any(2)))]).amax(
        0
    )
    assert longest.min() >= 0.8 * 28 - 1 and longest.max() <= 28
    assert len(pictures.flatten(1).unique(dim=0)) == 200  # none twice
    small = source(count=46, image_size=[16, 20], channels=3)
    assert small.shape == (3, 16, 20)


@pytest.mark.slow
def test_an_image_depends_on_its_number_alone_and_not_on_the_count(source, font):
    few, many = source(count=60), source(count=1100)
    assert torch.equal(few.images, many.images[:60])
    assert torch.equal(many.images[1000:], draw([font], 1100, 32)[1000:])
    assert not torch.equal(few.images, source(count=60, seed=1).images)
    assert not torch.equal(few.images, source(count=60, split="test").images)
    assert few.identity()["sha256"] == source(count=60, split="train").identity()["sha256"]


def test_images_are_kept_and_damaged_ones_drawn_anew(font, tmp_path, capsys):
    options = {"root": tmp_path, "fonts": font.parent, "count": 50}
    first = Devanagari(**options).images
    (kept,) = (tmp_path / "devanagari").glob("*.safetensors")
    assert "drawing 50 characters from 1 fonts" in capsys.readouterr().out
    assert torch.equal(Devanagari(**options).images, first) and capsys.readouterr().out == ""
    kept.write_bytes(kept.read_bytes()[:1000])
    assert torch.equal(Devanagari(**options).images, first)
    assert "is damaged and will be made again" in capsys.readouterr().out


def test_images_that_cannot_be_kept_are_used_all_the_same(font, tmp_path, capsys):
    (tmp_path / "devanagari").write_text("a file where a folder should be")
    assert len(Devanagari(root=tmp_path, fonts=font.parent, count=3)) == 3
    assert "cannot be saved" in capsys.readouterr().out


def test_without_a_font_that_covers_them_the_error_says_where_there_is_one(tmp_path, monkeypatch):
    make_font(tmp_path / "apart.ttf", ligatures=False)
    with pytest.raises(FileNotFoundError, match=r"no font in .* that draws all 46 .* package fonts-deva"):
        Devanagari(root=tmp_path, fonts=tmp_path)
    monkeypatch.setattr(glyphs, "findSystemFonts", lambda: [])
    with pytest.raises(FileNotFoundError, match="no font is installed that draws all 46 Devanagari characters"):
        Devanagari(root=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no folder .*missing"):
        Devanagari(root=tmp_path, fonts=tmp_path / "missing")
    assert not (tmp_path / "devanagari").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count=0 must be an integer >= 1"),
        ({"count": 1.5}, "count=1.5 must be an integer >= 1"),
        ({"count": 1_000_001}, "count=1000001 must be at most 1,000,000"),
        ({"count": 10**6, "image_size": 10**4}, "of memory are available"),
        ({"seed": -1}, "seed=-1 must be an integer >= 0"),
        ({"image_size": 4}, "drawn at 8 pixels and more"),
        ({"split": "all"}, "split='all': choose one of auto, train, test"),
        ({"channels": 2}, "channels=2"),
    ],
)
def test_options_that_are_refused(source, options, message):
    with pytest.raises(ValueError, match=message):
        source(**options)


@pytest.mark.slow
def test_installed_fonts_draw_46_different_characters():
    """Only where there are such fonts; no two classes look alike in any of them."""
    fonts = glyphs.fonts_with(GLYPHS, glyphs.installed())
    if not fonts:
        pytest.skip("no installed font draws all characters (fonts-deva)")
    for font in fonts[:2]:
        ink = (glyphs.distances(font, GLYPHS) > 0).flatten(1).float()
        overlap = ink @ ink.mT / (ink.sum(1)[:, None] + ink.sum(1) - ink @ ink.mT)
        assert (overlap - torch.eye(46)).max() < 0.9, font
    assert draw(fonts[:2], 92, 32).float().mean() / 255 == pytest.approx(0.17, abs=0.06)


def test_labels_of_a_batch_are_those_of_the_table(source):
    data = source()
    y = data.batch(torch.arange(46, 92)).y
    assert y.tolist() == [character.label for character in CHARACTERS]
    assert all(b.label == a.label + 1 for a, b in pairwise(CHARACTERS))


# ------------------------------------------------------------------------------------------------------------ labels


@pytest.fixture(scope="module")
def two_fonts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    make_font(folder / "a.ttf")
    make_font(folder / "b.ttf")
    (folder / "b.ttf").write_bytes((folder / "b.ttf").read_bytes() + b"\0")
    return folder


def test_the_style_is_the_font_that_an_image_is_drawn_with(monkeypatch):
    """Letters that are full in one font and nothing in the other."""
    letters = {"full": torch.ones(46, 32, 32), "thin": -torch.ones(46, 32, 32)}
    letters["thin"][:, 14:18, 14:18] = 1
    monkeypatch.setattr(glyphs, "distances", lambda path, texts: letters[path.name])
    images = draw([Path("full"), Path("thin")], 1200, 16)
    ink = images.double().mean((1, 2, 3))
    style = styles(2, 1200)
    assert style.shape == (1200,) and 400 < style.sum() < 800
    assert torch.equal(styles(2, 7), style[:7]) and not torch.equal(styles(2, 1200, seed=1), style)
    assert not torch.equal(styles(2, 1200, stream="test"), style)
    spread = [ink[style == k] for k in (0, 1)]
    assert (spread[0].mean() - spread[1].mean()).abs() > 3 * max(s.std() for s in spread) / 400**0.5


def test_styles_are_called_as_the_fonts_files_are():
    files = ("Lohit-Devanagari.ttf", "Noto Sans[wdth,wght].ttf", "x/a.ttf", "y/a.ttf", "a.otf", "[].ttf")
    expected = ("Lohit-Devanagari", "Noto-Sans-wdth-wght", "a", "a-2", "a-3", "font")
    assert names_of([Path(file) for file in files]) == expected


@pytest.mark.slow
def test_a_sample_has_its_class_and_its_style(two_fonts, tmp_path):
    made = {"root": tmp_path, "fonts": two_fonts, "count": 100}
    plain, both = Devanagari(**made), Devanagari(**made, labels=["class", "style"])
    assert (plain.label_counts, both.label_counts) == ((46,), (46, 2))
    numbers = torch.tensor([3, 50, 99])
    batch = both.batch(numbers)
    expected = torch.stack([numbers % 46, styles(2, 100)[numbers]], 1)
    assert torch.equal(batch.condition.classes, expected) and torch.equal(batch.y, numbers % 46)
    assert plain.batch(numbers).condition.classes.tolist() == (numbers % 46).tolist()
    assert torch.equal(batch.x, plain.batch(numbers).x) and both.identity() == plain.identity()
    assert both.styles == ("a", "b") and plain.styles == ()
    of_b = both.of_labels([3, 5], [1])
    for part in (of_b.train, of_b.held_out):
        assert set((part % 46).tolist()) <= {3, 5} and (styles(2, 100)[part] == 1).all()
    some = both.of_labels(None, [0])
    assert len(some.train) + len(some.held_out) == (styles(2, 100) == 0).sum() and both.of_labels([], []) is both
    with pytest.raises(ValueError, match="devanagari has no styles"):
        plain.of_styles([0])
    with pytest.raises(ValueError, match=r"labels=\['style'\]: choose \[class\] or \[class, style\]"):
        Devanagari(**made, labels=["style"])

    unet = {"image_size": 32, "in_channels": 1, "channels": 4, "channel_mults": (1,), "blocks": 1, "groups": 2}
    unet |= {"attention_resolutions": ()}
    must_take(UNet(**unet, num_classes=[46, 2]), both)
    for counts, message in (
        (46, r"num_classes = 46, but a sample of devanagari has 2 of such labels; set model.num_classes=\[46,2\]"),
        ([46, 1], r"num_classes = \[46, 1\], but the data have 2 classes"),
    ):
        with pytest.raises(ValueError, match=message):
            must_take(UNet(**unet, num_classes=counts), both)
    with pytest.raises(ValueError, match=r"= \[46, 2\], but .* has 1 of such labels; set model.num_classes=46"):
        must_take(UNet(**unet, num_classes=[46, 2]), plain)
    drawing = TrainedSampler(
        GaussianDiffusion(cosine(4)), UNet(**unet, num_classes=[3, 2]), DDIM(1), (1, 32, 32), 0, torch.device("cpu")
    )
    assert drawing.condition(range(7)).classes.tolist() == [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1], [0, 0]]
    assert drawing.classes(range(4)).tolist() == [0, 1, 2, 0] and drawing.draw(range(2)).shape == (2, 1, 32, 32)
    assert gflop(UNet(**unet, num_classes=[3, 2]).to("meta"), (1, 32, 32)) > 0


def test_a_run_is_named_by_its_labels_and_as_ever_by_the_class():
    facts = [
        science(resolved(compose("train", ["data=devanagari", *words])), {}, {}, 1)
        for words in ([], ["data.labels=[class]"], ["data.labels=[class,style]"])
    ]
    assert facts[0] == facts[1] and "labels" not in facts[0]["data"]
    assert facts[2]["data"]["labels"] == ["class", "style"]
