"""ddpm/config.py: what composes, what may be built, and what people are told when it does not."""

import importlib
import inspect
import shutil
import weakref
from pathlib import Path

import pytest
import torch
import yaml
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from PIL import Image

from ddpm import config
from ddpm.config import InvalidInput, allowed_targets, build, compose, conf_dir, read_config, resolve_device, resolved
from ddpm.data import Folder
from ddpm.schedules import linear
from ddpm.training import trainer
from ddpm.training.tasks.diffusion import PARTS

REPOSITORY = Path(__file__).parents[1]
WHOLE = ("experiment", "protocol", "tuning")  # choices of several groups, or of no group's
GROUPS = sorted(path for path in (REPOSITORY / "conf").glob("*/*.yaml") if path.parent.name not in WHOLE)
BOUND = {  # by the name of a file, or of its group: arguments that are built from other groups
    "task": {"model", "diffusion"},
    "task/classifier": {"model", "schedule"},
    "task/vae": {"model"},
    "task/regression": {"model"},
    "task/vqvae": {"model"},
    "task/pixelcnn": {"model"},
    "task/gan": {"model", "discriminator"},
    "task/contrastive": {"model"},
    "task/autoencoder_kl": {"model", "discriminator"},
    "task/vqgan": {"model", "discriminator"},
    "task/progressive": {"model", "diffusion", "teacher"},
    "task/consistency": {"model", "diffusion", "teacher"},
    "diffusion": {"schedule"},
    "adapter": {"model"},
    "model/unet": {"text"},
    "model/dual_encoder": {"text"},
    "tokenizer": {"captions"},
    "optimizer": {"params"},
    "judge": {"image_size", "in_channels", "num_classes"},
    "reader": {"image_size", "in_channels", "things", "facts"},
    "perceptual/classifier": {"image_size", "in_channels", "num_classes"},
}


def keys_of(path: Path) -> dict[str, object]:
    """The keys of a group; those that its defaults list brings, from other groups, as None."""
    keys = yaml.safe_load(path.read_text())
    nested = [name for entry in keys.pop("defaults", []) if isinstance(entry, dict) for name in entry]
    if path.parent.name in keys:  # beside the groups that it brings
        return keys[path.parent.name]
    return {name.partition("@")[2]: None for name in nested} | keys


def target(name: str) -> object:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


# ---------------------------------------------------------------------------------------------- conf/


def test_conf_is_found_beside_the_package_and_in_it(tmp_path, monkeypatch):
    assert conf_dir() == REPOSITORY / "conf"
    found = importlib.util.find_spec("ddpm")

    class Installed:
        origin = str(tmp_path / "ddpm" / "__init__.py")

    monkeypatch.setattr(config.importlib.util, "find_spec", lambda name: Installed if name == "ddpm" else found)
    with pytest.raises(FileNotFoundError, match="installation is incomplete"):
        conf_dir.__wrapped__()
    for folder in (tmp_path / "conf", tmp_path / "ddpm" / "conf"):  # the second, inside the package, wins
        folder.mkdir(parents=True)
        (folder / "train.yaml").touch()
        assert conf_dir.__wrapped__() == folder


@pytest.mark.parametrize("path", GROUPS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_key_of_a_group_is_an_argument_of_its_constructor_and_no_argument_is_missing(path):
    keys = keys_of(path)
    assert isinstance(keys.get("_target_"), str), f"{path} has no _target_"
    arguments = set(inspect.signature(target(keys.pop("_target_"))).parameters)
    group = path.parent.name
    bound = BOUND.get(f"{group}/{path.stem}", BOUND.get(group, set()))
    if group == "optimizer":
        assert keys.keys() <= arguments and "lr" in keys and "params" not in keys
    else:
        assert set(keys) == arguments - bound
    assert bound <= arguments


VARIANTS = {  # files beside the one of the same class, and what they say otherwise
    "dpmpp_2s": {"kind", "steps"},
    "dpmpp_3m": {"order"},
    "dpmpp_sde": {"kind", "steps"},
    "patch": {"layers"},
    "photo": {"scale", "translation", "brightness", "contrast", "padding"},
    "progressive": {"steps"},
    "transformer": {"channels", "layers", "heads", "activation"},  # smaller than CLIP's
    "script": {"rotation", "scale", "translation", "elastic"},
}
OWN = [path for path in GROUPS if path.parent.name != "optimizer"]  # torch has defaults of its own


@pytest.mark.parametrize("path", OWN, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_group_says_the_same_as_the_defaults_in_python(path):
    keys = keys_of(path)
    defaults = inspect.signature(target(keys.pop("_target_"))).parameters
    differing = {
        k
        for k, v in keys.items()
        if not isinstance(v, str) or "${" not in v
        if defaults[k].default is not inspect.Parameter.empty and v != in_yaml(defaults[k])
    }
    assert differing == VARIANTS.get(path.stem, set())


def in_yaml(parameter: inspect.Parameter) -> object:
    """A default as it is written there: a tuple as a list, a mapping that is None by default by its names."""
    if parameter.name == "parts":
        return dict.fromkeys(PARTS, 0.0) | {"diffusion": 1.0}
    if "dict" in str(parameter.annotation) and parameter.default is None:
        return dict.fromkeys(["gamma", "k", "weight"])
    return list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default


@pytest.mark.parametrize("name", sorted(path.stem for path in GROUPS if path.parent.name == "schedule"))
def test_every_schedule_composes_and_builds(name):
    given = {
        "betas": ["schedule.beta=[0.1,0.2,0.3]"],
        "zero_terminal_snr": ["schedule@schedule.schedule=cosine", "schedule.schedule.T=3"],
        "cosine": ["schedule.T=3"],
        "sigmoid": ["schedule.T=3"],
        "geometric": ["schedule.T=3"],
        "sigmas": ["schedule.sigma=[0.1,1,10]"],
    }.get(name, ["schedule.T=3", "schedule.rescale=false"])
    schedule = build(compose("train", [f"schedule={name}", *given]).schedule, "schedule")
    assert schedule.T == 3 and (schedule.alpha_bar[-1] == 0) == (name == "zero_terminal_snr")
    if name == "zero_terminal_snr":
        cosine = build(compose("train", ["schedule=cosine", "schedule.T=3"]).schedule, "schedule")
        assert schedule.alpha_bar[1].item() == pytest.approx(cosine.alpha_bar[1].item(), rel=1e-15)


def test_the_groups_mirror_the_code():
    assert {path.parent.name for path in GROUPS} >= {
        "model",
        "schedule",
        "diffusion",
        "sampler",
        "data",
        "augment",
        "optimizer",
        "trainer",
    }
    for name in ("train", "sample", "evaluate"):
        assert (REPOSITORY / "conf" / f"{name}.yaml").is_file()


def test_the_keys_that_scripts_rely_on():
    train, sample = compose("train", []), compose("sample", ["run=x"])
    keys = """model schedule diffusion.target diffusion.variance sampler.steps data.split data.validation optimizer.lr
        trainer.steps trainer.epochs trainer.seconds trainer.batch_size trainer.precision device seed init extend study
        runs"""
    for key in keys.split():
        assert OmegaConf.select(train, key, default="missing") != "missing", key
    assert (train.study, train.runs, train.device) == ("default", "runs", "auto")
    assert compose("train", ["data=mnist", "data.root=there"]).data.root == "there"
    for key in ("run", "n", "sampler.steps", "seed", "out", "weights", "batch", "steps_strip", "process"):
        assert OmegaConf.select(sample, key, default="missing") != "missing", key
    assert not GlobalHydra.instance().is_initialized()  # composing leaves nothing behind


# ---------------------------------------------------------------------------------------------- composition


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("schedule=nope", ["schedule/nope", "cosine", "linear"]),
        ("experiment=nope", ["experiment/nope", "devanagari", "mnist"]),
        ("model.chanels=8", ["model.chanels"]),
        ("bogus=1", ["bogus"]),
        ("schedule=linear,cosine", ["schedule=linear,cosine", "--multirun"]),
        ("schedule=[linear,cosine]", ["a run takes one choice of schedule", "-m schedule=linear,cosine"]),
        ("tuning=[full, 'lora']", ["only the last would count", "sweep: -m tuning=full,lora"]),
        ("+optimizer@inner=[adam,adamw]", ["-m +optimizer@inner=adam,adamw"]),
        ("experiment=[digits,mnist]", ["-m experiment=digits,mnist"]),
        ("trainer.steps", ["trainer.steps"]),
        ("model.channels=[1", ["input"]),
        ("model=null", ["model"]),
        ("=5", ["5"]),
        ("~nope", ["nope"]),
    ],
)
def test_what_does_not_compose_is_one_line(override, words):
    with pytest.raises(InvalidInput) as raised:
        compose("train", [override])
    message = str(raised.value)
    assert all(word in message for word in words) and "\n" not in message and "search path" not in message.lower()
    assert not GlobalHydra.instance().is_initialized()


def test_a_list_of_one_choice_is_that_choice_and_levers_are_put_together():
    listed, alone = (compose("train", [f"schedule={choice}"]).schedule for choice in ("[cosine]", "cosine"))
    assert listed == alone
    both = compose("train", ["experiment=mnist", "+ablation/lever=[min_snr,wider]"])
    plain = compose("train", ["experiment=mnist"])
    assert both.diffusion.loss == "min_snr" != plain.diffusion.loss
    assert both.model.channels != plain.model.channels


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.chanels=8", ["model.chanels", "model has:", "channels", "dropout"]),
        ("bogus=1", ["bogus", "the top level has:", "trainer", "seed"]),
        ("trainer.bogus.deep=1", ["trainer.bogus", "trainer has:", "batch_size"]),
    ],
)
def test_an_unknown_key_is_answered_with_those_that_are_known(override, words):
    overrides = ["seed=3", override, "model.channels=16"]
    with pytest.raises(InvalidInput) as raised:
        compose("train", overrides)
    message = config.with_known_keys("train", str(raised.value), overrides)
    assert all(word in message for word in words) and "_target_" not in message and "\n" not in message


def test_other_messages_are_left_alone():
    assert config.with_known_keys("train", "something else", ["seed=1"]) == "something else"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data=folder", ["data.root"]),
        ("trainer.steps=${nope}", ["nope"]),
        ("trainer.steps=${oc.env:NO_SUCH_NAME}", ["NO_SUCH_NAME"]),
    ],
)
def test_values_that_are_missing_or_lead_nowhere_are_one_line(override, words):
    with pytest.raises(InvalidInput) as raised:
        resolved(compose("train", [override]))
    assert all(word in str(raised.value) for word in words) and "\n" not in str(raised.value)


# ---------------------------------------------------------------------------------------------- what may be built


def test_the_closed_set_is_conf_and_the_optimizers():
    in_conf = {keys_of(path)["_target_"] for path in GROUPS}
    assert allowed_targets() == in_conf | set(config.OPTIMIZERS)
    assert all(callable(target(name)) for name in allowed_targets())


def test_what_is_allowed_is_built():
    schedule = build({"_target_": "ddpm.schedules.cosine", "T": 7, "s": 0.008, "beta_max": 0.999}, "schedule")
    assert schedule.T == 7
    model = build(compose("train", ["model.channels=8", "model.groups=4"]).model, "model")
    assert model.image_size == (8, 8)  # an interpolation to another group
    optimizer = build(
        OmegaConf.create({"_target_": "torch.optim.SGD", "lr": 0.5}), "optimizer", params=list(model.parameters())
    )
    assert optimizer.param_groups[0]["params"][0] is next(model.parameters())
    adam = build(compose("train", []).optimizer, "optimizer", params=list(model.parameters()))
    assert isinstance(adam.defaults["betas"], list | tuple)


FOREIGN = [
    "os.system",
    "builtins.eval",
    "torch.load",
    "torch.hub.load",
    "torch.optim.optimizer.torch.hub.load",
    "torch.optim.optimizer.torch.load",
    "torch.optim.Adam.__init__",
    "ddpm.training.trainer.torch.load",
    "models.unet.torch.load",
    "ddpm.schedules",
    "torch.optim.Adagrad",
    " torch.optim.Adam",
    "${evil}",
    "${oc.env:HOME}",
    "",
    None,
    ["os.system"],
    {"a": "os.system"},
    5,
]


@pytest.fixture
def trap(tmp_path) -> tuple[Path, dict]:
    """A file that must never be made, and a node that makes it if it is built."""
    file = tmp_path / "ran"
    return file, {"_target_": "pathlib.Path.touch", "self": {"_target_": "pathlib.Path", "_args_": [str(file)]}}


@pytest.mark.parametrize("name", FOREIGN, ids=str)
@pytest.mark.parametrize("plain", [True, False])
def test_a_foreign_target_is_refused_with_those_that_are_allowed(name, plain):
    node = {"_target_": name, "lr": 0.1}
    with pytest.raises(InvalidInput) as raised:
        build(node if plain else OmegaConf.create({"evil": "os.system", "x": node}).x, "optimizer")
    message = str(raised.value)
    assert message.startswith("optimizer: ") and "torch.optim.Adam," in message and "\n" not in message


@pytest.mark.parametrize(
    "hidden",
    [
        lambda evil: {"betas": evil},
        lambda evil: {"betas": [0.9, evil]},
        lambda evil: {"betas": [[{"deep": evil}]]},
        lambda evil: {"betas": {"a": {"b": evil}}},
    ],
)
def test_a_nested_foreign_target_is_refused(hidden, trap):
    file, evil = trap
    with pytest.raises(InvalidInput, match=r"'pathlib\.Path\.touch' is not allowed"):
        build({"_target_": "torch.optim.SGD", "lr": 0.1, **hidden(evil)}, "optimizer", params=[torch.zeros(1)])
    assert not file.exists()


@pytest.mark.parametrize(
    "reference",
    [
        "${evil}",
        ["${evil}"],
        {"a": ["${evil}"]},
        "${.hidden}",
        "${oc.create:${evil}}",
        "${oc.dict.values:nest}",
        "\\${evil}",
        "\\${oc.create:{_target_:pathlib.Path.touch,self:{_target_:pathlib.Path,_args_:['FILE']}}}",
    ],
    ids=str,
)
def test_an_interpolation_to_a_foreign_target_is_not_built(reference, trap):
    """A check of the plain text sees only a reference; what it leads to must not be built either."""
    file, evil = trap
    reference = reference.replace("FILE", str(file)) if isinstance(reference, str) else reference
    node = {"_target_": "ddpm.schedules.linear", "T": 10, "beta_1": reference, "beta_T": 0.02, "rescale": True}
    if reference == "${.hidden}":
        node["hidden"] = "${evil}"
    stored = OmegaConf.create({"evil": evil, "nest": {"a": evil}, "schedule": node})
    with pytest.raises(InvalidInput) as raised:
        build(stored.schedule, "schedule")
    assert not file.exists() and "\n" not in str(raised.value)


@pytest.mark.parametrize("key", ["_partial_", "_args_", "_convert_", "_recursive_"])
@pytest.mark.parametrize("nested", [False, True])
def test_hydras_other_keys_are_refused(key, nested):
    node = {"_target_": "torch.optim.SGD", "lr": 0.1}
    (node.setdefault("more", {}) if nested else node)[key] = [1]
    with pytest.raises(InvalidInput, match=f"optimizer: the key {key} is not allowed"):
        build(node, "optimizer")


@pytest.mark.parametrize("node", [{}, {"lr": 0.1}, None, "text", [], ["torch.optim.SGD"], 5])
def test_what_has_no_target_is_refused(node):
    with pytest.raises(InvalidInput, match=r"^optimizer: "):
        build(node if not isinstance(node, dict | list) else OmegaConf.create(node), "optimizer")


def test_trust_adds_an_exact_name_and_no_more():
    node = {"_target_": "torch.optim.Adagrad", "lr": 0.1}
    weights = [torch.zeros(1, requires_grad=True)]
    assert isinstance(build(node, "optimizer", ["torch.optim.Adagrad"], params=weights), torch.optim.Adagrad)
    for trust in (["torch.optim"], ["torch.optim.*"], ["Adagrad"], [], None):
        with pytest.raises(InvalidInput):
            build(node, "optimizer", trust, params=weights)


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"_target_": "ddpm.schedules.cosine", "T": 0, "s": 0.008, "beta_max": 0.999}, "T = 0"),
        ({"_target_": "ddpm.schedules.cosine", "bogus": 1}, "bogus"),
        ({"_target_": "ddpm.diffusion.GaussianDiffusion", "loss_options": [5]}, "must be a mapping of names to"),
        ({"_target_": "torch.optim.SGD", "lr": -1}, "learning rate"),
        ({"_target_": "torch.optim.Adam", "betas": [0.9]}, "unpack|range|betas"),
        ({"_target_": "models.unet.UNet", "image_size": 8, "attention_resolutions": [8], "groups": 0}, "groups"),
        ({"_target_": "ddpm.data.Folder", "root": "/no/such/folder"}, "/no/such/folder"),
    ],
)  # fmt: skip
def test_what_a_constructor_refuses_is_invalid_input_in_one_line(node, words):
    arguments = {"optim": {"params": [torch.zeros(1)]}, "diffusion": {"schedule": linear()}}
    arguments = next((a for name, a in arguments.items() if name in node["_target_"]), {})
    with pytest.raises(InvalidInput, match=words) as raised:
        build(node, "the part", **arguments)
    assert str(raised.value).startswith("the part: ") and "\n" not in str(raised.value)


# ---------------------------------------------------------------------------------------------- data of several runs


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder of three."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for n in range(3):
        Image.new("L", (8, 8), 80 * n).save(folder / f"{n}.png")
    return folder


def data_of(folder: Path, *words: str) -> object:
    return config.build_data(compose("train", ["data=folder", f"data.root={folder}", *words]).data, [])


def test_data_of_the_same_configuration_are_read_once(pictures):
    first = data_of(pictures)
    assert data_of(pictures, "seed=1") is first
    assert data_of(pictures, "data.image_size=16") is not first


def test_data_are_read_again_when_a_file_changed(pictures):
    before = data_of(pictures)
    Image.new("L", (8, 8), 200).save(pictures / "0.png")
    after = data_of(pictures)
    assert after.identity() != before.identity() and after.images.max() == 200
    (pictures / "1.png").unlink()
    assert len(data_of(pictures)) == 2
    shutil.rmtree(pictures)
    with pytest.raises(InvalidInput, match="no folder"):
        data_of(pictures)
    assert config._cached == {}


def test_of_data_the_last_are_kept_alone(pictures, monkeypatch):
    held = weakref.ref(data_of(pictures))
    assert held() is not None and len(config._cached) == 1
    build, alive = config.build, []
    monkeypatch.setattr(config, "build", lambda *arguments: (alive.append(held()), build(*arguments))[1])
    data_of(pictures, "data.flip=true")
    assert alive == [None] and len(config._cached) == 1  # it went before the others came


class Foreign(Folder):
    """May read what `Folder` knows nothing of."""


def test_foreign_data_are_not_kept(pictures):
    name = f"{__name__}.Foreign"
    node = {"_target_": name, "root": str(pictures)}
    assert config.build_data(node, [name]) is not config.build_data(node, [name])
    with pytest.raises(InvalidInput, match="is not allowed"):
        config.build_data(node, [])
    with pytest.raises(InvalidInput, match="data: nothing to build"):
        config.build_data(None, [])


# ---------------------------------------------------------------------------------------------- device, science, files


@pytest.mark.parametrize("name", ["tpu", "meta", "mps:x", "", None, "cuda:x"])
def test_an_unknown_device_lists_the_known(name):
    with pytest.raises(InvalidInput, match="is not known; allowed: auto, cpu, cuda"):
        resolve_device(name)


def test_a_device_that_is_there_or_not(monkeypatch):
    assert resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(InvalidInput, match="no such CUDA device here, PyTorch sees none; use device=cpu"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("cuda") and resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(InvalidInput, match="PyTorch sees 2 of them"):
        resolve_device("cuda:2")


def test_cadence_is_named_as_the_trainer_names_it():
    arguments = inspect.signature(trainer.Trainer).parameters
    assert set(config.CADENCE) <= set(arguments)
    assert set(config.MEMORY) <= set(compose("train", []).model)
    assert set(config.SCIENCE) <= set(compose("train", []))


@pytest.mark.parametrize(
    ("words", "in_task"),
    [
        ([], None),
        (["model.num_classes=10", "task.drop=0.1"], {"drop": 0.1}),
        (["task.only=[model.conv_in.*]"], {"only": ["model.conv_in.*"]}),
        (["trainer.offset_noise=0.1", "trainer.time_sampling=loss_aware"], None),  # which the trainer's part says
        (["task.parts.diffusion=1", "task.parts.ssim=0"], None),
        (["~task.parts"], None),
        (["task.parts=null"], None),
        (["task.parts.ssim=0.1"], {"parts": {"ssim": 0.1}}),  # one factor of a study
        (["task.parts={diffusion:0,huber:2}"], {"parts": {"diffusion": 0, "huber": 2}}),
        (["~task.parts.diffusion", "task.parts.huber=2"], {"parts": {"diffusion": 0.0, "huber": 2}}),
        (["task.parts=3"], {"parts": 3}),  # which is refused
    ],
)
def test_science_holds_of_the_task_what_is_not_said_elsewhere(words, in_task):
    settings = resolved(compose("train", words))
    facts = config.science(settings, {}, {}, 1)
    assert facts.get("task") == in_task
    said = [facts["trainer"][key] for key in ("offset_noise", "time_sampling")]
    assert said == [settings["task"][key] for key in ("offset_noise", "time_sampling")]


@pytest.mark.parametrize("name", ["vae", "vqvae", "autoencoder_kl", "vqgan"])
def test_a_perceptual_part_is_named_where_it_is_computed_and_its_network_by_its_weights(name):
    """So runs of earlier versions, which lack it, keep their names."""
    facts = [
        config.science(resolved(compose("train", [f"task={name}", *words])), {}, {}, 1)
        for words in ([], ["perceptual=classifier"], ["task.parts.perceptual=0.5"], ["~task.parts.perceptual"])
    ]
    assert "perceptual" not in facts[0]["task"]["parts"] and facts[0] == facts[1] == facts[3]
    parts = facts[0]["task"]["parts"] | {"perceptual": 0.5}
    assert facts[2] == facts[0] | {"task": facts[0]["task"] | {"parts": parts}}


def test_pictures_are_compared_by_the_classifier_that_judges():
    """So that one is trained for both."""
    files = (REPOSITORY / "conf" / group / "classifier.yaml" for group in ("judge", "perceptual"))
    assert len({str(yaml.safe_load(file.read_text())) for file in files}) == 1


@pytest.mark.parametrize("target", [["a"], {"a": 1}, 5, None, True])
def test_science_is_made_of_names_that_are_none_too(target):
    """They are refused when they are built, and not before."""
    settings = resolved(compose("train", []))
    settings["model"]["_target_"] = target
    assert config.science(settings, {}, {}, 1)["model"]["_target_"] == target


@pytest.mark.parametrize(
    ("words", "more"),
    [
        ([], {}),
        (["diffusion.sigma_data=0.62"], {}),  # which nothing makes use of
        (["diffusion.preconditioning=edm"], {"preconditioning": "edm"}),
        (
            ["diffusion.preconditioning=edm", "diffusion.sigma_data=0.62"],
            {"preconditioning": "edm", "sigma_data": 0.62},
        ),
    ],
)
def test_science_holds_a_preconditioning_with_the_deviation_of_the_data_or_a_target(words, more):
    facts = [config.science(resolved(compose("train", typed)), {}, {}, 1) for typed in ([], words)]
    without = {key: value for key, value in facts[0]["diffusion"].items() if not more or key != "target"}
    assert facts[1] == facts[0] | {"diffusion": without | more}


def test_science_holds_everything_but_where_and_how_often():
    settings = resolved(compose("train", []))
    facts = config.science(settings, {"name": "digits"}, {"init": "abc"}, 3)
    assert facts.keys() == {*config.SCIENCE, "data", "parents", "numerics"}
    assert facts["data"] == {"name": "digits", "validation": 0.2, "flip": False}
    assert facts["trainer"].keys() == settings["trainer"].keys() - set(config.CADENCE) - config.LATER["trainer"].keys()
    assert facts["model"].keys() == settings["model"].keys() - set(config.MEMORY) - config.LATER["model"].keys()
    assert facts["diffusion"].keys() == settings["diffusion"].keys() - config.LATER["diffusion"].keys()
    assert settings["trainer"].keys() >= set(config.CADENCE)  # it copies
    assert (facts["parents"], facts["numerics"]) == ({"init": "abc"}, 3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "lacks model, schedule"),
        ("model: {}\n", "lacks schedule"),
        ("- 1\n", "lacks model"),
        ("a: [1\n", "cannot be read as a configuration"),
        ("a: ${b\n", "cannot be read as a configuration|lacks"),
        ("\x00", "cannot be read as a configuration"),
        ("hello", "cannot be read as a configuration|lacks model"),
    ],
)
def test_a_file_that_is_no_configuration_of_a_run(text, words, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(InvalidInput, match=words) as raised:
        read_config(tmp_path / "config.yaml")
    assert "config.yaml" in str(raised.value) and "\n" not in str(raised.value)


def test_the_configuration_of_a_run_is_read_back(tmp_path):
    settings = resolved(compose("train", []))
    OmegaConf.save(OmegaConf.create(settings), tmp_path / "config.yaml")
    assert OmegaConf.to_container(read_config(tmp_path / "config.yaml")) == settings


def test_plain():
    assert (
        config.plain(OmegaConf.create([1, {"a": 2}])) == [1, {"a": 2}]
        and config.plain(5) == 5
        and config.plain(None) is None
    )


@pytest.mark.parametrize(
    ("word", "in_quotes"),
    [
        ("study=é", "study='é'"),
        ("data.root=/home/jürgen/my pictures", "data.root='/home/jürgen/my pictures'"),
        ("study=é,b,ü", "study='é',b,'ü'"),
        ('evaluation=[é,"ü = 1"]', "evaluation=['é',\"ü = 1\"]"),
        ("x={a:é,b:[ü]}", "x={a:'é',b:['ü']}"),
        ("study='é, b'", "study='é, b'"),
        ("study='it\\'s é'", "study='it\\'s é'"),
        ("study=plain", "study=plain"),
        ("é", "é"),
    ],
)
def test_what_is_beyond_ascii_gets_the_quotes_that_hydra_wants(word, in_quotes):
    assert config.in_quotes(word) == in_quotes == config.in_quotes(in_quotes)


def test_words_beyond_ascii_compose():
    assert compose("train", ["study=é"]).study == "é"
    assert compose("train", ["question=zu groß, oder nicht?".replace(",", "")]).question == "zu groß oder nicht?"
    swept = config.jobs("train", ["study=é,ü"], multirun=True)
    assert [compose("train", job).study for job in swept] == ["é", "ü"]
    with pytest.raises(InvalidInput, match=r"study=a#b cannot be read as key=value; .* is put into quotes"):
        compose("train", ["study=a#b"])


def test_options_that_are_null_or_as_ever_leave_a_run_its_name():
    """As runs have it that were made before these keys stood in conf/."""
    facts = config.science(resolved(compose("train", [])), {}, {}, 1)
    assert facts["diffusion"]["loss_options"] == {} and "amsgrad" not in facts["optimizer"]
    words = ["diffusion.loss=p2", "diffusion.loss_options.gamma=2", "optimizer.amsgrad=true"]
    facts = config.science(resolved(compose("train", words)), {}, {}, 1)
    assert facts["diffusion"]["loss_options"] == {"gamma": 2} and facts["optimizer"]["amsgrad"]
    plain = {"diffusion": resolved(compose("train", ["diffusion.loss_options={gamma:2}"]))["diffusion"]}
    assert plain["diffusion"]["loss_options"] == {"gamma": 2, "k": None, "weight": None}
