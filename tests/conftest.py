"""Shared by the tests: data whose exact denoiser, flow and moments are known in closed form, seeds, no network."""

import dataclasses
import html
import json
import os
import pickle
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import omegaconf
import pytest
import torch
import yaml
from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import IConfigRepository
from hydra._internal.defaults_list import DefaultsList, Overrides
from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.types import Override
from hypothesis import settings
from offline import sitecustomize
from omegaconf import DictConfig
from torch import Tensor

from ddpm.oracle import GaussianOracle, MixtureOracle
from ddpm.randomness import SampleNoise
from ddpm.samplers import Sampler, integrate
from ddpm.schedules import NoiseSchedule, linear

OFFLINE = str(Path(sitecustomize.__file__).parent)  # for the processes that tests start
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [OFFLINE, os.environ.get("PYTHONPATH")]))

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))
settings.register_profile("the same everywhere", deadline=None, derandomize=True, database=None)
settings.load_profile("the same everywhere")


SAY = """
  const asked = performance.getEntriesByType("resource").map((entry) => entry.name);
  said.requests = asked.filter((name) => !name.startsWith("data:"));
  said.wide = document.documentElement.scrollWidth > innerWidth;
  const out = document.createElement("pre");
  out.id = "said";
  out.textContent = JSON.stringify(said);
  document.body.append(out);
"""  # how a script in a page ends that fills `said`


def said_in_a_browser(page: str, script: str, folder: Path, *options: str) -> dict[str, Any]:
    """What a script says that is put into a page before its own, in headless Chromium; skips where there is none.

    The page must write nothing to the console, ask for nothing and be no wider than the window.
    """
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here")
    path = folder / "page.html"
    path.write_text(page.replace("<script>\n", f"<script>{script}</script><script>\n", 1), encoding="utf-8")
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", *options]
    words += [f"--user-data-dir={folder / 'profile'}", "--dump-dom", path.as_uri()]
    done = subprocess.run([browser, *words], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr
    said = json.loads(html.unescape(re.search(r'<pre id="said">(.*?)</pre>', done.stdout, re.DOTALL)[1]))
    assert said["errors"] == said["requests"] == [] and not said["wide"]
    return said


@pytest.fixture(autouse=True)
def _seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _composed_once() -> Iterator[None]:
    """Hydra reads and merges the files of a choice of groups once; of each command it applies the words as ever.

    Commands of this process compose three times, most of them the same files, which takes longer than a step.
    """
    choose, merge = config_loader_impl.create_defaults_list, ConfigLoaderImpl._compose_config_from_defaults_list
    chosen: dict[tuple, DefaultsList] = {}
    merged: dict[tuple, bytes] = {}  # pickled, which is read in less than half of the time that a copy takes

    def sources(repo: IConfigRepository) -> tuple[str, ...]:
        return tuple(source.full_path() for source in repo.get_sources())

    def chosen_once(
        repo: IConfigRepository, config_name: str | None, overrides_list: list[Override], **options: bool
    ) -> DefaultsList:
        keys = Overrides(repo=repo, overrides_list=overrides_list).config_overrides
        groups = tuple(str(override.input_line) for override in overrides_list if override not in keys)
        known = (sources(repo), config_name, groups, *options.items())
        if known not in chosen:
            chosen[known] = choose(repo, config_name, overrides_list, **options)
        return dataclasses.replace(chosen[known], config_overrides=keys)

    def merged_once(self: ConfigLoaderImpl, defaults: list[ResultDefault], repo: IConfigRepository) -> DictConfig:
        known = (sources(repo), repr(defaults))
        if known not in merged:
            merged[known] = pickle.dumps(merge(self, defaults, repo))
        return pickle.loads(merged[known])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config_loader_impl, "create_defaults_list", chosen_once)
        patch.setattr(ConfigLoaderImpl, "_compose_config_from_defaults_list", merged_once)
        yield


@pytest.fixture(autouse=True, scope="session")
def _read_by_libyaml() -> Iterator[None]:
    """OmegaConf's own loader, its events from the parser in C where PyYAML has it."""
    parser = yaml.cyaml.CParser if yaml.__with_libyaml__ else None
    if parser is None:
        yield
        return
    loader = omegaconf._utils.get_yaml_loader()

    def begin(self: yaml.SafeLoader, stream: object) -> None:
        parser.__init__(self, stream)
        yaml.constructor.SafeConstructor.__init__(self)
        yaml.resolver.Resolver.__init__(self)

    fast = type("Fast", (parser, loader), {"__init__": begin})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(omegaconf._utils, "get_yaml_loader", lambda: fast)
        yield


@pytest.fixture(autouse=True, scope="session")
def _without_waiting_for_the_disk() -> Iterator[None]:
    """Only a power cut, which no test brings about, takes what the system has and the disk has not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


class Probes(SampleNoise):
    """Unit noise in one step a row, none in rows 0 and 1: with x_T = 0, 1, 0, 0, ... each row probes one source."""

    def __init__(self, steps: int):
        super().__init__(0, range(steps + 2))

    def __call__(self, draw: int, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
        """Row 1 is x_T, draw 0; row n + 1 is the noise of step n."""
        return torch.eye(len(self.indices), dtype=torch.float64, device=device)[:, draw + 1].reshape(-1, *shape)


def propagate(
    sampler: Sampler,
    oracle: MixtureOracle,
    mean: float = 0.0,
    variance: float = 1.0,
    times: list[int] | list[float] | None = None,
) -> list[tuple[int | float, float, float]]:
    """Exact (s, mean, variance) of every x_s that a sampler makes of x_T ~ N(mean, variance), no chance involved.

    Where a sampler adds noise before a step, s is the time after that. With Gaussian data all of a sampler is affine in
    x_T and the noise of its steps: a probe for each tells all of it.
    """
    times = sampler.times(oracle.schedule) if times is None else times
    noise, walk = Probes(len(times) - 1), []
    x_end = integrate(
        sampler,
        oracle.schedule,
        oracle.denoise,
        noise.x_T((1,)),
        times,
        generator=noise,
        callback=lambda i, t, s, x_t, pred: walk.append((t, x_t)),
    )
    rows = [(s, x - x[0], x[0]) for s, x in (*walk[1:], (times[-1], x_end))]
    return [
        (s, (shift + slope[1] * mean).item(), (slope[1] ** 2 * variance + (slope[2:] ** 2).sum()).item())
        for s, slope, shift in rows
    ]


@pytest.fixture(params=["meta", "cuda"])
def device(request) -> str:
    """A device that is not the schedule's; shapes and devices can be checked on "meta" without any accelerator."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return request.param


@pytest.fixture(scope="session")
def schedule() -> NoiseSchedule:
    """The reference: linear, 1e-4 .. 0.02, T = 1000."""
    return linear(1000)


@pytest.fixture(scope="session")
def oracle(schedule) -> GaussianOracle:
    """Data N(0.7, 0.25) on the reference schedule."""
    return GaussianOracle(schedule, 0.7, 0.25)
