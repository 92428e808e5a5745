"""What the optimizer's phase should take on a GPU: bytes over a bandwidth that you state. Nothing is measured.

    python benchmarks/predict.py --bandwidth 2.9 [--models resnet50,large] [--dtype float32]

The bandwidth is in TB/s, read plus written, what a large copy reaches. Launches and the host are left out, so it is a
lower bound, and a poor one for lists of small tensors. Passes are one read or one write of every element: our kernels'
from `lib/traffic.py`, everybody else's counted from their code (`lib/providers.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lib import traffic
from lib.arguments import Parser
from lib.problem import DTYPES
from lib.providers import PROVIDERS
from lib.report import number, table
from lib.shapes import MODELS, numel
from lib.traffic import BASES


def prediction(models: Sequence[str], dtype: torch.dtype, terabytes: float) -> str:
    """Markdown tables of predicted milliseconds and ratios, said to be predicted."""
    times, ratios = [], []
    for model in models:
        elements = numel(MODELS[model]())
        seconds = [traffic.seconds(traffic.step(base), elements, dtype, terabytes * 1e12) for base in BASES]
        times.append([model, number(elements, 1, 1e-6), *(number(value, 3, 1e3) for value in seconds)])
    ours = [PROVIDERS["lesam_dist"].passes(base) for base in BASES]
    for name, provider in PROVIDERS.items():
        passes = [provider.passes(base) for base in BASES]
        ratios.append([name, *map(str, passes), *(number(a / b, 2) for a, b in zip(passes, ours, strict=True))])
    name = str(dtype).removeprefix("torch.")
    return (
        f"**Predicted, not measured**: bytes over an assumed {terabytes} TB/s, {name}; launches and the host left out, "
        "so too little for lists of small tensors.\n\n"
        + table(["lesam_dist, phase", "M elements", "sgd ms", "adamw ms"], times)
        + "\n"
        + table(["provider", "sgd passes", "adamw passes", "sgd, of ours", "adamw, of ours"], ratios)
    )


def main(argv: Sequence[str] | None = None) -> None:
    options = Parser(__doc__)
    options.add_argument("--bandwidth", type=float, required=True, metavar="TB/S", help="of a large copy")
    large = [name for name in MODELS if name != "tiny"]
    options.add_names("--models", MODELS, large, "default: all but tiny")
    options.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    args = options.parse(argv)
    print(prediction(args.models, DTYPES[args.dtype], args.bandwidth))


if __name__ == "__main__":
    main()
