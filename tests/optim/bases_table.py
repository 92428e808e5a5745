"""Which optimizers can make LE-SAM's update: the table of docs/bases.md, made by trying them.

Each takes four steps inside LESAM, once with its state_dict saved and loaded into a new one in between, and the weights
are compared with those of LE-SAM written out around the optimizer itself. The page is written by

    python -m tests.optim.bases_table
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lesam_dist import LESAM

DOCS = Path(__file__).parents[2] / "docs" / "bases.md"
BEGIN, END = "<!-- made by tests/optim/bases_table.py -->", "<!-- end -->"
STEPS, SIGMA, RHO_MAX = 4, 0.2, 0.5
TOLERANCE = 1e-10  # of weights, in float64


@dataclass(frozen=True)
class Base:
    """An optimizer as a base: where it is, what it is given, and what a reader should know."""

    package: str
    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    remark: str = ""
    rounds: bool = (
        False  # keeps its state in so few bits that the last one of a gradient can move a weight by a percent
    )
    modes: bool = False  # of training and evaluation

    def make(self) -> Callable[..., Optimizer]:
        return partial(getattr(import_module(self.package), self.name), **self.kwargs)


_TWO_MODES = "`optimizer.train()` and `optimizer.eval()` switch it, see below"
_LOW_BITS = {"rounds": True, "remark": "its first step compiles"}
BASES = [
    Base("torch.optim", "SGD", {"lr": 0.1, "momentum": 0.9}, "on a GPU made by the kernel that restores the weights"),
    Base("torch.optim", "AdamW", {"lr": 0.01}, "on a GPU made by the kernel that restores the weights"),
    Base("torch.optim", "Adam", {"lr": 0.01}, "torch's fused implementation"),
    Base("torch.optim", "Muon", {"lr": 0.01}, "2-D parameters alone; timm's takes all"),
    *(
        Base("torch.optim", name, {"lr": 0.01})
        for name in ["Adafactor", "Adagrad", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop"]
    ),
    Base("torch.optim", "Adadelta", {"lr": 0.1}, "not in the methods that have a `rho` of their own, as SAM"),
    Base("torch.optim", "LBFGS"),
    Base("torch.optim", "SparseAdam", {"lr": 0.01}),
    Base("lesam_dist", "LAMB", {"lr": 0.01}, "sharded parameters too"),
    Base("lesam_dist", "LARS", {"lr": 0.1}, "sharded parameters too"),
    Base("timm.optim", "Lamb", {"lr": 0.01}),
    Base("timm.optim", "Lars", {"lr": 0.1}),
    Base("timm.optim", "Lion", {"lr": 0.01}),
    Base("timm.optim", "Muon", {"lr": 0.01}, "AdamW for what is not 2-D"),
    Base("schedulefree", "SGDScheduleFree", {"lr": 0.1}, _TWO_MODES, modes=True),
    Base("schedulefree", "AdamWScheduleFree", {"lr": 0.01}, _TWO_MODES, modes=True),
    Base("schedulefree", "SGDScheduleFreeClosure", {"lr": 0.1}),
    Base("torchao.optim", "AdamW8bit", {"lr": 0.01}, **_LOW_BITS),  # type: ignore[arg-type]
    Base("torchao.optim", "AdamW4bit", {"lr": 0.01}, **_LOW_BITS),  # type: ignore[arg-type]
    Base("torchao.optim", "AdamWFp8", {"lr": 0.01}, **_LOW_BITS),  # type: ignore[arg-type]
]


def problem(base: Base) -> tuple[list[nn.Parameter], Callable[[], Tensor]]:
    """The last layer has 4,096 weights: torchao leaves smaller ones in float32."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 64, bias=base.name != "Muon" or base.package != "torch.optim"), nn.Tanh())
    dtype = torch.float32 if base.rounds else torch.float64
    net.append(nn.Linear(64, 64, bias=False)).to(dtype)
    x, y = torch.randn(16, 8, dtype=dtype), torch.randint(0, 64, (16,))

    def closure() -> Tensor:
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        return loss

    return list(net.parameters()), closure


def budget(base: Base) -> float:
    """None for a base that rounds: its weights must be the plain ones bit for bit."""
    return 0.0 if base.rounds else SIGMA


def in_lesam(base: Base, reload: bool) -> list[Tensor]:
    params, closure = problem(base)

    def new() -> LESAM:
        optimizer = LESAM(params, base.make(), sigma=budget(base), rho_max=RHO_MAX, backend="reference")
        optimizer.train()
        return optimizer

    optimizer = new()
    for step in range(STEPS):
        if step == 2 and reload:
            file = io.BytesIO()  # not deepcopy, which torchao's tensors do not know
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            optimizer = new()
            optimizer.load_state_dict(torch.load(file))
        torch.manual_seed(step)
        optimizer.step(closure)
    optimizer.eval()
    return [p.detach() for p in params]


def by_hand(base: Base) -> list[Tensor]:
    params, closure = problem(base)
    optimizer: Any = base.make()(params)
    if base.modes:
        optimizer.train()
    for step in range(STEPS):
        torch.manual_seed(step)
        closure()
        norm = torch.cat([p.grad.flatten() for p in params if p.grad is not None]).norm()
        exact = [p.detach().clone() for p in params]
        for p in params:
            p.data.add_(p.grad / norm * min(budget(base) / norm, RHO_MAX))  # type: ignore[operator]
        optimizer.zero_grad()
        closure()
        for p, w in zip(params, exact, strict=True):
            p.data.copy_(w)
        optimizer.step()
        optimizer.zero_grad()
    if base.modes:
        optimizer.eval()
    return [p.detach() for p in params]


def verdict(base: Base) -> str:
    """ "yes", or why not, in the words that a user reads."""
    with mock.patch.object(torch, "compile", lambda function, **_: function), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that warn when they are imported or built
        try:
            with_reload, without = in_lesam(base, reload=True), in_lesam(base, reload=False)
        except (ValueError, RuntimeError) as error:
            return f"no: {str(error).splitlines()[0]}"
        expected = by_hand(base)
    tolerance = 0.0 if base.rounds else TOLERANCE
    for mine in (without, with_reload):
        off = max((a - b).abs().max().item() for a, b in zip(mine, expected, strict=True))
        if not off <= tolerance:
            return f"no: its weights differ from LE-SAM written out by {off:.1g}"
    return "yes"


def rows() -> Iterator[str]:
    yield "| package | optimizer | works | |"
    yield "|---|---|---|---|"
    for base in BASES:
        yield f"| {base.package} | `{base.name}` | {verdict(base)} | {base.remark} |"


def render(page: str) -> str:
    """The page with the table that the code gives now."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return "\n".join([before + BEGIN, "", *rows(), "", END + after])


if __name__ == "__main__":
    DOCS.write_text(render(DOCS.read_text()))
