"""`ddpm-edit`: from an image and the words that are typed to a strip, its numbers, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from test_cli import Call, assert_refused, call, typed, words  # noqa: F401

from ddpm import cli
from ddpm.commands.sample import editing
from ddpm.config import InvalidInput, build_group, compose, resolved
from ddpm.data import Digits
from ddpm.runs import checkpoint


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Run directories as training leaves them, with random weights: with classes, without, and of points."""
    kinds = {
        "classes": words("model.num_classes=10", "schedule.T=100"),
        "plain": words("schedule.T=100"),
        "colour": words(
            "data=folder", "data.root=pictures", "data.image_size=[8,12]", "data.channels=3", "schedule.T=100"
        ),
        "lost": words("data=folder", "data.root=gone", "data.image_size=8", "data.channels=1", "model.num_classes=4"),
        "points": ["experiment=points", "data=moons", "schedule.T=100"],
        "told": words("data.condition=mask", "schedule.T=100"),
    }
    return {kind: made(tmp_path_factory.mktemp(kind), changes) for kind, changes in kinds.items()}


def made(run: Path, changes: list[str]) -> Path:
    composed = compose("train", changes)
    OmegaConf.save(OmegaConf.create(resolved(composed)), run / "config.yaml")
    torch.manual_seed(0)
    model = build_group(composed, "model", [])
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    checkpoint.save(run / "checkpoints", 2, {"model": model}, {"model": model}, {}, None)
    return run


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """A folder with images and masks, some with names that a shell and Hydra find hard."""
    monkeypatch.chdir(tmp_path)
    digit = Digits().batch(torch.tensor([5])).x[0, 0]
    pixels = ((digit + 1) * 127.5).round().numpy().astype(np.uint8)
    Image.fromarray(pixels).save("eight.png")
    Image.fromarray(pixels).convert("RGB").save("my digit, (1)'s é.png")
    Image.fromarray(np.kron(pixels, np.ones((4, 6), np.uint8))).save("wide.png")
    half = np.zeros((8, 8), np.uint8)
    half[:, 4:] = 255
    Image.fromarray(half).save("half.png")
    Image.fromarray(np.kron(half, np.ones((4, 6), np.uint8))).save("wide mask.png")
    Image.fromarray(half * 0).save("black.png")
    Image.fromarray(half[:5]).save("low.png")
    Path("text.png").write_text("no picture")
    return tmp_path


def results(call: Call, run: Path, *changes: str) -> np.ndarray:  # noqa: F811
    done = call(cli.edit, f"run={run}", "sampler.steps=5", "out=results.npy", *changes)
    assert done.code == 0, done
    return np.load("results.npy")


def pixels_of(name: str) -> np.ndarray:
    return np.asarray(Image.open(name).convert("L"))


@pytest.mark.slow
def test_img2img(call, runs, files):  # noqa: F811
    given = ("image=eight.png", "n=3")
    kept = results(call, runs["plain"], *given, "strength=0")
    assert kept.shape == (3, 8, 8, 1) and all(np.array_equal(x[..., 0], pixels_of("eight.png")) for x in kept)
    assert call(cli.sample, f"run={runs['plain']}", "sampler.steps=5", "n=3", "out=sampled.npy").code == 0
    assert np.array_equal(results(call, runs["plain"], *given, "strength=1"), np.load("sampled.npy"))
    half = results(call, runs["plain"], *given, "strength=0.5")
    assert np.array_equal(half, results(call, runs["plain"], *given, "strength=0.5", "batch=2"))
    assert not np.array_equal(half, results(call, runs["plain"], *given, "strength=0.5", "seed=1"))


def test_a_strip_shows_what_was_given_and_what_became_of_it(call, runs, files):  # noqa: F811
    name = "my digit, (1)'s é.png"
    done = call(cli.edit, f"run={runs['plain']}", f"image={name}", "strength=0.4", "sampler.steps=5", "out=a, (b).png")
    assert done.code == 0 and "wrote a, (b).png" in done.out and Path("a, (b).png").is_file()
    done = call(cli.edit, f"run={runs['plain']}", f"image={name}", "mask=half.png", "sampler.steps=5", "n=2")
    strip = runs["plain"] / "edit_my-digit-1-s_mask_0.png"
    assert done.code == 0 and f"wrote {strip}" in done.out
    assert Image.open(strip).width > 2 * Image.open(strip).height


@pytest.mark.slow
def test_a_mask_keeps_what_is_black(call, runs, files):  # noqa: F811
    given = ("image=eight.png", "mask=half.png", "sampler=ancestral")
    drawn = results(call, runs["plain"], *given)
    assert drawn.shape == (4, 8, 8, 1)
    assert all(np.array_equal(x[:, :4, 0], pixels_of("eight.png")[:, :4]) for x in drawn)
    assert len(np.unique(drawn, axis=0)) == 4
    for change in ("resamples=1", "resamples=2", "jump=2"):
        assert not np.array_equal(drawn, results(call, runs["plain"], *given, change))
    alike = results(call, runs["plain"], "image=wide.png", "mask=wide mask.png", "sampler=ancestral", "fit=pad")
    assert len(alike) == 4  # both are fitted alike


def test_a_network_that_is_told_of_the_mask_draws_what_is_white(call, runs, files):  # noqa: F811
    drawn = results(call, runs["told"], "image=eight.png", "mask=half.png")
    kept = pixels_of("eight.png")[:, :4]
    assert all(np.array_equal(x[:, :4, 0], kept) for x in drawn) and len(np.unique(drawn, axis=0)) == 4
    black = Image.fromarray(np.zeros((8, 8), np.uint8))
    black.save("black.png")
    other = results(call, runs["told"], "image=black.png", "mask=half.png")
    assert not np.array_equal(other[:, :, 4:], drawn[:, :, 4:])  # the same noise beside other known pixels
    refused = call(cli.edit, f"run={runs['told']}", "image=eight.png", "strength=0.5")
    assert_refused(refused, "conditioned on an image (data.condition=mask)", "mask=FILE")


@pytest.mark.parametrize(("fit", "told"), [("crop", "cropped and scaled to 8x8"), ("pad", "scaled and padded to 8x8")])
def test_an_image_of_another_size_is_fitted_and_told_so(fit, told, call, runs, files):  # noqa: F811
    done = call(cli.edit, f"run={runs['plain']}", "image=wide.png", "strength=0", f"fit={fit}", "out=x.npy")
    assert done.code == 0 and f"image=wide.png is 48x32: {told}" in done.out
    rows = np.load("x.npy")[0, :, :, 0]
    assert (rows[0] == rows[0, 0]).all() == (fit == "pad")


@pytest.mark.slow
def test_colour_images_that_are_wider_than_high(call, runs, files):  # noqa: F811
    """Gray files become colour ones, and width and height keep their places."""
    picture = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    Image.fromarray(picture).save("colour.png")
    mask = np.zeros((8, 12), np.uint8)
    mask[:, 9:] = 255
    Image.fromarray(mask).save("side.png")
    kept = results(call, runs["colour"], "image=colour.png", "mask=side.png", "precision=bf16")
    assert kept.shape == (4, 8, 12, 3) and all(np.array_equal(x[:, :9], picture[:, :9]) for x in kept)
    small = ("operator=super_resolution", "factor=4", "n=1", "precision=bf16")
    assert results(call, runs["colour"], "image=colour.png", *small).shape == (1, 8, 12, 3)
    assert results(call, runs["colour"], "image=eight.png", "strength=0", "fit=pad", "n=1").shape == (1, 8, 12, 3)
    assert_refused(call(cli.edit, f"run={runs['colour']}", "image=colour.png", "mask=half.png"), "8x8", "image, 12x8")
    given = ("image=held_out:0", "strength=0.5")
    assert_refused(call(cli.edit, f"run={runs['colour']}", *given), "no folder pictures")


@pytest.mark.slow
def test_classes_of_an_edit(call, runs, files):  # noqa: F811
    run, given = runs["classes"], ("strength=0.9", "n=3")
    of_5 = results(call, run, "image=eight.png", "class=5", *given)
    assert np.array_equal(of_5[1:2], results(call, run, "image=eight.png", "class=[1,5]", *given)[1:2])
    assert results(call, run, "image=eight.png", "class=all", *given).shape == (3, 8, 8, 1)
    done = call(cli.edit, f"run={run}", "image=held_out:3", *given, "sampler.steps=5", "out=own.npy")
    label = int(Digits(validation=0.02).batch(Digits(validation=0.02).held_out[[3]]).y)
    assert done.code == 0 and f"class {label}" in done.out  # its own
    assert_refused(call(cli.edit, f"run={run}", "image=eight.png", *given), "class= is needed", "0, 1, 2", "or all")


def test_classes_without_their_data_are_numbers(call, runs, files):  # noqa: F811
    given = (f"run={runs['lost']}", "image=eight.png", "strength=0.5", "sampler.steps=5")
    assert call(cli.edit, *given, "class=[3,1]", "out=x.png").code == 0
    assert_refused(call(cli.edit, *given), "class= is needed", "0, 1, 2, 3, or all")


def test_redrawing(call, runs, files):  # noqa: F811
    run = runs["classes"]
    redrawn = results(call, run, "image=held_out:3", "redraw=true")
    assert len(redrawn) == 10
    label = int(Digits(validation=0.02).batch(Digits(validation=0.02).held_out[[3]]).y)
    told = results(call, run, "image=held_out:3", "redraw=true", f"from_class={label}", "class=[7,2]")
    assert np.array_equal(told, redrawn[[7, 2]])
    kept = results(call, run, "image=eight.png", "redraw=true", "from_class=5", "class=7", "strength=0")
    assert np.array_equal(kept[0, :, :, 0], pixels_of("eight.png"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    ["operator=super_resolution", "operator=blur std=0.7 method=dps scale=0.5", "operator=inpainting mask=half.png"],
)
def test_operators(words, call, runs, files):  # noqa: F811
    drawn = results(call, runs["plain"], "image=eight.png", "n=3", *words.split())
    assert drawn.shape == (3, 8, 8, 1) and len(np.unique(drawn, axis=0)) == 3
    assert call(cli.edit, f"run={runs['plain']}", "image=eight.png", *words.split(), "out=x.png").code == 0
    Image.open("eight.png").resize((4, 4)).save("small.png")
    seen = "small.png" if "super" in words else "eight.png"
    assert results(call, runs["plain"], f"image={seen}", "observed=true", *words.split()).shape == (4, 8, 8, 1)


WRONG = {
    "image=eight.png": ["the edit is missing", "strength=0.6, mask=FILE, operator=NAME, redraw=true"],
    "image=eight.png strength=0.5 mask=half.png": ["strength and mask are different edits"],
    "image=eight.png operator=blur mask=half.png": ["mask and operator are different edits"],
    "image=eight.png redraw=true mask=half.png": ["mask and redraw are different edits"],
    "image=eight.png redraw=1": ["redraw=1 must be true or false"],
    "image=eight.png operator=inpainting": ["operator=inpainting needs mask=FILE"],
    "image=eight.png operator=sharpen": ["operator=sharpen", "super_resolution, blur, inpainting"],
    "image=eight.png strength=1.2": ["strength=1.2 must lie in [0, 1]"],
    "image=eight.png strength=-0.1": ["strength=-0.1 must lie in [0, 1]"],
    "image=eight.png strength=.nan": ["strength=nan must be a finite number"],
    "image=eight.png strength=much": ["strength=much must be a finite number"],
    "image=eight.png strength=0.5 from_class=3": ["from_class=3", "redraw=true"],
    "image=eight.png strength=0.5 class=3": ["class=3: the network was trained without classes"],
    "image=eight.png redraw=true": ["trained without classes"],
    "image=eight.png strength=0.5 n=0": ["n=0 must be an integer >= 1"],
    "image=eight.png strength=0.5 n=13": ["n=13: a strip shows up to 12", "FILE.npy"],
    "image=eight.png strength=0.5 fit=stretch": ["fit=stretch", "crop, pad, error"],
    "image=wide.png strength=0.5 fit=error": ["image=wide.png is 48x32, but 8x8 is needed", "fit=crop"],
    "image=gone.png strength=0.5": ["image=gone.png: no such file"],
    "image=text.png strength=0.5": ["image=text.png cannot be read: not a PNG, JPEG, WebP, BMP or TIFF file"],
    "image=. strength=0.5": ["image=. cannot be read"],
    "image=held_out:36 strength=0.5": ["image=held_out:36: held-out images have the numbers 0..35"],
    "image=held_out:x strength=0.5": ["have the numbers 0..35"],
    "image=3 strength=0.5": ["image=3 must be an image file"],
    "image=eight.png mask=black.png": ["mask=black.png is black everywhere", "white pixels are drawn anew"],
    "image=eight.png mask=low.png": ["mask=low.png is 8x5; it must have the size of the image, 8x8"],
    "image=wide.png mask=low.png": ["mask=low.png is 8x5", "the image, 48x32, or of the network's images, 8x8"],
    "image=eight.png mask=text.png": ["mask=text.png cannot be read: not a PNG, JPEG, WebP, BMP or TIFF file"],
    "image=eight.png mask=half.png resamples=0": ["resamples=0 must be an integer >= 1"],
    "image=eight.png mask=half.png jump=x": ["jump=x must be an integer >= 1"],
    "image=eight.png operator=super_resolution factor=3": ["factor=3 does not divide 8x8"],
    "image=eight.png operator=blur std=0": ["std=0 must be a number > 0"],
    "image=eight.png operator=blur sigma_y=-1": ["sigma_y=-1 must be a number >= 0"],
    "image=eight.png operator=blur method=x": ["method=x", "pigdm, dps"],
    "image=eight.png operator=blur observed=2": ["observed=2 must be true or false"],
    "image=eight.png strength=0.5 out=x.gif": ["out=x.gif", "FILE.png", "FILE.npy"],
    "image=eight.png strength=0.5 out=x/": ["out=x/", "FILE.png"],
    "image=eight.png strength=0.5 sampler.steps=101": ["steps = 101 is more than the schedule's T = 100"],
    "strength=0.5": ["image"],
}


@pytest.fixture(scope="module")
def composed() -> DictConfig:
    return compose("edit", ["device=cpu", "sampler.steps=5"])


@pytest.mark.parametrize("given", WRONG)
def test_wrong_input(given, composed, runs, files):
    before = sorted(files.iterdir())
    changes = OmegaConf.from_dotlist([f"run={runs['plain']}", *given.split()])
    with pytest.raises(InvalidInput) as refused:
        editing.edit(OmegaConf.merge(composed, changes))
    assert not [word for word in WRONG[given] if word not in str(refused.value)], refused.value
    assert sorted(files.iterdir()) == before


def test_wrong_input_to_other_runs(call, runs, files):  # noqa: F811
    run = runs["classes"]
    assert_refused(call(cli.edit, f"run={runs['points']}", "image=eight.png", "strength=0.5"), "draws no pictures")
    redraw = ("image=eight.png", "redraw=true")
    assert_refused(call(cli.edit, f"run={run}", *redraw), "redraw needs from_class=", "0, 1, 2")
    assert_refused(call(cli.edit, f"run={run}", *redraw, "from_class=[1,2]"), "from_class=[1, 2] must be one of")
    assert_refused(call(cli.edit, f"run={run}", *redraw, "from_class=x"), "from_class=x is not known")
    words = (*redraw, "from_class=1", "sampler=ancestral", "sampler.steps=2")
    assert_refused(call(cli.edit, f"run={run}", *words), "Ancestral has no inverse", "DDIM with eta = 0")


def test_the_command_as_it_is_typed(typed, runs, files):  # noqa: F811
    done = typed(cli.edit, f"run={runs['plain']}", "image=my digit, (1)'s é.png", "strength=0.5", "out=b [2].png")
    assert done.code == 0 and Path("b [2].png").is_file(), done
    assert_refused(typed(cli.edit, f"run={runs['plain']}", "image=eight.png", "strenght=0.5"), "strenght", "strength")
