"""What the optimizer's phase should take on a GPU: bytes over a bandwidth that you state. Nothing is measured.

    python benchmarks/predict.py --bandwidth 2.9 [--models resnet50,large] [--dtype float32]
    python benchmarks/predict.py --bandwidth 2.9 --tables ideas,walks,norms,small

The bandwidth is in TB/s, read plus written, what a large copy reaches. Launches and the host are left out, so it is a
lower bound, and a poor one for lists of small tensors. Passes are one read or one write of every element: our kernels'
from `lib/traffic.py`, everybody else's counted from their code (`lib/providers.py`). Tables:

- phase: our whole step and every provider's
- kernels: each of our kernels
- ideas: what changes of the algorithm would save (`lib/ideas.py`)
- walks: what orders of the blocks would find in L2, by a simulation (`lib/l2.py`)
- norms: what taking the norms during backward would save at most (`lib/hidden.py`; settings of its own)
- small: how many blocks lists of small tensors make, and their times by a model of latencies (`lib/waves.py`)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from lib import hidden, ideas, l2, machine, traffic, waves
from lib.arguments import Parser
from lib.problem import DTYPES
from lib.providers import PROVIDERS
from lib.report import number, table
from lib.shapes import MODELS, numel
from lib.traffic import BASES

_PARTS = (1, 8, 64)  # of a model on one process


def phase(models: Sequence[str], dtype: torch.dtype, bandwidth: float) -> str:
    """The whole step, in milliseconds, and its passes beside everybody else's."""
    times, ratios = [], []
    for model in models:
        elements = numel(MODELS[model]())
        seconds = [traffic.seconds(traffic.step(base), elements, dtype, bandwidth) for base in BASES]
        times.append([model, number(elements, 1, 1e-6), *(number(value, 3, 1e3) for value in seconds)])
    ours = [PROVIDERS["lesam_dist"].passes(base) for base in BASES]
    for name, provider in PROVIDERS.items():
        passes = [provider.passes(base) for base in BASES]
        ratios.append([name, *map(str, passes), *(number(a / b, 2) for a, b in zip(passes, ours, strict=True))])
    return (
        table(["lesam_dist, phase", "M elements", "sgd ms", "adamw ms"], times)
        + "\n"
        + table(["provider", "sgd passes", "adamw passes", "sgd, of ours", "adamw, of ours"], ratios)
    )


def kernels(models: Sequence[str], dtype: torch.dtype, bandwidth: float) -> str:
    """Each kernel, in milliseconds."""
    each = [traffic.sum_sq(), traffic.dots(), traffic.perturb(), traffic.restore(), traffic.restore_sgd()]
    each.append(traffic.restore_adamw())
    rows = []
    for kernel in each:
        seconds = [traffic.seconds([kernel], numel(MODELS[model]()), dtype, bandwidth) for model in models]
        rows.append([kernel.kernel, str(kernel.passes), *(number(value, 3, 1e3) for value in seconds)])
    return table(["kernel", "passes", *(f"{model} ms" for model in models)], rows)


def saved(models: Sequence[str], dtype: torch.dtype, bandwidth: float) -> str:
    """What each idea saves, in passes, milliseconds and launches."""
    lists = [MODELS[model]() for model in models]
    rows = []
    for idea in (ideas.SWAP, ideas.AVERAGE, ideas.SCALED):
        passes = [idea.passes * numel(shapes) * dtype.itemsize / bandwidth for shapes in lists]
        launches = [idea.each * len(shapes) + idea.once for shapes in lists]
        cells = [f"{number(s, 3, 1e3)}, {n}" for s, n in zip(passes, launches, strict=True)]
        rows.append([idea.name, number(idea.passes, 0), *cells])
    return table(["idea", "passes saved", *(f"{model}: ms, launches" for model in models)], rows)


def walks(models: Sequence[str], dtype: torch.dtype, _: float) -> str:
    """Passes saved by orders of the blocks, with half of L2 of use and with all of it, SGD."""
    rows = []
    for model, part in ((model, part) for model in models for part in _PARTS):
        elements = math.ceil(numel(MODELS[model]()) / part)
        cells = []
        for walk in l2.WALKS:
            few, many = (ideas.walk("sgd", elements, dtype.itemsize, walk, share * machine.L2) for share in (0.5, 1))
            cells.append(f"{few:.2f} to {many:.2f}")
        size = number(elements * dtype.itemsize, 1, 1e-6)
        rows.append([model if part == 1 else f"{model} / {part}", size, *cells])
    return table(["passes saved, reversed:", "MB of g", *map(str, l2.WALKS)], rows)


def norms(_: Sequence[str], __: torch.dtype, bandwidth: float) -> str:
    """What norms during backward save at most, in float32, with the milliseconds of one process."""
    rows = []
    for setting in hidden.SETTINGS:
        saving = hidden.predict(setting, bandwidth)
        link = f", {setting.link * 1e-9:.0f} GB/s" if setting.link else ""
        where = f"{setting.processes} {setting.wrapper}{link}" if link else "1"
        times = [number(seconds, 2, 1e3) for seconds in (saving.passes, saving.phase, saving.norms)]
        rate = number(setting.rate, 0, 1e-12)
        more = number(saving.host, 2, 1e3)
        rows.append([setting.name, str(setting.batch), where, rate, *times, f"{saving.share:.2%}", more])
    header = ["network", "batch", "processes", "TFLOP/s", "two passes", "phase", "norms", "saved at most", "host more"]
    return table(header, rows)


def small(_: Sequence[str], __: torch.dtype, bandwidth: float) -> str:
    """How lists of small tensors fill the chip, in float32."""
    rows = []
    for name, make in waves.LISTS.items():
        sizes = [math.prod(shape) for shape in make()]
        filling = waves.launch(traffic.perturb(), sizes, bandwidth)
        usual, packed = (waves.seconds(sizes, bandwidth, packed=packed) for packed in (False, True))
        shorter = waves.seconds(sizes, bandwidth, chunk=4096)
        in_bytes = traffic.seconds(traffic.step("sgd"), sum(sizes), torch.float32, bandwidth)
        few = sum(0 < size <= waves.SMALL for size in sizes)
        numbers = [len(sizes), few, filling.blocks, round(filling.elements / filling.blocks)]
        times = [number(value, 1, 1e6) for value in (in_bytes, usual, packed)]
        ratios = [number(usual / packed, 2), number(usual / shorter, 2)]
        rows.append([name, *map(str, numbers), f"{filling.idle:.0%}", *times, *ratios])
    header = ["list", "tensors", f"of at most {waves.SMALL}", "blocks", "elements per block", "idle in the last wave"]
    return table([*header, "bytes alone us", "step us", "packed us", "packed", "chunk 4096"], rows)


TABLES = {"phase": phase, "kernels": kernels, "ideas": saved, "walks": walks, "norms": norms, "small": small}


def prediction(tables: Sequence[str], models: Sequence[str], dtype: torch.dtype, terabytes: float) -> str:
    """Markdown tables of what is predicted, said to be predicted."""
    name = str(dtype).removeprefix("torch.")
    head = (
        f"**Predicted, not measured**: bytes over an assumed {terabytes} TB/s, {name}; launches and the host left out, "
        "so too little for lists of small tensors.\n"
    )
    return "\n".join([head, *(TABLES[key](models, dtype, terabytes * 1e12) for key in tables)])


def main(argv: Sequence[str] | None = None) -> None:
    options = Parser(__doc__)
    options.add_argument("--bandwidth", type=float, required=True, metavar="TB/S", help="of a large copy")
    options.add_names("--tables", TABLES, ["phase"], "default: phase")
    large = [name for name in MODELS if name != "tiny"]
    options.add_names("--models", MODELS, large, "default: all but tiny")
    options.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    args = options.parse(argv)
    print(prediction(args.tables, args.models, DTYPES[args.dtype], args.bandwidth))


if __name__ == "__main__":
    main()
