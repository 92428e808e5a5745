"""The optimizer's share of a step on the CPU: LE-SAM around SGD with momentum, against straightforward eager code.

    python benchmarks/optimizer_step.py [--model resnet50] [--repeats 20] [--json results.json]

Measures norm + perturb + restore + update on a model's real parameter list in float32, gradients given; forward and
backward are not part of it. Providers take turns within each repeat, so that a busy machine slows all of them alike;
read the ratios, not the milliseconds. A provider whose weights are wrong gets no number.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import Tensor

from lesam_dist import LESAM

SIGMA, RHO_MAX, LR, MOMENTUM = 0.3, 0.2, 0.1, 0.9

Step = Callable[[], None]
Provider = Callable[[list[Tensor], list[Tensor], list[Tensor]], Step]


def eager(params: list[Tensor], first: list[Tensor], second: list[Tensor], swap: bool = True) -> Step:
    """What most SAM code does: per tensor a clone, a temporary e, an add; back by swapping the clone in."""
    base = torch.optim.SGD(params, lr=LR, momentum=MOMENTUM)

    @torch.no_grad()
    def step() -> None:
        set_grads(params, first)
        norm = torch.stack([p.grad.norm(2) for p in params if p.grad is not None]).norm(2)
        scale = torch.clamp(SIGMA / (norm + 1e-12), max=RHO_MAX) / norm
        old = []
        for p in params:
            assert p.grad is not None
            old.append(p.data.clone())
            e = p.grad * scale
            p.add_(e)
        set_grads(params, second)
        for p, saved in zip(params, old, strict=True):
            if swap:
                p.data = saved
            else:
                p.data.copy_(saved)
        base.step()

    return step


def eager_copy(params: list[Tensor], first: list[Tensor], second: list[Tensor]) -> Step:
    """As `eager`, but back by copying, as it must be where the storage is shared (FSDP2, flat parameters)."""
    return eager(params, first, second, swap=False)


def lesam(params: list[Tensor], first: list[Tensor], second: list[Tensor]) -> Step:
    """This library, including its check of the second gradient, which the eager code does without."""
    optimizer = LESAM(params, torch.optim.SGD, sigma=SIGMA, rho_max=RHO_MAX, lr=LR, momentum=MOMENTUM)

    def step() -> None:
        set_grads(params, first)
        optimizer.first_step()
        set_grads(params, second)
        optimizer.second_step()

    return step


def plain_sgd(params: list[Tensor], first: list[Tensor], second: list[Tensor]) -> Step:
    """The update alone, for scale."""
    base = torch.optim.SGD(params, lr=LR, momentum=MOMENTUM, fused=True)

    def step() -> None:
        set_grads(params, second)
        base.step()

    return step


PROVIDERS: dict[str, Provider] = {
    "eager": eager,
    "eager_copy": eager_copy,
    "lesam_dist": lesam,
    "sgd_fused": plain_sgd,
}


def set_grads(params: list[Tensor], grads: list[Tensor]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = g


def make_tensors(model: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The parameters of a torchvision model, and two sets of gradients of a plausible size."""
    torch.manual_seed(0)
    params = [p.detach() for p in torchvision.models.get_model(model).parameters()]
    return params, *([torch.randn_like(p) * 1e-3 for p in params] for _ in range(2))


def check(params: list[Tensor], first: list[Tensor], second: list[Tensor], provider: Provider) -> float:
    """Largest difference from a float64 step, relative to the largest weight."""
    mine = [torch.nn.Parameter(p.clone()) for p in params]
    provider(mine, first, second)()
    expected = [p.double() - LR * g.double() for p, g in zip(params, second, strict=True)]
    return max(
        float((p.detach().double() - e).abs().max() / e.abs().max().clamp(min=1e-30))
        for p, e in zip(mine, expected, strict=True)
    )


def measure(steps: dict[str, Step], repeats: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if repeat >= 2:
                times[name].append(time.perf_counter() - start)
    return times


def commit() -> str:
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return result.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50", help="a torchvision classification model")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    args = parser.parse_args()

    params, first, second = make_tensors(args.model)
    steps, wrong = {}, {}
    for name, provider in PROVIDERS.items():
        error = check(params, first, second, provider)
        if error > 1e-6:
            wrong[name] = error
        else:
            steps[name] = provider([torch.nn.Parameter(p.clone()) for p in params], first, second)
    times = measure(steps, args.repeats)

    median = {name: statistics.median(values) for name, values in times.items()}
    numel = sum(p.numel() for p in params)
    threads = torch.get_num_threads()
    print(f"{args.model}: {len(params)} tensors, {numel / 1e6:.1f} M parameters, float32, {threads} threads")
    print(f"torch {torch.__version__}, {platform.machine()}, commit {commit()}, median of {args.repeats}\n")
    print("| provider | ms | of eager |\n|---|---|---|")
    for name, value in median.items():
        print(f"| {name} | {1e3 * value:.1f} | {value / median['eager']:.2f} |")
    for name, error in wrong.items():
        print(f"| {name} | wrong result ({error:.1e}) | |")
    if args.json:
        args.json.write_text(json.dumps({"model": args.model, "commit": commit(), "seconds": times}, indent=1))


if __name__ == "__main__":
    main()
