"""Precision in which a network computes; its weights, the losses and the mathematics stay in float32."""

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WORTH_BF16, WORTH_BF16_IN_TILES = 10**6, 5 * 10**5  # least parameters for bf16 on a CPU; the second with AMX


def computing(device: torch.device, precision: str, cache: bool = True) -> torch.autocast:
    """Return a context in which networks compute in a precision: PyTorch's autocast, without effect for "fp32".

    Args:
        cache: cache converted weights for reuse within the context; must be off in a CUDA graph.
    """
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32", cache_enabled=cache)


def computes_in_bf16(device: torch.device) -> bool:
    """Whether a device multiplies in bfloat16, rather than emulating it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (_cpu_has("avx512_bf16") or _cpu_has("amx_tile"))


def _cpu_has(feature: str) -> bool:
    return getattr(torch.cpu, f"_is_{feature}_supported", bool)()  # PyTorch has no public name for it


def resolve(precision: str, device: torch.device, parameters: int) -> str:
    """Return the precision that "auto" stands for: bf16 where the device computes in it, else fp32.

    On a CPU small networks stay in fp32, for conversions cost them more time than they gain.

    Args:
        parameters: number of parameters of the network.
    """
    if precision != "auto":
        return precision
    least = WORTH_BF16_IN_TILES if _cpu_has("amx_tile") else WORTH_BF16
    small = device.type == "cpu" and parameters < least
    return "bf16" if computes_in_bf16(device) and not small else "fp32"


def as_trained(precision: str, device: torch.device) -> str:
    """Return the precision for sampling from a network trained in `precision`: the same, where the device has it."""
    if precision == "fp16" and device.type != "cuda":
        precision = "bf16"
    return precision if precision != "bf16" or computes_in_bf16(device) else "fp32"
