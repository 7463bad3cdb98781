"""What is kept comes back bit for bit, or not at all."""

import pytest
import torch

from ddpm.runs.tensor_cache import load_tensor, save_tensor


@pytest.mark.parametrize("x", [torch.arange(12, dtype=torch.uint8).reshape(3, 4), torch.randn(5, 2, 1).mT])
def test_a_tensor_comes_back(x, tmp_path, capsys):
    path = tmp_path / "made" / "x.safetensors"
    assert load_tensor(path, x.dtype, x.shape) is None
    save_tensor(x, path)
    for shape in (x.shape, [None, *x.shape[1:]], [None] * x.ndim):
        assert torch.equal(load_tensor(path, x.dtype, shape), x)
    assert capsys.readouterr().out == "" and [p.name for p in path.parent.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(torch.int32, (3, 4)), (torch.float32, (3, 5)), (torch.float32, (None, 3)), (torch.float32, (12,))],
)
def test_another_tensor_is_told_of(dtype, shape, tmp_path, capsys):
    save_tensor(torch.zeros(3, 4), tmp_path / "x")
    assert load_tensor(tmp_path / "x", dtype, shape) is None
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'x'} is damaged and will be made again: ")


def test_every_changed_byte_is_noticed(tmp_path, capsys):
    path, x = tmp_path / "x", torch.arange(6, dtype=torch.uint8)
    save_tensor(x, path)
    content = path.read_bytes()
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        found = load_tensor(path, torch.uint8, (6,))
        assert found is None or torch.equal(found, x)  # a space of the header, say
    for end in range(len(content)):
        path.write_bytes(content[:end])
        assert load_tensor(path, torch.uint8, (6,)) is None
    assert "its checksum is wrong" in capsys.readouterr().out


def test_where_nothing_can_be_written_it_is_said(tmp_path, capsys):
    (tmp_path / "file").touch()
    save_tensor(torch.zeros(2), tmp_path / "file" / "x")
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'file' / 'x'} cannot be saved: ")
