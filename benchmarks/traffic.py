"""The memory traffic of the optimizer's phase, and what it predicts.

    python benchmarks/traffic.py --bandwidth 2.9 [--models resnet50,large] [--dtype float32]

Prints a *prediction*: bytes divided by a bandwidth that you give, in TB/s (read plus written, what a large copy
reaches). It leaves out launches and the host, so it is a lower bound, and a poor one for lists of small tensors.

A "pass" is one read or one write of every element, in the parameters' dtype. What a step cannot do without:

    ascent    norm: read g (1); climb: read w, g, write copy, w (4)
    descent   restore + SGD with momentum: read copy, g, m, write w, m (5); AdamW reads and writes v too (7)
              check that the second gradient is finite: read g (1), for those who check
"""

from __future__ import annotations

import argparse
from typing import Literal

import torch
from common import number, table, words
from model_shapes import MODELS, numel

Base = Literal["sgd", "adamw"]
Part = Literal["ascent", "descent", "phase"]
BASES: tuple[Base, ...] = ("sgd", "adamw")
PARTS: tuple[Part, ...] = ("ascent", "descent", "phase")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_ASCENT = 5
_UPDATE: dict[Base, int] = {"sgd": 5, "adamw": 7}


def minimal_passes(base: Base, part: Part, checks_second: bool) -> int:
    """Passes of the minimal algorithm: what the effective bandwidth of every provider is counted from."""
    descent = _UPDATE[base] + checks_second
    return {"ascent": _ASCENT, "descent": descent, "phase": _ASCENT + descent}[part]


# What each provider moves in a whole phase, counted from its code (providers.py). "update" is the fused base step.
_EXTRA_PASSES: dict[str, int] = {
    "eager": 1 + 2 + 2 + 3,  # norm, clone, e = g * scale, w += e; back by swapping. Its update: see below
    "foreach": 1 + 2 + 3 + 2,  # norm, copy, w += scale * g; w <- copy
    "foreach_swap": 1 + 2 + 3,  # the same without the last: storages are swapped
    "compile": 1 + 4,  # norm, climb; restore is part of the compiled update
    "pytorch_optimizer": 1 + 2 + 2 + 2 + 3 + 2,  # norm, clone, e = 1.0 * g, e *= scale, w += e; w <- copy
    "lesam_dist": 1 + 4 + 1,  # norm, climb, check of the second gradient; restore is part of the update
    "lesam_unchecked": 1 + 4,
}
_FOREACH_UPDATE: dict[Base, int] = {"sgd": 11, "adamw": 20}  # torch's default on CUDA, with weight decay


def provider_passes(provider: str, base: Base) -> int:
    """Passes that a provider makes over all elements in a whole phase (ascent and descent)."""
    update = _FOREACH_UPDATE[base] if provider == "eager" else _UPDATE[base]
    return _EXTRA_PASSES[provider] + update


def predict_seconds(provider: str, base: Base, elements: int, itemsize: int, bandwidth: float) -> float:
    """Predicted time of the phase: bytes moved over ``bandwidth`` (bytes/s, read plus written)."""
    return provider_passes(provider, base) * elements * itemsize / bandwidth


def prediction(models: list[str], dtype: torch.dtype, terabytes: float) -> str:
    """Markdown tables of predicted milliseconds and ratios, said to be predicted."""
    times, ratios = [], []
    for model in models:
        elements = numel(MODELS[model]())
        seconds = [predict_seconds("lesam_dist", base, elements, dtype.itemsize, terabytes * 1e12) for base in BASES]
        times.append([model, number(elements, 1, 1e-6), *(number(value, 3, 1e3) for value in seconds)])
    for name in _EXTRA_PASSES:
        passes = [provider_passes(name, base) for base in BASES]
        ours = [provider_passes("lesam_dist", base) for base in BASES]
        ratios.append([name, *map(str, passes), *(number(a / b, 2) for a, b in zip(passes, ours, strict=True))])
    name = str(dtype).removeprefix("torch.")
    return (
        f"**Predicted, not measured**: bytes over an assumed {terabytes} TB/s, {name}; launches and the host left out, "
        "so too little for lists of small tensors.\n\n"
        + table(["lesam_dist, phase", "M elements", "sgd ms", "adamw ms"], times)
        + "\n"
        + table(["provider", "sgd passes", "adamw passes", "sgd, of ours", "adamw, of ours"], ratios)
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bandwidth", type=float, required=True, help="TB/s of a large copy, read plus written")
    parser.add_argument("--models", type=words, default=[name for name in MODELS if name != "tiny"])
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    args = parser.parse_args(argv)
    print(prediction(args.models, DTYPES[args.dtype], args.bandwidth))


if __name__ == "__main__":
    main()
