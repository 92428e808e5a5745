"""The maths of one sharpness-aware step in plain torch: the executable specification, and the CPU path.

The Triton kernels (`lesam_kernels`) compute the same functions and are tested against these. On the CPU these
are also the fast path: no temporaries, and where a parameter owns its storage the saved copy and the weights
trade storages instead of contents, so that restoring costs nothing. On CUDA `perturb` reads the norm on the host
(one sync); training there uses the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

# Sums run over rows of this many elements in float32 and over the rows in float64, so that 7 digits are kept whatever
# the tensor's size. Rows, because threads share a sum along one dim by its outputs: the bits depend neither on their
# number, as a whole tensor's sum does from 32768 elements on, nor on its address, as a BLAS dot product's may.
_ROW = 4096
_PRODUCTS = 16 * _ROW  # elements of a product that exist at once


class Radius(NamedTuple):
    """How the perturbation radius follows from the gradient norm: ``rho = min(sigma/(norm + eps), rho_max)``.

    LE-SAM sets all three (paper, Algorithm 1, lines 7 and 8); SAM's fixed radius is ``sigma = inf``. A negative sigma
    moves against the direction, by the rho of its absolute value.
    """

    sigma: float
    rho_max: float
    eps: float

    @classmethod
    def fixed(cls, rho: float) -> Radius:
        """SAM's: ``rho`` whatever the norm; against the direction where it is negative."""
        return cls(sigma=math.copysign(math.inf, rho), rho_max=abs(rho), eps=0.0)


class Direction(NamedTuple):
    """Along what the weights of a param group move: ``T^2 * v`` with ``v = g - ema_scale*ema`` and ``T = p*|w| + q``.

    The gradient itself by default. Its squared norm, which makes the radius, is the sum of ``(T*v)^2``.
    """

    p: float = 0.0
    q: float = 1.0
    ema_scale: float = 0.0


def directed(w: Tensor, g: Tensor, ema: Tensor | None, direction: Direction) -> tuple[Tensor, Tensor]:
    """``T*v`` and ``T^2*v`` of one parameter, in at least float32; for the plain gradient both are ``g`` itself."""
    if direction == Direction():
        return g, g
    v = g.to(torch.promote_types(g.dtype, torch.float32))
    if ema is not None and direction.ema_scale:
        v = v.sub(ema, alpha=direction.ema_scale)
    if (direction.p, direction.q) == (0.0, 1.0):
        return v, v
    metric = w.detach().abs().to(v.dtype).mul_(direction.p).add_(direction.q)
    scaled = v * metric
    return scaled, scaled * metric


def dot(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Sum of the products of all elements of two parallel lists; accumulated as `sum_sq` does."""
    if all(a is b for a, b in zip(first, second, strict=True)):
        return sum_sq(first)
    sums = []
    for a, b in zip(first, second, strict=True):
        if a.stride() != b.stride():  # else the elements of both come in one order
            a, b = a.contiguous(), b.contiguous()
        pairs = zip(_flat(a).split(_PRODUCTS), _flat(b).split(_PRODUCTS), strict=True)
        sums += [row.sum(dim=1) for x, y in pairs for row in _rows(x * y)]
    return _total(torch.cat(sums))


def sum_sq(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of squares over all elements of all tensors, accumulated in float32 per row and float64 beyond.

    Args:
        tensors: at least one tensor; floating, any shapes (empty ones count nothing), one device.

    Returns:
        0-d float64 tensor; not finite where any element is not, or where a square overflows float32. Its bits depend
        on the values alone: not on addresses, nor on the number of threads.
    """
    norms = [torch.linalg.vector_norm(rows, dim=1) for tensor in tensors for rows in _rows(_flat(tensor))]
    return _total(torch.cat([norm.double() for norm in norms]).square_())


def perturb(
    params: Sequence[Tensor],
    directions: Sequence[Tensor],
    copies: Sequence[Tensor],
    sum_sq: Tensor,
    radius: Radius,
) -> Tensor:
    """Save the weights and climb: ``copy <- w``, ``w <- w + rho * g/||g||`` (paper, Algorithm 1, lines 7 to 9).

    A zero or non-finite norm leaves ``w`` as it is. ``copy`` is written in every case, so `restore` is always exact.

    Args:
        params, directions, copies: parallel lists; shapes agree, a copy has its parameter's dtype and strides, and is
            the caller's for this purpose alone. A direction is the gradient, or what `directed` makes of it.
        sum_sq: 0-d, the squared global gradient norm, of which these lists may be a part.
        radius: how rho follows from the norm.

    Returns:
        float64 tensor (3,): grad_norm, rho, and 1.0 where the norm is not finite, else 0.0.
    """
    norm = math.sqrt(sum_sq.item())
    usable = math.isfinite(norm) and norm > 0
    rho = min(abs(radius.sigma) / (norm + radius.eps), radius.rho_max) if usable else 0.0
    scale = math.copysign(rho, radius.sigma) / norm if rho > 0 else 0.0
    for w, g, copy in zip(params, directions, copies, strict=True):
        if rho > 0 and _owns_storage(w):
            torch.add(w, g, alpha=scale, out=copy)
            _trade_storages(w, copy)
            continue
        copy.copy_(w)
        if rho > 0:
            w.add_(g, alpha=scale)
    stats = (norm, rho, float(not math.isfinite(norm)))
    return torch.tensor(stats, dtype=torch.float64, device=sum_sq.device)


def restore(params: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
    """Give the parameters back the saved weights, bit for bit: ``w <- copy``. The copies are then used up."""
    for w, copy in zip(params, copies, strict=True):
        if _owns_storage(w):
            _trade_storages(w, copy)
        else:
            w.copy_(copy)


def mix(g_hat: Tensor, g: Tensor | None, a: float | Tensor, b: float | Tensor) -> None:
    """Combine both gradients in place: ``g_hat <- a * g_hat + b * g``; a missing g counts as zero.

    a and b are numbers, or 0-d tensors on the device.
    """
    if isinstance(a, float) and a == 0.0 and g is not None:
        torch.mul(g, b, out=g_hat)
        return
    g_hat.mul_(a)
    if g is not None:
        if isinstance(b, Tensor):
            g_hat.addcmul_(g, b.to(g.dtype))
        else:
            g_hat.add_(g, alpha=b)


def _owns_storage(w: Tensor) -> bool:
    """Whether ``w`` is what the model reads and nothing else lies in its storage.

    Not so for the shard of a DTensor (a plain Tensor; FSDP2 would go on reading the old storage), for a view into a
    flat buffer, or for memory shared between processes.
    """
    return (
        type(w) is nn.Parameter
        and w.device.type == "cpu"
        and w.untyped_storage().nbytes() == w.nbytes
        and not w.is_shared()
    )


def _trade_storages(w: Tensor, copy: Tensor) -> None:
    held = w.data
    w.data = copy
    copy.data = held


def _rows(flat: Tensor) -> list[Tensor]:
    """The whole rows of ``flat``, and its rest as one shorter row."""
    whole = flat.numel() // _ROW * _ROW
    rows = [flat[:whole].view(-1, _ROW)] if whole else []
    return rows if whole == flat.numel() and whole else [*rows, flat[whole:].view(1, -1)]


def _total(values: Tensor) -> Tensor:
    """The sum of a 1-d tensor in float64, in a fixed order."""
    return torch.cat([row.sum(dim=1, dtype=torch.float64) for row in _rows(values)]).sum()


def _flat(tensor: Tensor) -> Tensor:
    """The elements in one row of at least float32; a sum does not mind their order."""
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        tensor = tensor.permute(0, 2, 3, 1)
    flat = tensor.reshape(-1)
    return flat.float() if flat.dtype in (torch.bfloat16, torch.float16) else flat
