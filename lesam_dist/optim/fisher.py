"""Fisher SAM (Kim et al., 2022, section 3; paper, section 2).

    f     = g^2  (elementwise)                           the diagonal Fisher information, from the batch's gradient
    d     = g / (1 + eta * f)
    w_hat = w + rho * d / sqrt(g . d)                    so that (w_hat - w)' diag(1 + eta*f) (w_hat - w) = rho^2
    w     <- base step with g_hat = grad L(w_hat)        from the exact w

Exact: the formulas above, with one inner product over all perturbed parameters. The authors released no code; f follows
the two public implementations, which take the square of the batch's mean gradient for the mean of squares. Unlike SAM
it depends on the scale of the loss. eta = 0 is SAM. Cost: two forward and backward passes a step; the direction is made
in plain torch, and is freed before the second pass.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch.optim.optimizer import ParamsT

from lesam_dist.optim.engine.arguments import NonNegative
from lesam_dist.optim.engine.base_optimizer import BaseOptimizer
from lesam_dist.optim.engine.vectors import Ascent, Vector
from lesam_dist.optim.sam import SAM


class FisherSAM(SAM, name="fishersam", along="g, less where the Fisher information is large"):
    """Fisher SAM around any torch optimizer: ``FisherSAM(params, torch.optim.SGD, rho=0.1, eta=1.0, lr=0.1)``.

    Args:
        params: parameters or param groups; a group may set its own ``rho`` and ``fisher_eta``.
        base_optimizer: the class that makes the update.
        rho: radius in the metric above, >= 0.
        eta: weight of the Fisher information, >= 0. In the groups it is ``fisher_eta``.
        kwargs: options of `SharpnessAware`; the rest goes to ``base_optimizer``.

    Raises:
        ValueError: for a value out of range.
    """

    group_names: ClassVar = {"eta": "fisher_eta"}

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: BaseOptimizer,
        *,
        rho: NonNegative = 0.1,
        eta: NonNegative = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, base_optimizer, rho=rho, eta=eta, **kwargs)

    def climb(self, g: Vector) -> Ascent:
        g = g.perturbed
        d = g.map(lambda g, eta: g / (1 + eta * g * g), self.per_group("eta"))
        return Ascent(d, norm_sq=g.dot(d))
