"""LAMB (You et al. 2020, "Large batch optimization for deep learning", Algorithm 2, with its bias correction). Of each
layer, at step t:

    m <- beta1 * m + (1 - beta1) * g,   v <- beta2 * v + (1 - beta2) * g^2
    u = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay * w
    r = ||w|| / ||u||                                                          1 where either norm is 0
    w <- w - lr * r * u

The paper's phi is the identity. NVIDIA's and timm's first clip the gradient to a global norm of 1: here only where it
is asked for, by the method's ``max_grad_norm``. Biases and normalisation weights keep r = 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from lesam_dist.optim.bases.layers import Layers, layers_of, norms, state_of


class LAMB(Optimizer):
    """Adam whose step in each layer is as long as the layer's weights, times the learning rate.

    An ordinary torch optimizer; under FSDP2 and HSDP the norms are of whole layers, by one reduction a step. It keeps a
    tensor of the weights' size for the time of the step.

    Args:
        params: parameters or param groups. A group may set its own of all below.
        lr: length of a step in units of the weights' norm, a number or a 0-d tensor, >= 0.
        betas: of the moving averages of g and g^2, both in [0, 1).
        eps: added to the root, >= 0.
        weight_decay: part of the direction u, >= 0. Give biases and normalisation weights a group with 0, as is usual.
        adapt: which parameters get r; True all of the group, False none, None those of two dims and more.

    Raises:
        ValueError: for a value out of range.
    """

    reads_found_inf = True  # the attribute `found_inf`, a tensor: where it is 1 a step changes nothing

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        adapt: bool | None = None,
    ) -> None:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"LAMB: betas is {tuple(betas)}: both must be in [0, 1).")
        for name, value in {"lr": lr, "weight_decay": weight_decay, "eps": eps}.items():
            if not value >= 0:
                raise ValueError(f"LAMB: {name} is {value}: it must be at least 0.")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "adapt": adapt})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update with the gradients in ``.grad``; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        layers = layers_of(self.param_groups)
        directions = [self._direction(own) for own in layers]
        places = [index for index, own in enumerate(layers) if own.adapted]
        adapted = [layers[index] for index in places]
        measured = norms(adapted, [own.shards for own in adapted], [directions[index] for index in places])
        ratios = {place: _ratios(*both) for place, both in zip(places, measured, strict=True)}
        for index, own in enumerate(layers):
            self._move(own, directions[index], ratios.get(index))
        return loss

    def _direction(self, layers: Layers) -> list[Tensor]:
        """Update the moments; returns -u.

        torch's own fused Adam does it: a step of length 1 from zero ends at minus the direction. It leaves moments and
        zero alone where ``found_inf`` is 1.
        """
        group, (beta1, beta2) = layers.group, layers.group["betas"]
        ends = [torch.zeros_like(shard) for shard in layers.shards]
        adamw(
            ends,
            layers.grads,
            state_of(layers, self.state, "exp_avg"),
            state_of(layers, self.state, "exp_avg_sq"),
            [],
            state_of(layers, self.state, "step"),
            fused=True,
            found_inf=getattr(self, "found_inf", None),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=1.0,
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
        )
        if decay := group["weight_decay"]:
            torch._foreach_add_(ends, layers.shards, alpha=-decay)
        return ends

    def _move(self, layers: Layers, directions: list[Tensor], ratios: Tensor | None) -> None:
        """``w <- w + lr * r * direction``, or the same w where ``found_inf`` is 1."""
        factor: Any = layers.group["lr"] if ratios is None else layers.group["lr"] * ratios
        if (skips := getattr(self, "found_inf", None)) is not None:
            factor = factor * (1.0 - skips.to(layers.shards[0].device))  # whose directions are finite
        if isinstance(factor, Tensor) and factor.ndim:
            torch._foreach_mul_(directions, list(factor.unbind()))
        else:
            torch._foreach_mul_(directions, factor)
        torch._foreach_add_(layers.shards, directions)


def _ratios(w_norm: Tensor, u_norm: Tensor) -> Tensor:
    """r of each layer, (n,) float64."""
    return torch.where((w_norm > 0) & (u_norm > 0), w_norm / u_norm, 1.0)
