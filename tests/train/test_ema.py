"""The weight average: its closed form, on one process and sharded; swapping it in and out; saving and resuming it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lesam_dist import LESAM
from lesam_dist.config.command_line import parse
from lesam_dist.config.schema import CheckpointConfig
from lesam_dist.parallel.processes import Distributed
from lesam_dist.parallel.wrapping import Strategy, wrap
from lesam_dist.train.batchnorm import batchnorms
from lesam_dist.train.checkpoint import Checkpointer
from lesam_dist.train.ema import WeightAverage
from lesam_dist.train.passes import BatchPasses
from lesam_dist.train.run import build_trainer
from tests.parallel.processes import run

ALONE = Distributed(0, 0, 1, torch.device("cpu"))
STEPS, BATCH, DECAY = 5, 12, 0.22  # reached by the warm-up after two updates
Weights = dict[str, Tensor]

# float32: the closed form adds in float64 what each update rounds once (6e-8); other processes sum gradients otherwise.
ROUNDING, SUMS = 1e-6, 2e-5


def make(dtype: torch.dtype = torch.float32) -> nn.Module:
    # The last layers have fewer rows than processes: empty shards.
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 1), nn.Linear(1, 3)).to(dtype)


def whole(tensors: Mapping[str, Tensor]) -> Weights:
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for n, t in tensors.items()}


class Run:
    """A model in training with its average; every weight it had is kept."""

    def __init__(
        self, world: Distributed, seed: int, strategy: Strategy, uniform_from: int | None = None, **options: Any
    ) -> None:
        torch.manual_seed(seed)
        self.world, self.net = world, make()
        self.x, self.y = torch.randn(STEPS, BATCH, 6), torch.randint(0, 3, (STEPS, BATCH))
        self.model = wrap(self.net, world, strategy, **options)
        self.params = dict(self.net.named_parameters())  # kept: a gathered model names the gathered ones
        self.optimizer = LESAM(self.net.parameters(), torch.optim.SGD, sigma=0.05, rho_max=0.1, lr=0.5, momentum=0.9)
        decay = DECAY if uniform_from is None else None
        self.ema = WeightAverage(self.net, decay, uniform_from=uniform_from)
        self.history, self.before = [self.weights()], 0

    def weights(self) -> Weights:
        return whole(self.params)

    def average(self) -> Weights:
        averages = self.ema.state_dict()
        assert averages.pop("n_averaged").item() == len(self.history) - 1 + self.before
        return whole(averages)

    def train(self, steps: range) -> None:
        for t in steps:
            x, y = (v[t].chunk(self.world.world_size)[self.world.rank] for v in (self.x, self.y))
            self.optimizer.step(BatchPasses(self.model, nn.CrossEntropyLoss(), x, y))
            self.ema.update()
            self.history.append(self.weights())

    @torch.no_grad()
    def logits(self) -> Tensor:
        out: Tensor = self.net(self.x[0])
        return out


def closed_form(history: list[Weights]) -> Weights:
    """The initial weights' share is the product of all d_t; (1 - d_t) and the later ones make that of update t."""
    decays = [min(DECAY, (1 + t) / (10 + t)) for t in range(len(history) - 1)]
    shares = [math.prod(decays), *((1 - d) * math.prod(decays[t + 1 :]) for t, d in enumerate(decays))]
    return {n: sum(a * w[n].double() for a, w in zip(shares, history, strict=True)) for n in history[0]}  # type: ignore[misc]


def assert_near(actual: Weights, expected: Weights, tolerance: float, history: Sequence[Weights] = ()) -> None:
    """Relative to each tensor's largest value: of the history too, where the average is summed up from that."""
    for name, value in expected.items():
        scale = max(w[name].abs().max().item() for w in (expected, *history))
        torch.testing.assert_close(actual[name].double(), value.double(), rtol=0, atol=tolerance * scale, msg=name)


def test_closed_form(seed: int) -> None:
    this = Run(ALONE, seed, "none")
    this.train(range(STEPS))
    assert_near(this.average(), closed_form(this.history), ROUNDING, this.history)


@pytest.mark.parametrize("start", [1, 3, STEPS, STEPS + 1])
def test_uniform_average(seed: int, start: int) -> None:
    """The mean of the weights after update start - 1 and all later ones; before, the weights themselves, to the bit."""
    this = Run(ALONE, seed, "none", uniform_from=start)
    for t in range(STEPS):
        this.train(range(t, t + 1))
        if t + 1 < start:
            torch.testing.assert_close(this.average(), this.history[-1], rtol=0, atol=0)
    last = this.history[start - 1 :]
    expected: Weights = {name: sum(w[name].double() for w in last) / len(last) for name in last[0]}  # type: ignore[misc]
    assert_near(this.average(), expected, ROUNDING, this.history)


def test_uniform_average_leaves_out_what_is_skipped(seed: int) -> None:
    """Nor does a skipped update count towards the start."""
    net = nn.BatchNorm1d(3)
    ema = WeightAverage(net, uniform_from=2)
    taken = []
    for t in range(8):
        net(torch.randn(8, 3))
        if t % 2:
            assert net.running_mean is not None
            taken.append(net.running_mean.clone())
        ema.update(skipped=torch.tensor(float(t % 2 == 0)))
    torch.testing.assert_close(ema.state_dict()["running_mean"], torch.stack(taken).mean(dim=0), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="either decay or uniform_from"):
        WeightAverage(net)


def test_buffers_are_averaged_too(seed: int) -> None:
    """BatchNorm's running statistics, with the weights' decays; swapped in and out, and what counts stays as it is."""
    net = nn.BatchNorm1d(3)
    ema = WeightAverage(net, DECAY)
    history = [whole(dict(net.named_buffers()))]
    for _ in range(STEPS):
        net(torch.randn(8, 3))
        ema.update()
        history.append(whole(dict(net.named_buffers())))
    ema.update(skipped=torch.ones(()))
    averages = ema.state_dict()
    assert averages["n_averaged"].item() == STEPS
    expected = closed_form(history)
    for name in ("running_mean", "running_var"):
        assert_near(averages, {name: expected[name]}, ROUNDING)
    with ema.swapped():
        for name in ("running_mean", "running_var"):
            assert torch.equal(net.get_buffer(name), averages[name])
        assert net.get_buffer("num_batches_tracked").item() == STEPS
    torch.testing.assert_close(whole(dict(net.named_buffers())), history[-1], rtol=0, atol=0)


def test_average_of_a_real_run_is_worth_what_it_is_with_statistics_estimated_anew(tmp_path: Path) -> None:
    """Three epochs on the digits with a decay of which 0.27 would be left of the initial weights without a warm-up."""
    flags = ("--config", "digits", "--epochs", "3", "--ema.decay", "0.99")
    flags += ("--data.image_size", "16", "--data.val_resize", "16")
    places = ("--data.root", str(tmp_path / "digits"), "--run_dir", str(tmp_path / "run"))
    this = build_trainer(parse([*flags, *places]), ALONE)
    evaluation = this.fit()
    assert this.ema is not None
    with this.ema.swapped(), torch.no_grad():
        for layer in batchnorms(this.model):
            layer.reset_running_stats()
            layer.momentum = None  # a plain mean over the training images
        this.model.train()
        for images, _ in this.train_loader.epoch(0):
            this.model(images)
        anew = this.validation.of_weights()
    this.close()
    assert anew["acc1"] > 85
    assert abs(evaluation["ema_acc1"] - anew["acc1"]) < 3


def test_bfloat16_weights_have_a_float32_average(seed: int) -> None:
    torch.manual_seed(seed)
    net = make(torch.bfloat16)
    ema = WeightAverage(net, 0.9999)
    ema.state_dict()["n_averaged"].fill_(1e6)  # the warm-up is over
    start = whole(dict(net.named_parameters()))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2)
    ema.update()
    for name, w in ((name, w.double()) for name, w in start.items()):
        average = ema.state_dict()[name]
        torch.testing.assert_close(average.double(), w + 1e-4 * w, rtol=1e-7, atol=0, msg=name)
    before = whole(dict(net.named_parameters()))
    with ema.swapped():
        for name, p in net.named_parameters():
            assert torch.equal(p, ema.state_dict()[name].bfloat16())
    torch.testing.assert_close(whole(dict(net.named_parameters())), before, rtol=0, atol=0)


def sharded(world: Distributed, seed: int) -> list[dict[str, Any]]:
    """Average, weights and outputs; with parameters that stay gathered after a forward, and that do not."""
    results = []
    for reshard in (False, True):
        this = Run(world, seed, "fsdp", wrap_classes=["Linear"], reshard_after_forward=reshard)
        this.train(range(STEPS))
        before, weights = this.logits(), this.weights()  # the forward leaves parameters gathered
        with this.ema.swapped():
            swapped, held = this.logits(), this.weights()
        after = this.logits()
        results.append(
            {
                "average": this.average(),
                "history": this.history,
                "held": held,
                "swapped": swapped,
                "exact": torch.equal(before, after)
                and all(torch.equal(w, weights[n]) for n, w in this.weights().items()),
            }
        )
    return results


def test_sharded_average_equals_the_single_process(seed: int) -> None:
    alone = Run(ALONE, seed, "none")
    alone.train(range(STEPS))
    with alone.ema.swapped():
        expected = alone.logits()
    for rank in run(sharded, 2, seed):
        for result in rank:
            assert_near(result["average"], closed_form(result["history"]), ROUNDING, result["history"])
            assert_near(result["average"], alone.average(), SUMS)
            torch.testing.assert_close(result["held"], result["average"], rtol=0, atol=0)
            assert_near({"": result["swapped"]}, {"": expected}, SUMS)
            assert result["exact"], "swapping must give back the weights bit for bit"


def test_an_error_inside_gives_the_weights_back(seed: int) -> None:
    this = Run(ALONE, seed, "none")
    this.train(range(2))
    before, average = this.weights(), this.average()
    inside: list[Weights] = []

    def fail() -> None:
        with this.ema.swapped():
            inside.append(this.weights())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    torch.testing.assert_close(inside[0], average, rtol=0, atol=0)
    assert not torch.equal(inside[0]["0.weight"], before["0.weight"])
    torch.testing.assert_close(this.weights(), before, rtol=0, atol=0)
    torch.testing.assert_close(this.average(), average, rtol=0, atol=0)
    this.train(range(2, STEPS))  # the swap left nothing behind in the next steps
    untouched = Run(ALONE, seed, "none")
    untouched.train(range(STEPS))
    torch.testing.assert_close(this.average(), untouched.average(), rtol=0, atol=0)


def save_then_finish(world: Distributed, seed: int, folder: Path) -> Weights:
    this = Run(world, seed, "fsdp", wrap_classes=["Linear"])
    this.train(range(2))
    checkpointer = Checkpointer(folder, world, CheckpointConfig(asynchronous="never"))
    checkpointer.save(2, this.net, this.optimizer, {}, this.ema)
    this.train(range(2, STEPS))
    checkpointer.save(STEPS, this.net, this.optimizer, {}, this.ema)
    return this.average()


def load_then_finish(world: Distributed, seed: int, folder: Path, strategy: Strategy) -> tuple[Weights, Weights]:
    this = Run(world, seed, strategy, wrap_classes=["Linear"])
    loaded = Checkpointer(folder, world, CheckpointConfig(keep=1)).load_latest(this.net, this.optimizer, this.ema)
    assert (loaded.progress or {})["step"] == 2
    assert [f"{STEPS:08d}/rank_00001.safetensors is damaged" in fault for fault in loaded.damaged] == [True]
    this.before = 2
    loaded = this.average()
    this.train(range(2, STEPS))
    return loaded, this.average()


def test_resumed_average_equals_the_uninterrupted_one(seed: int, tmp_path: Path) -> None:
    """Bit for bit on as many processes, and loaded bit for bit on others; a newer one, of which one process's file is
    damaged, is passed over by all.
    """
    uninterrupted = run(save_then_finish, 2, seed, tmp_path)[0]
    victim = tmp_path / f"step_{STEPS:08d}" / "rank_00001.safetensors"
    content = victim.read_bytes()
    victim.write_bytes(content[:-1] + bytes([content[-1] ^ 4]))
    alone = Run(ALONE, seed, "none")
    alone.train(range(2))
    again = run(load_then_finish, 2, seed, tmp_path, "fsdp")
    saved = again[0][0]
    assert_near(saved, alone.average(), SUMS)
    for _, resumed in again:
        torch.testing.assert_close(resumed, uninterrupted, rtol=0, atol=0)
    elsewhere = [load_then_finish(ALONE, seed, tmp_path, "none"), *run(load_then_finish, 3, seed, tmp_path, "fsdp")]
    for loaded, continued in elsewhere:
        torch.testing.assert_close(loaded, saved, rtol=0, atol=0)
        assert_near(continued, uninterrupted, SUMS)


class Large(TorchDispatchMode):
    """Counts operations that are given more than a few numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(t, Tensor) and t.numel() > 2 for t in tree_leaves((args, kwargs))):
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_one_launch_however_many_tensors(seed: int) -> None:
    """As on a GPU. And it is torch's lerp, here in float64, but for the rounding of what is as large as the weights."""
    sizes = [(5, 3), (7,), (0, 4), (2, 2, 3)]
    net = nn.ParameterList([torch.randn(size) for size in sizes])
    ema = WeightAverage(net, 0.9)
    ema._in_one_launch = True
    expected = [p.detach().double() for p in net]
    for t in range(3):
        for p in net:
            p.data.normal_()
        with Large() as operations:
            ema.update()
        assert [name for name in operations.names if name != "aten::detach"] == ["aten::_fused_sgd_.tensor_lr"]
        share = 1 - min(0.9, (1 + t) / (10 + t))
        expected = [torch.lerp(e, p.detach().double(), share) for e, p in zip(expected, net, strict=True)]
    for i, value in enumerate(expected):
        torch.testing.assert_close(ema.state_dict()[str(i)].double(), value, rtol=0, atol=3e-6)
