"""Distillation to few sampling steps: progressive distillation and consistency models."""

from ddpm.distillation.consistency import consistency, curriculum, lognormal, pseudo_huber
from ddpm.distillation.progressive import one_step_for_two

__all__ = ["consistency", "curriculum", "lognormal", "one_step_for_two", "pseudo_huber"]
