"""ddpm/runs/precision.py: which numbers a network computes in, where nobody says it."""

import pytest
import torch

from ddpm.runs import precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def having(monkeypatch: pytest.MonkeyPatch, **names: bool) -> None:
    """A CPU, and a GPU, that compute in bf16 or do not."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: names.get(name, False), raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: names.get("cuda", False))


@pytest.mark.parametrize(
    ("has", "device", "parameters", "expected"),
    [
        ("_is_avx512_bf16_supported", CPU, 10**6, "bf16"),
        ("_is_amx_tile_supported", CPU, 10**8, "bf16"),
        ("_is_avx512_bf16_supported", CPU, 10**6 - 1, "fp32"),
        ("_is_amx_tile_supported", CPU, 5 * 10**5, "bf16"),
        ("_is_amx_tile_supported", CPU, 5 * 10**5 - 1, "fp32"),
        ("nothing", CPU, 10**8, "fp32"),
        ("cuda", CUDA, 1000, "bf16"),
        ("nothing", CUDA, 10**8, "fp32"),
    ],
)
def test_auto(has, device, parameters, expected, monkeypatch):
    having(monkeypatch, **{has: True})
    assert precision.resolve("auto", device, parameters) == expected
    assert precision.resolve("fp16", device, parameters) == "fp16"


def test_samples_are_drawn_as_the_network_was_trained_where_the_device_can(monkeypatch):
    having(monkeypatch, _is_amx_tile_supported=True, cuda=True)
    assert [precision.as_trained(p, CPU) for p in precision.PRECISIONS] == ["fp32", "bf16", "bf16"]
    assert [precision.as_trained(p, CUDA) for p in precision.PRECISIONS] == ["fp32", "bf16", "fp16"]
    having(monkeypatch)
    assert [precision.as_trained(p, CPU) for p in precision.PRECISIONS] == ["fp32"] * 3
    assert [precision.as_trained(p, CUDA) for p in precision.PRECISIONS] == ["fp32", "fp32", "fp16"]


@pytest.mark.parametrize("name", precision.PRECISIONS)
def test_computing(name):
    with precision.computing(CPU, name):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == precision.PRECISIONS[name]
