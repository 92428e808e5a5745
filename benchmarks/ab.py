"""Choices of the kernels against their alternatives: order of the blocks, chunk, warps, how a launch is made.

    python benchmarks/ab.py [--models resnet50,large] [--variants forward,chunk8192]

Each variant makes the same step with one choice changed; all take turns. Shown is each kernel's time in its place in a
step, the whole phase's, and what the host needs to launch all of it. Weights must come out as the default's, to the
rounding of a norm that is summed in another order. On a CPU it runs in Triton's interpreter and shows no numbers.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: it is read once, at decoration

from lib.arguments import Parser
from lib.launches import Launches, time_launches
from lib.problem import DTYPES, Problem, make_problem
from lib.report import Report, Result, first_line, number, progress, table
from lib.shapes import MODELS
from lib.timing import CpuClock, Deadline, make_clock
from lib.traffic import BASES, Base

from lesam_kernels.launch_config import NUM_WARPS

DEFAULT = "default"


def plain_launches(launches: Launches) -> Launches:
    """Through Triton's front end each time."""

    def launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
        kernel[(programs,)](*args, **constants)

    launches.table.launch = launch  # type: ignore[assignment]
    return launches


def with_warps(launches: Launches, warps: int) -> Launches:
    """Each thread still takes 16 bytes of a tensor at a time, so a block is as much larger or smaller."""
    launch = launches.table.launch

    def other(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
        if "BLOCK" in constants:
            constants["BLOCK"] = constants["BLOCK"] * warps // NUM_WARPS
        launch(kernel, programs, *args, **{**constants, "num_warps": warps})

    launches.table.launch = other  # type: ignore[assignment]
    launches.table.types = tuple((dtype, block * warps // NUM_WARPS) for dtype, block in launches.table.types)
    return launches


VARIANTS: dict[str, Callable[[Problem, Base], Launches]] = {
    DEFAULT: Launches,
    "forward": lambda problem, base: Launches(problem, base, walk_back=False),
    "chunk8192": lambda problem, base: Launches(problem, base, chunk=8192),
    "chunk32768": lambda problem, base: Launches(problem, base, chunk=32768),
    "warps4": lambda problem, base: with_warps(Launches(problem, base), 4),
    "plain launches": lambda problem, base: plain_launches(Launches(problem, base)),
}


def differ(launches: Launches, other: Launches) -> str | None:
    """Why the weights after as many steps are not the same, or None."""
    for a, b in zip(launches.weights, other.weights, strict=True):
        error = ((a - b).abs().max() / b.abs().max()).item()
        if not error <= 4 * torch.finfo(a.dtype).eps:
            return f"weights differ by {error:.1e} of the largest"
    return None


def _prepare(name: str, problem: Problem, base: Base, default: Launches | None) -> Launches | str:
    """A variant after its first step, which compiles it, or what is wrong with it."""
    try:
        launches = VARIANTS[name](problem, base)
        for launch in (*launches.ascent, *launches.descent):
            launch.call()
        return (default and differ(launches, default)) or launches
    except Exception as error:  # a variant that does not compile must not take the others with it
        return f"failed: {first_line(error)}"


def host_seconds(launches: Launches, clock: CpuClock, repeats: int) -> float | None:
    """Median of the time in which the host has made all launches of a step, on an idle device."""
    calls = [launch.call for launch in (*launches.ascent, *launches.descent)]
    samples = [clock.host_seconds(lambda: [call() for call in calls]) for _ in range(repeats)]
    return statistics.median(sample[0] for sample in samples if sample) if all(samples) else None


def compare(
    model: str, base: Base, problem: Problem, names: Sequence[str], clock: CpuClock, repeats: int
) -> list[Result]:
    """All variants on one parameter list; the default is always among them."""
    ready: dict[str, Launches] = {}
    status: dict[str, str] = {}
    for name in dict.fromkeys((DEFAULT, *names)):
        made = _prepare(name, problem, base, ready.get(DEFAULT))
        status[name] = made if isinstance(made, str) else "ok"
        if isinstance(made, Launches):
            ready[name] = made
    times = time_launches(ready, clock, repeats)
    results: list[Result] = []
    for name, text in status.items():
        result: Result = {"model": model, "base": base, "variant": name, "status": text}
        if name in ready:
            result |= {"kernels": times[name], "host_seconds": host_seconds(ready[name], clock, repeats)}
        results.append(result)
    return results


def report(results: list[Result], on_cuda: bool) -> str:
    """Markdown of one parameter list; on a CPU, only what worked."""
    first = results[0]
    title = f"### {first['model']}, {first['base']}\n\n"
    if not on_cuda:
        return title + table(["variant", "outcome"], [[r["variant"], r["status"]] for r in results])
    kernels = [k["kernel"] for k in next((r["kernels"] for r in results if r["status"] == "ok"), [])]
    header = ["variant", *(f"{kernel} ms" for kernel in kernels), "phase ms", "of default", "host us"]
    whole = {r["variant"]: sum(k["seconds"]["p50"] for k in r["kernels"]) for r in results if r["status"] == "ok"}
    rows = []
    for r in results:
        name = r["variant"]
        if name not in whole:
            rows.append([name, r["status"]])
            continue
        ratio = whole[name] / whole[DEFAULT] if DEFAULT in whole else None
        cells = [number(k["seconds"]["p50"], 4, 1e3) for k in r["kernels"]]
        cells += [number(whole[name], 4, 1e3), number(ratio, 3), number(r["host_seconds"], 0, 1e6)]
        rows.append([name, *cells])
    return title + table(header, rows)


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    device, deadline = torch.device(args.device), Deadline(args.seconds)
    clock = make_clock(device)
    output = Report(args, "ab.py", device, "Choices of the kernels", seed=args.seed)
    for model, base in itertools.product(args.models, args.base):
        if deadline.passed:
            output.add(f"{model}, {base}: not run, the {args.seconds:.0f} s are used up\n")
            continue
        progress(f"{model}, {base}")
        problem = make_problem(MODELS[model](), DTYPES[args.dtype], device, args.seed)
        results = compare(model, base, problem, args.variants, clock, args.repeats)
        output.add(report(results, device.type == "cuda"), results)
        del problem
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    options = Parser(__doc__)
    options.add_device()
    options.add_names("--models", MODELS, None, "default: with CUDA resnet50,large,small1000, on a CPU tiny")
    options.add_names("--variants", VARIANTS, list(VARIANTS), "default: all")
    options.add_names("--base", BASES, ["sgd"], "default: sgd")
    options.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    options.add_argument("--repeats", type=int, metavar="N", help="timed steps; default: with CUDA 50, on a CPU 1")
    options.add_argument("--seconds", type=float, metavar="S", help="begin nothing new after this")
    options.add_seed("weights and gradients")
    options.add_files()
    args = options.parse(argv)
    on_cuda = args.device == "cuda"
    args.models = args.models or (["resnet50", "large", "small1000"] if on_cuda else ["tiny"])
    args.repeats = args.repeats or (50 if on_cuda else 1)
    return args


if __name__ == "__main__":
    main()
