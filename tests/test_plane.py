"""ddpm/commands/sample/points.py: its pictures are drawn of any network, a broken one too, and on any schedule."""

import math

import pytest
import torch

from ddpm.commands.sample.points import draw_plane, is_plane
from ddpm.data import Mixture, SwissRoll
from ddpm.diffusion import GaussianDiffusion
from ddpm.samplers import DDIM, Ancestral, AnnealedLangevin
from ddpm.schedules import cosine, geometric, linear, zero_terminal_snr
from ddpm.sources.trained import TrainedSampler
from models.mlp import MLP

OF_ALL = {"score.png", "walks.png", "field.gif"}
CASES = {
    "one step": (cosine(1), DDIM(1), "x_0", OF_ALL),
    "levels of noise": (geometric(3), AnnealedLangevin(moves=2), "eps", OF_ALL | {"process.png", "density.png"}),
    "pure noise at T": (zero_terminal_snr(cosine(20)), Ancestral(4), "v", OF_ALL | {"process.png"}),
    "the flow": (linear(30), DDIM(4), "flow", OF_ALL | {"process.png", "density.png"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("weight", [0.0, 1e18, math.nan])
def test_pictures_are_drawn_of_any_network(case, weight, tmp_path):
    schedule, sampler, target, expected = CASES[case]
    model = MLP(2, 16, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(weight)
    diffusion = GaussianDiffusion(schedule, target, clip_x_0=False)
    source = TrainedSampler(diffusion, model, sampler, (2,), 0, torch.device("cpu"))
    assert is_plane(source)
    drawn = draw_plane(tmp_path, source, Mixture(count=100) if weight == 0 else SwissRoll(200))
    assert {path.name for path in drawn} == {path.name for path in tmp_path.iterdir()} == expected
    assert all(path.stat().st_size > 1000 for path in drawn)
