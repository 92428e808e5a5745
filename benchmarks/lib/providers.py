"""Everyone who can do the optimizer's phase of a sharpness-aware step, behind one interface.

A provider owns its parameters, finds gradients in ``p.grad`` and does two things: ``ascent`` (norm, perturbation)
with the first gradient there, ``descent`` (restore, base update) with the second one. README.md says why each is here.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any, Literal

import torch
from torch import Tensor

from lesam_dist import LESAM, SAM
from lesam_dist.optim.simple import SimpleLESAM
from lib import traffic
from lib.problem import Hyper
from lib.traffic import Base

Part = Literal["ascent", "descent", "phase"]
PARTS: tuple[Part, ...] = ("ascent", "descent", "phase")

BASE_CLASSES: dict[Base, type[torch.optim.Optimizer]] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
_STATE = {"sgd": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}


class Provider:
    """One way to do it. ``params`` are its own; it may not change the gradients that it is given.

    Args:
        params: leaves of one dtype on one device.
        base: the base optimizer.
        hyper: settings; ``rho`` is the radius that they give for these gradients, for those who know only SAM.
    """

    checks_second = False  # whether a second gradient that is not finite skips the update
    extra_passes = 0  # reads and writes of every element, counted from the code, beside the base optimizer's update

    def __init__(self, params: list[Tensor], base: Base, hyper: Hyper, rho: float) -> None:
        self.params, self.base, self.hyper, self.rho = params, base, hyper, rho
        self.optimizer: torch.optim.Optimizer
        self.build()

    @classmethod
    def unavailable(cls, device: torch.device) -> str | None:
        """Why it cannot run here, or None."""
        return None

    @classmethod
    def passes(cls, base: Base) -> int:
        """Reads and writes of every element in a whole phase. A fused update makes as many as our kernel's."""
        return cls.extra_passes + traffic.step(base)[-1].passes

    def build(self) -> None:
        raise NotImplementedError

    def ascent(self) -> None:
        raise NotImplementedError

    def descent(self) -> None:
        raise NotImplementedError

    def state(self) -> list[list[Tensor]]:
        """The base optimizer's state as lists parallel to ``params``: momentum, or both of Adam's moments."""
        return [[self.optimizer.state[p][key] for p in self.params] for key in _STATE[self.base]]

    def grads(self) -> list[Tensor]:
        return [p.grad for p in self.params if p.grad is not None]


class Eager(Provider):
    """`lesam_dist.optim.simple`, which is the usual SAM code: per tensor a norm, a clone, a temporary e and an add;
    back by swapping the clone in.

    The base optimizer is torch's default (foreach on CUDA).
    """

    extra_passes = 1 + 2 + 2 + 3  # norm, clone, e = scale * g, w += e

    @classmethod
    def passes(cls, base: Base) -> int:
        return cls.extra_passes + {"sgd": 11, "adamw": 20}[base]  # torch's foreach updates, with weight decay

    def build(self) -> None:
        self.optimizer = base_optimizer(self.params, self.base, self.hyper)
        self.simple = SimpleLESAM(self.optimizer, self.hyper.sigma, self.hyper.rho_max, self.hyper.eps)

    def ascent(self) -> None:
        self.simple.first_step()

    def descent(self) -> None:
        self.simple.second_step()


class Foreach(Provider):
    """The strongest plain torch that keeps every address: saved copies, foreach, fused updates, no host sync.

    torch has no foreach op for ``w += scale * g`` with a scale on the device, except one: fused SGD without momentum
    takes its learning rate from there. It reads w and g and writes w, where multiply and add move five passes.
    """

    extra_passes = 1 + 2 + 3 + 2  # norm, copy, w += scale * g; w <- copy

    def build(self) -> None:
        self.optimizer = base_optimizer(self.params, self.base, self.hyper, fused=True)
        self.copies = [torch.empty_like(p) for p in self.params]

    @torch.no_grad()
    def ascent(self) -> None:
        torch._foreach_copy_(self.copies, self.params)
        self.climb(self.params)

    @torch.no_grad()
    def descent(self) -> None:
        torch._foreach_copy_(self.params, self.copies)
        self.optimizer.step()

    def climb(self, weights: list[Tensor]) -> None:
        grads = self.grads()
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, dtype=torch.float32)))
        torch._fused_sgd_(
            weights,
            grads,
            [],
            weight_decay=0.0,
            momentum=0.0,
            lr=self.hyper.scale(norm),
            dampening=0.0,
            nesterov=False,
            maximize=True,
            is_first_step=False,
        )


class ForeachSwap(Foreach):
    """As `Foreach`, but it perturbs the copies and swaps storages, so that going back moves nothing.

    Only where nobody else holds the parameters' addresses: not with FSDP2, flat buffers or CUDA graphs.
    """

    extra_passes = 1 + 2 + 3  # without the last

    @torch.no_grad()
    def ascent(self) -> None:
        torch._foreach_copy_(self.copies, self.params)
        self.climb(self.copies)
        self.swap()

    @torch.no_grad()
    def descent(self) -> None:
        self.swap()
        self.optimizer.step()

    def swap(self) -> None:
        for i, p in enumerate(self.params):
            held = p.data
            p.data = self.copies[i]
            self.copies[i] = held


class Compile(Provider):
    """`Foreach` written for Inductor, which fuses foreach ops by itself: climb and copy, restore and update.

    The hyper-parameters are constants in the compiled code, which is to its advantage.
    """

    extra_passes = 1 + 4  # norm, climb; the restore is part of the update

    compiler = staticmethod(torch.compile)

    @classmethod
    def unavailable(cls, device: torch.device) -> str | None:
        return None if device.type == "cuda" else "skipped: CUDA only"

    def build(self) -> None:
        import torch._dynamo.config

        torch._dynamo.config.recompile_limit = 64  # one per parameter list, dtype and base
        self.copies = [torch.empty_like(p) for p in self.params]
        self.moments = [[torch.zeros_like(p) for p in self.params] for _ in _STATE[self.base]]
        self.steps = torch.zeros((), device=self.params[0].device)
        self.run_ascent = self.compiler(_compiled_ascent, fullgraph=True, dynamic=False)
        update = _compiled_sgd if self.base == "sgd" else _compiled_adamw
        self.run_descent = self.compiler(update, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def ascent(self) -> None:
        self.run_ascent(self.params, self.grads(), self.copies, self.hyper)

    @torch.no_grad()
    def descent(self) -> None:
        self.run_descent(self.params, self.grads(), self.copies, *self.moments, self.steps, self.hyper)

    def state(self) -> list[list[Tensor]]:
        return self.moments


def _compiled_ascent(params: list[Tensor], grads: list[Tensor], copies: list[Tensor], hyper: Hyper) -> None:
    norm = torch.stack([n.float() for n in torch._foreach_norm(grads)]).square().sum().sqrt()
    torch._foreach_copy_(copies, params)
    torch._foreach_add_(params, torch._foreach_mul(grads, hyper.scale(norm).to(params[0].dtype)))


def _compiled_sgd(
    params: list[Tensor], grads: list[Tensor], copies: list[Tensor], momenta: list[Tensor], steps: Tensor, hyper: Hyper
) -> None:
    grads = list(torch._foreach_add(grads, copies, alpha=hyper.weight_decay))
    torch._foreach_mul_(momenta, hyper.momentum)  # zero at first, which torch's first step amounts to
    torch._foreach_add_(momenta, grads)
    torch._foreach_copy_(params, torch._foreach_add(copies, momenta, alpha=-hyper.lr))


def _compiled_adamw(
    params: list[Tensor],
    grads: list[Tensor],
    copies: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    steps: Tensor,
    hyper: Hyper,
) -> None:
    steps.add_(1)
    beta1, beta2 = hyper.betas
    dtype = params[0].dtype
    torch._foreach_lerp_(first, grads, 1 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
    denominators = torch._foreach_sqrt(second)
    # 1 - beta**steps, without cancellation in float32
    correction1, correction2 = (-torch.expm1(steps * math.log(beta)) for beta in (beta1, beta2))
    torch._foreach_div_(denominators, correction2.sqrt().to(dtype))
    torch._foreach_add_(denominators, hyper.adam_eps)
    torch._foreach_mul_(denominators, (correction1 / hyper.lr).to(dtype))
    weights = torch._foreach_mul(copies, 1 - hyper.lr * hyper.weight_decay)
    torch._foreach_copy_(params, torch._foreach_addcdiv(weights, first, denominators, value=-1.0))


class PytorchOptimizer(Provider):
    """kozistr/pytorch_optimizer's SAM (a fixed radius): the published package with a foreach path."""

    extra_passes = 1 + 2 + 2 + 2 + 3 + 2  # norm, clone, e = 1.0 * g, e *= scale, w += e; w <- copy

    @classmethod
    def unavailable(cls, device: torch.device) -> str | None:
        return None if importlib.util.find_spec("pytorch_optimizer") else "not installed"

    def build(self) -> None:
        import pytorch_optimizer  # type: ignore[import-not-found, unused-ignore]

        kwargs = {**self.hyper.base_kwargs(self.base), "fused": True}
        self.sam = pytorch_optimizer.SAM(self.params, BASE_CLASSES[self.base], rho=self.rho, **kwargs)
        self.optimizer = self.sam.base_optimizer

    def ascent(self) -> None:
        self.sam.first_step()

    def descent(self) -> None:
        self.sam.second_step()


class Ours(Provider):
    """lesam_dist, with its check that the second gradient is finite, which nobody else here makes."""

    checks_second = True

    @classmethod
    def passes(cls, base: Base) -> int:
        return traffic.passes(traffic.step(base, check_second=cls.checks_second))

    def build(self) -> None:
        self.sharp = our_optimizer(self.params, self.base, self.hyper, check_second=self.checks_second)
        self.optimizer = self.sharp

    def ascent(self) -> None:
        self.sharp.first_step()

    def descent(self) -> None:
        self.sharp.second_step()


class OursUnchecked(Ours):
    """lesam_dist with `check_second=False`: does what the others do, no more."""

    checks_second = False


def base_optimizer(params: list[Tensor], base: Base, hyper: Hyper, **kwargs: Any) -> torch.optim.Optimizer:
    """torch's, with these settings."""
    return BASE_CLASSES[base](params, **hyper.base_kwargs(base), **kwargs)


def minimal_passes(base: Base, part: Part, checks_second: bool) -> int:
    """Passes that nobody can do without, from which everybody's bytes per second are counted: our kernels'."""
    kernels = traffic.step(base, check_second=checks_second)
    return traffic.passes({"ascent": kernels[:2], "descent": kernels[2:], "phase": kernels}[part])


def our_optimizer(params: list[Tensor], base: Base, hyper: Hyper, **kwargs: Any) -> LESAM | SAM:
    """LESAM or, where the budget is infinite, SAM."""
    kwargs |= hyper.base_kwargs(base)
    if base == "adamw":
        kwargs.pop("eps")  # Adam's own default is the same
        assert hyper.adam_eps == 1e-8
    if hyper.sigma == math.inf:
        return SAM(params, BASE_CLASSES[base], rho=hyper.rho_max, **kwargs)
    return LESAM(params, BASE_CLASSES[base], sigma=hyper.sigma, rho_max=hyper.rho_max, **kwargs)


PROVIDERS: dict[str, type[Provider]] = {
    "lesam_dist": Ours,
    "lesam_unchecked": OursUnchecked,
    "foreach": Foreach,
    "foreach_swap": ForeachSwap,
    "compile": Compile,
    "pytorch_optimizer": PytorchOptimizer,
    "eager": Eager,
}
