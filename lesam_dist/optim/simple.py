"""LE-SAM in plain torch (paper, Algorithm 1), to be read first. `LESAM` computes the same, fused and on many GPUs."""

from collections.abc import Callable

import torch


class SimpleLESAM:
    """``SimpleLESAM(torch.optim.SGD(params, lr=0.1), sigma=0.3, rho_max=0.2)``; then, per batch, ``step(closure)``.

    ``closure`` makes one forward and backward pass over the batch and returns the loss.
    """

    def __init__(self, base: torch.optim.Optimizer, sigma: float, rho_max: float, eps: float = 1e-12) -> None:
        self.base, self.sigma, self.rho_max, self.eps = base, sigma, rho_max, eps

    def step(self, closure: Callable[[], torch.Tensor]) -> torch.Tensor:
        self.base.zero_grad()
        loss = closure()  # g = grad L(w)
        self.first_step()
        self.base.zero_grad()
        closure()  # g_hat = grad L(w + e)
        self.second_step()
        return loss

    @torch.no_grad()
    def first_step(self) -> None:
        params = [p for group in self.base.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        rho = (self.sigma / (norm + self.eps)).clamp(max=self.rho_max)
        scale = torch.where(norm > 0, rho / norm, 0.0)  # a gradient of zero has no direction
        self.saved = [(p, p.clone()) for p in params]
        for p in params:
            p += scale * p.grad  # w + e, e = rho * g / ||g||

    @torch.no_grad()
    def second_step(self) -> None:
        for p, w in self.saved:
            p.data = w  # the exact weights: taken back, not computed
        self.base.step()
