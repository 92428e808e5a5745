"""A whole training step on synthetic images: what sharpness-aware training costs over SGD, end to end.

    python benchmarks/step.py [--models resnet50,vit_b_16] [--batch 32,128,256] [--variants sgd,lesam]

These are what it takes with CUDA. On a CPU it rehearses: tiny models and batches, in seconds, every variant's loss, and
no time or ratio.

Images are on the device already, channels_last, forward and backward under bf16 autocast. BatchNorm's statistics are
frozen in the second pass of every two-pass variant. Variants take turns of a few steps, each with its own model of the
same weights.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from lib.arguments import Parser
from lib.models import NETWORKS
from lib.problem import Hyper
from lib.providers import base_optimizer, our_optimizer
from lib.report import Report, Result, first_line, number, percentiles, progress, table
from lib.timing import Deadline, step_seconds
from lib.traffic import BASES, Base
from torch import Tensor, nn

from lesam_dist.optim.simple import SimpleLESAM
from lesam_dist.train.batchnorm import frozen_batchnorm

# A small rate: every step sees the same batch, which must not be learned by heart until its gradient vanishes.
LESAM_HYPER = Hyper(sigma=0.3, rho_max=0.2, lr=1e-4)
SAM_HYPER = Hyper(sigma=math.inf, rho_max=0.05, lr=1e-4)
_WARM_UP = 5
_TURNS = 4
Step = Callable[[], Tensor]


class Passes:
    """Forward and backward of one batch; `begin` a step, then call it once per pass."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        self.model, self.images, self.labels = model, images, labels
        self._count = 0

    def begin(self) -> None:
        self._count = 0

    def __call__(self) -> Tensor:
        with frozen_batchnorm(self.model) if self._count else nullcontext():
            with torch.autocast(self.images.device.type, torch.bfloat16):
                loss = nn.functional.cross_entropy(self.model(self.images), self.labels)
            loss.backward()
        self._count += 1
        return loss.detach()


def sgd(passes: Passes, base: Base) -> Step:
    """One pass and torch's fused update: the cost of a plain step."""
    optimizer = base_optimizer(list(passes.model.parameters()), base, LESAM_HYPER, fused=True)

    def step() -> Tensor:
        passes.begin()
        optimizer.zero_grad()
        loss = passes()
        optimizer.step()
        return loss

    return step


def eager(passes: Passes, base: Base, hyper: Hyper) -> Step:
    """The usual code: one loop over the parameters per operation."""
    base_step = base_optimizer(list(passes.model.parameters()), base, hyper)
    optimizer = SimpleLESAM(base_step, hyper.sigma, hyper.rho_max, hyper.eps)

    def step() -> Tensor:
        passes.begin()
        return optimizer.step(passes)

    return step


def ours(passes: Passes, base: Base, hyper: Hyper, **options: Any) -> Step:
    """lesam_dist as a user calls it."""
    optimizer = our_optimizer(list(passes.model.parameters()), base, hyper, **options)

    def step() -> Tensor:
        passes.begin()
        return optimizer.step(passes)  # type: ignore[no-any-return]

    return step


def graph(passes: Passes, base: Base, hyper: Hyper) -> Step:
    """`ours`, captured once in a CUDA graph and replayed; a replay reads lr, sigma and the like from the device."""
    if passes.images.device.type != "cuda":
        raise CaptureError("skipped: CUDA only")
    try:
        optimizer: Any = our_optimizer(list(passes.model.parameters()), base, hyper)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is made at first (state, tables, plans) must not be in the graph
            for _ in range(3):
                passes.begin()
                optimizer.step(passes)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.reset_peak_memory_stats()
        captured = torch.cuda.CUDAGraph()
        passes.begin()
        with torch.cuda.graph(captured):
            loss: Tensor = optimizer.step(passes)
        optimizer.push_scalars()  # also tells the kernels where the graph has its gradients
        captured.replay()
        torch.cuda.synchronize()
    except Exception as error:
        raise CaptureError(f"capture failed: {first_line(error)}") from error

    def step() -> Tensor:
        optimizer.push_scalars()
        captured.replay()
        return loss

    return step


class CaptureError(Exception):
    """The step could not be captured; the message says why."""


VARIANTS: dict[str, Callable[[Passes, Base], Step]] = {
    "sgd": sgd,
    "eager_sam": lambda passes, base: eager(passes, base, SAM_HYPER),
    "eager_lesam": lambda passes, base: eager(passes, base, LESAM_HYPER),
    "sam": lambda passes, base: ours(passes, base, SAM_HYPER),
    "lesam": lambda passes, base: ours(passes, base, LESAM_HYPER),
    "lesam_graph": lambda passes, base: graph(passes, base, LESAM_HYPER),
    "lesam_early": lambda passes, base: ours(passes, base, LESAM_HYPER, norm_in_backward=True),
}
_USUAL = [name for name in VARIANTS if name != "lesam_early"]  # which is for large models at small batches


def prepare(variant: str, model: str, batch: int, args: argparse.Namespace) -> tuple[Result, Step | None]:
    """A variant that has made its first steps, ready to be timed; or its result says what went wrong."""
    device = torch.device(args.device)
    on_cuda = device.type == "cuda"
    result: Result = {"model": model, "batch": batch, "variant": variant, "status": "ok"}
    before = torch.cuda.memory_allocated() if on_cuda else 0
    try:
        torch.manual_seed(args.seed)
        network = NETWORKS[model](args.image_size).train().to(device)
        network = network.to(memory_format=torch.channels_last)
        images = torch.randn(batch, 3, args.image_size, args.image_size, device=device)
        images = images.contiguous(memory_format=torch.channels_last)
        labels = torch.randint(10, (batch,), device=device)
        step = VARIANTS[variant](Passes(network, images, labels), args.base)
        for _ in range(_WARM_UP if on_cuda else 1):
            step()
        if on_cuda:
            torch.cuda.synchronize()
            if variant != "lesam_graph":  # a graph took its memory when it was captured
                torch.cuda.reset_peak_memory_stats()
            step()
            torch.cuda.synchronize()
            result["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    except CaptureError as error:
        return {**result, "status": str(error)}, None
    except Exception as error:  # out of memory, above all: the other variants may fit
        return {**result, "status": f"failed: {first_line(error)}"}, None
    return result, step


def measure(results: list[Result], steps: dict[str, Step], args: argparse.Namespace, deadline: Deadline) -> None:
    """Time the prepared variants in turns of a few steps, there and back, so that clocks and heat meet all of them.

    On a CPU the steps are made and not timed: tiny models tell nothing about large ones on a GPU, and with a thread per
    core a busy machine made one variant's median 70 times another run's.
    """
    device = torch.device(args.device)
    samples: dict[str, list[float]] = {variant: [] for variant in steps}
    for turn in range(_TURNS):
        if turn and deadline.passed:
            break
        for variant in list(steps) if turn % 2 == 0 else list(reversed(steps)):
            seconds, status = _turn(steps[variant], -(-args.repeats // _TURNS), device)
            samples[variant] += seconds
            if status != "ok":
                next(r for r in results if r["variant"] == variant)["status"] = status
                del steps[variant]
    for result in results:
        if result["variant"] not in steps:
            continue
        loss = result["loss"] = float(steps[result["variant"]]())
        if not math.isfinite(loss):
            result["status"] = f"failed: the loss is {loss}"
        elif device.type == "cuda":
            seconds = samples[result["variant"]]
            median = statistics.median(seconds)
            result |= {"seconds": percentiles(seconds), "images_per_second": result["batch"] / median}


def _turn(step: Step, count: int, device: torch.device) -> tuple[list[float], str]:
    """Seconds of each of ``count`` steps, and "ok" or what was raised: activations of one may not fit beside others."""
    try:
        return step_seconds(step, count, device), "ok"
    except Exception as error:
        return [], f"failed: {first_line(error)}"


def add_ratios(results: list[Result]) -> None:
    """``of_sgd`` and ``of_eager_sam``: a variant's median over theirs."""
    medians = {r["variant"]: r["seconds"]["p50"] for r in results if r["status"] == "ok" and "seconds" in r}
    for result in results:
        for other in ("sgd", "eager_sam"):
            if result["variant"] in medians and other in medians:
                result[f"of_{other}"] = medians[result["variant"]] / medians[other]


def report(results: list[Result], on_cuda: bool) -> str:
    """Markdown of one model and batch; on a CPU, only what worked."""
    title = f"### {results[0]['model']}, batch {results[0]['batch']}\n\n"
    if not on_cuda:
        rows = [[r["variant"], r["status"], number(r.get("loss"), 4)] for r in results]
        return title + table(["variant", "outcome", "loss"], rows)
    rows = []
    for r in results:
        if r["status"] != "ok":
            rows.append([r["variant"], r["status"]])
            continue
        row = [r["variant"], number(r.get("of_sgd"), 3), number(r.get("of_eager_sam"), 3)]
        p20, p50, p80 = (number(r["seconds"][p], 2, 1e3) for p in ("p20", "p50", "p80"))
        row += [f"{p50} ({p20}-{p80})", number(r["images_per_second"], 0), number(r["peak_bytes"], 2, 2**-30)]
        rows.append(row)
    return title + table(["variant", "of sgd", "of eager SAM", "ms (p20-p80)", "images/s", "peak GiB"], rows)


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    on_cuda = args.device == "cuda"
    torch.backends.cudnn.benchmark = True
    deadline = Deadline(args.seconds)
    settings = {"image_size": args.image_size, "base": args.base, "repeats": args.repeats, "seed": args.seed}
    output = Report(args, "step.py", torch.device(args.device), f"Training step, base {args.base}", settings=settings)
    for batch, model in itertools.product(args.batch, args.models):
        results: list[Result] = []
        steps: dict[str, Step] = {}
        step: Step | None = None
        for variant in args.variants:
            progress(f"{model}, batch {batch}: {variant}")
            if deadline.passed:
                status = f"not run: the {args.seconds:.0f} s are used up"
                results.append({"model": model, "batch": batch, "variant": variant, "status": status})
                continue
            result, step = prepare(variant, model, batch, args)
            results.append(result)
            if step is not None:
                steps[variant] = step
        measure(results, steps, args, deadline)
        add_ratios(results)
        output.add(report(results, on_cuda), results)
        step = None
        steps.clear()
        gc.collect()  # a graph and its pool are in cycles
        if on_cuda:
            torch.cuda.empty_cache()


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    options = Parser(__doc__)
    options.add_device()
    options.add_names("--models", NETWORKS, None, "default: with CUDA resnet50,vit_b_16, on a CPU the tiny ones")
    options.add_names("--variants", VARIANTS, _USUAL, "default: all but lesam_early")
    options.add_integers("--batch", None, "images per step; default: with CUDA 128,32,256, on a CPU 4")
    options.add_argument(
        "--image-size", type=int, metavar="N", help="a multiple of 16, at least 32; default: with CUDA 224, on a CPU 32"
    )
    options.add_argument("--base", choices=BASES, default="sgd", help="sgd has momentum; default: sgd")
    options.add_argument("--repeats", type=int, default=20, metavar="N", help="timed steps per variant; default: 20")
    options.add_argument(
        "--seconds", type=float, metavar="S", help="begin nothing new after this; default on a CPU: 80"
    )
    options.add_seed("weights and images")
    options.add_files()
    args = options.parse(argv)
    on_cuda = args.device == "cuda"
    args.models = args.models or (["resnet50", "vit_b_16"] if on_cuda else ["resnet_tiny", "vit_tiny"])
    args.batch = args.batch or ([128, 32, 256] if on_cuda else [4])
    args.image_size = args.image_size or (224 if on_cuda else 32)
    args.seconds = args.seconds or (None if on_cuda else 80.0)
    return args


if __name__ == "__main__":
    main()
