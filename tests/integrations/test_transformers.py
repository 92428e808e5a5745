"""Hugging Face's Trainer with both passes takes the steps of a loop written by hand, on one process and on two."""

from __future__ import annotations

import copy
import re
import runpy
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lesam_dist import ESAM, LESAM, CosineBudget, frozen_batchnorm
from lesam_dist.parallel.processes import Distributed
from tests.integrations.two_processes import assert_steps_of_one, start
from tests.parallel.processes import free_port, run

pytest.importorskip("transformers")

SIGMA, RHO_MAX, LR, DECAY, CLIP, EPS = 0.05, 0.5, 0.01, 0.1, 0.05, 1e-12
STEPS, BATCH = 4, 8
EXAMPLE = Path(__file__).parents[2] / "examples" / "huggingface_trainer.py"
# float64 throughout, but for sums in another order; two processes were 2e-16 from one.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}


class Net(nn.Module):
    """Classifies points; as transformers' own models do, it averages over the labels that are not -100, of all
    micro-batches where it is told how many those are."""

    def __init__(self, dropout: float, norm: bool) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.norm = nn.BatchNorm1d(16) if norm else nn.Identity()
        self.drop, self.last = nn.Dropout(dropout), nn.Linear(16, 3)
        self.double()

    def forward(self, x: Tensor, labels: Tensor, num_items_in_batch: Any = None, **_: Any) -> dict[str, Tensor]:
        logits = self.last(self.drop(self.norm(self.first(x)).relu()))
        total = cross_entropy(logits.double(), labels, reduction="sum")
        count = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": total / count, "logits": logits}


class Points(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, seed: int, rows: int = STEPS * BATCH) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(rows, 6, dtype=torch.float64, generator=generator)
        self.labels = torch.randint(3, (rows,), generator=generator)
        self.labels[1::3] = -100  # so micro-batches differ in what they count

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "labels": self.labels[index]}


def budget(optimizer: Any, steps: int) -> CosineBudget:
    return CosineBudget(optimizer, steps, anneal_steps=steps // 2)


def make_trainer(net: nn.Module, data: Points, folder: Path, method: Any = LESAM, **settings: Any) -> Any:
    from transformers import TrainingArguments

    from lesam_dist.transformers import SharpnessAwareTrainer

    class InOrder(SharpnessAwareTrainer):
        """So that the loop by hand sees the same batches."""

        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(data)

    own = {"sigma": SIGMA, "rho_max": RHO_MAX} if method is LESAM else settings.pop("own")
    chosen = {
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 1,
        "learning_rate": LR,
        "weight_decay": DECAY,
        "max_grad_norm": CLIP,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "save_strategy": "no",
        "optim": "adamw_torch",
        "adam_beta1": 0.8,
        "adam_beta2": 0.9,
        "adam_epsilon": 1e-3,  # Adam's step by a gradient near 0 is then no matter of rounding
        **settings,
    }
    arguments = TrainingArguments(str(folder), use_cpu=True, report_to=[], disable_tqdm=True, **chosen)
    return InOrder(
        net, arguments, train_dataset=data, sharpness=(method, own), budget=budget if method is LESAM else None
    )


def by_hand(net: Net, data: Points, steps: Sequence[Sequence[slice]], autocast: bool = False) -> list[dict[str, float]]:
    """LE-SAM's steps in plain torch, each over its micro-batches; returns what each step's log must say."""
    decayed = [p for name, p in net.named_parameters() if "bias" not in name and "norm" not in name]
    others = [p for name, p in net.named_parameters() if "bias" in name or "norm" in name]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    base = torch.optim.AdamW(groups, lr=LR, betas=(0.8, 0.9), eps=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(base, lambda step: max(0.0, 1 - step / len(steps)))
    sigma_of = CosineBudget(LESAM(net.parameters(), torch.optim.SGD, lr=1.0, sigma=1.0), len(steps), len(steps) // 2)
    params, logs = list(net.parameters()), []

    def one_pass(parts: Sequence[slice]) -> float:
        count = sum(int((data.labels[part] != -100).sum()) for part in parts)
        losses = []
        for part in parts:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = net(data.x[part], data.labels[part], count)["loss"]
            loss.backward()
            losses.append(loss.item())
        return sum(losses)

    net.train()
    for t, parts in enumerate(steps):
        sigma, state = SIGMA * sigma_of.factor(t), torch.get_rng_state()
        loss = one_pass(parts)
        grads = [p.grad.clone() for p in params if p.grad is not None]
        norm = torch.stack([grad.square().sum() for grad in grads]).sum().sqrt()
        rho = min(sigma / (float(norm) + EPS), RHO_MAX)
        exact = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p, grad in zip(params, grads, strict=True):
                p.add_(grad / (norm + EPS), alpha=rho)
        base.zero_grad()
        torch.set_rng_state(state)
        with frozen_batchnorm(net):
            perturbed = one_pass(parts)
        with torch.no_grad():
            for p, w in zip(params, exact, strict=True):
                p.copy_(w)
        torch.nn.utils.clip_grad_norm_(params, CLIP)
        base.step()
        base.zero_grad()
        schedule.step()
        logs.append({"loss": loss, "perturbed_loss": perturbed, "rho": rho, "sigma": sigma, "grad_norm": float(norm)})
    return logs


def assert_same(actual: nn.Module, expected: nn.Module) -> None:
    torch.testing.assert_close(dict(actual.state_dict()), dict(expected.state_dict()), **TOLERANCE)


def parts_of(micro_batches: int) -> list[list[slice]]:
    size = BATCH // micro_batches
    starts = range(0, STEPS * BATCH, BATCH)
    return [[slice(at + size * i, at + size * (i + 1)) for i in range(micro_batches)] for at in starts]


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_steps_and_logs_are_those_of_a_loop_by_hand(seed: int, tmp_path: Path, micro_batches: int) -> None:
    """Dropout and BatchNorm alike in both passes, weight decay by groups, clipping of the second gradient alone."""
    data, net = Points(seed), Net(dropout=0.3, norm=True)
    twin = copy.deepcopy(net)
    size = BATCH // micro_batches
    trainer = make_trainer(
        net, data, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=micro_batches
    )
    states: list[Tensor] = []
    net.register_forward_pre_hook(lambda *_: states.append(torch.get_rng_state()))
    trainer.train()
    torch.set_rng_state(states[0])  # the loaders have drawn before
    expected = by_hand(twin, data, parts_of(micro_batches))
    assert_same(net, twin)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == STEPS
    for log, line in zip(logs, expected, strict=True):
        for name, value in line.items():
            assert log[name] == pytest.approx(value, rel=1e-6), name
        assert log["skipped"] == 0
    assert expected[0]["rho"] > 0


def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(seed: int, tmp_path: Path) -> None:
    data, net = Points(seed), Net(dropout=0.3, norm=True)
    twin = copy.deepcopy(net)
    make_trainer(net, data, tmp_path, save_strategy="steps", save_steps=2).train()
    trainer = make_trainer(twin, data, tmp_path)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == STEPS
    for name, value in net.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name
    sigmas = [log["sigma"] for log in trainer.state.log_history if "sigma" in log]
    assert sigmas == pytest.approx([SIGMA, SIGMA, SIGMA, 0.0]), "the schedule goes on at its step"


def test_bfloat16_is_that_of_autocast(seed: int, tmp_path: Path) -> None:
    data, net = Points(seed), Net(dropout=0.0, norm=True).float()
    data.x = data.x.float()
    twin = copy.deepcopy(net)
    make_trainer(net, data, tmp_path, bf16=True).train()
    by_hand(twin, data, parts_of(1), autocast=True)
    for name, value in net.state_dict().items():  # norms are summed in another order
        torch.testing.assert_close(value, twin.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_a_scaler_is_known_and_updated_once_a_step(seed: int, tmp_path: Path) -> None:
    """accelerate makes one for fp16 on a GPU only, so it is put in; scaling by a power of two changes no bit."""
    data, net = Points(seed), Net(dropout=0.0, norm=False)
    twin = copy.deepcopy(net)
    trainer = make_trainer(net, data, tmp_path)
    scaler = trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    trainer.train()
    by_hand(twin, data, parts_of(1))
    assert_same(net, twin)
    assert trainer.sharpness_aware.grad_scaler is scaler
    assert scaler.state_dict()["_growth_tracker"] == STEPS


def test_a_clip_of_the_methods_own_is_kept(tmp_path: Path) -> None:
    trainer = make_trainer(Net(0.0, False), Points(0), tmp_path, LESAM)
    trainer.sharpness = (LESAM, {"max_grad_norm": 3.0})
    assert trainer.create_optimizer().options.max_grad_norm == 3.0
    trainer = make_trainer(Net(0.0, False), Points(0), tmp_path, LESAM, max_grad_norm=0)
    assert trainer.create_optimizer().options.max_grad_norm is None


def test_what_is_refused(seed: int, tmp_path: Path) -> None:
    from transformers import TrainingArguments

    from lesam_dist.transformers import SharpnessAwareTrainer

    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no")
    net, data = Net(0.0, False), Points(seed)
    before = copy.deepcopy(net)
    with pytest.raises(TypeError, match=r"AdamW, which makes one pass\. Give sharpness=\(LESAM"):
        SharpnessAwareTrainer(net, arguments, train_dataset=data).train()
    optimizer = LESAM(net.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="both sharpness= and optimizers="):
        SharpnessAwareTrainer(net, arguments, optimizers=(optimizer, None), sharpness=(LESAM, {}))
    for method, own, what in (
        (ESAM, {"gamma": 0.5}, "ESAM asks for a pass with per_sample=True"),
        (LESAM, {"ascent_fraction": 0.5}, "LESAM asks for a pass with fraction=0.5"),
    ):
        with pytest.raises(TypeError, match=what):
            SharpnessAwareTrainer(net, arguments, train_dataset=data, sharpness=(method, own)).train()
    assert_same(net, before)


@pytest.mark.parametrize("kind", ["FSDP1", "DeepSpeed"])
def test_shards_that_do_not_say_so_are_refused(tmp_path: Path, kind: str) -> None:
    from accelerate import DistributedType
    from accelerate.state import AcceleratorState
    from transformers import TrainingArguments

    from lesam_dist.transformers import SharpnessAwareTrainer

    class Pretends(SharpnessAwareTrainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            if kind == "FSDP1":
                self.accelerator.state.fsdp_plugin = SimpleNamespace(fsdp_version=1)
            else:
                self.accelerator.state.distributed_type = DistributedType.DEEPSPEED

    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    try:
        with pytest.raises(ValueError, match=f"{kind}.* FSDP2"):
            Pretends(Net(0.0, False), arguments, sharpness=(LESAM, {}))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    before, after = re.findall(r"eval loss (\S+) before, (\S+) after", capsys.readouterr().out)[0]
    assert float(before) > 2, "of random guesses it is log 11 = 2.4"
    assert float(after) < 1


KINDS = ("ddp", "ddp, two micro-batches", "local", "fsdp2")


def test_two_processes_take_the_steps_of_one(seed: int, tmp_path: Path) -> None:
    net, data = Net(dropout=0.0, norm=False), Points(seed)
    results = run(in_two_processes, 2, seed, copy.deepcopy(net.state_dict()), str(tmp_path), free_port())
    by_hand(net, data, parts_of(1))
    assert_steps_of_one(KINDS, results, dict(net.state_dict()), TOLERANCE)


def in_two_processes(world: Distributed, seed: int, state: Any, folder: str, port: int) -> dict[str, Any]:
    start(world, port)
    results = {}
    for kind in KINDS:
        net = Net(dropout=0.0, norm=False)
        net.load_state_dict(state)
        size, micro_batches = (2, 2) if "micro" in kind else (4, 1)
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": micro_batches}
        trainer = make_trainer(net, Points(seed), Path(folder), **settings)
        if kind == "local":
            trainer.sharpness = (LESAM, {"sigma": SIGMA, "rho_max": RHO_MAX, "scope": "local"})
        if kind == "fsdp2":
            shard(trainer)
        trainer.train()
        assert type(trainer.model_wrapped).__name__ == ("FSDPNet" if kind == "fsdp2" else "DistributedDataParallel")
        whole = {name: full(value) for name, value in trainer.model.state_dict().items()}
        logs = [log["rho"] for log in trainer.state.log_history if "rho" in log]
        results[kind] = (whole, logs)
    return results


def full(value: Any) -> Tensor:
    whole: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole


def shard(trainer: Any) -> None:
    """accelerate forgets FSDP's settings on a host without GPUs; what prepare() does with them is the same."""
    from accelerate import DistributedType, FullyShardedDataParallelPlugin

    state = trainer.accelerator.state
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    trainer.is_fsdp_enabled = True
