"""A sharpness-aware optimizer prepared by accelerate: ``model, optimizer, loader = prepare(accelerator, model, ...)``.

`Accelerator.prepare` puts the optimizer into a wrapper whose ``step`` returns nothing, has no telemetry, and does not
tell the optimizer of accelerate's GradScaler. What `prepare` here returns is the optimizer itself, which knows it.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from lesam_dist.optim.engine.base import SharpnessAware

try:
    from accelerate import Accelerator, DistributedType
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"lesam_dist.accelerate needs {error.name}: pip install accelerate", name=error.name
    ) from error

_UNKNOWN_SHARDS = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def prepare(accelerator: Accelerator, model: nn.Module, optimizer: SharpnessAware, *others: Any) -> tuple[Any, ...]:
    """As ``accelerator.prepare(model, optimizer, *others)``, with the optimizer itself in the place of its wrapper.

    ``optimizer.step(closure)`` then returns the loss, and under fp16 updates ``accelerator.scaler`` too. The closure is
    one that calls ``accelerator.backward(loss)``, or `BatchPasses` with ``scaler=accelerator.scaler``, which makes the
    passes alike and leaves out reductions where the optimizer or micro-batches ask for it; autocast is accelerate's.
    ``accelerator.save_state`` and ``load_state`` know the optimizer as ever.

    Args:
        accelerator: with ``gradient_accumulation_steps`` left at 1.
        model, optimizer: prepared together, which FSDP2 needs.
        others: data loaders, schedulers and what else ``accelerator.prepare`` takes.

    Returns:
        The model, the optimizer, and the others as accelerate prepared them.

    Raises:
        TypeError: where the optimizer is not sharpness-aware.
        ValueError: for gradient accumulation, or under FSDP1, DeepSpeed or Megatron.
    """
    if not isinstance(optimizer, SharpnessAware):
        raise TypeError(
            f"prepare: the optimizer is a {type(optimizer).__name__}, not a sharpness-aware one as LESAM. Give the "
            "model and then the optimizer, or call accelerator.prepare."
        )
    if (steps := accelerator.gradient_accumulation_steps) > 1:
        raise ValueError(
            f"prepare: Accelerator(gradient_accumulation_steps={steps}) makes a step of one batch in {steps}, and both "
            f"passes need all of them. Leave it at 1, give the loader batches {steps} times as large, and go through "
            f"them in parts: BatchPasses(model, criterion, x, y, scaler=accelerator.scaler, micro_batches={steps})."
        )
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if accelerator.distributed_type in _UNKNOWN_SHARDS or (plugin is not None and plugin.fsdp_version == 1):
        kind = "FSDP1" if plugin is not None else accelerator.distributed_type.value
        raise ValueError(
            f"prepare: under {kind} shards do not say that they are, so the norm would be each process's own. Choose "
            "FSDP2: Accelerator(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))."
        )
    model, wrapper, *rest = accelerator.prepare(model, optimizer, *others)
    inner: SharpnessAware = wrapper.optimizer
    inner.grad_scaler = scaler = accelerator.scaler
    if scaler is not None:

        def update(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if (*args[1:], *kwargs.values()) not in ((), (None,)):  # step(None) only creates the state
                scaler.update()

        inner.register_step_post_hook(update)
    return model, inner, *rest
