"""Lightning with the callback takes the steps of a loop by hand: automatic, manual, on one process and on two."""

from __future__ import annotations

import copy
import os
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy

from lesam_dist import ESAM, LESAM, CosineBudget, Passes
from lesam_dist.parallel.processes import Distributed
from tests.integrations.two_processes import assert_steps_of_one, start
from tests.parallel.processes import free_port, run

pytest.importorskip("lightning")
import lightning.pytorch as pl
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lesam_dist.lightning import SharpnessAwareCallback

EXAMPLE = Path(__file__).parents[2] / "examples" / "lightning_module.py"
STEPS, BATCH = 4, 8
SETTINGS: dict[str, Any] = {"sigma": 0.05, "rho_max": 0.5, "lr": 0.05, "momentum": 0.9}
TOLERANCE = {"rtol": 1e-12, "atol": 1e-14}  # float64; two processes were 2e-16 from one


class Module(pl.LightningModule):
    def __init__(self, manual: bool = False, dropout: float = 0.3, norm: bool = True, method: Any = LESAM, **own: Any):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16) if norm else nn.Identity(), nn.Dropout(dropout), nn.Linear(16, 3)
        ).double()
        self.automatic_optimization = not manual
        self.method, self.own = method, own or SETTINGS
        self.outputs: list[Tensor] = []
        self.updates = 0

    def loss(self, batch: list[Tensor]) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        if self.automatic_optimization:
            loss = self.loss(batch)
            self.log("train_loss", loss, on_step=True, on_epoch=True)
            return loss
        optimizer: Any = self.optimizers()

        def closure() -> Tensor:
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)
        return None

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.updates += 1

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.automatic_optimization:
            self.outputs.append(outputs["loss"])

    def configure_optimizers(self) -> Any:
        return self.method(self.parameters(), torch.optim.SGD, **self.own)


class Sharded(Module):
    def configure_model(self) -> None:
        if not hasattr(self.net[0], "unshard"):
            for layer in (self.net[0], self.net[3], self.net):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])


class Written(DummyLogger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # type: ignore[override]
        self.lines.append(metrics)


def batches(dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(BATCH, 6, dtype=dtype), torch.randint(3, (BATCH,))) for _ in range(STEPS)]


def schedule(optimizer: Any, steps: int) -> CosineBudget:
    return CosineBudget(optimizer, steps, anneal_steps=steps // 2)


def make_trainer(*callbacks: Any, logger: Any = False, **settings: Any) -> pl.Trainer:
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    chosen = {"accelerator": "cpu", "devices": 1, "log_every_n_steps": 1, "max_epochs": 1, **quiet, **settings}
    return pl.Trainer(callbacks=list(callbacks), logger=logger, use_distributed_sampler=False, **chosen)


def loader(data: Any) -> Any:
    return torch.utils.data.DataLoader(data, batch_size=None)


def by_hand(module: Module, data: Any, autocast: torch.dtype | None = None) -> tuple[list[dict[str, float]], Any]:
    """A plain loop with the same optimizer, whose passes are those of `Passes`; each step's telemetry."""
    optimizer = module.configure_optimizers()
    sigma = schedule(optimizer, len(data)) if "sigma" in module.own else None
    module.train()
    lines = []
    for batch in data:
        optimizer.step(Passes(module.net, lambda net, b: cross_entropy(net(b[0]), b[1]), batch, autocast))
        lines.append({name: float(value) for name, value in optimizer.telemetry.items()})
        if sigma is not None:
            sigma.step()
    return lines, optimizer


def assert_same(actual: nn.Module, expected: nn.Module) -> None:
    torch.testing.assert_close(dict(actual.state_dict()), dict(expected.state_dict()), **TOLERANCE)


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_steps_and_logs_are_those_of_a_loop_by_hand(seed: int, manual: bool) -> None:
    """Dropout and BatchNorm alike in both passes; what is logged and shown is of the first."""
    module, data, logger = Module(manual), batches(), Written()
    twin = copy.deepcopy(module)
    state = torch.get_rng_state()
    trainer = make_trainer(SharpnessAwareCallback(budget=schedule), logger=logger)
    states: list[Tensor] = []
    module.net.register_forward_pre_hook(lambda *_: states.append(torch.get_rng_state()))
    trainer.fit(module, loader(data))
    torch.set_rng_state(states[0] if states else state)
    expected, _ = by_hand(twin, data)
    assert_same(module, twin)
    assert trainer.global_step == STEPS
    assert module.updates == STEPS, "one update a step"
    shown = [line for line in logger.lines if "sharpness/rho" in line]
    assert len(shown) == STEPS
    for line, wanted in zip(shown, expected, strict=True):
        for name, value in wanted.items():
            assert line[f"sharpness/{name}"] == pytest.approx(value, rel=1e-6), name
    assert shown[0]["sharpness/rho"] > 0 == shown[-1]["sharpness/rho"]
    if not manual:
        losses = [line["loss"] for line in expected]
        assert [float(loss) for loss in module.outputs] == pytest.approx(losses)
        assert [line["train_loss_step"] for line in shown] == pytest.approx(losses)
        (mean,) = [line["train_loss_epoch"] for line in logger.lines if "train_loss_epoch" in line]
        assert mean == pytest.approx(sum(losses) / STEPS), "of the passes at the weights alone"
    assert "optimizer_step" not in vars(trainer.precision_plugin), "given back"


@pytest.mark.parametrize("how", ["gradient_clip_val", "max_grad_norm"])
def test_clipping_is_of_the_second_gradient_alone(seed: int, how: str) -> None:
    module, data = Module(dropout=0.0), batches()
    if how == "max_grad_norm":
        module.own = {**SETTINGS, "max_grad_norm": 0.1}
    twin = copy.deepcopy(module)
    twin.own = {**SETTINGS, "max_grad_norm": 0.1}
    make_trainer(
        SharpnessAwareCallback(budget=schedule), gradient_clip_val=0.1 if how == "gradient_clip_val" else None
    ).fit(module, loader(data))
    by_hand(twin, data)
    torch.testing.assert_close(dict(module.state_dict()), dict(twin.state_dict()), rtol=1e-9, atol=1e-9)


def test_bf16_mixed_is_autocast(seed: int) -> None:
    module, data = Module(dropout=0.0).float(), batches(torch.float32)
    twin = copy.deepcopy(module)
    make_trainer(SharpnessAwareCallback(budget=schedule), precision="bf16-mixed").fit(module, loader(data))
    by_hand(twin, data, torch.bfloat16)
    assert_same(module, twin)


def test_16_mixed_knows_the_scaler_and_skips_an_overflow(seed: int) -> None:
    """Lightning makes a scaler for GPUs alone, so the plugin is given; a power of two changes no bit in float64."""
    module, data = Module(dropout=0.0, norm=False), batches()
    twin = copy.deepcopy(module)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    plugin.forward_context = torch.enable_grad  # type: ignore[method-assign]  # in float64, so without autocast
    trainer = make_trainer(SharpnessAwareCallback(budget=schedule), plugins=[plugin])
    trainer.fit(module, loader(data))
    by_hand(twin, data)
    torch.testing.assert_close(dict(module.state_dict()), dict(twin.state_dict()), rtol=1e-9, atol=1e-12)
    assert scaler.state_dict()["_growth_tracker"] == STEPS, "one update a step"
    with torch.no_grad():
        data[0][0][0, 0] = torch.inf
    before = copy.deepcopy(module)
    make_trainer(SharpnessAwareCallback(), plugins=[plugin]).fit(module, loader(data[:1]))
    assert_same(module, before)
    assert scaler.get_scale() == 2.0**9


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(seed: int, tmp_path: Path) -> None:
    module, data = Module(dropout=0.0), batches()
    twin = copy.deepcopy(module)
    make_trainer(SharpnessAwareCallback(budget=schedule), max_epochs=2).fit(module, loader(data))

    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "first.ckpt")
            trainer.should_stop = True

    start = copy.deepcopy(twin)
    make_trainer(SharpnessAwareCallback(budget=schedule), Stop(), max_epochs=2, min_epochs=1).fit(twin, loader(data))
    trainer = make_trainer(SharpnessAwareCallback(budget=schedule), max_epochs=2)
    trainer.fit(start, loader(data), ckpt_path=str(tmp_path / "first.ckpt"))
    assert_same(start, module)


def test_validation_sees_the_exact_weights(seed: int) -> None:
    seen = []

    class Validated(Module):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            seen.append(self.optimizers().is_perturbed)

    module, data = Validated(dropout=0.0), batches()
    trainer = make_trainer(SharpnessAwareCallback(), val_check_interval=1, num_sanity_val_steps=0)
    trainer.fit(module, loader(data), loader(data[:1]))
    assert seen == [False] * STEPS


def test_a_manual_closure_may_take_parts_of_a_batch(seed: int) -> None:
    """ESAM asks for the loss of each sample, then for a subset."""

    def losses(net: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(net(batch[0]), batch[1], reduction="none")

    class InParts(Module):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.optimizers().step(passes(self.net, batch))

    def passes(net: nn.Module, batch: Any) -> Passes:
        return Passes(net, lambda net, b: losses(net, b).mean(), batch, losses=losses)

    own = {"rho": 0.1, "beta": 1.0, "gamma": 0.5, "lr": 0.1}
    module, data = InParts(manual=True, dropout=0.0, method=ESAM, **own), batches()
    twin = copy.deepcopy(module)
    trainer = make_trainer(SharpnessAwareCallback())
    trainer.fit(module, loader(data))
    optimizer = twin.configure_optimizers()
    for batch in data:
        optimizer.step(passes(twin.net, batch))
    assert_same(module, twin)
    assert trainer.global_step == STEPS


def plain_sgd(params: Any, base: Any, lr: float) -> Any:
    return base(params, lr=lr)


@pytest.mark.parametrize(
    ("settings", "module", "error", "message"),
    [
        ({"accumulate_grad_batches": 2}, {}, ValueError, "accumulate_grad_batches=2 Lightning's closure is the last"),
        ({"max_epochs": -1}, {}, ValueError, "budget needs to know how many steps"),
        ({}, {"method": ESAM, "gamma": 0.5, "lr": 0.1}, TypeError, "ESAM asks for a pass with per_sample=True"),
        ({}, {**SETTINGS, "ascent_fraction": 0.5}, TypeError, r"LESAM asks for a pass with fraction=0\.5"),
        ({}, {"method": plain_sgd, "lr": 0.1}, TypeError, r"no optimizer is sharpness-aware \(SGD\)"),
    ],
    ids=["accumulation", "endless", "esam", "fraction", "sgd"],
)
def test_what_is_refused(
    seed: int, settings: dict[str, Any], module: dict[str, Any], error: type[Exception], message: str
) -> None:
    net = Module(**module)
    before = copy.deepcopy(net)
    budget = schedule if settings.get("max_epochs") == -1 else None
    trainer = make_trainer(SharpnessAwareCallback(budget=budget), **settings)
    with pytest.raises(error, match=message):
        trainer.fit(net, loader(batches()))
    assert "optimizer_step" not in vars(trainer.precision_plugin), "given back"
    for name, value in net.net.named_parameters():
        assert torch.equal(value, before.net.get_parameter(name))


def test_16_mixed_with_lightnings_clipping_is_refused() -> None:
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    trainer = make_trainer(SharpnessAwareCallback(), plugins=[plugin], gradient_clip_val=0.5)
    with pytest.raises(
        ValueError, match=r"gradient_clip_val=0\.5 would clip gradients .* give the optimizer max_grad_n"
    ):
        trainer.fit(Module(), loader(batches()))


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_shards_that_do_not_say_so_are_refused(strategy: Any) -> None:
    module = Module()
    trainer: Any = SimpleNamespace(strategy=strategy.__new__(strategy), optimizers=[module.configure_optimizers()])
    with pytest.raises(ValueError, match=f"{strategy.__name__} the shards do not say .*ModelParallelStrategy"):
        SharpnessAwareCallback().on_fit_start(trainer, module)


def test_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It learns, and shows a radius that the budget sets."""
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    lines = re.findall(r"^epoch \d+  loss (\S+)  rho (\S+)  sigma (\S+)$", capsys.readouterr().out, re.M)
    losses, radii, sigmas = zip(*((float(number) for number in line) for line in lines), strict=True)
    assert losses[-1] < losses[0] / 3
    assert min(radii[:-1]) > 0 == radii[-1]
    assert sigmas[0] == pytest.approx(0.1)
    assert sigmas[-1] == 0


KINDS = ("ddp", "ddp, manual", "local", "fsdp2")


def test_two_processes_take_the_steps_of_one(seed: int) -> None:
    module, data = Module(dropout=0.0, norm=False), batches()
    results = run(in_two_processes, 2, module.net.state_dict(), data, free_port())
    lines, _ = by_hand(module, data)
    assert_steps_of_one(KINDS, results, dict(module.net.state_dict()), TOLERANCE)
    for kind in set(KINDS) - {"local"}:
        assert results[0][kind][1] == pytest.approx([line["rho"] for line in lines])


def in_two_processes(world: Distributed, state: Any, data: Any, port: int) -> dict[str, Any]:
    start(world, port)
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0", "NODE_RANK": "0"}
    half = slice(world.rank * BATCH // 2, (world.rank + 1) * BATCH // 2)
    results = {}
    for kind in KINDS:
        own = {**SETTINGS, "scope": "local"} if kind == "local" else SETTINGS
        module = (Sharded if kind == "fsdp2" else Module)(manual="manual" in kind, dropout=0.0, norm=False, **own)
        module.net.load_state_dict(state)
        strategy: Any = ModelParallelStrategy(2, 1) if kind == "fsdp2" else DDPStrategy(process_group_backend="gloo")
        logger = Written()
        trainer = make_trainer(SharpnessAwareCallback(budget=schedule), logger=logger, devices=2, strategy=strategy)
        radii: list[float] = []

        class Radii(pl.Callback):
            def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, radii: list[float] = radii) -> None:
                radii.append(float(trainer.optimizers[0].telemetry["rho"]))

        trainer.callbacks.append(Radii())  # type: ignore[attr-defined]
        trainer.fit(module, loader([(x[half], y[half]) for x, y in data]))
        assert isinstance(module.net[0].weight, DTensor) == (kind == "fsdp2")
        whole = {
            name: (value.full_tensor() if isinstance(value, DTensor) else value).detach()
            for name, value in module.net.state_dict().items()
        }
        results[kind] = (whole, radii)
    return results
