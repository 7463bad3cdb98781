"""Emoji with captions: which are drawn, how, and what is held out; by a font made here, and by an installed one."""

import io
import re
from pathlib import Path

import emoji as names
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from fontTools.ttLib import newTable
from fontTools.ttLib.tables.sbixGlyph import Glyph
from fontTools.ttLib.tables.sbixStrike import Strike
from PIL import Image

from ddpm.data import Emoji
from ddpm.data.emoji import (
    CLASSES,
    RANGES,
    TONES,
    Named,
    bitmaps,
    caption,
    colour,
    distinct,
    draw,
    family,
    group,
    located,
    recommended,
    squared,
)

GRINNING, WAVE, ASTRONAUT, HEART, MONKEY, SQUARE = "😀", "👋", "🧑‍🚀", "❤️", "🐵", "⬜"
FRANCE, CLIPPERTON, NEWER = "🇫🇷", "🇨🇵", "🫩"
LIGHT, MEDIUM, DARK = TONES[0], TONES[2], TONES[4]
CLEAR = (0, 0, 0, 0)
BLUE, RED = (0, 0, 255, 255), (255, 0, 0, 255)
DRAWN = {  # text -> the colour of its bitmap; None for a glyph without one
    GRINNING: (250, 200, 50, 255), WAVE: (240, 190, 40, 255), WAVE + LIGHT: (250, 220, 200, 255),
    WAVE + MEDIUM: (180, 130, 90, 255), ASTRONAUT: (200, 200, 210, 255), HEART: RED, FRANCE: BLUE, CLIPPERTON: BLUE,
    NEWER: (1, 2, 3, 255), SQUARE: CLEAR, MONKEY: None,
}  # fmt: skip
SHOWN = [HEART, FRANCE, WAVE, WAVE + LIGHT, WAVE + MEDIUM, GRINNING, ASTRONAUT]  # in the order of their characters


def png(colour: tuple[int, int, int, int]) -> bytes:
    """A bitmap of 6x4 pixels, all of one colour but for the outermost column on either side, where nothing is."""
    picture, file = Image.new("RGBA", (6, 4), CLEAR), io.BytesIO()
    picture.paste(colour, (1, 0, 5, 4))
    picture.save(file, "PNG")
    return file.getvalue()


def make_emoji_font(path: Path, drawn: dict[str, tuple[int, int, int, int] | None] = DRAWN, sbix: bool = True) -> Path:
    """A font with a bitmap for each text, and for what is missing; those of several characters are ligatures.

    It has a glyph for each tone.
    """
    letters = sorted({letter for text in drawn for letter in text} | set(TONES))
    order = [".notdef", *(f"u{ord(letter):X}" for letter in letters)]
    order += [glyph_of(text) for text in drawn if len(text) > 1]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(order)
    builder.setupCharacterMap({ord(letter): f"u{ord(letter):X}" for letter in letters})
    builder.setupGlyf({name: TTGlyphPen(None).glyph() for name in order})
    builder.setupHorizontalMetrics({name: (1000, 0) for name in order})
    builder.setupHorizontalHeader(ascent=900, descent=0)
    builder.setupOS2()
    builder.setupPost()
    builder.setupNameTable({"familyName": "Colours", "styleName": "Regular"})
    whole = [text for text in drawn if len(text) > 1]
    rules = [f"sub {' '.join(f'u{ord(letter):X}' for letter in text)} by {glyph_of(text)};" for text in whole]
    builder.addOpenTypeFeatures(f"languagesystem DFLT dflt; feature ccmp {{ {' '.join(rules)} }} ccmp;")
    if sbix:
        table, strike = newTable("sbix"), Strike(ppem=100)
        for text, colour in drawn.items():
            if colour is not None:
                name = glyph_of(text)
                strike.glyphs[name] = Glyph(graphicType="png ", glyphName=name, imageData=png(colour))
        strike.glyphs[".notdef"] = Glyph(graphicType="png ", glyphName=".notdef", imageData=png((9, 9, 9, 255)))
        for name in order:
            strike.glyphs.setdefault(name, Glyph(glyphName=name))
        table.strikes[100] = strike
        builder.font["sbix"] = table
    builder.save(path)
    return path


def glyph_of(text: str) -> str:
    return "_".join(f"u{ord(letter):X}" for letter in text)


@pytest.fixture(scope="module")
def font(tmp_path_factory) -> Path:
    return make_emoji_font(tmp_path_factory.mktemp("fonts") / "colours.ttf")


@pytest.fixture(scope="module")
def source(font, tmp_path_factory):
    """Builds a source from the one font, kept in a folder of its own."""
    root = tmp_path_factory.mktemp("data")
    return lambda **options: Emoji(**{"root": root, "font": font, "image_size": 8} | options)


# ------------------------------------------------------------------------------------------------- names and groups


def test_captions_are_words():
    assert caption(":grinning_face:") == "grinning face"
    assert caption(":A_button_(blood_type):") == "A button (blood type)"
    found, newer = recommended()
    assert len({one.caption for one in found}) == len({one.text for one in found}) == len(found) > 3700
    assert all(one.caption.strip() and not set(":_") & set(one.caption) for one in found)
    fully = [facts for facts in names.EMOJI_DATA.values() if facts["status"] == names.STATUS["fully_qualified"]]
    assert len(found) + newer == len(fully)
    assert [one.text for one in found] == sorted(one.text for one in found)
    wave = next(one for one in found if one.text == WAVE + DARK)
    assert wave == Named(WAVE + DARK, "waving hand dark skin tone", CLASSES.index("people"), 1.0)


def test_without_skin_tones_no_text_asks_for_one():
    every, plain = ({one.text for one in recommended(tones)[0]} for tones in (True, False))
    toned = {text for text in every if set(TONES) & set(text)}
    assert plain == every - toned and len(toned) > 1500
    assert {family(text) for text in toned if "\u200d" not in text} <= {family(text) for text in plain}


def test_groups_are_those_of_the_first_character():
    members = (("😀", "smileys"), ("👋🏽", "people"), ("👩‍🚀", "people"), ("🐻‍❄️", "animals"), ("🍎", "food"),
               ("⛵", "travel"), ("🎨", "activities"), ("👑", "objects"), ("#️⃣", "symbols"), ("🏳️‍🌈", "flags"),
               ("🇳🇵", "flags"), ("👁️", "people"), ("👁️‍🗨️", "smileys"))  # fmt: skip
    assert {text: CLASSES[group(text)] for text, _ in members} == dict(members)
    assert group(NEWER) is None and group("\U0010fffd") is None
    spans = [[int(end, 16) for end in span.split("-")] for ranges in RANGES.values() for span in ranges.split()]
    ends = [end for span in sorted(spans) for end in (span[0], span[-1])]
    assert ends == sorted(ends) and all(a < b for a, b in zip(ends[1::2], ends[2::2], strict=False))  # none overlap


def test_groups_are_those_of_unicode():
    """Only where its file is, in Debian's package unicode-data."""
    file = Path("/usr/share/unicode/emoji/emoji-test.txt")
    if not file.is_file():
        pytest.skip("no emoji-test.txt (unicode-data)")
    title, count = "", 0
    for line in file.read_text(encoding="utf-8").splitlines():
        title = line.removeprefix("# group: ") if line.startswith("# group: ") else title
        match = re.match("([0-9A-F ]+); fully-qualified", line)
        if match:
            label = group("".join(chr(int(code, 16)) for code in match[1].split()))
            assert label is not None and CLASSES[label] == title.split()[0].lower(), line
            count += 1
    assert count > 3000


def test_a_family_is_an_emoji_in_all_its_tones():
    assert family(WAVE) == family(WAVE + LIGHT) == WAVE != family("✋")
    assert family("☝️") == family("☝🏽") and family("🧑🏻‍🤝‍🧑🏿") == family("🧑‍🤝‍🧑") != family("🧑")
    assert family(FRANCE) == FRANCE


# ------------------------------------------------------------------------------------------------------- from a font


def test_a_text_has_a_bitmap_where_the_font_draws_it_as_one(font):
    fallen = (WAVE + DARK, "🫶", MONKEY, GRINNING + GRINNING)  # apart, missing, without a bitmap, apart
    found = bitmaps(font, [*DRAWN, *fallen])
    assert found == [None if colour is None else png(colour) for colour in DRAWN.values()] + [None] * 4


def test_of_the_same_picture_the_one_that_came_first_stays():
    first, later, short, long = (
        Named(*facts) for facts in (("b", "France", 8, 0.6), ("a", "Chad", 8, 2), ("d", "No", 8, 2), ("c", "Yes", 8, 2))
    )
    alone, without = Named("e", "alone", 8, 1), Named("f", "without", 8, 1)
    kept, twice = distinct([later, first, long, short, alone, without], [b"1", b"1", b"2", b"2", b"3", None])
    assert list(kept.items()) == [(first, b"1"), (short, b"2"), (alone, b"3")] and twice == 2


def test_a_bitmap_loses_empty_margins_and_no_ink():
    inner, outer = Image.open(io.BytesIO(png(RED))), Image.new("RGBA", (6, 4), RED)
    assert squared(inner, (9, 9, 9)).tobytes() == bytes((255, 0, 0)) * 16  # 4x4
    padded = squared(outer, (9, 9, 9))
    rows = [bytes((9, 9, 9)) * 6] + [bytes((255, 0, 0)) * 6] * 4 + [bytes((9, 9, 9)) * 6]
    assert padded.size == (6, 6) and padded.tobytes() == b"".join(rows)
    for column in (0, 5):
        one_sided = inner.copy()
        one_sided.paste(RED, (column, 0, column + 1, 1))
        assert squared(one_sided, (9, 9, 9)).size == (6, 6)
        assert squared(one_sided.rotate(90, expand=True), (9, 9, 9)).size == (6, 6)
    tall = squared(outer.rotate(90, expand=True), (9, 9, 9))
    assert tall.tobytes() == padded.rotate(90).tobytes()
    nothing = squared(Image.new("RGBA", (6, 4), CLEAR), (9, 9, 9))
    assert set(nothing.tobytes()) == {9}


def test_what_shows_through_is_the_ground():
    drawn = draw([png((200, 100, 0, 255)), png((200, 100, 0, 51))], 8, (0, 50, 250))
    assert drawn.dtype == torch.uint8 and drawn.shape == (2, 3, 8, 8)
    for image, expected in zip(drawn, ((200, 100, 0), (40, 60, 200)), strict=True):  # 51 is a fifth of 255
        assert torch.equal(image, torch.tensor(expected, dtype=torch.uint8)[:, None, None].expand(3, 8, 8))
    with pytest.raises(ValueError, match="a bitmap of the font cannot be read"):
        draw([png(RED)[:60]], 8, (0, 0, 0))


def test_rows_of_an_image_run_downwards_and_channels_are_red_green_blue():
    picture, file = Image.new("RGBA", (4, 4), RED), io.BytesIO()
    picture.paste(BLUE, (0, 2, 4, 4))
    picture.save(file, "PNG")
    (image,) = draw([file.getvalue()], 4, (0, 0, 0))
    assert image[:, 0].T.tolist() == [[255, 0, 0]] * 4 and image[:, 3].T.tolist() == [[0, 0, 255]] * 4


# ------------------------------------------------------------------------------------------------------------ source


def test_samples_have_their_picture_their_caption_and_their_class(source):
    data = source()
    assert (data.name, data.split, data.shape, data.classes) == ("emoji", "all", (3, 8, 8), CLASSES)
    assert list(data.texts) == SHOWN
    assert data.captions == (
        "red heart", "France", "waving hand", "waving hand light skin tone", "waving hand medium skin tone",
        "grinning face", "astronaut",
    )  # fmt: skip
    assert [CLASSES[label] for label in data.labels] == ["smileys", "flags", *["people"] * 3, "smileys", "people"]
    for text, image in zip(data.texts, data.images, strict=True):
        assert torch.equal(image, torch.tensor(DRAWN[text][:3], dtype=torch.uint8)[:, None, None].expand(3, 8, 8))
    newer = recommended()[1]
    assert data.left_out == {
        "not in the font": len(recommended()[0]) - len(SHOWN) - 2,
        "same picture": 1,
        "nothing to see": 1,
        "of unknown group": newer,
    }


def test_options_change_what_is_drawn(source):
    assert source(skin_tones=False).texts == (HEART, FRANCE, WAVE, GRINNING, ASTRONAUT)
    assert source(image_size=[8, 12], channels=1).shape == (1, 8, 12)
    on_red = source(background="red")  # on which a red picture is none
    assert HEART not in on_red.texts and on_red.left_out["nothing to see"] == 2 and len(on_red) == len(SHOWN) - 1


def test_the_tones_of_an_emoji_are_held_out_together(tmp_path):
    """Of 20 hands in three tones each, and 20 animals."""
    found = [one for one in recommended()[0] if one.version < 1]
    hands = [one.text for one in recommended()[0] if one.text[1:] == LIGHT and one.version == 1][:20]
    alone = [one.text for one in found if CLASSES[one.label] == "animals" and len(one.text) == 1][:20]
    texts = [hand[0] + tone for hand in hands for tone in (LIGHT, MEDIUM, DARK)] + alone
    colours = {text: (number, 100, 200, 255) for number, text in enumerate(texts)}
    path = make_emoji_font(tmp_path / "hands.ttf", colours)
    data = Emoji(tmp_path, path, 8, validation=0.25)
    sides = [{family(data.texts[number]) for number in part.tolist()} for part in (data.train, data.held_out)]
    assert len(data) == 80 and not sides[0] & sides[1] and len(sides[0] | sides[1]) == 40
    assert torch.equal(torch.cat([data.train, data.held_out]).sort().values, torch.arange(80))
    assert 18 <= len(data.held_out) <= 20 and {len(text) for text in sides[1]} == {1}
    assert torch.equal(data.held_out, data.held_out.sort().values)
    for validation, sizes in ((0, (0,)), (1e-9, (1, 3)), (0.999, (77, 79))):
        train, held_out = data._divide(80, validation)
        assert len(held_out) in sizes and len(train) == 80 - len(held_out)


def toned(tmp_path: Path, **options: object) -> Emoji:
    """Twelve emoji, the first six of them in four of the tones."""
    hands = ["👋", "👌", "👍", "👎", "👏", "👐"]
    every = [hand + tone for hand in hands for tone in ("", *TONES[:4])] + ["😀", "😁", "😂", "😃", "😄", "😅"]
    font = tmp_path / "toned.ttf"
    if not font.exists():
        make_emoji_font(font, {text: (n, 255 - n, 7 * n % 251, 255) for n, text in enumerate(every)})
    return Emoji(tmp_path, font=font, image_size=8, **options)


def test_pairs_of_an_emoji_and_a_tone_are_held_out_while_both_are_seen_apart(tmp_path):
    before = toned(tmp_path)
    assert len(before.composed) == 0 and "without" not in before.identity()
    data = toned(tmp_path, without=3)
    assert len(data.composed) == 3 and data.identity()["without"] == [data.captions[n] for n in data.composed]
    assert torch.equal(data.held_out, torch.cat([before.held_out, data.composed]).sort().values)
    assert torch.equal(torch.cat([data.train, data.composed]).sort().values, before.train)
    seen = [data.texts[n] for n in data.train]
    for text in (data.texts[n] for n in data.composed):
        tone = next(letter for letter in text if letter in TONES)
        assert any(family(other) == family(text) and other != text for other in seen), "the emoji in another tone"
        assert any(tone in other for other in seen), "the tone of another emoji"
    assert len({family(data.texts[n]) for n in data.composed}) == 3
    assert len({letter for n in data.composed for letter in data.texts[n] if letter in TONES}) > 1
    assert torch.equal(data.composed, toned(tmp_path, without=3).composed)
    named = toned(tmp_path, without=["thumbs up light skin tone", "waving hand medium skin tone"])
    assert [named.captions[n] for n in named.composed] == named.identity()["without"]
    assert set(named.identity()["without"]) == {"thumbs up light skin tone", "waving hand medium skin tone"}
    assert not set(named.composed.tolist()) & set(named.train.tolist()) and len(named.held_out) > 2
    alone = toned(tmp_path, without=2, validation=0)
    assert torch.equal(alone.held_out, alone.composed)
    assert len(toned(tmp_path, without=[]).composed) == 0
    for wrong, said in (
        ({"without": ["thumbs up light skin"]}, "did you mean 'thumbs up light skin tone'"),
        ({"without": ["thumbs up"]}, "give emoji in one tone"),
        ({"without": 7}, "emoji that are trained on have tones; allowed: 0 to"),
        ({"without": -1}, "an integer >= 0"),
        ({"without": 1, "skin_tones": False}, "set skin_tones=true"),
    ):
        with pytest.raises(ValueError, match=said):
            toned(tmp_path, **wrong)


def test_one_family_cannot_be_divided(tmp_path):
    path = make_emoji_font(tmp_path / "one.ttf", {WAVE + LIGHT: RED, WAVE + DARK: BLUE})
    with pytest.raises(ValueError, match="leaves none to hold out; set validation=0"):
        Emoji(tmp_path, path, 8)
    assert len(Emoji(tmp_path, path, 8, validation=0).train) == 2


def test_captions_are_part_of_the_identity(source, monkeypatch):
    before = source().identity()
    assert source().identity() == before
    monkeypatch.setitem(names.EMOJI_DATA, GRINNING, {**names.EMOJI_DATA[GRINNING], "en": ":happy:"})
    after = source().identity()
    assert after["sha256"] == before["sha256"] and after["captions"] != before["captions"]


def test_pictures_are_kept_and_damaged_ones_drawn_anew(font, tmp_path, capsys):
    first = Emoji(tmp_path, font, 8)
    (kept,) = (tmp_path / "emoji").glob("*.safetensors")
    assert f"drawing 8 emoji of {font}, once" in capsys.readouterr().out
    again = Emoji(tmp_path, font, 8)
    assert torch.equal(again.images, first.images) and capsys.readouterr().out == ""
    kept.write_bytes(kept.read_bytes()[:1000])
    assert torch.equal(Emoji(tmp_path, font, 8).images, first.images)
    assert "is damaged and will be made again" in capsys.readouterr().out
    other = make_emoji_font(tmp_path / "other.ttf", {**DRAWN, GRINNING: (9, 9, 9, 255)})
    redrawn = Emoji(tmp_path, other, 8)
    assert (redrawn.images[SHOWN.index(GRINNING)] == 9).all() and redrawn.identity() != first.identity()
    assert first.origin is not None and not first.origin.changed()


# ------------------------------------------------------------------------------------------------- what is refused


def test_without_the_font_the_error_says_where_there_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr("ddpm.data.emoji.PLACES", (str(tmp_path),))
    for given, words in (
        (None, "is installed;"),
        (tmp_path / "no.ttf", r"is installed, and there is no file .*no\.ttf;"),
    ):
        with pytest.raises(
            FileNotFoundError, match=rf"no NotoColorEmoji.ttf {words} .* fonts-noto-color-emoji .* data.font"
        ):
            Emoji(tmp_path / "data", given)
    (tmp_path / "a").mkdir()
    installed = make_emoji_font(tmp_path / "a" / "NotoColorEmoji.ttf")
    assert located(None) == installed and list(Emoji(tmp_path / "data", image_size=8).texts) == SHOWN


def test_a_font_without_bitmaps_is_refused(tmp_path, font):
    plain = make_emoji_font(tmp_path / "plain.ttf", sbix=False)
    (tmp_path / "no_font.ttf").write_bytes(b"no font")
    for path in (plain, tmp_path / "no_font.ttf"):
        with pytest.raises(ValueError, match=rf"{path.name} has no colour bitmaps \(tables CBDT or sbix\)"):
            Emoji(tmp_path, path)
    with pytest.raises(ValueError, match="draws no emoji"):
        Emoji(tmp_path, make_emoji_font(tmp_path / "other.ttf", {"a": RED}))
    assert not (tmp_path / "emoji").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "train"}, "split='train': choose one of auto"),
        ({"image_size": 4}, "image_size=4: emoji are drawn at 8 pixels and more"),
        ({"image_size": 10**5}, "of memory are available"),
        ({"channels": 2}, "channels=2"),
        ({"skin_tones": "no"}, "skin_tones='no': choose true or false"),
        ({"background": "whit"}, "background='whit': give a colour by its name, .* did you mean white?"),
        ({"background": "#12345678"}, "background='#12345678'"),
        ({"background": 7}, "background=7"),
    ],
)
def test_options_that_are_refused(source, options, message):
    with pytest.raises(ValueError, match=message):
        source(**options)


def test_colours_have_names_and_numbers():
    assert colour("white") == (255, 255, 255) and colour("#102030") == (16, 32, 48) and colour("#f00") == (255, 0, 0)


@pytest.mark.slow
def test_the_installed_font_draws_what_the_captions_say(tmp_path):
    """Only where there is one."""
    try:
        font = located(None)
    except FileNotFoundError:
        pytest.skip("no NotoColorEmoji.ttf is installed (fonts-noto-color-emoji)")
    data = Emoji(tmp_path, font)
    assert len(data) > 3500 and data.shape == (3, 64, 64) and len(set(data.captions)) == len(data)
    assert len({image.numpy().tobytes() for image in data.images}) == len(data)
    assert data.left_out["not in the font"] < 200 and data.left_out["same picture"] < 40
    shown = dict(zip(data.captions, data.images.float(), strict=True))
    assert "Clipperton Island" not in shown
    france = shown["France"][:, 24:40]  # blue, white and red
    for part, (most, least) in ((france[..., 8:16], (2, 0)), (france[..., 48:56], (0, 2))):
        assert part[most].mean() > part[least].mean() + 80
    assert france[..., 30:34].mean() > 200
    red, green, blue = shown["grinning face"][:, 16:20, 28:36].mean((1, 2))
    assert red > 200 and green > 150 and blue < 120
    tones = ("light", "medium-light", "medium", "medium-dark", "dark")
    light = [shown[f"waving hand {tone} skin tone"][:, 32:40, 28:40].mean() for tone in tones]
    assert light == sorted(light, reverse=True) and light[0] > light[-1] + 80
    assert {len(set(data.texts[i] for i in part.tolist())) for part in (data.train, data.held_out)} == {
        len(data.train),
        len(data.held_out),
    }
