"""Samplers: one sampling loop, and one file per method with its step."""

from ddpm.samplers.ancestral import Ancestral
from ddpm.samplers.base import Before, Callback, Sampler, Step, integrate
from ddpm.samplers.consistency import Consistency
from ddpm.samplers.ddim import DDIM, interpolate
from ddpm.samplers.dpm_solver import DPMSolverPP
from ddpm.samplers.edm import Euler, Heun
from ddpm.samplers.langevin import AnnealedLangevin
from ddpm.samplers.lms import LMS
from ddpm.samplers.plms import PLMS
from ddpm.samplers.student import Student
from ddpm.samplers.unipc import UniPC

__all__ = [
    "DDIM",
    "LMS",
    "PLMS",
    "Ancestral",
    "AnnealedLangevin",
    "Before",
    "Callback",
    "Consistency",
    "DPMSolverPP",
    "Euler",
    "Heun",
    "Sampler",
    "Step",
    "Student",
    "UniPC",
    "integrate",
    "interpolate",
]
