"""Published pipelines: schedulers as samplers, prompts as sources, whole folders drawn from, by call and by command."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_pipeline
import torch
from PIL import Image

from ddpm import cli
from ddpm.guidance import Guidance
from ddpm.latent.codec import Continuous
from ddpm.randomness import SampleNoise
from ddpm.samplers import DDIM, LMS, Heun, UniPC
from ddpm.schedules import scaled_linear, zero_terminal_snr
from ddpm.sources.prompted import Pipeline, deep, masked
from ddpm.sources.published import of_config, read_scheduler
from models.pretrained import load_pipeline

HERE = Path(__file__).parent / "published"
REFERENCE = json.loads((HERE / "pipelines.json").read_text())
SPEC = importlib.util.spec_from_file_location("make_pipelines", HERE / "make_pipelines.py")
made = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(made)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each version, made once."""
    root = tmp_path_factory.mktemp("pipelines")
    return {version: tiny_pipeline.write(root / version, version) for version in tiny_pipeline.VERSIONS}


@pytest.fixture(scope="module")
def one(folders):
    return load_pipeline(folders["1"])


@pytest.fixture(scope="module")
def two(folders):
    return load_pipeline(folders["2"])


def counted(pipeline):
    """A pipeline whose U-Net counts the rows that it is asked for."""
    rows = []
    hook = pipeline.model.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    return rows, hook


# --- Schedulers


@pytest.mark.parametrize("name", made.WALKS)
def test_schedulers_walk_as_those_of_the_library(name):
    """LMS apart: its last step, to data, is of a higher order there."""
    scheduler = of_config({**tiny_pipeline.PROCESS, **made.WALKS[name]})
    sampler = scheduler.sampler(made.STEPS)
    denoise = scheduler.diffusion.denoiser(lambda x, t: made.net(x, t[0].item() - 1))
    ours = sampler(scheduler.diffusion.schedule, denoise, made.start())
    expected = torch.tensor(REFERENCE["walks"][name], dtype=torch.float64).reshape(4, 4)
    tolerance = 2e-2 if name.startswith("LMS") else 5e-5
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("settings", "times"),
    [
        ({"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}, [802, 602, 402, 202, 2, 1]),
        ({"timestep_spacing": "leading", "set_alpha_to_one": False}, [801, 601, 401, 201, 1]),
        ({"timestep_spacing": "leading", "steps_offset": 1}, [802, 602, 402, 202, 2, 0]),
        ({"timestep_spacing": "trailing"}, [1000, 800, 600, 400, 200, 0]),
        ({"_class_name": "DPMSolverMultistepScheduler", "timestep_spacing": "leading"}, [831, 665, 499, 333, 167, 0]),
        ({"_class_name": "UniPCMultistepScheduler"}, [1000, 800, 600, 401, 201, 0]),
        ({"_class_name": "EulerDiscreteScheduler"}, [1000, 750.25, 500.5, 250.75, 1, 0]),
    ],
)
def test_times_are_theirs_and_1(settings, times):
    scheduler = of_config({"_class_name": "DDIMScheduler", **settings})
    assert scheduler.sampler(5).times(scheduler.diffusion.schedule) == times


def test_a_scheduler_is_a_process():
    said = {**tiny_pipeline.PROCESS, **tiny_pipeline.DDIM, "num_train_timesteps": 400}
    diffusion = of_config(said).diffusion
    assert torch.equal(diffusion.schedule.alpha_bar, scaled_linear(400, rescale=False).alpha_bar)
    assert (diffusion.target, diffusion.clip_x_0) == ("eps", False)
    diffusion = of_config({"_class_name": "DDIMScheduler", "prediction_type": "sample"}).diffusion  # clips by default
    assert (diffusion.target, diffusion.clip_x_0, diffusion.schedule.beta[1].item()) == ("x_0", True, 1e-4)
    zero = of_config(said | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}).diffusion
    assert torch.equal(zero.schedule.alpha_bar, zero_terminal_snr(scaled_linear(400, rescale=False)).alpha_bar)
    given = of_config({**said, "num_train_timesteps": 3, "trained_betas": [0.1, 0.2, 0.5]}).diffusion.schedule
    assert given.beta[1:].tolist() == [0.1, 0.2, 0.5]
    assert isinstance(of_config({"_class_name": "HeunDiscreteScheduler"}).sampler(4), Heun)
    ancestral = of_config({"_class_name": "EulerAncestralDiscreteScheduler"}).sampler(4)
    assert isinstance(ancestral, DDIM) and ancestral.eta == 1
    order = of_config({"_class_name": "UniPCMultistepScheduler", "solver_order": 1, "solver_type": "bh1"}).sampler(4)
    assert isinstance(order, UniPC) and (order.order, order.variant) == (1, "bh1")
    # A key of another class says nothing, as there:
    assert isinstance(of_config({"_class_name": "LMSDiscreteScheduler", "skip_prk_steps": False}).sampler(9), LMS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"_class_name": "DDPMWuerstchenScheduler"},
            "_class_name = 'DDPMWuerstchenScheduler' has no counterpart here; .*PNDM",
        ),
        ({"_class_name": "PNDMScheduler"}, r"skip_prk_steps = False \(allowed: true: PLMS\)"),
        ({"thresholding": True}, r"thresholding = True \(allowed: false\)"),
        ({"timestep_spacing": "linspace"}, r"timestep_spacing = 'linspace' \(allowed: leading or trailing\)"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule = 'sigmoid'"),
        ({"num_train_timesteps": True}, "num_train_timesteps = True"),
        ({"clip_sample_range": 2.0}, r"clip_sample_range = 2\.0 \(allowed: 1\)"),
        ({"shift": 3.0}, r"shift = 3\.0 is not a known key"),
        ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}, "use_karras_sigmas = True"),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}, r"solver_order = 3 \(allowed: 2 or 1\)"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"}, "algorithm_type = 'dpmsolver'"),
        ({"rescale_betas_zero_snr": True}, "an impossible process: target = 'eps' does not determine x_0"),
        ({"trained_betas": [0.1]}, "trained_betas are 1, but num_train_timesteps = 1000"),
        ({"beta_end": 1}, r"beta_end = 1 \(allowed: a number in \(0, 1\)\)"),
    ],
)
def test_schedulers_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        of_config({"_class_name": "DDIMScheduler", **settings})


def test_steps_that_a_scheduler_has_not(tmp_path):
    scheduler = of_config({"_class_name": "DDIMScheduler", "steps_offset": 1})
    with pytest.raises(ValueError, match=r"steps = 1000 .* times beyond 1\.\.1000, or one twice; .* possible: 999"):
        scheduler.sampler(1000)
    with pytest.raises(ValueError, match=r"steps = 0: .* in 1\.\.1000"):
        scheduler.sampler(0)
    with pytest.raises(ValueError, match=r"is no file; a published scheduler is a scheduler_config\.json"):
        read_scheduler(tmp_path)
    (tmp_path / "scheduler_config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a JSON list"):
        read_scheduler(tmp_path)


# --- Against the library


@pytest.mark.parametrize("name", ["2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("1", "1 by DDIM"))])
def test_the_library_draws_the_same_from_the_same_noise(name, folders, tmp_path):
    version, scheduler = made.DRAWN[name]
    folder = folders[version] if scheduler is None else tiny_pipeline.write(tmp_path, version, scheduler)
    pipeline = load_pipeline(folder)
    source = pipeline.of(made.PROMPT, made.NEGATIVE, made.W, made.STEPS, seed=made.SEED)
    seen = []
    image = source.draw([0], lambda i, t, s, x_t, pred: seen.append((t, s)))
    assert seen[-1] == (2, 1)  # the final alpha is honoured
    denoise = source.denoiser(source.condition([0]))
    x_T = SampleNoise(made.SEED, [0]).x_T((4, 8, 8), CPU)
    z = source.sampler(source.diffusion.schedule, denoise, x_T)
    theirs = {key: torch.tensor(values) for key, values in REFERENCE["drawn"][name].items()}
    scale = theirs["latents"].abs().max()
    assert (z.flatten() - theirs["latents"]).abs().max() < 1e-4 * max(1, scale)
    expected = theirs["image"].clamp(-1, 1)
    assert expected.std() > 0.1  # far from nothing
    torch.testing.assert_close(image[0, :, ::4, ::4].flatten(), expected, rtol=0, atol=2e-4)


# --- Prompts


def test_a_sample_is_of_its_number_and_of_its_prompt(one):
    prompts, settings = ["a red cat", "two dogs"], {"sampler": 3, "seed": 5}
    x = one.draw(prompts, n=4, batch=4, **settings)
    assert x.shape == (4, 3, 64, 64) and x.abs().max() <= 1 and x.device == CPU
    torch.testing.assert_close(one.draw(prompts, n=4, batch=1, **settings), x, rtol=0, atol=1e-4)
    alone = one.draw(prompts[0], n=3, **settings)
    torch.testing.assert_close(alone[[0, 2]], x[[0, 2]], rtol=0, atol=1e-4)
    assert (alone[1] - x[1]).abs().max() > 1e-3  # the same noise, of another prompt
    assert one.draw(prompts, **settings).shape[0] == 2
    assert (one.draw(prompts[0], sampler=3, seed=6) - x[0]).abs().max() > 1e-2


def test_w_0_and_1_evaluate_one_and_a_negative_prompt_that_is_the_prompt_says_nothing(two):
    rows, hook = counted(two)
    settings = {"sampler": 2, "seed": 1}
    conditional = two.draw("a cat", w=1.0, negative="dog", **settings)
    assert rows == [1, 1]
    torch.testing.assert_close(two.draw("a cat", w=1.0, **settings), conditional, rtol=0, atol=0)
    away = two.draw("a cat", w=0.0, negative="dog", **settings)
    assert rows == [1] * 6
    torch.testing.assert_close(two.draw("dog", w=1.0, **settings), away, rtol=0, atol=0)
    assert (away - conditional).abs().max() > 1e-3
    rows.clear()
    both = two.draw("a cat", w=5.0, negative="a cat", **settings)
    hook.remove()
    assert rows == [2, 2]  # as one batch
    torch.testing.assert_close(both, conditional, rtol=0, atol=1e-4)
    guided = two.draw("a cat", w=5.0, negative="dog", **settings)
    assert (guided - conditional).abs().max() > 1e-3
    alone = two.of("a cat", guidance=Guidance(), **settings).draw([0])
    torch.testing.assert_close(alone, conditional, rtol=0, atol=0)


def test_guidance_is_that_of_the_paper_between_the_two_prompts(one):
    source = one.of("a cat", "dog", 3.0, 4)
    x_t, condition = torch.randn(2, 4, 8, 8), source.condition([0, 1])
    of = lambda text: one.of(text, w=1.0).predictor(one.of(text).condition([0, 1]))(x_t, 500).eps  # noqa: E731
    expected = of("dog") + 3.0 * (of("a cat") - of("dog"))
    torch.testing.assert_close(source.predictor(condition)(x_t, 500).eps, expected, rtol=1e-4, atol=1e-5)


def test_sizes_samplers_previews_and_precision(one):
    seen = []
    x = one.draw("", size=(48, 72), sampler=DDIM(2), callback=lambda i, t, s, x_t, pred: seen.append(pred.x_0))
    assert x.shape == (1, 3, 48, 72) and [tuple(z.shape) for z in seen] == [(1, 4, 6, 9)] * 2
    assert one.codec.of_size(48, 72).decode(seen[0]).shape == (1, 3, 48, 72)
    with pytest.raises(ValueError, match="50 of 72x50 is not divisible by 8; nearest that are: 48, 56"):
        one.draw("", size=(50, 72))
    own = one.of("")
    assert type(own.sampler).__name__ == "PLMS" and own.evaluations == 51
    half = Pipeline(one.model, one.codec, one.encoder, one.tokenizer, one.scheduler, CPU, "bf16")
    difference = (half.draw("a cat", sampler=2) - one.draw("a cat", sampler=2)).abs()
    assert difference.max() > 0 and difference.mean() < 0.1
    for wrong, message in (
        ({"n": 0}, "n = 0 must be an integer >= 1"),
        ({"w": float("nan")}, "w = nan must be a finite number"),
        ({"sampler": 0}, "steps = 0"),
    ):
        with pytest.raises(ValueError, match=message):
            one.draw("a cat", **wrong)
    for prompt in ([], [3]):
        with pytest.raises(ValueError, match="a text is needed"):
            one.draw(prompt)


def test_what_is_decoded_one_by_one_is_what_is_decoded_at_once_but_tiles_are_not(one):
    """Group norms look at the whole map: even far from its edge a tile is another picture."""
    z = torch.randn(2, 4, 8, 24, generator=torch.Generator().manual_seed(0))
    codec = one.codec.of_size(64, 192)
    source = one.of("", size=(64, 192))
    torch.testing.assert_close(source.decode(z), codec.decode(z), rtol=0, atol=1e-5)
    tile = codec.of_size(64, 128).decode(z[..., :16])[..., :64]
    assert (tile - codec.decode(z)[..., :64]).abs().max() > 1e-3


# --- Networks that are told more than a text


def test_what_networks_are_told_beside_the_text(folders):
    inpainting, depth = (load_pipeline(folders[name]) for name in ("inpainting", "depth"))
    assert (inpainting.kind, depth.kind) == ("inpainting", "depth")
    with pytest.raises(ValueError, match=r"conditioned on more than a text \(inpainting\), which is missing"):
        inpainting.draw("a cat", sampler=1)
    x, mask = torch.rand(1, 3, 64, 64) * 2 - 1, torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    mask[..., 16:40, 8:64] = True
    image = masked(inpainting.codec, x, mask)
    assert image.shape == (1, 5, 8, 8)
    assert image[0, 0].nonzero().tolist() == [[i, j] for i in range(2, 5) for j in range(1, 8)]
    codec = inpainting.codec
    torch.testing.assert_close(image[:, 1:], codec.scale * codec.model.encode(x.masked_fill(mask, 0))[0])
    assert torch.equal(masked(codec, torch.where(mask, 1, x), mask), image)  # nothing of the hole is looked at
    source = inpainting.of("a cat", sampler=2).conditioned_on_image(image)
    other = inpainting.of("a cat", sampler=2).conditioned_on_image(-image)
    assert (source.draw([0, 1]) - other.draw([0, 1])).abs().max() > 1e-3

    told = deep(depth.codec, torch.arange(64.0 * 64).reshape(1, 1, 64, 64))
    assert told.shape == (1, 1, 8, 8) and told.flatten()[[0, -1]].tolist() == [-1, 1]
    assert depth.of("a cat", image=told, sampler=1).draw([0]).isfinite().all()
    with pytest.raises(ValueError, match="the depth is 3 everywhere"):
        deep(depth.codec, torch.full((1, 1, 64, 64), 3.0))


# --- Folders


def test_what_a_folder_states_of_itself(one, folders, tmp_path):
    assert one.about[:2] == ("license: creativeml-openrail-m", "base_model: somebody/something")
    assert one.about[2] == "left out: safety_checker, feature_extractor"
    folder = shutil.copytree(folders["1"], tmp_path / "bare")
    (folder / "README.md").unlink()
    assert load_pipeline(folder).about[0] == "README.md states no licence and no source"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "StableDiffusionXLPipeline"}, 'is a "StableDiffusionXLPipeline"; pipelines that are read'),
        ({"_class_name": "StableDiffusionInpaintPipelineLegacy"}, None),
        ({"_class_name": "StableDiffusionDepth2ImgPipeline"}, "is conditioned on depth, and this one on text"),
        ({"text_encoder_2": ["transformers", "CLIPTextModel"]}, "text_encoder_2 = .* which is not a known key"),
        ({"image_encoder": [None, None]}, None),
        ({"vae": ["diffusers", "AutoencoderTiny"]}, r"vae = .*AutoencoderTiny.* \(allowed: AutoencoderKL\)"),
        ({"tokenizer": None}, "tokenizer is missing"),
    ],
)
def test_folders_that_are_refused(change, message, folders, tmp_path):
    folder = tmp_path / "changed"
    folder.mkdir()
    for part in folders["1"].iterdir():
        (folder / part.name).symlink_to(part)
    (folder / "model_index.json").unlink()
    index = json.loads((folders["1"] / "model_index.json").read_text()) | change
    (folder / "model_index.json").write_text(json.dumps(index))
    if message is None:
        assert load_pipeline(folder).kind == "text"
        return
    with pytest.raises(ValueError, match=message):
        load_pipeline(folder)


def test_folders_of_another_kind_and_parts_that_do_not_fit(one, folders, tmp_path):
    for folder, message in (
        (folders["1"] / "vae", 'no pipeline: it has no model_index.json, but the config.json of a "AutoencoderKL"'),
        (tmp_path / "none", "no pipeline: there is no such folder"),
        (tmp_path, "no pipeline: it has no model_index.json"),
    ):
        with pytest.raises(ValueError, match=message):
            load_pipeline(folder)
    with pytest.raises(ValueError, match="precision = 'int8' is not known; allowed: fp32, bf16, fp16"):
        load_pipeline(folders["1"], precision="int8")
    narrow = tiny_pipeline.TextEncoder(one.encoder.vocabulary - 3, 8, 32, 1, 1)
    with pytest.raises(ValueError, match=r"16 channels of a token, .* 32; .* 16 tokens .* 8; .* knows 511"):
        Pipeline(one.model, one.codec, narrow, one.tokenizer, one.scheduler, CPU)
    wide = tiny_pipeline.AutoencoderKL(16, latent_channels=3, channels=8, channel_mults=(1, 1), blocks=1, groups=4)
    with pytest.raises(ValueError, match="latents of 4 channels, the autoencoder has 3"):
        Pipeline(one.model, Continuous(wide), one.encoder, one.tokenizer, one.scheduler, CPU)


# --- The command line


def command(verb, *words):
    """The exit code of a command."""
    before, sys.argv = sys.argv, [f"ddpm-{verb}", *map(str, words), "device=cpu"]
    try:
        getattr(cli, verb)()
    except SystemExit as end:
        return end.code or 0
    finally:
        sys.argv = before
    return 0


def told(capsys):
    """What a command said."""
    return capsys.readouterr().out


@pytest.mark.slow
def test_sample_draws_what_the_call_draws(one, folders, tmp_path, capsys):
    out = tmp_path / "x.npy"
    words = (f"pipeline={folders['1']}", "prompt=A, (b) [1] 'c'", "negative=dog", f"out={out}", "seed=3")
    assert command("sample", *words, "size=48x64", "sampler.steps=4", "guidance.w=8") == 0
    said = capsys.readouterr().out
    assert "license: creativeml-openrail-m" in said and "left out: safety_checker" in said
    assert "PLMS, 5 evaluations of its own, 48 high and 64 wide, seed 3, classifier-free guidance w = 8" in said
    x = one.draw("A, (b) [1] 'c'", "dog", 8.0, 4, (48, 64), 3)
    ours = ((x[0].movedim(0, -1) + 1) * 127.5).round().clamp(0, 255).numpy()
    drawn = np.load(out)
    assert drawn.shape == (1, 48, 64, 3) and np.abs(drawn[0] - ours).max() <= 1
    assert command("sample", *words, "sampler=lms", "sampler.steps=5", "n=2") == 0
    assert (
        "LMS, 5 evaluations, 64 high and 64 wide, seed 3, classifier-free guidance w = 7.5" in capsys.readouterr().out
    )
    assert len(np.load(out)) == 2
    assert command("sample", *words[:3], f"out={tmp_path}/many/", "n=2", "sampler.steps=2") == 0
    assert sorted(path.name for path in (tmp_path / "many").iterdir()) == ["000000.png", "000001.png", "samples.json"]
    assert command("sample", *words[:1], "prompt=", f"out={tmp_path}/a.gif", "sampler.steps=2", "guidance=none") == 0
    assert "warning" not in told(capsys)
    assert command("sample", words[0], "prompt=a text that is too long", words[3], "sampler.steps=1") == 0
    assert "warning: a text has 18 tokens, and 14 fit between start and end; cut: " in told(capsys)
    strip = (f"out={tmp_path}/s.png", "steps_strip=[1,2]")
    assert command("sample", *words[:2], *strip) == 0


@pytest.mark.slow
def test_edit_of_each_kind(folders, tmp_path, capsys):
    side = np.linspace(0, 255, 64)
    picture = np.stack([side[:, None] + 0 * side, side + 0 * side[:, None], 0 * side + 0 * side[:, None]], axis=-1)
    image, mask, depth = (tmp_path / f"{name}.png" for name in ("image", "mask", "depth"))
    Image.fromarray(picture.astype(np.uint8)).save(image)
    hole = np.zeros((64, 64), dtype=np.uint8)
    hole[16:40, 8:64] = 255
    Image.fromarray(hole).save(mask)
    Image.fromarray(picture[..., 0].astype(np.uint8)).save(depth)
    out = tmp_path / "edited.npy"

    def edited(version, *words):
        given = (f"pipeline={folders[version]}", f"image={image}", "prompt=a cat", f"out={out}", "sampler.steps=4")
        code = command("edit", *given, *words)
        return code, capsys.readouterr()

    code, told = edited("1", "strength=0.5")
    assert code == 0, told.err
    half = np.load(out)
    assert half.shape == (1, 64, 64, 3)
    assert edited("1", "strength=0.5", "seed=1")[0] == 0
    assert np.abs(np.load(out) - half.astype(float)).max() > 2
    for version in ("1", "inpainting"):
        code, told = edited(version, f"mask={mask}")
        assert code == 0, told.err
        kept = np.abs(np.load(out)[0].astype(float) - picture.astype(np.uint8))[hole == 0]
        assert kept.max() == 0  # pixels outside the mask are those that were given
    code, told = edited("depth", f"depth={depth}", "strength=0.8")
    assert code == 0, told.err
    assert edited("depth", f"depth={depth}", f"out={tmp_path}/strip.png")[0] == 0

    small = tmp_path / "small.png"
    Image.fromarray(hole[:32]).save(small)
    for version, words, message in (
        ("1", (f"depth={depth}", "strength=0.5"), "the network is conditioned on text: leave depth= out"),
        ("depth", ("strength=0.5",), "the network is conditioned on depth: depth=FILE is needed"),
        ("inpainting", ("strength=0.5",), "edits with mask=FILE only"),
        ("1", (f"mask={small}",), "is 64x32; it must have the size of the image"),
        ("1", ("redraw=true",), "redraw=true needs a network with classes"),
        ("1", ("operator=blur",), "draws latents, to which operator=blur does not apply"),
        ("1", ("strength=0.5", "image=held_out:3"), "a pipeline edits an image file"),
    ):
        code, told = edited(version, *words)
        assert code == 2 and message in told.err and told.err.count("\n") == 1, (words, told.err)


@pytest.mark.slow
def test_words_that_are_refused_in_one_line(folders, tmp_path, capsys):
    good = f"pipeline={folders['1']}"
    broken = shutil.copytree(folders["1"], tmp_path / "broken")
    (broken / "tokenizer" / "vocab.json").unlink()
    for words, message in (
        ((good,), "prompt=TEXT is needed; prompt='' draws without one"),
        ((f"pipeline={tmp_path / 'nowhere'}",), "nowhere is no pipeline: "),
        (("run=runs/x", "size=48x64"), "size=48x64 is for a published pipeline: give pipeline=FOLDER too"),
        ((good, "run=runs/x", "prompt=a"), "run=runs/x and pipeline="),
        ((good, "prompt=a", "size=50x64"), "50 of 64x50 is not divisible by 8; nearest that are: 48, 56"),
        ((good, "prompt=a", "size=big"), "size=big must be HEIGHTxWIDTH in pixels, such as 480x640"),
        ((good, "prompt=a", "class=3"), "class=3 is for runs"),
        ((good, "prompt=a", "sampler.eta=1"), "sampler.eta=1 is no setting of the pipeline's own sampler"),
        ((good, "prompt=a", "sampler.steps=1000"), "nearest that is possible: 999"),
        ((good, "prompt=a", "guidance=auto", "guidance.bad=runs/x"), "guidance.bad=runs/x"),
        ((good, "prompt=a", "between=[0,1]"), "needs held-out images"),
        ((f"pipeline={tmp_path}", "prompt=a"), "is no pipeline: it has no model_index.json"),
        ((f"pipeline={folders['1']}/unet", "prompt=a"), 'the config.json of a "UNet2DConditionModel"'),
        ((f"pipeline={broken}", "prompt=a"), "vocab.json"),
        ((f"pipeline={folders['depth']}", "prompt=a"), "experiments/edit.py gives it: mask=FILE or depth=FILE"),
    ):
        assert command("sample", *words, f"out={tmp_path}/x.png") == 2, words
        told = capsys.readouterr().err
        assert message in told and told.count("\n") == 1, (words, told)
        assert not (tmp_path / "x.png").exists()
