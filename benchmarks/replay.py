"""`LESAM.step` without a wait, and a captured step replayed a hundred times against an eager one, bit for bit.

    python benchmarks/replay.py [--steps 100]

The gradients are those of elementwise losses, so that every bit is the optimizer's own doing. lr and sigma change in
every step. First eager steps run under `torch.cuda.set_sync_debug_mode("error")`, which raises where the host would
wait for the device; then the same step is captured in a CUDA graph and replayed. On a CPU nothing can be captured:
there the twin keeps its gradients in place. Exits with 1 where anything differs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: it is read once, at decoration

from lib.arguments import Parser
from lib.report import Report, Result, first_line, progress, table
from torch import Tensor, nn

from lesam_dist import LESAM

SHAPES = ((3, 5), (), (2049,), (64, 33), (1,))
_WARM_UP = 3
BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 1e-3}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 1e-2}),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "LE-SAM+": {"alpha": 0.5},
    "no check": {"check_second": False},
    "clipped": {"max_grad_norm": 0.5},
    "gradients in place": {"static_grads": True},
    "norms in backward": {"norm_in_backward": True},
}


class Model:
    """Parameters with the loss ``sum of a (w - c)^2``, where a and c are the batch, and an optimizer over them."""

    def __init__(self, base: str, options: dict[str, Any], device: torch.device, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal() -> list[Tensor]:
            return [torch.randn(shape, generator=generator).to(device) for shape in SHAPES]

        self.params = [nn.Parameter(w) for w in normal()]
        self.a, self.c = [x.abs() for x in normal()], normal()
        cls, kwargs = BASES[base]
        self.optimizer = LESAM(self.params, cls, sigma=0.3, rho_max=1.0, lr=0.05, backend="triton", **kwargs, **options)

    def closure(self) -> Tensor:
        parts = [(a * (w - c).square()).sum() for a, w, c in zip(self.a, self.params, self.c, strict=True)]
        loss = torch.stack(parts).sum()
        loss.backward()
        return loss.detach()

    def schedule(self, number: int) -> None:
        """Other numbers and another batch for each step, in place."""
        group = self.optimizer.param_groups[0]
        group["lr"], group["sigma"] = 0.05 / (1 + number % 7), 0.3 / (1 + number % 5)
        for c in self.c:
            c.mul_(-1.01 if number % 2 else 0.99)

    def step(self) -> None:
        self.optimizer.step(self.closure)

    def everything(self) -> list[Tensor]:
        """Weights and the base optimizer's state."""
        state = [t for own in self.optimizer.state.values() for _, t in sorted(own.items()) if isinstance(t, Tensor)]
        return [*(p.detach() for p in self.params), *state, self.optimizer.telemetry["skipped"]]


@contextmanager
def waiting_is_an_error(device: torch.device) -> Iterator[None]:
    """Within, whatever makes the host wait for a GPU raises RuntimeError."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def never_waits(base: str, options: dict[str, Any], device: torch.device, seed: int) -> None:
    """Eager steps, with a schedule; raises where one of them waits."""
    model = Model(base, options, device, seed)
    for number in range(_WARM_UP):  # compiles, and makes the state
        model.schedule(number)
        model.step()
    with waiting_is_an_error(device):
        for number in range(_WARM_UP, _WARM_UP + (5 if device.type == "cuda" else 1)):
            model.schedule(number)
            model.step()


def captured(model: Model) -> Callable[[], None]:
    """The model's step as a replay of a graph; ``schedule`` before each one still counts."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model.step()

    def replay() -> None:
        model.optimizer.push_scalars()
        graph.replay()

    return replay


def replays(base: str, options: dict[str, Any], device: torch.device, seed: int, steps: int) -> None:
    """Raise ArithmeticError at the first step after which a replayed model differs from an eager one in any bit."""
    eager = Model(base, options, device, seed)
    twin = Model(base, options if device.type == "cuda" else {**options, "static_grads": True}, device, seed)
    stream = torch.cuda.Stream() if device.type == "cuda" else None
    for number in range(_WARM_UP):
        for model in (eager, twin):
            model.schedule(number)
        eager.step()
        if stream is None:
            twin.step()
            continue
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            twin.step()
        torch.cuda.current_stream().wait_stream(stream)
    step = twin.step if stream is None else captured(twin)
    for number in range(_WARM_UP, _WARM_UP + steps):
        for model in (eager, twin):
            model.schedule(number)
        eager.step()
        step()
        different = [
            i
            for i, pair in enumerate(zip(eager.everything(), twin.everything(), strict=True))
            if not torch.equal(*pair)
        ]
        if different:
            raise ArithmeticError(f"{len(different)} tensors differ after step {number - _WARM_UP + 1}")


def check(call: Callable[..., None], *args: Any) -> str:
    """ "ok", or what was raised."""
    try:
        call(*args)
    except Exception as raised:  # the other cells say whether it is this case's fault
        return f"failed: {first_line(raised)}"
    return "ok"


def main(argv: Sequence[str] | None = None) -> int:
    options = Parser(__doc__)
    options.add_device()
    options.add_argument("--steps", type=int, metavar="N", help="replays of each; default: with CUDA 100, on a CPU 2")
    options.add_seed("weights and batches")
    options.add_files()
    args = options.parse(argv)
    device = torch.device(args.device)
    steps = args.steps or (100 if device.type == "cuda" else 2)
    output = Report(args, "replay.py", device, "Steps that never wait, and replayed ones", seed=args.seed)
    results: list[Result] = []
    for base in BASES:
        for name, more in OPTIONS.items():
            progress(f"{base}, {name}")
            waits = check(never_waits, base, more, device, args.seed)
            bits = check(replays, base, more, device, args.seed, steps)
            results.append({"base": base, "options": name, "eager": waits, "replayed": bits, "steps": steps})
    on_cuda = device.type == "cuda"
    header = ["base", "options", "eager, waiting is an error", f"{steps} replays, bit for bit"]
    if not on_cuda:
        header[2:] = ["eager", f"{steps} steps with gradients in place, bit for bit"]
    output.add(table(header, [[r["base"], r["options"], r["eager"], r["replayed"]] for r in results]), results)
    return int(any(r[kind] != "ok" for r in results for kind in ("eager", "replayed")))


if __name__ == "__main__":
    sys.exit(main())
