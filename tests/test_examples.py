"""Each example runs as it stands; one process follows Algorithm 1 in float64, and two make the steps of one."""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch.func import functional_call

from tests.fake_graph import FakeGraph
from tests.oracles import SGD64, Weights, algorithm_1
from tests.parallel.processes import PRELOAD, free_port

EXAMPLES = Path(__file__).parents[1] / "examples"
SEVERAL = ("ddp.py", "fsdp2.py", "accelerate_loop.py")
LINE = re.compile(r"^epoch \d+  loss (\S+)  rho (\S+)$", re.M)
# Of a printed number, which has 6 decimals. float32 was 6e-7 from float64, and two processes 1e-6 from one.
TOLERANCE = 2e-5


def printed(text: str) -> np.ndarray[Any, Any]:
    """(epochs, 2): loss and rho."""
    return np.array([[float(number) for number in line] for line in LINE.findall(text)])


@pytest.fixture(scope="module")
def plain() -> np.ndarray[Any, Any]:
    """What plain_loop.py prints, started as its first lines say."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(EXAMPLES / "plain_loop.py")]
    return printed(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


def test_plain_loop_follows_algorithm_1(plain: np.ndarray[Any, Any]) -> None:
    example = runpy.run_path(str(EXAMPLES / "plain_loop.py"))
    epochs, batch = example["EPOCHS"], example["BATCH"]
    x, y = example["make_data"]()
    torch.manual_seed(example["SEED"])
    net = torch.nn.Sequential(
        torch.nn.Linear(20, 64), torch.nn.LayerNorm(64), torch.nn.ReLU(), torch.nn.Linear(64, 5)
    ).double()
    orders = [torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch)) for epoch in range(epochs)]
    batches = [part for order in orders for part in order.split(batch)]
    losses: list[float] = []

    def gradient(w: Weights, t: int) -> Weights:
        leaves = {name: torch.from_numpy(value).requires_grad_() for name, value in w.items()}
        loss = torch.nn.functional.cross_entropy(functional_call(net, leaves, x[batches[t]].double()), y[batches[t]])
        losses.append(loss.item())
        return dict(zip(leaves, (g.numpy() for g in torch.autograd.grad(loss, list(leaves.values()))), strict=True))

    steps = len(batches)
    anneal = steps // 4
    base = SGD64(lr=0.1, momentum=0.9)

    def update(w: Weights, g: Weights) -> None:
        base(w, g)
        base.lr = 0.1 * (1 + math.cos(math.pi * len(losses) / 2 / steps)) / 2  # two losses a step

    def sigma(t: int) -> float:
        return 0.1 * (1 + math.cos(math.pi * max(0, t - (steps - anneal)) / (anneal - 1))) / 2

    weights = {name: p.detach().numpy() for name, p in net.named_parameters()}
    _, radii = algorithm_1(weights, gradient, update, steps=steps, sigma=sigma, rho_max=0.3)
    expected = np.array([np.reshape(losses[::2], (epochs, -1)).mean(1), np.reshape(radii, (epochs, -1))[:, -1]]).T
    np.testing.assert_allclose(plain, expected, rtol=0, atol=TOLERANCE)
    assert plain[:-1, 1].min() > 0.05, "without a perturbation nothing would be compared"


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs there")
def test_a_graph_needs_a_gpu() -> None:
    with pytest.raises(SystemExit, match=r"there is no CUDA device\. plain_loop\.py runs on a CPU"):
        runpy.run_path(str(EXAMPLES / "cuda_graph.py"), run_name="__main__")


def test_replays_make_the_steps_of_a_plain_loop(plain: np.ndarray[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU as `tests.fake_graph` emulates it, and there two epochs only: kernels are interpreted."""
    main, lines = runpy.run_path(str(EXAMPLES / "cuda_graph.py"))["main"], list[str]()

    class EnoughError(Exception):
        pass

    def tell(line: str) -> None:
        lines.append(line)
        if len(lines) == 2 and not on_gpu:
            raise EnoughError

    on_gpu = torch.cuda.is_available()
    main.__globals__["print"] = tell
    if not on_gpu:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
        monkeypatch.setattr(torch.cuda, "graph", FakeGraph.capture)
        for name in ("Stream", "current_stream", "stream"):
            monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
        monkeypatch.setattr("lesam_dist.optim.engine.backend.choose", lambda *_: "triton")
    with contextlib.suppress(EnoughError):
        main()
    np.testing.assert_allclose(printed("\n".join(lines)), plain[: len(lines)], rtol=0, atol=TOLERANCE)


def test_several_processes_make_the_steps_of_one(plain: np.ndarray[Any, Any], tmp_path: Path) -> None:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    ports = [free_port() for _ in SEVERAL]
    mp.start_processes(_as_launched, (2, ports, tmp_path), nprocs=2, start_method="forkserver")  # type: ignore[no-untyped-call]
    for name in SEVERAL:
        outputs = [(tmp_path / f"{name}.{rank}").read_text() for rank in range(2)]
        np.testing.assert_allclose(printed(outputs[0]), plain, rtol=0, atol=TOLERANCE, err_msg=name)
        assert outputs[1] == "", "one process alone talks"


def _as_launched(rank: int, world_size: int, ports: list[int], folder: Path) -> None:
    """The examples one after the other in the environment that torchrun gives a process."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""}
    os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "localhost"}
    for name, port in zip(SEVERAL, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        with redirect_stdout(io.StringIO()) as output:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        (folder / f"{name}.{rank}").write_text(output.getvalue())
    torch.distributed.barrier()  # accelerate leaves its group open
    os._exit(0)  # with FSDP2 on gloo, torch 2.14 aborts in one of ten exits
