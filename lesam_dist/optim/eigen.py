"""Eigen-SAM (Luo et al., 2024, Algorithm 1; paper, section 2).

    v     ~ the Hessian's eigenvector of largest eigenvalue in size, by power iteration every k steps
    d     = g/||g|| + alpha * sign(g . v) * (v - (g/||g|| . v) g/||g||)
    w_hat = w + rho * d                                  d is not normalised again
    w     <- base step with g_hat = grad L(w_hat)        from the exact w

That is the released code. The paper of LE-SAM writes ``w + rho * v`` for it (Eq. 18), which the code does not do.
Until the first v, at step k, it is SAM. The iteration starts from the last v, at first from the gradient (in the
released code: from noise), on the step's own batch. Two more differences: the Hessian is that of training (there: of
the model in eval mode, where BatchNorm normalises by its running statistics), and k counts all steps (there: those of
an epoch, so that short epochs never make a v).

``products="auto"`` differentiates twice, as the released code does, where the closure can (`BatchPasses`: alone and
under DDP, compiled or not) and the weights are whole. Elsewhere, and under FSDP2, products with the Hessian are
differences of gradients, reduced like any other: ``H v ~ (grad L(w + r v) - grad L(w - r v)) / 2r``. With ReLU those
are far from exact (`benchmarks/hessian_probe.py`, ResNet-18 on 64 digits, r = 0.01). Along the first eigenvector they
are off by 140 % of ``H v`` before training and by 38 and 43 % after one and three epochs, and then by more with r = 0.1
or 0.001; along the gradient by 68 to 340 %. Five steps of power iteration end at a cosine of 0.34, 0.81 and 0.68 to
that vector, where exact products end at 0.99, 0.998 and 0.96.

Cost: two forward and backward passes a step, and every k steps 3 * power_steps more, or 2 * power_steps of differences;
v, one tensor per parameter, is in the `state_dict`. They are made between the two passes that every method makes: let
all calls of a closure but a step's first leave BatchNorm's running statistics alone, as `BatchPasses` does.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import ParamsT

from lesam_dist.optim.engine.arguments import Count, NonNegative, Positive
from lesam_dist.optim.engine.base_optimizer import BaseOptimizer
from lesam_dist.optim.engine.products import NotTwiceDifferentiableError, TwiceDifferentiable
from lesam_dist.optim.engine.rule import Closure
from lesam_dist.optim.engine.vectors import Ascent, Vector, ratio
from lesam_dist.optim.sam import SAM

_VECTOR = "eigenvector"


class EigenSAM(
    SAM,
    name="eigensam",
    along="g and the Hessian's first eigenvector",
    passes="2, and 15 more every 100 steps",
    keeps="the vector",
):
    """Eigen-SAM around any torch optimizer: ``EigenSAM(params, torch.optim.SGD, rho=0.05, alpha=0.2, lr=0.1)``.

    Args:
        params: parameters or param groups; a group may set its own ``rho``.
        base_optimizer: the class that makes the update.
        rho: radius along the gradient, >= 0.
        alpha: weight of the eigenvector, >= 0; 0 is SAM. In the groups it is ``eigen_alpha``.
        interval: k, steps from one power iteration to the next, >= 1.
        power_steps: products with the Hessian in each of them, >= 1.
        products: "exact" differentiates twice, "difference" takes differences of gradients, "auto" the former where it
            can. A resumed run that is sharded otherwise may go on with the other kind.
        probe: r, the length of the step of a difference, > 0.
        kwargs: options of `SharpnessAware`; the rest goes to ``base_optimizer``.

    Raises:
        ValueError: for a value out of range, or ``products="exact"`` of sharded weights.
    """

    memory_names = (_VECTOR,)
    group_names: ClassVar = {"alpha": "eigen_alpha", "interval": "eigen_interval"}

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: BaseOptimizer,
        *,
        rho: NonNegative = 0.05,
        alpha: NonNegative = 0.2,
        interval: Count = 100,
        power_steps: Count = 5,
        products: Literal["auto", "exact", "difference"] = "auto",
        probe: Positive = 1e-2,
        **kwargs: Any,
    ) -> None:
        own = {"rho": rho, "alpha": alpha, "interval": interval, "power_steps": power_steps, "probe": probe}
        super().__init__(params, base_optimizer, **own, products=products, **kwargs)
        if products == "exact" and self._is_sharded():
            raise ValueError(
                "EigenSAM: products is 'exact', but weights are sharded (FSDP2), of which FSDP2 makes no graph that "
                "can be differentiated twice. Choose 'auto' or 'difference', or DDP."
            )

    def climb(self, g: Vector) -> Vector | Ascent:
        alpha = float(self.first("alpha"))
        if not alpha or self.step_index < self.first("interval"):
            return g
        g, v = g.perturbed, self.kept(_VECTOR)
        norm = g.norm()
        inverse = ratio(1.0, norm)
        along = g.dot(v) * inverse  # of the eigenvector on g/||g||
        d = inverse * (1 - alpha * along.abs()) * g + alpha * along.sign() * v
        # Its length is part of the method, so it counts as 1; a norm that is not finite makes this so too.
        return Ascent(d, norm_sq=torch.where(norm > 0, 1.0 + 0.0 * norm, norm))

    def first_pass(self, closure: Closure, **arguments: Any) -> Any:
        loss = self.run_pass(closure, **arguments)
        interval = self.first("interval")
        if self.first("alpha") and self.step_index > 0 and self.step_index % interval == 0:
            g = self.gradient().copy()  # the probes' passes overwrite it
            old = self.kept(_VECTOR)
            v = self._power_iteration(closure, g.perturbed if self.step_index == interval else old)
            self.keep(_VECTOR, v.where_finite(otherwise=old))
            self.set_gradient(g)
        return loss

    def _power_iteration(self, closure: Closure, v: Vector) -> Vector:
        """The unit vector that products with the Hessian at the exact weights turn ``v`` into."""
        v = _unit(v)
        for _ in range(int(self.first("power_steps"))):
            v = _unit(self._product(closure, v).perturbed)
        return v

    def _product(self, closure: Closure, v: Vector) -> Vector:
        """``H v``; of differences, a multiple of it."""
        wanted, probe = self.first("products"), float(self.first("probe"))
        if wanted != "difference" and not self._is_sharded():
            if isinstance(closure, TwiceDifferentiable):
                try:
                    return self.hessian_product(closure, v)
                except NotTwiceDifferentiableError as error:
                    if wanted == "exact":
                        raise RuntimeError(f"EigenSAM: products is 'exact', but {error} Choose 'auto'.") from None
            elif wanted == "exact":
                raise RuntimeError(
                    "EigenSAM: products is 'exact', but the closure has no method hessian_product. Give step a "
                    "lesam_dist.BatchPasses, or a closure that has it (lesam_dist.optim.hessian_backward makes it), or "
                    "choose 'auto'."
                )
        return self.gradient_at(closure, v, probe) - self.gradient_at(closure, v, -probe)

    def _is_sharded(self) -> bool:
        return any(isinstance(p, DTensor) for group in self.param_groups for p in group["params"])

    def owns_passes(self) -> str | None:
        products = f"one step in {self.first('interval')} makes {self.first('power_steps')} products with the Hessian"
        return super().owns_passes() or (products if self.first("alpha") else None)


def _unit(v: Vector) -> Vector:
    return ratio(1.0, v.norm()) * v
