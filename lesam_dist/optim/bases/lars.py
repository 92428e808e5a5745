"""LARS (You, Gitman and Ginsburg 2017, "Large batch training of convolutional networks", Algorithm 1). Of each layer

    r = trust_coefficient * ||w|| / (||g|| + weight_decay * ||w|| + eps)      1 where ||w|| or ||g|| is 0
    v <- momentum * v + r * (g + weight_decay * w)
    w <- w - lr * v                                 nesterov: w <- w - lr * (r * (g + weight_decay * w) + momentum * v)

The learning rate stands before v, as in torch's SGD, timm's Lars and MLPerf's reference, and not inside it as in the
paper: the same while lr is constant. ``||g||`` and ``||w||`` have separate norms in the denominator, as in the paper;
eps is timm's. Biases and normalisation weights keep r = 1, as everywhere it works.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd

from lesam_dist.optim.bases.layers import Layers, layers_of, norms, state_of


class LARS(Optimizer):
    """SGD whose step in each layer has a length in proportion to the layer's weights.

    An ordinary torch optimizer; under FSDP2 and HSDP the norms are of whole layers, by one reduction a step. It makes
    one copy of the gradients for the time of the step.

    Args:
        params: parameters or param groups. A group may set its own of all below.
        lr: learning rate, a number or a 0-d tensor, >= 0.
        momentum: in [0, 1).
        nesterov: look ahead along the momentum, which must be above 0.
        weight_decay: L2, >= 0. Give biases and normalisation weights a group with 0, as is usual.
        trust_coefficient: length of a step at lr 1 and without momentum, in units of the weights' norm, > 0.
        eps: added to the denominator, >= 0.
        adapt: which parameters get r; True all of the group, False none, None those of two dims and more.

    Raises:
        ValueError: for a value out of range.
    """

    reads_found_inf = True  # the attribute `found_inf`, a tensor: where it is 1 a step changes nothing

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        *,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        eps: float = 1e-8,
        adapt: bool | None = None,
    ) -> None:
        if not trust_coefficient > 0:
            raise ValueError(f"LARS: trust_coefficient is {trust_coefficient}: it must be above 0, e.g. 0.001.")
        if not 0 <= momentum < 1:
            raise ValueError(f"LARS: momentum is {momentum}: it must be in [0, 1).")
        if nesterov and momentum == 0:
            raise ValueError("LARS: nesterov is True but momentum is 0: set momentum above 0, e.g. 0.9.")
        for name, value in {"lr": lr, "weight_decay": weight_decay, "eps": eps}.items():
            if not value >= 0:
                raise ValueError(f"LARS: {name} is {value}: it must be at least 0.")
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "trust_coefficient": trust_coefficient, "eps": eps, "adapt": adapt})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update with the gradients in ``.grad``; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        layers = layers_of(self.param_groups)
        adapted = [own for own in layers if own.adapted]
        measured = norms(adapted, [own.shards for own in adapted], [own.grads for own in adapted])
        for own, (w_norm, g_norm) in zip(adapted, measured, strict=True):
            self._update(own, _ratios(own.group, w_norm, g_norm))
        for own in layers:
            if not own.adapted:
                self._update(own, None)
        return loss

    def _update(self, layers: Layers, ratios: Tensor | None) -> None:
        """torch's own fused SGD, with gradients that have weight decay and r in them already."""
        group, grads = layers.group, layers.grads
        decay = group["weight_decay"]
        if ratios is not None:
            # New tensors: a gradient is the caller's.
            grads = list(
                torch._foreach_add(grads, layers.shards, alpha=decay) if decay else torch._foreach_mul(grads, 1)
            )
            torch._foreach_mul_(grads, list(ratios.unbind()))
            decay = 0.0
        momentum = group["momentum"]
        buffers: list[Any] = state_of(layers, self.state, "momentum_buffer") if momentum else [None] * len(grads)
        sgd(
            layers.shards,
            grads,
            buffers,
            fused=True,
            found_inf=getattr(self, "found_inf", None),
            weight_decay=decay,
            momentum=momentum,
            lr=group["lr"],
            dampening=0.0,
            nesterov=group["nesterov"],
            maximize=False,
        )


def _ratios(group: dict[str, Any], w_norm: Tensor, g_norm: Tensor) -> Tensor:
    """r of each layer, (n,) float64."""
    ratios = group["trust_coefficient"] * w_norm / (g_norm + group["weight_decay"] * w_norm + group["eps"])
    return torch.where((w_norm > 0) & (g_norm > 0), ratios, 1.0)
