"""Every launcher of the kernels on three tensors, against float64: the first thing to run on a GPU, in seconds.

    python benchmarks/smoke.py [--launchers sum_sq,restore_adamw] [--dtypes float32]

Tensors are of odd sizes, once aligned to 16 bytes and once a single element off. A cell is the largest error over the
one that is allowed, so at most 1: a unit in the last place of the dtype, and 2e-6 of the largest value for arithmetic
in float32. Weights that come back, and copies, must have the same bits. Exits with 1 where anything is wrong.
On a CPU it runs in Triton's interpreter, which needs numpy.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: it is read once, at decoration

from lib.arguments import Parser
from lib.report import Report, Result, first_line, table
from torch import Tensor

from lesam_kernels import TensorTable, dots, perturb, restore, restore_adamw, restore_sgd, sum_sq
from lesam_kernels.launch_config import CHUNK, SUPPORTED_DTYPES

SIZES = (7, 2 * 1024 + 21, CHUNK + 3)
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in SUPPORTED_DTYPES}
_COLUMNS = ("copy", "g", "g_hat", "g_kept", "momentum_buffer", "exp_avg", "exp_avg_sq")
_ARITHMETIC = 2e-6  # of the largest value: a few roundings of float32
Pairs = list[tuple[Tensor, Tensor]]
"""What a kernel left, and what it should have, in float64."""


class Case:
    """A table over three tensors with every column, and the same in float64 as it was before."""

    def __init__(self, dtype: torch.dtype, offset: int, device: torch.device, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def make(numel: int) -> Tensor:
            storage = torch.randn(numel + offset, generator=generator).to(device, dtype)
            return storage[offset:]

        self.device = device
        self.w = [make(n) for n in SIZES]
        self.own = {name: [make(n) for n in SIZES] for name in _COLUMNS}
        for v in self.own["exp_avg_sq"]:
            v.abs_().add_(0.25)
        self.steps = [torch.full((), 4.0, device=device) for _ in SIZES]
        self.table = TensorTable(device)
        self.table.build(self.w, [0] * len(SIZES))
        for name, tensors in {**self.own, "step": self.steps}.items():
            self.table.set(name, tensors)
        self.w64, self.found_inf = doubles(self.w), torch.zeros((), device=device)
        self.own64 = {name: doubles(tensors) for name, tensors in self.own.items()}

    def scalar(self, *values: float, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor([values], dtype=dtype, device=self.device)


def doubles(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.double() for t in tensors]


def of_sum_sq(case: Case) -> Pairs:
    return [(sum_sq(case.table, "g"), torch.stack([g.square().sum() for g in case.own64["g"]]).sum())]


def of_dots(case: Case) -> Pairs:
    g, g_hat = (torch.cat(case.own64[name]) for name in ("g", "g_hat"))
    inner, of_g, of_g_hat = dots(case.table, "g", "g_hat").unbind()
    size = (g * g_hat).abs().sum()  # what the inner product is made of may cancel
    return [(inner + size, g @ g_hat + size), (of_g, g @ g), (of_g_hat, g_hat @ g_hat)]


def of_perturb(case: Case) -> Pairs:
    sigma, rho_max, eps, norm = 0.3, 0.05, 0.5, 2.0
    rho = min(sigma / (norm + eps), rho_max)
    stats = perturb(case.table, case.scalar(norm**2).view(()), case.scalar(sigma, rho_max, eps))
    moved = [w + rho / norm * g for w, g in zip(case.w64, case.own64["g"], strict=True)]
    exact(case.own["copy"], case.w64)
    return [(stats, case.scalar(norm, rho, 0.0).view(3)), *zip(case.w, moved, strict=True)]


def of_perturb_keep(case: Case) -> Pairs:
    """Also saves the gradients, and raises found_inf for a norm that is not finite; then nothing moves."""
    radius, kept = case.scalar(0.3, 0.05, 0.5), case.own["g_kept"]
    perturb(case.table, case.scalar(float("inf")).view(()), radius, keep=True, found_inf=case.found_inf)
    exact(kept, case.own64["g"])
    exact(case.own["copy"], case.w64)
    exact(case.w, case.w64)
    exact([case.found_inf], [case.scalar(1.0).view(())])
    return []


def of_restore(case: Case) -> Pairs:
    restore(case.table)
    exact(case.w, case.own64["copy"])
    return []


def of_restore_sgd(case: Case) -> Pairs:
    lr, momentum, dampening, decay, a, b = 0.25, 0.875, 0.5, 0.125, 0.75, 0.25
    scalars = case.scalar(lr, momentum, dampening, decay, 1.0, a, b, dtype=torch.float32)
    restore_sgd(case.table, scalars, case.found_inf)
    pairs: Pairs = []
    for i, w in enumerate(case.own64["copy"]):
        d = a * case.own64["g_hat"][i] + b * case.own64["g_kept"][i] + decay * w
        buffer = momentum * case.own64["momentum_buffer"][i] + (1 - dampening) * d
        pairs += [(case.own["momentum_buffer"][i], buffer), (case.w[i], w - lr * (d + momentum * buffer))]
    return pairs


def of_restore_adamw(case: Case) -> Pairs:
    lr, beta1, beta2, eps, decay, a, b = 0.25, 0.75, 0.875, 1e-8, 0.125, 0.75, 0.25
    restore_adamw(case.table, case.scalar(lr, beta1, beta2, eps, decay, a, b), case.found_inf)
    t = 5  # the table has counted four
    pairs: Pairs = [(torch.stack(case.steps), torch.full((len(SIZES),), float(t), device=case.device))]
    for i, w in enumerate(case.own64["copy"]):
        d = a * case.own64["g_hat"][i] + b * case.own64["g_kept"][i]
        m = beta1 * case.own64["exp_avg"][i] + (1 - beta1) * d
        v = beta2 * case.own64["exp_avg_sq"][i] + (1 - beta2) * d * d
        step = lr * (m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + eps) + decay * w)
        pairs += [(case.own["exp_avg"][i], m), (case.own["exp_avg_sq"][i], v), (case.w[i], w - step)]
    return pairs


def of_skipped(update: Callable[..., None], dtype: torch.dtype) -> Callable[[Case], Pairs]:
    """An update that is told of a norm which is not finite: the weights come back, and nothing else is written."""

    def run(case: Case) -> Pairs:
        skipped, nan = torch.full((), 41.0, device=case.device), case.scalar(float("nan")).view(())
        state = [name for name in _COLUMNS if name != "copy"]
        update(case.table, case.scalar(*[0.5] * 7, dtype=dtype), case.found_inf, sum_sq=nan, skipped=skipped)
        exact(case.w, case.own64["copy"])
        exact([t for name in state for t in case.own[name]], [t for name in state for t in case.own64[name]])
        exact([case.found_inf, skipped, *case.steps], case.scalar(1.0, 42.0, 4.0, 4.0, 4.0).view(-1).unbind())
        return []

    return run


LAUNCHERS: dict[str, Callable[[Case], Pairs]] = {
    "sum_sq": of_sum_sq,
    "dots": of_dots,
    "perturb": of_perturb,
    "perturb_keep": of_perturb_keep,
    "restore": of_restore,
    "restore_sgd": of_restore_sgd,
    "restore_adamw": of_restore_adamw,
    "skipped_sgd": of_skipped(restore_sgd, torch.float32),
    "skipped_adamw": of_skipped(restore_adamw, torch.float64),
}


def exact(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Raise ArithmeticError unless all are equal; doubles hold every value of the smaller types."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if not torch.equal(a.double(), e):
            raise ArithmeticError(f"{int((a.double() != e).sum())} of {a.numel()} elements of tensor {i} differ")


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest error over what is allowed; infinite where there is a NaN."""
    allowed = torch.finfo(actual.dtype).eps * expected.abs() + _ARITHMETIC * expected.abs().max().clamp(min=1.0)
    worst = ((actual.double() - expected).abs() / allowed).max().item()
    return worst if worst == worst else float("inf")


def check(launcher: str, dtype: str, offset: int, device: torch.device, seed: int) -> Result:
    """One cell: the largest error over the allowed one, or what was raised."""
    result: Result = {"launcher": launcher, "dtype": dtype, "offset": offset}
    try:
        case = Case(DTYPES[dtype], offset, device, seed)
        worst = max((error(*pair) for pair in LAUNCHERS[launcher](case)), default=0.0)
        return {**result, "status": "ok" if worst <= 1 else "wrong", "error": worst}
    except Exception as raised:  # the other cells say whether it is this launcher's fault
        return {**result, "status": f"failed: {first_line(raised)}"}


def report(results: Sequence[Result]) -> str:
    """Markdown: a row per launcher, a column per dtype and offset; below, what was raised and where."""
    kinds = list(dict.fromkeys((r["dtype"], r["offset"]) for r in results))
    header = ["launcher", *(f"{dtype}{', odd offset' if offset else ''}" for dtype, offset in kinds)]
    rows: dict[str, list[str]] = {}
    raised: dict[str, list[str]] = {}
    for r in results:
        text = {"ok": "{:.2f}", "wrong": "**wrong** {:.3g}"}.get(r["status"], "**failed**")
        rows.setdefault(r["launcher"], [r["launcher"]]).append(text.format(r.get("error")))
        if text == "**failed**":
            raised.setdefault(r["status"], []).append(f"{r['launcher']} {r['dtype']}")
    notes = [f"- {message} ({len(where)} times, first {where[0]})\n" for message, where in raised.items()]
    return table(header, list(rows.values())) + "\n" * bool(notes) + "".join(notes)


def main(argv: Sequence[str] | None = None) -> int:
    options = Parser(__doc__)
    options.add_device()
    options.add_names("--launchers", LAUNCHERS, list(LAUNCHERS), "default: all")
    options.add_names("--dtypes", DTYPES, list(DTYPES), "default: all")
    options.add_seed("tensors")
    options.add_files()
    args = options.parse(argv)
    device = torch.device(args.device)
    output = Report(args, "smoke.py", device, "Every launcher against float64", seed=args.seed)
    results = [
        check(launcher, dtype, offset, device, args.seed)
        for launcher in args.launchers
        for dtype in args.dtypes
        for offset in (0, 1)
    ]
    legend = (
        "Largest error over the allowed one: right up to 1. Rounding a result to bfloat16 or float16 takes half of "
        f"what is allowed, and all of it in Triton's interpreter, which truncates to bfloat16. Seed {args.seed}."
    )
    output.add(f"{legend}\n\n{report(results)}", results)
    bad = [r for r in results if r["status"] != "ok"]
    print(f"{len(results) - len(bad)} of {len(results)} are right")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
