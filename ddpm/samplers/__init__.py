"""Samplers: one loop, then one paper a file, one step each."""

from ddpm.samplers.ancestral import Ancestral
from ddpm.samplers.base import Sampler
from ddpm.samplers.ddim import DDIM

__all__ = ["DDIM", "Ancestral", "Sampler"]
