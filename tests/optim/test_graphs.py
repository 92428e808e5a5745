"""Steps in CUDA graphs, emulated where there is no GPU: a replay makes the step that eager code makes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from lesam_dist import LESAM
from lesam_dist.optim.engine.base_update import SCHEDULED
from lesam_dist.train.passes import BatchPasses
from tests.cost_meter import Meter
from tests.methods import CASES
from tests.optim.captures import (
    BY_NUMBER,
    SGD_KWARGS,
    Graph,
    Training,
    assert_same,
    assert_same_telemetry,
    backward,
    both,
    eager_steps,
    replays,
    replays_alone,
)
from tests.optim.nets import DEVICE


@pytest.mark.parametrize(("base", "static_grads"), [(SGD, False), (SGD, True), (AdamW, False)])
def test_replays_make_the_steps_of_eager_code(seed: int, base: Any, static_grads: bool) -> None:
    pair = both(seed, base=base, static_grads=static_grads)
    graph = pair[0].capture()
    assert_same(*pair)  # a capture computes nothing
    replays(pair, graph, range(3, 7), lr=lambda n: 0.1 / n, sigma=lambda n: 0.3 / n, rho_max=lambda n: 0.01 * n)


def test_nothing_happens_before_the_scalars_are_pushed(seed: int) -> None:
    """The kernels do not know yet where the graph has its gradients; they must not read at random."""
    training, _ = both(seed)
    before = copy.deepcopy(training.net.state_dict())
    training.capture().replay()
    torch.testing.assert_close(training.net.state_dict(), before, rtol=0, atol=0)


def test_eager_steps_between_replays(seed: int) -> None:
    """They have gradients elsewhere, and leave the graph what it reads."""
    pair = both(seed)
    graph = pair[0].capture()
    eager_steps(pair, range(3, 5))  # before the first replay, too
    telemetry = dict(pair[0].optimizer.telemetry)
    for start in (5, 9):
        replays_alone(pair, graph, range(start, start + 2))
        eager_steps(pair, range(start + 2, start + 4))
        assert_same(*pair)
    assert telemetry.keys() == pair[1].optimizer.telemetry.keys()


def test_several_graphs_of_one_optimizer(seed: int) -> None:
    """Captured one after the other, the second after replays of the first, and replayed in turns."""
    pair = both(seed)
    graphs = [pair[0].capture(), pair[0].capture()]
    for number in range(3, 9):
        replays_alone(pair, graphs[number % len(graphs)], range(number, number + 1))
        if number == 5:
            graphs.append(pair[0].capture())


@pytest.mark.parametrize("closures", [2, 3])
def test_several_closures(seed: int, closures: int) -> None:
    """m-sharpness: each of its passes has gradients of its own."""
    pair = both(seed, closures=closures)
    replays(pair, pair[0].capture(), range(3, 6), lr=lambda n: 0.1 / n)


def test_norms_that_are_taken_during_backward(seed: int) -> None:
    """By hooks, over tables of their own, which read the graph's gradients as well."""
    pair = both(seed, norm_in_backward=True, alpha=0.5)
    graph = pair[0].capture()
    replays(pair, graph, range(3, 5), lr=lambda n: 0.1 / n)
    eager_steps(pair, range(5, 6))
    replays_alone(pair, graph, range(6, 7))


def test_the_two_step_form(seed: int) -> None:
    pair = both(seed)
    training, graph = pair[0], Graph()
    with graph.capture():
        for make_step in (training.optimizer.first_step, training.optimizer.second_step):
            backward(nn.functional.cross_entropy(training.net(training.x), training.y))
            make_step(zero_grad=True)
    replays_alone(pair, graph, range(3, 6))


class BatchNormTraining(Training):
    """With running statistics, and the passes of the trainer."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).to(DEVICE)
        self.optimizer = LESAM(self.net.parameters(), SGD, backend="triton", **SGD_KWARGS)

    def step(self) -> Tensor:
        loss: Tensor = self.optimizer.step(BatchPasses(self.net, nn.CrossEntropyLoss(), self.x, self.y))
        return loss


def test_batchnorm_statistics_move_once_in_a_replay(seed: int) -> None:
    pair = BatchNormTraining(seed), BatchNormTraining(seed)
    eager_steps(pair, range(3))
    replays(pair, pair[0].capture(), range(3, 6))
    assert pair[0].net[1].num_batches_tracked.item() == 6  # type: ignore[union-attr]


def test_a_replay_skips_what_is_not_finite(seed: int) -> None:
    pair = both(seed)
    graph = pair[0].capture()
    for number, bad in enumerate((False, True, True, False), start=3):
        for training in pair:
            training.load(number, bad)
        pair[0].optimizer.push_scalars()
        graph.replay()
        pair[1].step()
        assert_same(*pair)
    assert_same_telemetry(*pair)
    assert pair[0].optimizer.telemetry["skipped"].item() == 2


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("options", [{}, {"norm_in_backward": True}, {"closures": 2}], ids=str)
def test_a_loss_scale_in_the_graph(seed: int, options: dict[str, Any], bad: bool) -> None:
    """The scaler's own update is captured with the step: an overflow halves the scale in a replay too."""
    pair = Training(seed, **options), Training(seed, **options)
    for training in pair:
        training.scaler = torch.amp.GradScaler(DEVICE, init_scale=64.0, growth_interval=2)
        training.optimizer.grad_scaler = training.scaler
    eager_steps(pair, range(3))
    graph = pair[0].capture()
    for number in range(3, 6):
        for training in pair:
            training.load(number, bad and number == 4)
        pair[0].optimizer.push_scalars()
        graph.replay()
        pair[1].step()
        assert_same(*pair)
        scales = [training.scaler.get_scale() for training in pair if training.scaler is not None]
        assert scales[0] == scales[1]
    assert pair[0].optimizer.telemetry["skipped"].item() == bad


def test_clipping_and_lesam_plus(seed: int) -> None:
    pair = both(seed, max_grad_norm=0.3, alpha=0.5)
    replays(pair, pair[0].capture(), range(3, 6), lr=lambda n: 0.1 / n, plus_alpha=lambda n: 1.0 / n)


# ---- methods -----------------------------------------------------------------------------------------------------

DOCS = Path(__file__).parents[2] / "docs" / "graphs.md"

# What no graph can hold, and why.
REFUSED = {"looksam": BY_NUMBER, "eigen": BY_NUMBER}
# What may be scheduled between replays, where it is not lr and rho.
SCHEDULES: dict[str, tuple[str, ...]] = {
    "lesam": ("lr", "sigma", "rho_max"),
    "lesam-adaptive": ("lr", "sigma"),
    "wsam": ("rho",),  # lr multiplies the part beside the base optimizer's step
}


@pytest.mark.parametrize("base", [SGD, pytest.param(AdamW, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", CASES)
def test_methods(seed: int, name: str, base: Any) -> None:
    case = CASES[name]
    pair = both(seed, case.method, base, **case.kwargs)
    if name in REFUSED:
        with pytest.raises(RuntimeError, match=REFUSED[name]):
            pair[0].capture()
        return
    names = SCHEDULES.get(name, ("lr", "rho"))
    replays(pair, pair[0].capture(), range(3, 5), **{key: lambda n: 0.1 / n for key in names})
    assert pair[0].optimizer.scheduled() >= set(names)


def test_the_table_of_methods_in_the_docs() -> None:
    """One line for each method of `tests.methods` that the project has."""
    lines = ["| method | one graph | settings that may change between replays |", "|---|---|---|"]
    for name, case in CASES.items():
        training = Training(0, case.method, **case.kwargs)
        eager_steps((training, training), range(1))
        own = training.optimizer.scheduled() - set(SCHEDULED[SGD])
        followed = f"{', '.join(f'`{key}`' for key in sorted(own))}; of the base "
        followed += "all" if "lr" in training.optimizer.scheduled() else "all but `lr`"
        line = f"| {name} | {'no: ' + REFUSED[name] if name in REFUSED else 'yes'} |"
        if name != "own":
            lines.append(f"{line} {'' if name in REFUSED else followed} |")
    assert "\n".join(lines) in DOCS.read_text(), "\n".join(lines)


@pytest.mark.skipif(DEVICE == "cuda", reason="counted in Triton's interpreter")
def test_gradients_that_stay_in_place_cost_nine_passes() -> None:
    """They are zeroed three times, and twice autograd adds what it made to zeros: two reads and a write."""
    moved = {}
    for static_grads in (False, True):
        net = nn.Linear(40, 30, bias=False)
        optimizer = LESAM(net.parameters(), SGD, backend="triton", static_grads=static_grads, **SGD_KWARGS)
        meter = Meter()
        with meter, meter.interpreter():
            for _ in range(2):
                meter.clear()
                optimizer.step(lambda net=net: backward(net(torch.ones(1, 40)).sum()))
        moved[static_grads] = meter.moved
    assert moved[True] - moved[False] == 9 * net.weight.nbytes
