r"""Faster CPU kernels: group norm with SiLU, 3x3 convolutions by Winograd's algorithm, attention with narrow heads.

They are C++ (kernels.cpp), compiled once in a few seconds by the system's compiler into the user's cache. Without a
compiler, or if DDPM_KERNELS=0 is set, PyTorch's own operations are used, and so they are for all tensors that are not
float32 or bfloat16 on a CPU, channels-last. Results differ by rounding. Gradients of gradients need DDPM_KERNELS=0.

Under `torch.vmap` S networks of one form are one program: their group norms are one with S times the groups, over their
channels side by side, like their convolutions in PyTorch; their attention is one over the rows of all.
"""

import contextlib
import ctypes
import functools
import hashlib
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-w"]
SUFFIXES = {torch.float32: "float", torch.bfloat16: "bf16"}
NARROW = (4, 8)  # widths of heads for which attention is compiled
FEW = 256  # pixels whose scores are all stored for a backward pass in bfloat16
# Channels in and out: with fewer, the transforms cost more than Winograd's algorithm saves.
WIDE_ENOUGH = {torch.float32: 256, torch.bfloat16: 128}
AROUND = ([1, 1],) * 3  # padding, stride and dilation
CHUNK = 2**24  # bytes of transformed tiles at a time, which should stay in the last cache


# --- The compiled library


class Unavailable(Exception):
    """Raised with the reason why there are no compiled kernels."""


def available() -> bool:
    """Whether there are compiled kernels; compiles them if necessary."""
    return isinstance(_found(), ctypes.CDLL)


def why_not() -> str:
    """Return the reason why there are no compiled kernels; empty if there are."""
    found = _found()
    return "" if isinstance(found, ctypes.CDLL) else found


@functools.cache
def _found() -> ctypes.CDLL | str:
    """Return the compiled kernels, or why there are none."""
    try:
        return _library()
    except Unavailable as error:
        return str(error)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"the compiled kernels cannot be made or loaded: {error}"


def _library() -> ctypes.CDLL:
    """Load the kernels from the cache, or compile them."""
    if os.environ.get("DDPM_KERNELS") == "0":
        raise Unavailable("DDPM_KERNELS=0")
    if os.name != "posix":
        raise Unavailable("they are compiled on Linux and macOS only")
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise Unavailable("no C++ compiler (c++, or what CXX names)")
    if not torch.backends.openmp.is_available():
        raise Unavailable("PyTorch was built without OpenMP")
    key = (SOURCE.read_text(), FLAGS, compiler, torch.__version__, platform.machine(), _processor())
    path = _cache() / f"kernels-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.so"
    failed = path.with_suffix(".failed")
    if failed.exists():
        raise Unavailable(f"{failed.read_text()[:300]}; delete {failed} to try again")
    if not path.exists():
        try:
            _compile(compiler, path)
        except Unavailable as error:
            failed.write_text(str(error))
            raise
    return ctypes.CDLL(str(path))


def _processor() -> str:
    """Return the instruction sets that this machine's compiler may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _cache() -> Path:
    """Return the cache folder of the user, made if it is missing."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    for folder in (Path(home) / "ddpm-ablations", Path(tempfile.gettempdir()) / f"ddpm-ablations-{os.getuid()}"):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
            return folder
    raise Unavailable("no folder of the user's own to keep them in")


def _compile(compiler: str, path: Path) -> None:
    """Compile under a name of this process's own, then rename: several processes may do so at once."""
    print("compiling models/kernels.cpp, once for this machine ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        partial, shared = Path(folder) / "kernels.o", Path(folder) / path.name
        # linked without OpenMP's own library: the one that PyTorch has loaded serves, with PyTorch's threads
        for command in ([*FLAGS, "-c", str(SOURCE), "-o", str(partial)], ["-shared", str(partial), "-o", str(shared)]):
            done = subprocess.run([compiler, *command], capture_output=True, text=True, timeout=300, check=False)
            if done.returncode:
                raise Unavailable(f"{compiler} failed: {' '.join(done.stderr.split())[:200]}")
        ctypes.CDLL(str(shared))
        os.replace(shared, path)


def _call(name: str, x: Tensor, *arguments: Tensor | int | float | None) -> None:
    """Call a kernel in the version for x's dtype; integers are passed as int64, floats as float32."""

    def as_c(a: Tensor | int | float | None) -> Any:
        if a is None or isinstance(a, Tensor):
            return ctypes.c_void_p(None if a is None else a.data_ptr())
        return ctypes.c_float(a) if isinstance(a, float) else ctypes.c_int64(a)

    values = [as_c(a) for a in arguments]
    getattr(_found(), f"{name}_{SUFFIXES[x.dtype]}")(*values)


def _plain(x: Tensor) -> bool:
    """Whether to use PyTorch's own operations for operations on x."""
    return (
        x.device.type != "cpu"
        or x.dtype not in SUFFIXES
        or not x.numel()
        or torch.compiler.is_compiling()
        or torch._C._functorch.maybe_current_level() is not None  # a transform by torch.func
        or not available()
    )


Backward = Callable[[Any, Tensor], tuple[Tensor | None, ...]]


def _once(backward: Backward) -> Backward:
    """Wrap a backward pass that cannot be differentiated; torch's own `once_differentiable` may permit it silently."""

    @functools.wraps(backward)
    def guarded(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "compiled kernels have no gradients of gradients (create_graph=True); set DDPM_KERNELS=0"
            )
        return backward(ctx, gradient)

    return guarded


def _is_channels_last(x: Tensor) -> bool:
    """Whether x is in the order in which the kernels read images; one of 1x1 pixels is in every order."""
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _is_row(x: Tensor, *shape: int) -> bool:
    """Whether x is a float32 tensor of this shape that the kernels may read by its address."""
    return x.shape == shape and x.dtype == torch.float32 and x.device.type == "cpu" and x.is_contiguous()


def _of_several(x: Tensor) -> bool:
    """Whether x stands for the tensors of several networks, under `torch.vmap`."""
    return bool(torch._C._functorch.is_batchedtensor(x))


class _Stacked(torch.autograd.Function):
    """An operation that only defines its rule under `torch.vmap`; autograd goes through what that calls."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # which torch requires of all that have a rule
        pass


# --- Frozen weights

_cached = threading.local()


@contextlib.contextmanager
def frozen() -> Iterator[None]:
    """A context for many calls with the same weights, such as a sampler's: transformed weights are cached.

    It holds for the thread that enters it, while gradients are off; at its end the cache is cleared. A weight that does
    change inside is noticed, unless it is written to through `.data` or outside of PyTorch.
    """
    before, _cached.made = getattr(_cached, "made", None), {}
    try:
        yield
    finally:
        _cached.made = before


def _frozen() -> bool:
    return getattr(_cached, "made", None) is not None and not torch.is_grad_enabled()


def _made(make: Callable[..., Tensor], weight: Tensor, *how: Any) -> Tensor:
    """Return make(weight, *how), within `frozen` computed once for each version of the weight."""
    if not _frozen() or weight.is_inference():  # without version counter
        return make(weight, *how)
    key, state = (make, how, weight.data_ptr()), (weight._version, weight.shape, weight.stride())
    entry = _cached.made.get(key)
    if entry is None or entry[0] != state:
        # with the weight, whose address is thus no other's
        entry = _cached.made[key] = state, make(weight, *how), weight.detach()
    return entry[1]


# --- Group norm and SiLU


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    r"""Return group norm, followed by SiLU if `silu`, with float32 statistics for every dtype.

    .. math:: h = \frac{x - \mu_g}{\sqrt{\sigma_g^2 + \text{eps}}}\, \gamma_c + \beta_c, \quad
        y = h \cdot \operatorname{sigmoid}(h)

    Args:
        x: (B, C, H, W); weight, bias: gamma and beta, (C,).
    Returns: (B, C, H, W), of x's type.
    Source: Group Normalization (arXiv 1803.08494); SiLU (arXiv 1702.03118).
    """
    C = x.shape[1]
    if _of_several(x):
        return _StackedGroupNorm.apply(x, weight, bias, groups, eps, silu)
    if _plain(x) or not _is_channels_last(x) or C % groups or not _is_row(weight, C) or not _is_row(bias, C):
        h = F.group_norm(x, groups, weight, bias, eps)
        return F.silu(h) if silu else h
    return _GroupNorm.apply(x, weight, bias, groups, float(eps), silu)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
        B, C, H, W = x.shape
        y, (mean, rstd) = torch.empty_like(x), torch.empty(2, B, groups)
        _call("norm_forward", x, x, weight, bias, y, mean, rstd, B, H * W, C, groups, eps, silu)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.groups, ctx.silu = groups, silu
        return y

    @staticmethod
    @_once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        B, C, H, W = x.shape
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx, (dweight, dbias) = torch.empty_like(x), torch.empty(2, B, C)
        _call(
            "norm_backward", x, x, dy, weight, bias, mean, rstd, dx, dweight, dbias, B, H * W, C, ctx.groups, ctx.silu
        )
        return dx, dweight.sum(0), dbias.sum(0), None, None, None


class _StackedGroupNorm(_Stacked):
    @staticmethod
    def vmap(
        info: Any, axes: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
    ) -> tuple[Tensor, int]:
        S = info.batch_size
        side_by_side = x.movedim(axes[0], 1).flatten(1, 2)  # (B, S C, H, W)
        gamma, beta = (
            (row.expand(S, -1) if axis is None else row.movedim(axis, 0)).flatten()
            for row, axis in ((weight, axes[1]), (bias, axes[2]))
        )
        return group_norm(side_by_side, S * groups, gamma, beta, eps, silu).unflatten(1, (S, -1)), 1


# --- Convolution


def convolution(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None = None) -> Tensor:
    r"""Return a 3x3 convolution with padding 1, plus an optional shift for each image and channel.

    By Winograd's algorithm F(2x2, 3x3): tiles of 4x4 pixels d give 2x2 pixels with 16 products instead of 36,

    .. math:: Y = A^T \left[ (G g G^T) \odot (B^T d B) \right] A \qquad \text{[Lavin (2x2, 3x3)]}

    .. math:: B^T = \begin{pmatrix} 1 & 0 & -1 & 0 \\ 0 & 1 & 1 & 0 \\ 0 & -1 & 1 & 0 \\ 0 & 1 & 0 & -1 \end{pmatrix},
        \quad G = \begin{pmatrix} 1 & 0 & 0 \\ 1/2 & 1/2 & 1/2 \\ 1/2 & -1/2 & 1/2 \\ 0 & 0 & 1 \end{pmatrix},
        \quad A^T = \begin{pmatrix} 1 & 1 & 1 & 0 \\ 0 & 1 & -1 & -1 \end{pmatrix},

    and the 16 products, summed over channels, are 16 matrix products over all tiles. In bfloat16 its rounding error is
    twice that of the sum term by term, in float32 about the same. Within `frozen`, in bfloat16, the sum is taken term
    by term where that is faster.

    Args:
        x: (B, C, H, W); weight: (C', C, 3, 3); bias: (C',); shift: (B, C').
    Returns: (B, C', H, W).
    Source: Lavin & Gray, Fast Algorithms for Convolutional Neural Networks (arXiv 1509.09308), section 4.1.
    """
    kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    C_out, C_in = weight.shape[:2]
    fits = (
        not _plain(x)
        and _is_channels_last(x)
        and weight.shape[1:] == (x.shape[1], 3, 3)
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and _is_row(bias, C_out)
        and (shift is None or shift.shape == (len(x), C_out))
    )
    wide = min(C_in, C_out) >= WIDE_ENOUGH.get(kind, math.inf)
    if fits and kind == torch.bfloat16 and _frozen() and _packs() and (_multiplies_tiles() or not wide):
        return _direct(x.to(kind), weight, bias, shift)
    if not fits or not wide:
        y = F.conv2d(x, weight, bias, padding=1)
        return y if shift is None else y + shift[:, :, None, None]
    of = _Middle if x.shape[2:] == (1, 1) else _Winograd
    return of.apply(x.to(kind), weight, bias[None] if shift is None else shift + bias, shift is None)


def _direct(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None) -> Tensor:
    """Return the convolution term by term, by PyTorch's own operation, from kernels in the order of its loops."""
    packed = _made(_pack, weight, x.dtype, tuple(x.shape))
    y = torch.ops.mkldnn._convolution_pointwise(x, packed, bias.to(x.dtype), *AROUND, 1, "none", [], "")
    return y if shift is None else y.add_(shift[:, :, None, None])


def _pack(weight: Tensor, kind: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Return kernels (C', C, 3, 3) in the order in which PyTorch's convolution of images of a shape reads them."""
    blocked = weight.detach().to(kind).to_mkldnn()
    return torch._C._nn.mkldnn_reorder_conv2d_weight(blocked, *AROUND, 1, shape)  # type: ignore[call-arg]  # shape


@functools.cache
def _packs() -> bool:
    """Whether PyTorch has the two operations, which have no public names."""
    names = ((torch.ops.mkldnn, "_convolution_pointwise"), (torch._C._nn, "mkldnn_reorder_conv2d_weight"))
    return all(hasattr(*name) for name in names) and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@functools.cache
def _multiplies_tiles() -> bool:
    """Whether the CPU multiplies tiles (AMX), so that Winograd's transforms take longer than they save."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


class _Middle(torch.autograd.Function):
    """The convolution of a map of one pixel, where all but the middle of a kernel meets padding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, shift: Tensor, shared: bool) -> Tensor:
        middle = weight[:, :, 1, 1].to(x.dtype)
        ctx.save_for_backward(x, middle)
        ctx.shared = shared
        return F.linear(x[:, :, 0, 0], middle).add_(shift)[:, :, None, None]

    @staticmethod
    @_once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, middle), dy = ctx.saved_tensors, dy[:, :, 0, 0]
        dweight = torch.empty(*middle.shape, 3, 3, memory_format=torch.channels_last).zero_()
        dweight[:, :, 1, 1] = dy.T @ x[:, :, 0, 0]
        dshift = dy.sum(0, keepdim=True, dtype=torch.float32) if ctx.shared else dy.float()
        return (dy @ middle)[:, :, None, None], dweight, dshift, None


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, shift: Tensor, shared: bool) -> Tensor:
        U = _made(_transformed, weight, x.dtype)
        ctx.save_for_backward(x, U)
        ctx.shared = shared
        return _correlate(x, U.mT, shift.float().contiguous(), False)

    @staticmethod
    @_once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, U = ctx.saved_tensors
        dx = dweight = dshift = None
        dy = dy.contiguous(memory_format=torch.channels_last)
        if ctx.needs_input_grad[0]:
            dx = _correlate(dy, U, None, True)  # with the kernels turned by 180 degrees
        if ctx.needs_input_grad[1]:
            dweight = _weight_gradient(x, dy, U)
        if ctx.needs_input_grad[2]:
            dshift = dy.sum((0, 2, 3) if ctx.shared else (2, 3), dtype=torch.float32).reshape(-1, dy.shape[1])
        return dx, dweight, dshift, None


def _transformed(weight: Tensor, kind: torch.dtype) -> Tensor:
    """Return G g G^T of kernels (C', C, 3, 3): (16, C', C)."""
    weight = weight.contiguous(memory_format=torch.channels_last)
    C_out, C_in = weight.shape[:2]
    U = torch.empty(16, C_out, C_in, dtype=kind)
    _call("weight_in", U, weight, U, C_out, C_in)
    return U


def _chunks(x: Tensor, channels: int) -> Iterator[slice]:
    """Return slices of images whose tiles, with this many channels, take `CHUNK` bytes."""
    images = max(1, CHUNK // (4 * x.shape[2] * x.shape[3] * channels * x.element_size()))
    return (slice(start, start + images) for start in range(0, len(x), images))


def _scratch(name: str, dtype: torch.dtype, *shape: int) -> Tensor:
    """Return a scratch tensor, which reuses the memory of the last one of its name, as new memory is expensive."""
    memory: Tensor | None = getattr(_cached, name, None)
    size = math.prod(shape) * dtype.itemsize
    if memory is None or memory.numel() < size:
        memory = torch.empty(size, dtype=torch.uint8)
        setattr(_cached, name, memory)
    return memory[:size].view(dtype).view(shape)


def _tiles(x: Tensor, turned: bool) -> Tensor:
    """Return B^T d B of every tile: (B, C, H, W) -> (16, tiles, C), in scratch memory."""
    B, C, H, W = x.shape
    V = _scratch("V", x.dtype, 16, B * ((H + 1) // 2) * ((W + 1) // 2), C)
    _call("tiles_in", x, x, V, B, H, W, C, turned)
    return V


def _correlate(x: Tensor, U: Tensor, shift: Tensor | None, turned: bool) -> Tensor:
    """Correlate x with transformed kernels U (16, C, C'), turned by 180 degrees if `turned`."""
    (B, C, H, W), C_out = x.shape, U.shape[2]
    y = torch.empty(B, C_out, H, W, dtype=x.dtype, memory_format=torch.channels_last)
    stride = 0 if shift is None or len(shift) == 1 else C_out
    for rows in _chunks(x, C + C_out):
        V, part = _tiles(x[rows], turned), y[rows]
        M = torch.bmm(V, U, out=_scratch("M", x.dtype, 16, V.shape[1], C_out))
        added = shift if shift is None or not stride else shift[rows]
        _call("tiles_out", x, M, added, stride, part, len(part), H, W, C_out, turned)
    return y


def _weight_gradient(x: Tensor, dy: Tensor, U: Tensor) -> Tensor:
    """Return G^T [sum over tiles of (A dy A^T) (B^T d B)] G, (C', C, 3, 3)."""
    (_, C_out, C_in), (_, _, H, W) = U.shape, x.shape
    dU: Tensor | None = None
    for rows in _chunks(x, C_in + C_out):
        V, part = _tiles(x[rows], False), dy[rows]
        dM = _scratch("M", x.dtype, 16, V.shape[1], C_out)
        _call("tiles_back", x, part, dM, len(part), H, W, C_out)
        one = torch.bmm(dM.mT, V)
        dU = one if dU is None else dU.float().add_(one)
    assert dU is not None
    dweight = torch.empty(C_out, C_in, 3, 3, memory_format=torch.channels_last)
    _call("weight_back", dU, dU, dweight, C_out, C_in)
    return dweight


# --- Attention


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    r"""Return softmax(q k^T / sqrt(d)) v of each head, without ever storing all scores.

    PyTorch's own is best for wide heads, but slow with d <= 8. For few pixels in bfloat16 its backward pass on a CPU
    takes 2 to 10 times as long as that of the products written out.

    Args:
        q, k, v: (B, n, heads * d).
    Returns: (B, n, heads * d).
    """
    C = q.shape[2]
    if _of_several(q):
        return _StackedAttention.apply(q, k, v, heads)
    alike = all((x.shape, x.dtype, x.device) == (q.shape, q.dtype, q.device) and x.is_contiguous() for x in (q, k, v))
    if _plain(q) or C // heads not in NARROW or not alike:
        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        slow = q.requires_grad and q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= FEW
        attended = _written_out if slow else F.scaled_dot_product_attention
        return attended(q, k, v).transpose(1, 2).flatten(2)
    return _Attention.apply(q, k, v, heads)


def _written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the attention of q, k and v, each (B, heads, n, d), with all scores in memory."""
    scores = q / math.sqrt(q.shape[-1]) @ k.mT
    return scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype) @ v


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        B, n, C = q.shape
        out, lse = torch.empty_like(q), torch.empty(B, heads, n)
        _call("attend", q, q, k, v, out, lse, B, n, heads, C // heads)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.heads = heads
        return out

    @staticmethod
    @_once
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        (B, n, C), heads = q.shape, ctx.heads
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        _call("attend_back", q, q, k, v, out, lse, dout.contiguous(), dq, dk, dv, B, n, heads, C // heads)
        return dq, dk, dv, None


class _StackedAttention(_Stacked):
    @staticmethod
    def vmap(info: Any, axes: Any, q: Tensor, k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, int]:
        q, k, v = (x.movedim(axis, 0).flatten(0, 1) for x, axis in zip((q, k, v), axes, strict=False))  # (S B, n, C)
        return attention(q, k, v, heads).unflatten(0, (info.batch_size, -1)), 0
