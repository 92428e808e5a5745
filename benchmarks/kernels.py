"""The optimizer's phase of a sharpness-aware step (norm, perturbation, restore, update), provider by provider.

    python benchmarks/kernels.py [--models resnet50,vit_l_16] [--providers lesam_dist,foreach] [--base sgd,adamw]

Gradients are given; forward and backward are not part of it. Providers take turns within each repeat, so that a change
of clocks or a busy machine meets all of them. One whose weights, perturbed weights or momentum differ from a float64
step gets no number. On the CPU it shows ratios alone. README.md says what the columns mean.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence

import torch
from lib.arguments import Parser
from lib.problem import DTYPES, Problem, make_problem, set_grads
from lib.providers import PARTS, PROVIDERS, Provider, minimal_passes
from lib.reference64 import Expected, expected_steps, wrong
from lib.report import Report, Result, first_line, number, percentiles, progress, table
from lib.shapes import MODELS
from lib.timing import CpuClock, CudaClock, Deadline, make_clock, no_collection
from lib.traffic import Base

OURS = "lesam_dist"
_CUDA_MODELS = [name for name in MODELS if name != "tiny"]
_FEWEST_REPEATS = 3


def prepare(name: str, problem: Problem, base: Base, expected: list[Expected]) -> Provider | str:
    """The provider, checked and ready to be timed, or why it is not."""
    cls = PROVIDERS[name]
    reason = cls.unavailable(problem.weights[0].device)
    if reason:
        return reason
    try:
        return wrong(cls, problem, base, expected) or cls(problem.parameters(), base, problem.hyper, problem.rho)
    except Exception as error:  # a peer that breaks must not take the others' numbers with it
        return f"failed: {first_line(error)}"


def measure(
    ready: dict[str, Provider], problem: Problem, clock: CpuClock, repeats: int, deadline: Deadline
) -> dict[str, Result]:
    """Samples in seconds: per provider and part, on the device, of the host, and of both from an idle device."""
    warm_up = 5 if isinstance(clock, CudaClock) else 1
    kinds = ("device", "host", "wall")
    samples: dict[str, Result] = {name: {kind: {part: [] for part in PARTS} for kind in kinds} for name in ready}
    with no_collection():
        for repeat in range(warm_up + repeats):
            if deadline.passed and repeat >= warm_up + _FEWEST_REPEATS:
                break
            for name, provider in ready.items():
                values = _one_step(provider, problem, clock)
                if repeat < warm_up:
                    continue
                for kind, (ascent, descent) in values.items():
                    for part, value in zip(PARTS, (ascent, descent, ascent + descent), strict=True):
                        samples[name][kind][part].append(value)
    return samples


def _one_step(provider: Provider, problem: Problem, clock: CpuClock) -> dict[str, tuple[float, float]]:
    """Two steps, one for the host's clock and one for the device's: (ascent, descent) in seconds by kind."""
    host, device = [], []
    parts = ((problem.first, provider.ascent), (problem.second, provider.descent))
    for grads, part in parts:
        set_grads(provider.params, grads)
        host.append(clock.host_seconds(part))
    for (grads, part), seconds in zip(parts, host, strict=True):
        set_grads(provider.params, grads)
        device.append(clock.device_seconds(part, seconds and seconds[0]))
    result = {"device": (device[0], device[1])}
    if host[0] and host[1]:
        result["host"] = host[0][0], host[1][0]
        result["wall"] = host[0][1], host[1][1]
    return result


def summarize(problem: Problem, base: Base, provider: Provider, samples: Result, copy: float | None) -> Result:
    """One provider's result: percentiles, bytes per second and the share of the copy's bandwidth."""
    kinds = {
        kind: {part: percentiles(values) for part, values in parts.items()}
        for kind, parts in samples.items()
        if parts["phase"]
    }
    elements = sum(w.numel() for w in problem.weights)
    itemsize = problem.weights[0].dtype.itemsize
    rates = {}
    for part in PARTS:
        per_element = minimal_passes(base, part, provider.checks_second) * itemsize
        rate = per_element * elements / kinds["device"][part]["p50"]
        rates[part] = {"bytes_per_element": per_element, "bytes_per_second": rate, "of_copy": copy and rate / copy}
    return {"status": "ok", "seconds": kinds, "traffic": rates}


def compare(
    model: str, base: Base, problem: Problem, names: list[str], clock: CpuClock, repeats: int, deadline: Deadline
) -> list[Result]:
    """All providers on one parameter list."""
    expected = expected_steps(problem, base)
    made = {name: prepare(name, problem, base, expected) for name in names}
    del expected  # several times the weights
    ready = {name: provider for name, provider in made.items() if isinstance(provider, Provider)}
    samples = measure(ready, problem, clock, repeats, deadline)
    copy = clock.copy_bandwidth()
    results: list[Result] = []
    for name, provider in made.items():
        result: Result = {
            "model": model,
            "base": base,
            "dtype": str(problem.weights[0].dtype).removeprefix("torch."),
            "tensors": len(problem.weights),
            "elements": sum(w.numel() for w in problem.weights),
            "provider": name,
            "copy_bytes_per_second": copy,
            "repeats": len(samples[name]["device"]["phase"]) if name in samples else 0,
        }
        if isinstance(provider, Provider):
            result |= summarize(problem, base, provider, samples[name], copy)
        else:
            result |= {"status": provider}
        results.append(result)
    ours = next((r for r in results if r["provider"] == OURS and r["status"] == "ok"), None)
    for result in results:
        if ours and result["status"] == "ok":
            result["of_ours"] = {
                kind: {part: value["p50"] / ours["seconds"][kind][part]["p50"] for part, value in parts.items()}
                for kind, parts in result["seconds"].items()
            }
    return results


def report(results: list[Result]) -> str:
    """Markdown of one parameter list."""
    first = results[0]
    title = f"### {first['model']}, {first['base']}, {first['dtype']}\n\n"
    title += f"{first['tensors']} tensors, {first['elements']:,} elements"
    copy = first["copy_bytes_per_second"]
    title += f", copy {copy / 1e12:.2f} TB/s\n\n" if copy else "\n\n"
    return title + (_cuda_table(results) if copy else _cpu_table(results))


def _cuda_table(results: list[Result]) -> str:
    header = ["provider", "ascent ms", "descent ms", "phase ms (p20-p80)", "GB/s", "of copy", "host ms", "wall ms"]
    header += ["of ours", "wall, of ours"]
    rows = []
    for result in results:
        if result["status"] != "ok":
            rows.append([result["provider"], result["status"]])
            continue
        device = result["seconds"]["device"]
        spread = "-".join(number(device["phase"][p], 3, 1e3) for p in ("p20", "p80"))
        traffic = result["traffic"]["phase"]
        ratio = result.get("of_ours", {})
        rows.append(
            [
                result["provider"],
                number(device["ascent"]["p50"], 3, 1e3),
                number(device["descent"]["p50"], 3, 1e3),
                f"{number(device['phase']['p50'], 3, 1e3)} ({spread})",
                number(traffic["bytes_per_second"], 0, 1e-9),
                number(traffic["of_copy"], 0, 100, " %"),
                number(result["seconds"]["host"]["phase"]["p50"], 3, 1e3),
                number(result["seconds"]["wall"]["phase"]["p50"], 3, 1e3),
                number(ratio["device"]["phase"] if ratio else None, 2),
                number(ratio["wall"]["phase"] if ratio else None, 2),
            ]
        )
    return table(header, rows)


def _cpu_table(results: list[Result]) -> str:
    """Ratios alone: absolute times of a shared CPU say nothing about anybody else's."""
    rows = []
    for result in results:
        ratio = result.get("of_ours", {}).get("device")
        cells = [number(ratio[part], 2) for part in PARTS] if ratio else [result["status"]]
        rows.append([result["provider"], *cells])
    return table(["provider", *(f"{part}, of ours" for part in PARTS)], rows)


def each_kernel(results: list[Result], base: Base, problem: Problem, clock: CpuClock, repeats: int) -> str:
    """Markdown of our kernels one by one, whose numbers are added to our result."""
    from lib.launches import Launches, as_table, time_launches  # imports triton, which nothing else here needs

    ours = next((r for r in results if r["provider"] == OURS and r["status"] == "ok"), None)
    if ours is None:
        return ""
    ours["kernels"] = time_launches({OURS: Launches(problem, base)}, clock, repeats)[OURS]
    return as_table(ours["kernels"], ours["copy_bytes_per_second"])


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    clock, deadline = make_clock(device), Deadline(args.seconds)
    output = Report(args, "kernels.py", device, "Optimizer phase", seed=args.seed)
    left = len(args.models) * len(args.dtype) * len(args.base)
    for model, dtype in itertools.product(args.models, args.dtype):
        problem = make_problem(MODELS[model](), DTYPES[dtype], device, args.seed)
        for base in args.base:
            if deadline.passed:
                output.add(f"{model}, {base}, {dtype}: not run, the {args.seconds:.0f} s are used up\n")
            else:
                progress(f"{model}, {base}, {dtype}")
                share = deadline.share(left)
                results = compare(model, base, problem, args.providers, clock, args.repeats, share)
                output.add(report(results), results)
                if device.type == "cuda":
                    output.add(each_kernel(results, base, problem, clock, args.repeats))
                    torch.cuda.empty_cache()
            left -= 1


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    options = Parser(__doc__)
    options.add_device()
    options.add_names("--models", MODELS, None, "default: with CUDA all but tiny, on a CPU resnet50")
    options.add_names("--providers", PROVIDERS, list(PROVIDERS), "default: all")
    options.add_bases()
    options.add_names("--dtype", DTYPES, ["float32"], "default: float32")
    options.add_argument("--repeats", type=int, metavar="N", help="at most; default: with CUDA 50, on a CPU 10")
    options.add_argument("--quick", action="store_true", help="a tenth of the repeats, for a first look")
    options.add_argument(
        "--seconds", type=float, metavar="S", help="fewer repeats, to end by then; default on a CPU: 80"
    )
    options.add_seed("weights and gradients")
    options.add_files()
    args = options.parse(argv)
    on_cuda = args.device == "cuda"
    args.models = args.models or (_CUDA_MODELS if on_cuda else ["resnet50"])
    args.seconds = args.seconds or (None if on_cuda else 80.0)
    args.repeats = args.repeats or (50 if on_cuda else 10)
    if args.quick:
        args.repeats = max(args.repeats // 10, 1)
    return args


if __name__ == "__main__":
    main()
