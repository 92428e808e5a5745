"""Targets beside results: the table at the end of gpu.py."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from lib.report import Result, table
from lib.traffic import BASES, Base

Found = list[tuple[float, str]]
"""Values and where each was measured."""

HOST_TARGET_SECONDS, HOST_TARGET_TENSORS = 300e-6, 161
"""What `host.py` should find at most on an idle server core, for a list as long as ResNet-50's and new addresses.

An H100 is predicted to take 375 microseconds for that phase: a host that takes less of them, and leaves some for the
driver's own part, is never what a step waits for. A shard's phase is shorter; FSDP2's DTensors have no target.
"""

OURS, UNCHECKED = "lesam_dist", "lesam_unchecked"
# On lists of small tensors launches dominate: their bandwidth says nothing.
_SMALL_LISTS = ("small1000", "tiny")


def summary(folder: Path, parts: Sequence[str] = ("kernels", "step", "host")) -> str:
    """A Markdown table from the JSON files in ``folder``.

    Targets of parts that were not to run are left out; "not measured" says that one ran and a number is missing.
    """
    kernels, steps, host = (_results(folder / f"{name}.json") for name in ("kernels", "step", "host"))
    rows = [row for part, row in _rows(kernels, steps, host) if part in parts]
    return table(["what", "target", "worst result", "met"], rows) if rows else "No part with a target was run.\n"


def _rows(kernels: list[Result], steps: list[Result], host: list[Result]) -> Iterator[tuple[str, list[str]]]:
    """Rows of the table, and the part that each belongs to."""
    for base in BASES:
        phases = _phases(kernels, base)
        for row in (
            _row(f"each kernel, {base}: of copy bandwidth", ">=", 90, " %", _of_copy_each(phases)),
            _row(f"phase, {base}: of copy bandwidth", ">=", 90, " %", _of_copy(phases)),
            _row(f"phase, {base}: foreach over ours", ">=", 1.3, "x", _ratios(phases, "foreach", OURS)),
            _row(f"phase, {base}: foreach over ours, unchecked", ">=", 1.3, "x", _ratios(phases, "foreach", UNCHECKED)),
            _row(f"phase, {base}: foreach_swap over ours", ">=", 1.0, "x", _ratios(phases, "foreach_swap", OURS)),
            _row(f"phase, {base}: eager over ours", ">=", 5.0, "x", _ratios(phases, "eager", OURS)),
        ):
            yield "kernels", row
    yield "kernels", _row("phase, resnet50: host time", "<=", 0.3, " ms", _host_times(kernels))
    for key, limit, name in (("of_sgd", 2.0, "SGD"), ("of_eager_sam", 0.97, "eager SAM")):
        for variant in ("lesam", "lesam_graph"):
            mine = [r for r in steps if (r["variant"], r["batch"]) == (variant, 128) and key in r]
            found = [(r[key], r["model"]) for r in mine]
            yield "step", _row(f"step, batch 128: {variant} over {name}", "<=", limit, "x", found)
    found = [(1e6 * r["seconds"]["p50"], r["base"]) for r in host if has_host_target(r)]
    what = f"host down to the driver, {HOST_TARGET_TENSORS} tensors, new addresses"
    yield "host", _row(what, "<=", 1e6 * HOST_TARGET_SECONDS, " us", found)


def has_host_target(result: Result) -> bool:
    """Whether `HOST_TARGET_SECONDS` is about this result of `host.py`."""
    return result["tensors"] == HOST_TARGET_TENSORS and result["layout"] == "plain"


def _row(what: str, sign: str, limit: float, unit: str, found: Found) -> list[str]:
    """The worst of what was found, against its target."""
    target = f"{sign} {limit:g}{unit}"
    if not found:
        return [what, target, "not measured", "-"]
    value, where = min(found) if sign == ">=" else max(found)
    met = value >= limit if sign == ">=" else value <= limit
    return [what, target, f"{value:.4g}{unit} ({where})", "yes" if met else "**no**"]


def _phases(results: list[Result], base: Base) -> dict[tuple[str, str], Result]:
    """Good results by (provider, model), without the lists of small tensors."""
    return {
        (r["provider"], r["model"]): r
        for r in results
        if r["base"] == base and r["status"] == "ok" and r["model"] not in _SMALL_LISTS
    }


def _of_copy(phases: dict[tuple[str, str], Result]) -> Found:
    shares = [(r["traffic"]["phase"]["of_copy"], model) for (name, model), r in phases.items() if name == OURS]
    return [(100 * share, model) for share, model in shares if share is not None]


def _of_copy_each(phases: dict[tuple[str, str], Result]) -> Found:
    """Per cent of the copy's bandwidth of every kernel of ours."""
    return [
        (100 * k["bytes"] / k["seconds"]["p50"] / r["copy_bytes_per_second"], f"{model} {k['kernel']}")
        for (name, model), r in phases.items()
        if name == OURS
        for k in r.get("kernels", [])
    ]


def _ratios(phases: dict[tuple[str, str], Result], other: str, ours: str) -> Found:
    """Device time of the phase, the other's over ours, per model."""
    return [
        (_phase_seconds(r, "device") / _phase_seconds(phases[ours, model], "device"), model)
        for (name, model), r in phases.items()
        if name == other and (ours, model) in phases
    ]


def _host_times(results: list[Result]) -> Found:
    """Milliseconds of our host time on ResNet-50, by base."""
    mine = [r for r in results if (r["provider"], r["model"], r["status"]) == (OURS, "resnet50", "ok")]
    return [(1e3 * _phase_seconds(r, "host"), r["base"]) for r in mine if "host" in r["seconds"]]


def _phase_seconds(result: Result, kind: str) -> float:
    return float(result["seconds"][kind]["phase"]["p50"])


def _results(path: Path) -> list[Result]:
    return json.loads(path.read_text())["results"] if path.exists() else []
