"""In which numbers a network computes; its weights, the losses and the mathematics around it stay in float32."""

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WORTH_BF16, WORTH_BF16_IN_TILES = 10**6, 5 * 10**5  # parameters, on a CPU; the second where it multiplies tiles (AMX)


def computing(device: torch.device, precision: str, cache: bool = True) -> torch.autocast:
    """A context in which networks compute in a precision: PyTorch's autocast, without effect for "fp32".

    Args:
        cache: keep weights that were converted, for their next use within the context; a CUDA graph has to do without.
    """
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32", cache_enabled=cache)


def computes_in_bf16(device: torch.device) -> bool:
    """Whether a device multiplies in bfloat16, rather than emulating it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (_cpu_has("avx512_bf16") or _cpu_has("amx_tile"))


def _cpu_has(feature: str) -> bool:
    return getattr(torch.cpu, f"_is_{feature}_supported", bool)()  # PyTorch tells under no public name


def resolve(precision: str, device: torch.device, parameters: int) -> str:
    """The precision that "auto" stands for: bf16 where the device computes in it, else fp32.

    On a CPU small networks stay in fp32, for they lose more time by conversions than they gain.

    Args:
        parameters: how many the network has.
    """
    if precision != "auto":
        return precision
    least = WORTH_BF16_IN_TILES if _cpu_has("amx_tile") else WORTH_BF16
    small = device.type == "cpu" and parameters < least
    return "bf16" if computes_in_bf16(device) and not small else "fp32"


def as_trained(precision: str, device: torch.device) -> str:
    """The precision to draw samples in from a network that was trained in one: the same, where the device has it."""
    if precision == "fp16" and device.type != "cuda":
        precision = "bf16"
    return precision if precision != "bf16" or computes_in_bf16(device) else "fp32"
