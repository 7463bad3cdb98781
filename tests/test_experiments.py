"""conf/experiment: every recipe composes, is what it says it is, and takes a step on images of its kind."""

import gzip
import re
import shlex
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from test_devanagari import make_font

from ddpm import cli
from ddpm.commands.load import optimizer_of
from ddpm.commands.train import training
from ddpm.config import SCIENCE, build, compose, jobs, read_config, resolved
from ddpm.runs import checkpoint
from ddpm.runs.directory import Run, read_metrics
from ddpm.training.cost import flops
from ddpm.training.task import shape_of
from ddpm.training.tasks.diffusion import Diffusion

REPOSITORY = Path(__file__).parents[1]
OF_CODINGS = [
    "autoencoder_kl",
    "contrastive_emoji",
    "contrastive_scenes",
    "cvae",
    "depth_of_scenes",
    "gan",
    "latent_diffusion",
    "pixelcnn",
    "scenes_from_depth",
    "scenes_from_masks",
    "vae",
    "vqvae",
    "subject",
    "text_emoji",
    "text_scenes",
    "text_scenes_latent",
]
# whose groups are others than those of diffusion: see test_vae_cli.py, test_codes_cli.py, test_latent_cli.py,
# test_words_cli.py, test_contrastive_cli.py and test_surfaces_cli.py; what begins with a run: test_subject_cli.py
OF_SOUNDS = ["sound_folder", "spoken_digits"]  # see test_sound_cli.py
EXPERIMENTS = sorted(
    path.stem
    for path in (REPOSITORY / "conf" / "experiment").glob("*.yaml")
    if path.stem not in (*OF_CODINGS, *OF_SOUNDS)
)
STUDIES = sorted(path.stem for path in (REPOSITORY / "conf" / "experiment" / "study").glob("*.yaml"))
STUDIES_OF_CODINGS = ["codebook", "cvae", "vae_codings"]  # whose groups are others, too
FOLDERS = ("devanagari", "cars", "butterflies", "pictures")
_COMPOSED: dict[str, DictConfig] = {}


def composed(name: str) -> DictConfig:
    """The configuration of an experiment; composing takes a while, so it is done once."""
    if name not in _COMPOSED:
        _COMPOSED[name] = compose("train", [f"experiment={name}", *(["data.root=x"] if name in FOLDERS else [])])
    return _COMPOSED[name].copy()


def parameters(name: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build(composed(name).model, "model").parameters())


def test_these_are_the_experiments():
    of_characters = ["devanagari", "devanagari_small"]
    of_digits = ["digits", "digits_short"]
    others = ["fashion", "mnist", "mnist_class", "mnist_class_channels", "mnist_dit", "pictures", "points"]
    assert ["butterflies", "cars", "cifar10_ddpm", *of_characters, *of_digits, *others] == EXPERIMENTS
    of_models = ["attention", "channels", "class_mnist", "ema", "ema_post_hoc", "learning_rate", "mnist_levers"]
    of_models += ["mnist_networks", "plane_objectives", "restarts", "samplers", "schedules", "targets"]
    assert sorted([*of_models, *STUDIES_OF_CODINGS, "trilemma"]) == STUDIES


# ---------------------------------------------------------------------------------------------- what they say


COUNTS = {"devanagari": 77_357_825, "cifar10_ddpm": 35_746_307}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_are_counted_exactly(name):
    assert parameters(name) == COUNTS[name]


def test_butterflies_have_about_18_5_million_parameters():
    assert parameters("butterflies") == pytest.approx(18.5e6, rel=0.01)


ADAM, ADAMW = "torch.optim.Adam", "torch.optim.AdamW"
LITERAL = {"schedule._target_": "ddpm.schedules.linear", "schedule.beta_1": 1e-4, "schedule.beta_T": 0.02}
RECIPES: dict[str, dict[str, Any]] = {
    "digits": {
        "data._target_": "ddpm.data.Digits", "data.validation": 0.2, "data.image_size": 8, "data.channels": 1,
        "recognition": True, "seed": 0, "device": "auto",
    },
    "mnist": {
        "data.name": "mnist", "data.image_size": 28, "data.split": "auto", "trainer.seconds": 300,
        "trainer.steps": None, "trainer.epochs": None, "trainer.batch_size": 64, "diffusion.target": "v",
        "optimizer._target_": "ddpm.training.muon.Muon", "optimizer.lr": 3e-3,
    },
    "mnist_class": {
        "data.name": "mnist", "model.num_classes": 10, "model.class_channels": 0, "task.drop": 0.1, "model.drop": 0.1,
        "trainer.seconds": 300, "diffusion.target": "v",
    },
    "mnist_dit": {
        "data.name": "mnist", "data.image_size": 28, "diffusion.target": "v", "trainer.seconds": 300,
        "model._target_": "models.dit.DiT", "model.patch": 4, "model.width": 96, "model.depth": 6, "model.heads": 3,
        "model.mlp_ratio": 4.0, "trainer.batch_size": 64, "optimizer.lr": 3e-3,
    },
    "mnist_class_channels": LITERAL | {
        "data.name": "mnist", "data.image_size": 28, "schedule.T": 1000, "diffusion.target": "eps",
        "model.num_classes": 10, "model.class_channels": 4, "model.channels": 32, "model.channel_mults": [1, 2, 2],
        "model.blocks": 2, "model.attention_resolutions": [14, 7], "optimizer._target_": ADAM, "optimizer.lr": 1e-3,
        "trainer.batch_size": 128, "trainer.epochs": 10, "trainer.steps": None, "trainer.seconds": None,
        "task.drop": 0.0,
    },
    "fashion": LITERAL | {
        "data.name": "fashion_mnist", "data.image_size": 28, "data.channels": 1, "schedule.T": 1000,
        "diffusion.target": "eps", "diffusion.variance": "beta", "trainer.batch_size": 128, "optimizer.lr": 1e-3,
        "trainer.epochs": 20, "trainer.steps": None, "trainer.seconds": None,
    },
    "devanagari": LITERAL | {
        "data._target_": "ddpm.data.Folder", "data.image_size": 32, "data.channels": 1, "trainer.batch_size": 32,
        "optimizer._target_": ADAMW, "optimizer.lr": 1e-4, "trainer.warmup": 500, "trainer.lr_schedule": "cosine",
        "trainer.clip": 1.0, "trainer.epochs": 2, "trainer.steps": None, "trainer.seconds": None,
        "model.channels": 128, "model.channel_mults": [1, 1, 2, 2, 4, 4], "model.blocks": 1,
        "model.attention_resolutions": [2], "model.middle_attention": True, "model.head_channels": 8, "model.patch": 1,
    },
    "cars": LITERAL | {
        "data._target_": "ddpm.data.Folder", "data.image_size": 64, "data.channels": 3, "schedule.T": 512,
        "schedule.rescale": False, "trainer.batch_size": 64, "trainer.warmup_epochs": 10, "trainer.warmup": 0,
        "trainer.lr_schedule": "cosine", "trainer.epochs": 300, "trainer.steps": None, "trainer.seconds": None,
    },
    "butterflies": {
        "data._target_": "ddpm.data.Folder", "data.image_size": 32, "data.channels": 3, "trainer.batch_size": 8,
        "optimizer._target_": ADAMW, "optimizer.lr": 4e-4, "trainer.epochs": 30, "trainer.steps": None,
        "trainer.seconds": None, "model.patch": 1,
    },
    "pictures": {
        "data._target_": "ddpm.data.Folder", "data.image_size": 32, "data.channels": 3, "data.flip": False,
        "schedule._target_": "ddpm.schedules.cosine", "diffusion.target": "v", "diffusion.variance": "beta_tilde",
        "model.channel_mults": None, "model.attention_resolutions": None, "model.patch": 1, "augment.scale": 0.0,
        "trainer.seconds": 3600, "trainer.steps": None, "trainer.epochs": None, "trainer.batch_size": 32,
    },
    "cifar10_ddpm": LITERAL | {
        "data._target_": "ddpm.data.CIFAR10", "data.image_size": 32, "data.channels": 3, "data.flip": True,
        "schedule.T": 1000, "diffusion.target": "eps", "diffusion.variance": "beta", "optimizer._target_": ADAM,
        "optimizer.lr": 2e-4, "optimizer.betas": [0.9, 0.999], "optimizer.weight_decay": 0.0, "trainer.steps": 800_000,
        "trainer.epochs": None, "trainer.seconds": None, "trainer.batch_size": 128, "trainer.warmup": 5000,
        "trainer.lr_schedule": "constant", "trainer.clip": 1.0, "trainer.ema_decay": 0.9999, "model.dropout": 0.1,
        "model.channels": 128, "model.channel_mults": [1, 2, 2, 2], "model.blocks": 2, "model.heads": 1,
        "model.attention_resolutions": [16], "model.head_channels": None, "model.patch": 1,
        "sampler._target_": "ddpm.samplers.Ancestral", "sampler.steps": None,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_is_the_one_that_is_named(name):
    config = OmegaConf.create(resolved(composed(name)))
    found = {key: OmegaConf.select(config, key, default="missing") for key in RECIPES[name]}
    assert {k: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for k, v in found.items()} == RECIPES[name]


def test_rescaled_betas_are_the_literal_ones_at_1000_steps_and_cars_are_literal_at_512():
    for name, T in (("fashion", 1000), ("cifar10_ddpm", 1000), ("devanagari", 1000), ("cars", 512)):
        schedule = build(composed(name).schedule, "schedule")
        torch.testing.assert_close(schedule.beta[1:], torch.linspace(1e-4, 0.02, T, dtype=torch.float64))


def test_every_experiment_averages_its_weights():
    for name in EXPERIMENTS:
        assert composed(name).trainer.ema_decay >= 0.99, name


def test_devanagari_is_trained_in_half_precision_where_the_device_can():
    assert composed("devanagari").trainer.precision in ("auto", "bf16", "fp16")


def test_the_default_is_digits():
    assert resolved(compose("train", [])) == resolved(composed("digits"))


def test_a_recipe_has_its_own_words_for_each_network():
    """Nothing that is said of one stands in the way of another."""
    of_digits, of_mnist = (compose("train", [f"experiment={name}", "model=dit"]) for name in ("digits", "mnist"))
    for config, tokens in ((of_digits, 4 * 4), (of_mnist, 7 * 7)):
        model = build(config.model, "model")
        assert len(model.positions) == tokens and "channel_mults" not in config.model
    assert resolved(of_mnist) == resolved(composed("mnist_dit"))
    assert of_digits.trainer.steps == composed("digits").trainer.steps
    classifier = compose("train", ["task=classifier"]).model
    assert (classifier._target_, classifier.channels) == ("models.noisy_classifier.NoisyClassifier", 16)
    assert "channels" not in compose("train", ["model=mlp"]).model


def test_the_default_ends_by_itself_in_time():
    trainer = composed("digits").trainer
    assert trainer.steps is not None and trainer.seconds <= 120


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_one_budget_that_decides_and_a_sampler_that_can_walk(name):
    config = composed(name)
    assert (
        sum(config.trainer[key] is not None for key in ("steps", "epochs")) + (config.trainer.seconds is not None) >= 1
    )
    assert build(config.sampler, "sampler").times(build(config.schedule, "schedule"))[-1] == 0
    build(config.trainer, "trainer")


# -------------------------------------------------------------------------------------------------------------- studies


def arms(study: str) -> dict[str, DictConfig]:
    """Words of an arm -> its configuration, with the first seed."""
    found = jobs("train", [f"experiment=study/{study}", "seed=0"], multirun=False)
    assert found is not None
    return {" ".join(word for word in job if "seed" not in word): compose("train", job) for job in found}


QUICK = ("channels", "samplers")
OF_SYSTEMS = ["trilemma"]  # whose arms are several tasks
BY_TIME = [
    study if study in QUICK else pytest.param(study, marks=pytest.mark.slow)
    for study in STUDIES
    if study not in (*STUDIES_OF_CODINGS, *OF_SYSTEMS)
]


@pytest.mark.slow
@pytest.mark.parametrize("study", BY_TIME)
def test_every_study_sweeps_over_arms_and_five_seeds_that_can_all_be_trained(study):
    whole = jobs("train", [f"experiment=study/{study}"], multirun=False)
    found = arms(study)
    assert whole is not None and len(whole) == 5 * len(found)
    assert len({str(resolved(config)) for config in found.values()}) == len(found)
    for config in found.values():
        assert config.study == study and config.question.endswith("?")
        about_time = study in ("mnist_levers", "mnist_networks")
        assert config.trainer.seconds == (300 if about_time else None)
        with torch.device("meta"):
            model = build(config.model, "model")
        schedule = build(config.schedule, "schedule")
        diffusion = build(config.diffusion, "diffusion", schedule=schedule)
        diffusion.must_be_trainable()
        assert model.out_channels == shape_of(model)[0] and build(config.sampler, "sampler").times(schedule)[-1] == 0
        build(config.trainer, "trainer")
        for line in config.evaluation:
            compose("evaluate", shlex.split(line))
    factors = {name for words in found for name in re.findall(r"ablation/(\w+)=", words)}
    named = [path.stem for name in factors for path in (REPOSITORY / "conf" / "ablation" / name).glob("*.yaml")]
    assert all(any(f"={name} " in f"{words} " for words in found) for name in named)
    (baseline,) = {config.baseline for config in found.values()}
    ways = {f"{sampler} {steps}" for sampler in ("ddim", "unipc") for steps in (5, 50)}  # of sampling one network
    assert baseline is None or baseline in ways or named.count(baseline) == 1  # an arm; of a grid, a factor's level


@pytest.mark.slow
def test_the_systems_of_the_trilemma_have_the_same_time_the_same_data_and_the_class():
    found = {words.partition(" ")[0].rpartition("=")[2]: config for words, config in arms("trilemma").items()}
    assert sorted(found) == ["diffusion", "gan", "latent", "pixelcnn", "vae"]
    assert len({config.task._target_ for config in found.values()}) == 4  # latents are diffused as pixels are
    (line,) = {line for config in found.values() for line in config.evaluation}
    compose("evaluate", shlex.split(line))
    for name, config in found.items():
        words = shlex.split(config.get("init_codec", ""))
        codec = compose("train", words).trainer.seconds if words else 0
        assert config.trainer.seconds + codec == 300, name
        assert (
            config.model.num_classes == 10 and config.data._target_ == "ddpm.data.IDX" and config.data.name == "mnist"
        )


@pytest.mark.slow
@pytest.mark.parametrize("study", STUDIES_OF_CODINGS)
def test_every_study_of_codings_is_a_grid_with_five_seeds_that_can_all_be_trained(study):
    whole, found = jobs("train", [f"experiment=study/{study}"], multirun=False), arms(study)
    assert whole is not None and len(whole) == 5 * len(found) == 5 * len({str(resolved(c)) for c in found.values()})
    for config in found.values():
        assert config.study == study and config.question.endswith("?") and config.trainer.seconds is None
        with torch.device("meta"):
            model = build(config.model, "model")
        assert build(config.task, "task", model=model) is not None and model.shape == (1, 28, 28)
        build(config.trainer, "trainer")
        for line in config.evaluation:
            compose("evaluate", shlex.split(line))
    settings = {
        "codebook": lambda c: c.model.codes,
        "cvae": lambda c: (c.model.num_classes, c.trainer.epochs),
        "vae_codings": lambda c: c.model.codings,
    }
    levels = {
        "codebook": [64, 128, 256],
        "cvae": [(classes, epochs) for classes in (None, 10) for epochs in (10, 20, 40)],
        "vae_codings": [32, 64, 128],
    }
    grid = {(settings[study](config), config.trainer.batch_size) for config in found.values()}
    assert grid == {(level, batch) for level in levels[study] for batch in (64, 128, 256)} and len(grid) == len(found)
    (baseline,) = {config.baseline for config in found.values()}
    assert baseline == ("num_classes=null" if study == "cvae" else None)


@pytest.mark.slow
def test_a_lever_is_one_change_of_the_recipe_for_mnist():
    """Of one group alone, but for EDM's, which is a preconditioning and the noise levels that belong to it."""
    found = {words.partition(" ")[0].rpartition("=")[2]: config for words, config in arms("mnist_levers").items()}
    recipe = composed("mnist")
    for name, config in found.items():
        changed = {group for group in config if group in SCIENCE and config[group] != recipe[group]} - {"trainer"}
        trainer = {key for key in config.trainer if config.trainer[key] != recipe.trainer[key]} - {"previews"}
        assert len(changed) + len(trainer) == {"recipe": 0, "edm": 2}.get(name, 1), name
    assert found["edm"].diffusion == found["edm_uniform"].diffusion
    assert found["edm"].trainer == found["lognormal"].trainer


@pytest.mark.slow
def test_attention_is_placed_at_equal_cost():
    gflop = {}
    for words, config in arms("attention").items():
        with torch.device("meta"):
            model = build(config.model, "model")
            x_t, t = torch.empty(1, 1, 8, 8), torch.ones(1, dtype=torch.long)
        gflop[words] = flops(model, x_t, t, backward=False)
    assert len(gflop) == 5 and max(gflop.values()) / min(gflop.values()) < 1.12
    mean = sum(gflop.values()) / len(gflop)
    assert all(abs(found / mean - 1) < 0.07 for found in gflop.values())


@pytest.mark.slow
def test_classes_of_mnist_are_channels_beside_x_t_in_twelve_settings():
    found = arms("class_mnist").values()
    with torch.device("meta"):
        widths = {build(config.model, "model").conv_in.in_channels for config in found}
    assert widths == {1 + 4}
    settings = {(c.optimizer.lr, c.trainer.batch_size, c.trainer.epochs) for c in found}
    assert settings == {(lr, n, epochs) for lr in (2e-3, 3e-3, 4e-3) for n in (64, 128) for epochs in (10, 15)}


@pytest.mark.slow
def test_networks_of_mnist_differ_in_network_and_target_alone():
    found = {words.partition(" ")[0].rpartition("=")[2]: config for words, config in arms("mnist_networks").items()}
    made = {name: (config.model._target_, config.diffusion.target) for name, config in found.items()}
    unet, dit = "models.unet.UNet", "models.dit.DiT"
    assert made == {"unet_v": (unet, "v"), "unet_flow": (unet, "flow"), "dit_v": (dit, "v")}
    rest = [resolved(config) for config in found.values()]
    for one in rest:
        one["model"] = one["diffusion"]["target"] = one["trainer"]["precision"] = None
    assert rest[0] == rest[1] == rest[2]


@pytest.mark.slow
def test_the_widths_of_the_channels_study_are_an_eighth_of_those_in_use():
    widths = {}
    for words, config in arms("channels").items():
        widths[words.partition(" ")[0].rpartition("=")[2]] = [
            config.model.channels * m for m in config.model.channel_mults
        ]
    assert [8 * width for width in widths["pairs"]] == [128, 128, 256, 256, 512, 512]
    assert [8 * width for width in widths["stairs"]] == [64, 128, 192, 256, 384, 512]


@pytest.mark.slow
def test_linear_schedules_of_the_study_end_where_their_names_say():
    ends = {words: config.schedule for words, config in arms("schedules").items() if "beta_T" in words}
    assert len(ends) == 4
    for words, schedule in ends.items():
        assert schedule.beta_1 == 0.001 and words.startswith(f"+ablation/schedule=beta_T_{schedule.beta_T:g} ")


# ---------------------------------------------------------------------------------------------- one step


def write_pictures(folder: Path, n: int = 6) -> Path:
    """PNG and JPEG files of several sizes."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        size = (40 + 10 * i, 70 - 5 * i, 3)
        Image.fromarray(random.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{i}.{('png', 'jpg')[i % 2]}")
    return folder


def write_idx(folder: Path, n: int = 12) -> Path:
    """The train half of a data set in MNIST's format."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (n, 28, 28), dtype=np.uint8)
    for stem, array in (("images-idx3", pixels), ("labels-idx1", np.arange(n, dtype=np.uint8) % 10)):
        header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
        (folder / f"train-{stem}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    return folder


def write_cifar(folder: Path, n: int = 4) -> Path:
    """The extracted binary archive, with a few records a file."""
    random = np.random.default_rng(0)
    (folder / "cifar-10-batches-bin").mkdir(parents=True)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        records = np.concatenate([np.arange(n)[:, None] % 10, random.integers(0, 256, (n, 3072))], 1).astype(np.uint8)
        (folder / "cifar-10-batches-bin" / f"{name}.bin").write_bytes(records.tobytes())
    return folder


def write_font(folder: Path) -> Path:
    """A font that draws all Devanagari characters."""
    folder.mkdir(parents=True)
    make_font(folder / "squares.ttf")
    return folder


WRITERS = {
    "fashion": lambda folder: write_idx(folder / "fashion_mnist").parent,
    **dict.fromkeys(("mnist", "mnist_class", "mnist_class_channels", "mnist_dit"), write_idx),
    "cifar10_ddpm": write_cifar,
    "devanagari_small": write_font,
    **dict.fromkeys(FOLDERS, write_pictures),
}
SMALLER = {  # only what makes a step slow: width, and the size of a batch
    "devanagari": ["model.channels=32"],
    "cifar10_ddpm": ["model.channels=32"],
    "cars": ["model.channels=32"],
    "butterflies": ["model.channels=32"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_takes_a_step(name, tmp_path):
    config = composed(name)
    changes = ["trainer.batch_size=2", "trainer.previews=0", "trainer.steps=1", *SMALLER.get(name, [])]
    if name in WRITERS:
        changes.append(f"data.root={WRITERS[name](tmp_path / 'data')}")
        changes += ["data.download=false"] if "download" in config.data else []
        changes += [f"data.fonts={tmp_path / 'data'}", "data.count=100"] if "fonts" in config.data else []
    config = OmegaConf.merge(config, OmegaConf.from_dotlist(changes))

    torch.manual_seed(0)
    data, model = build(config.data, "data"), build(config.model, "model")
    assert data.shape == shape_of(model)
    task = Diffusion(model, build(config.diffusion, "diffusion", schedule=build(config.schedule, "schedule")))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run = Run(tmp_path / "run")
    run.path.mkdir()
    trainer = build(config.trainer, "trainer")
    optimizer = optimizer_of(config, [])
    ended, averaged = trainer.fit(run, task, data, optimizer, seed=0, device=torch.device("cpu"))

    train, held_out = read_metrics(run.path)
    least = 0.1 if name == "pictures" else 0.3  # whose sizes make these pictures nearly even
    assert ended == "steps" and least < train["loss"] < 3 and train["grad_norm"] > 0 and least < held_out["loss"] < 3
    assert checkpoint.last_whole(run.checkpoints).name == "1"
    rate = config.optimizer.lr * trainer.lr_factor(1, 0.0, config.trainer.warmup or round(
        (config.trainer.warmup_epochs or 0) * len(data.train) / 2))  # fmt: skip
    assert train["lr"] == pytest.approx(rate, rel=1e-6) and train["lr"] > 0
    moved = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
    assert moved, "the output layer at least"
    ema_weights = averaged.model.state_dict()
    assert all(torch.equal(ema_weights[k], v) for k, v in model.state_dict().items())  # after one step


PICTURES = {16: 1.6, 20: 1.6, 28: 1.6, 32: 4.2, 48: 4.1, 64: 8.5, 128: 8.8}  # side -> millions of parameters


@pytest.mark.parametrize("side", PICTURES)
def test_pictures_has_a_network_for_every_size(side):
    config = OmegaConf.merge(composed("pictures"), {"data": {"image_size": side}})
    with torch.device("meta"):
        net = build(config.model, "model")
        assert net(torch.empty(1, 3, side, side), torch.ones(1)).shape == (1, 3, side, side)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(PICTURES[side] * 1e6, rel=0.03)


@pytest.mark.slow
def test_pictures_is_trained_and_drawn_at_several_sizes(tmp_path, monkeypatch):
    """As it is typed: a sweep over sizes of files of every format, then samples of each run."""
    root = tmp_path / "pictures"
    for n, suffix in enumerate(("png", "webp", "bmp", "tif")):
        write_pictures(root / "part", 1)
        Image.open(root / "part" / "0.png").resize((30 + n, 20)).save(root / f"{n}.{suffix}")
    small = ["model.channels=16", "model.head_channels=16", "trainer.batch_size=2", "trainer.previews=0"]
    sizes = "data.image_size=16,[20,18],32"
    words = ["experiment=pictures", f"data.root={root}", sizes, *small, "trainer.seconds=null", "trainer.steps=2"]
    monkeypatch.setattr(training, "_draw_results", lambda *arguments: None)
    monkeypatch.setattr(sys, "argv", ["ddpm-train", "-m", *words, f"runs={tmp_path / 'runs'}", "sampler.steps=2"])
    cli.train()
    runs = sorted(path.parent for path in (tmp_path / "runs" / "default").glob("*/status.json"))
    assert [Run(run).status()["state"] for run in runs] == ["DONE"] * 3
    shapes = set()
    for run in runs:
        out = tmp_path / f"{run.name}.npy"
        monkeypatch.setattr(sys, "argv", ["ddpm-sample", f"run={run}", "n=2", "sampler.steps=2", f"out={out}"])
        cli.sample()
        shapes.add(np.load(out).shape)
        stored = read_config(run / "config.yaml").model
        assert stored.channel_mults is None and stored.attention_resolutions is None
    assert shapes == {(2, 16, 16, 3), (2, 20, 18, 3), (2, 32, 32, 3)}


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_the_large_ones_take_a_step_as_they_are(name, tmp_path):
    root = WRITERS[name](tmp_path)
    changes = [f"data.root={root}", "trainer.batch_size=2"]
    config = OmegaConf.merge(composed(name), OmegaConf.from_dotlist(changes))
    data, model = build(config.data, "data"), build(config.model, "model")
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]
    diffusion = build(config.diffusion, "diffusion", schedule=build(config.schedule, "schedule"))
    optimizer = build(config.optimizer, "optimizer", params=list(model.parameters()))
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = diffusion.loss(model, data.batch(data.train[:2]).x, generator=torch.Generator().manual_seed(0)).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
