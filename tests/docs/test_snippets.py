"""The Python that pages show runs, block by block, as a reader types it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.docs.pages import PAGES, ROOT, blocks, name

# The block of kernels/README.md is a part of a step, and has a test of its own.
SNIPPETS = [page for page in PAGES if "```python" in page.read_text() and page.parent.name != "kernels"]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("page", SNIPPETS, ids=name)
def test_python_runs(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A page's blocks in order, as a reader types them.

    Each print writes what a comment behind it says (``# prints ...``), or else a radius or a loss, which is positive.
    """
    names: dict[str, Any] = {}
    for block in blocks(page, "python"):
        exec(compile(block, name(page), "exec"), names)
        out = capsys.readouterr().out
        said = re.findall(r"# prints (.+)$", block, re.M)
        assert [line for line in out.splitlines() if line in said] == said, out
        printed = re.findall(r"tensor\(([\d.e-]+)", out)
        assert len(printed) + len(said) >= block.count("print("), block
        assert all(float(number) > 0 for number in printed), "a radius of 0 would show nothing"


def test_the_diff_turns_sgd_into_lesam(seed: int) -> None:
    """Both sides of the README's diff run; without a budget the new one makes the steps of the old one."""
    (diff,) = blocks(ROOT / "README.md", "diff")
    lines = diff.splitlines()
    before, after = ("\n".join(line[1:] for line in lines if line[:1] in sides) for sides in ("- ", "+ "))
    start = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 3))
    loader = [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(3)]

    def weights(code: str) -> dict[str, torch.Tensor]:
        model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 3))
        model.load_state_dict(start.state_dict())
        names = {"torch": torch, "model": model, "loader": loader, "criterion": nn.CrossEntropyLoss(), "epochs": 2}
        torch.manual_seed(seed)
        exec(compile(code, "README.md", "exec"), names)
        assert names["loss"].item() > 0
        return model.state_dict()

    old, new, without = weights(before), weights(after), weights(after.replace("sigma=0.3", "sigma=0.0"))
    torch.testing.assert_close(without, old)
    assert not torch.allclose(new["0.weight"], old["0.weight"])


def test_kernels_readme() -> None:
    """Its block is one LE-SAM step with SGD, here on L(w) = c w.w / 2, whose gradient is c w."""
    (block,) = blocks(ROOT / "kernels" / "README.md", "python")
    shapes, curvature = [(5, 7), (3,)], 2.0
    params = [nn.Parameter(torch.randn(shape, device=DEVICE)) for shape in shapes]
    before = [p.detach().double() for p in params]
    grads = [curvature * p.detach() for p in params]
    names: dict[str, Any] = {"torch": torch, "device": DEVICE, "params": params, "groups": [0, 0], "grads": grads}
    names |= {"copies": [torch.empty_like(p) for p in params], "buffers": [torch.zeros_like(p) for p in params]}
    names |= {"sigma": 0.3, "rho_max": 0.2, "eps": 1e-12, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}

    def second_pass() -> None:
        for g, p in zip(grads, params, strict=True):
            g.copy_(curvature * p.detach())

    assert block.count("...  # second") == 1
    exec(block.replace("...  # second", "second_pass()  # second"), names | {"second_pass": second_pass})
    norm = curvature * float(torch.stack([w.square().sum() for w in before]).sum().sqrt())
    rho = min(0.3 / norm, 0.2)
    for p, w in zip(params, before, strict=True):
        g_hat = curvature * (w + rho * curvature * w / norm)
        torch.testing.assert_close(p.detach(), (w - 0.1 * (g_hat + 0.01 * w)).float())
