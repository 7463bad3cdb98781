"""Who may import whom. The mathematics is readable alone because nothing here can creep in."""

import ast
import configparser
import json
import re
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
ALLOWED = {  # what each module of the mathematics, and each room, may import of ddpm; the arrows go one way
    "checks": set(),
    "schedules": set(),
    "randomness": set(),
    "times": {"schedules"},
    "forward": {"schedules"},
    "preconditioning": {"schedules"},
    "targets": {"schedules"},
    "reverse": {"forward", "targets", "schedules"},
    "losses": {"reverse", "forward", "targets", "schedules"},
    "likelihood": {"losses", "reverse", "forward", "targets", "schedules"},
    "diffusion": {"preconditioning", "losses", "reverse", "forward", "targets", "schedules"},
    "oracle": {"schedules", "targets"},
    "guidance": {"guidance", "diffusion", "targets", "schedules"},
    "latent": {"latent"},
    "samplers": {
        "latent",
        "samplers",
        "score",
        "diffusion",
        "reverse",
        "forward",
        "targets",
        "schedules",
        "randomness",
        "oracle",
    },
    "editing": {"editing", "samplers", "diffusion", "forward", "targets", "schedules", "randomness"},
    "distillation": {"distillation", "samplers", "forward", "targets", "schedules"},
    "score": {"score", "likelihood", "schedules"},
    "runs": {"runs"},
    "figures": {"figures", "runs", "schedules"},
    "data": {"data", "figures", "runs", "randomness"},
    "metrics": {
        "latent",
        "oracle",
        "score",
        "forward",
        "targets",
        "metrics",
        "sources",
        "samplers",
        "diffusion",
        "likelihood",
        "losses",
        "schedules",
        "data",
        "figures",
        "runs",
        "randomness",
    },
    "training": {
        "training",
        "distillation",
        "latent",
        "oracle",
        "score",
        "forward",
        "sources",
        "samplers",
        "diffusion",
        "losses",
        "times",
        "schedules",
        "data",
        "figures",
        "runs",
        "randomness",
    },
    "sources": {
        "sources",
        "samplers",
        "latent",
        "guidance",
        "diffusion",
        "targets",
        "schedules",
        "data",
        "figures",
        "runs",
        "randomness",
    },
    "study": {"study", "metrics", "figures", "runs", "randomness"},
    "reading": {
        "reading",
        "distillation",
        "forward",
        "guidance",
        "latent",
        "likelihood",
        "losses",
        "oracle",
        "preconditioning",
        "randomness",
        "samplers",
        "schedules",
        "score",
        "targets",
        "times",
        "training",
    },
}
EVERYWHERE = {"checks"}  # which itself imports nothing: what a setting must be
BESIDES = {  # what binds guidance to the condition of data
    "guidance.bound": {"data"},
}
JOINS = {  # the one network module that imports mathematics, within a function: a published pipeline is both
    "models.pretrained.pipeline": {
        "ddpm.data.spectrogram",
        "ddpm.latent.codec",
        "ddpm.sources.prompted",
        "ddpm.sources.published",
        "ddpm.sources.sounds",
    },
}
PACKAGES = {  # where nobody may import it, but these
    "hydra": (
        ("ddpm", "models", "experiments"),
        {"ddpm.config", "ddpm.cli", *(f"ddpm.commands.{n}" for n in ("launch", "train.sweeping"))},
    ),
    "soundfile": (("ddpm", "models", "experiments"), {"ddpm.data.sound"}),
    "soxr": (("ddpm", "models", "experiments"), {"ddpm.data.sound"}),
    "datasets": (("ddpm", "models", "experiments", "tests"), {"ddpm.data.hub"}),
    "torch_fidelity": (("ddpm", "models", "experiments", "tests"), {"ddpm.metrics.features"}),
    "diffusers": (("ddpm", "models", "experiments", "tests"), set()),
    "transformers": (("ddpm", "models", "experiments", "tests"), set()),
    "tokenizers": (("ddpm", "models", "experiments", "tests"), set()),
}
BEHIND = {"torch.utils.tensorboard": "tensorboard"}  # imported through another package, which does not require it
NOT_IMPORTED = {"pytest-xdist", "ruff", "mypy", "ipykernel", "ipython"}  # of the extras: what tests and checks run
NOT_IMPORTED |= {"latex2mathml", "pygments", "soundfile", "soxr"}  # and what of the package needs an extra of its own
LINTERS = {"ruff", "mypy"}  # need not run at the lower bounds


def modules(*folders: str) -> dict[str, Path]:
    """Dotted name -> file, of every module in these folders."""
    files = [path for folder in folders for path in sorted((REPOSITORY / folder).rglob("*.py"))]
    return {".".join(p.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): p for p in files}


OURS = modules("ddpm", "models")


def imports(source: str, name: str = "", package: bool = False) -> set[str]:
    """What a module imports, anywhere in it: modules of ours by their full names, of others as written."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".")
                parent = parts[: len(parts) - node.level + package]
                base = ".".join([*parent, *([base] if base else [])])
            inner = {f"{base}.{alias.name}" for alias in node.names}
            found |= {i for i in inner if i in OURS} or {base}
            if base in OURS and not inner <= OURS.keys():
                found.add(base)
    return found


@cache
def edges(*folders: str) -> dict[str, set[str]]:
    return {
        name: imports(path.read_text(encoding="utf-8"), name, path.name == "__init__.py")
        for name, path in modules(*folders).items()
    }


def of(package: str, imported: set[str]) -> set[str]:
    """The imported modules that lie in a package."""
    return {i for i in imported if i == package or i.startswith(f"{package}.")}


def test_networks_and_mathematics_never_import_each_other():
    graph = edges("ddpm", "models")
    wrong = {n: of("models" if n.split(".")[0] == "ddpm" else "ddpm", i) for n, i in graph.items()}
    assert {n: i for n, i in wrong.items() if i} == JOINS


def test_the_join_is_made_late():
    """So `models` is imported without the mathematics."""
    code = "import sys, models.pretrained; print(*[m for m in sys.modules if m.split('.')[0] == 'ddpm'])"
    run = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES)
def test_packages_that_few_or_none_may_import(package):
    folders, allowed = PACKAGES[package]
    assert {name for name, imported in edges(*folders).items() if of(package, imported)} <= allowed


@pytest.mark.parametrize("name", ALLOWED)
def test_the_arrows_go_one_way(name):
    """So no room imports the configuration or the command line either."""
    for module, imported in edges("ddpm").items():
        if module == f"ddpm.{name}" or module.startswith(f"ddpm.{name}."):
            inside = {i.split(".")[1] if "." in i else "ddpm itself" for i in of("ddpm", imported)}
            allowed = ALLOWED[name] | EVERYWHERE | BESIDES.get(module.removeprefix("ddpm."), set())
            assert inside <= allowed, f"{module} imports {inside - allowed}"


def test_every_module_and_room_was_found():
    top = {name.split(".")[1] for name in OURS if name.startswith("ddpm.")}
    assert top == ALLOWED.keys() | {"config", "cli", "commands"}
    assert {"ddpm.samplers.base", "models.unet"} <= OURS.keys()


def test_nothing_imports_the_command_line_and_only_it_the_commands_and_the_configuration():
    graph = edges("ddpm", "models")
    commands = of("ddpm.commands", set(OURS))
    assert {n for n, i in graph.items() if "ddpm.cli" in i} == set()
    assert {n for n, i in graph.items() if of("ddpm.commands", i)} <= {"ddpm.cli"} | commands
    assert {n for n, i in graph.items() if "ddpm.config" in i} <= {"ddpm.cli"} | commands


def test_no_cycles():
    """Imports inside functions count: a late import hides a cycle, it does not break it."""
    graph = {name: imported & OURS.keys() for name, imported in edges("ddpm", "models").items()}
    TopologicalSorter(graph).prepare()  # raises CycleError with the names


@pytest.mark.slow
def test_every_module_can_be_the_first_one_imported():
    """In one fresh interpreter, ours forgotten between imports: an import that only works after another fails here."""
    code = """
import importlib, sys
for name in sys.argv[1:]:
    for loaded in [m for m in sys.modules if m.split(".")[0] in ("ddpm", "models")]:
        del sys.modules[loaded]
    importlib.import_module(name)
"""
    names = [name for name in OURS if not name.endswith("__main__")]
    run = subprocess.run([sys.executable, "-c", code, *names], cwd=REPOSITORY, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "late"),
    [
        ("import ddpm.cli", {"torch", "PIL"}),  # --help and what does not compose are told in a moment
        (
            "import ddpm.training.trainer, ddpm.data; ddpm.data.Digits()",
            {"matplotlib", "tensorboard", "sklearn", "scipy", "datasets"},
        ),
    ],
)
def test_what_a_start_does_not_need_is_not_waited_for(code, late):
    code = f"import sys; {code}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert late & set(run.stdout.split()) == set()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch.nn as nn, hydra.utils", {"torch.nn", "hydra.utils"}),
        ("from ddpm.schedules import at", {"ddpm.schedules"}),
        ("from ddpm import forward", {"ddpm.forward"}),
        ("from ddpm import NUMERICS, forward", {"ddpm", "ddpm.forward"}),
        ("from . import forward", {"ddpm.forward"}),
        ("from .schedules import at", {"ddpm.schedules"}),
        ("def f():\n    from hydra import compose", {"hydra"}),
    ],
)
def test_what_counts_as_an_import(source, expected):
    assert imports(source, "ddpm.reverse") == expected


# ---------------------------------------------------------------------------------------------------- what is installed


def normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def requirements(*extras: str) -> dict[str, str]:
    """Distribution -> lower bound, of setup.cfg: what an installation requires, or what these extras add."""
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg", encoding="utf-8")
    lists = [setup["options.extras_require"][name] for name in extras] or [setup["options"]["install_requires"]]
    lines = [line.partition(">=") for text in lists for line in text.split()]
    return {normal(name): bound.partition(",")[0] for name, _, bound in lines}


def pins(path: str) -> dict[str, str]:
    """Distribution -> exact version, of a file for pip."""
    lines = (REPOSITORY / path).read_text(encoding="utf-8").splitlines()
    return {normal(line.partition("==")[0]): line.partition("==")[2] for line in lines if not line.startswith("#")}


def distributions(imported: set[str]) -> set[str]:
    """What must be installed for these imports; a name that nobody provides stands for itself."""
    known = packages_distributions()
    names = {BEHIND.get(name, name).split(".")[0] for name in imported} | {name.split(".")[0] for name in imported}
    names -= sys.stdlib_module_names | {"ddpm", "models"} | {path.stem for path in (REPOSITORY / "tests").iterdir()}
    return {normal(distribution) for name in names for distribution in known.get(name, [name])}


def test_every_folder_with_modules_is_in_the_wheel():
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg", encoding="utf-8")
    folders = {
        path.parent.relative_to(REPOSITORY) for name in ("ddpm", "models") for path in (REPOSITORY / name).rglob("*.py")
    }
    listed = set(setup["options"]["packages"].split()) - {"ddpm.conf"}
    assert listed == {".".join(folder.parts) for folder in folders}


def test_what_the_package_imports_is_required_and_nothing_else():
    """A configuration imports by `_target_`."""
    imported = set().union(*edges("ddpm", "models", "experiments").values())
    for path in (REPOSITORY / "conf").rglob("*.yaml"):
        imported |= set(re.findall(r"_target_: ([\w.]+)", path.read_text(encoding="utf-8")))
    brought = {"joblib", "submitit"}  # by the launchers of the extras "parallel" and "slurm", which Hydra finds
    assert (
        distributions(imported) - brought
        == requirements().keys() | requirements("hub", "fid", "optuna", "reading", "audio").keys()
    )


def test_what_the_notebooks_import_is_in_their_extra():
    imported = set()
    for path in (REPOSITORY / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        imported = imported.union(*(imports("".join(c["source"])) for c in cells if c["cell_type"] == "code"))
    assert distributions(imported) <= requirements().keys() | requirements("notebooks").keys()


@pytest.mark.slow
def test_what_the_tests_import_is_in_the_extras_and_nothing_else():
    needed = distributions(set().union(*edges("tests").values())) - requirements().keys()
    assert needed == requirements("test", "notebooks").keys() - NOT_IMPORTED


def test_every_requirement_has_an_exact_version_that_the_tests_passed_with():
    extras = requirements("test", "notebooks", "hub", "fid", "parallel", "slurm", "optuna", "reading", "audio")
    assert requirements().keys() | extras.keys() <= pins("constraints.txt").keys()


def test_the_oldest_versions_that_are_tested_are_the_lower_bounds():
    lowest, tested = requirements() | requirements("test"), pins(".ci/oldest.txt")
    assert {name: tested.get(name) for name in lowest if name not in LINTERS} == {
        name: bound for name, bound in lowest.items() if name not in LINTERS
    }
