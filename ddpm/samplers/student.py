"""The sampler of a distilled student: Progressive Distillation (Salimans & Ho, arXiv 2202.00512)."""

from ddpm.samplers.ddim import DDIM


class Student(DDIM):
    """DDIM over the times that a student was trained at: T, T - T / N, ..., T / N as real numbers, and 0.

    Args:
        steps: N. A network is only trained at the times of its own N.
    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, steps: int = 1):
        super().__init__(steps, grid="continuous")
