"""Domain generalisation: what is reported, the steps in which the last layer learns alone, both on many processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lesam_dist.config.command_line import parse
from lesam_dist.config.schema import Config
from lesam_dist.data.domains import hold_out, scan_domains
from lesam_dist.errors import UserError
from lesam_dist.parallel.processes import Distributed
from lesam_dist.train.run import build_trainer, train_here
from lesam_dist.train.telemetry import read_metrics
from lesam_dist.train.trainer import Trainer
from tests.conftest import Command
from tests.parallel.processes import run

ALONE = Distributed(0, 0, 1, torch.device("cpu"))
SIDE, CLASSES, HEAD = 16, 3, 3
SIZES = {"a": 12, "b": 9, "c": 14}  # images of each class


@pytest.fixture
def root(tmp_path: Path, seed: int) -> Path:
    """Three domains of noise around a class's colour, in which domains differ."""
    rng = np.random.default_rng(seed)
    for domain, size in SIZES.items():
        for label in range(CLASSES):
            folder = tmp_path / "data" / domain / f"class_{label}"
            folder.mkdir(parents=True)
            color = rng.integers(60, 190, 3)
            for i in range(size):
                pixels = (color + rng.integers(-60, 60, (SIDE, SIDE, 3))).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return tmp_path / "data"


def config_of(root: Path, run_dir: Path, *flags: str, method: str = "sam", source: str = "[a]") -> Config:
    own = ["--data.builtin", "null", "--data.root", str(root), "--run_dir", str(run_dir), "--domains.source", source]
    own += ["--data.image_size", str(SIDE), "--data.batch_size", "12"]
    own += ["--domains.steps_per_epoch", "2", "--epochs", "3", "--domains.head_steps", str(HEAD)]
    own += ["--ema.uniform_from", "4", "--logging.tensorboard", "false"]
    return parse(["--config", f"digit_domains_resnet8_ermpp_{method}", *own, *flags])


def weights(model: nn.Module) -> dict[str, Tensor]:
    tensors = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in model.named_parameters()}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def by_hand(trainer: Trainer, paths: list[str]) -> float:
    """Top-1 in per cent, image by image."""
    trainer.model.eval()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (trainer.config.data.mean, trainer.config.data.std))
    right = 0
    with torch.no_grad():
        for path in paths:
            pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1).float() / 255
            logits = trainer.model(((pixels - mean) / std)[None])
            right += int(logits.argmax()) == int(Path(path).parent.name[-1])
    return 100 * right / len(paths)


def test_what_is_reported(root: Path, tmp_path: Path) -> None:
    """Of the weights and of their average, against a forward of each image; what is held out is not trained on."""
    trainer = build_trainer(config_of(root, tmp_path / "run", source="[a, c]"), ALONE)
    evaluation = trainer.fit()
    domains = scan_domains(root)
    held = {n: list(hold_out(domains[n], 0.2, seed=0, number=i)[1].paths) for i, n in ((0, "a"), (2, "c"))}
    trained = {path for batch in trainer.train_loader._plan.epoch(0) for path in batch.paths}  # type: ignore[attr-defined]
    assert trained.isdisjoint({path for paths in held.values() for path in paths})
    assert {len(paths) for paths in held.values()} == {7, 8}
    assert trainer.ema is not None
    for prefix in ("", "ema_"):
        expected = {"acc1": np.mean([by_hand(trainer, paths) for paths in held.values()])}
        expected["acc1_b"] = by_hand(trainer, list(domains["b"].paths))
        for name in ("target_acc1", "target_acc1_micro"):
            expected[name] = expected["acc1_b"]
        assert {name: evaluation[prefix + name] for name in expected} == pytest.approx(expected)
        if not prefix:
            trainer.ema._overwrite(trainer.ema._shards)
    trainer.close()
    lines = [line for line in read_metrics(tmp_path / "run") if line["split"] == "val"]
    assert [line["step"] for line in lines] == [2, 4, 6]
    best = max(lines, key=lambda line: line["ema_acc1"])["ema_acc1"]
    assert trainer.checkpoints is not None
    content = trainer.checkpoints.progress()
    assert content is not None
    assert (content["metric"]["name"], content["chosen_by"]["name"]) == ("target_acc1", "acc1")
    kept = [int(path.name[-8:]) for path in (tmp_path / "run" / "checkpoints").glob("step_*")]
    assert {line["step"] for line in lines if line["ema_acc1"] == best} & {*kept}


def test_macro_and_micro(root: Path, tmp_path: Path) -> None:
    evaluation = train_here(config_of(root, tmp_path / "run", method="sgd"), ALONE)
    b, c = evaluation["acc1_b"], evaluation["acc1_c"]
    assert evaluation["target_acc1"] == pytest.approx((b + c) / 2)
    assert evaluation["target_acc1_micro"] == pytest.approx((9 * b + 14 * c) / 23)
    assert evaluation["samples"] == 7 + 3 * 23


def test_all_images_are_trained_on_without_a_holdout(root: Path, tmp_path: Path) -> None:
    """The second stage: no accuracy to choose by, and no checkpoint is kept for it."""
    flags = ("--domains.holdout", "0", "--domains.target", "[c]", "--epochs", "4", "--checkpoint.keep", "1")
    trainer = build_trainer(config_of(root, tmp_path / "run", *flags), ALONE)
    assert len(trainer.task.splits[0]) == 36
    evaluation = trainer.fit()
    trainer.close()
    assert "acc1" not in evaluation
    assert "acc1_b" not in evaluation
    assert evaluation["target_acc1"] == evaluation["acc1_c"]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")] == ["step_00000008"]


def train(trainer: Trainer, steps: int) -> None:
    each = trainer.steps()
    for _ in range(steps):
        next(each)


@pytest.mark.parametrize("method", ["sgd", "sam", "lesam", "fsam"])
def test_the_last_layer_learns_alone(root: Path, tmp_path: Path, method: str) -> None:
    """As with all other parameters frozen, perturbation and moments among it; then the others begin as new ones do."""
    first, frozen = (
        build_trainer(config_of(root, tmp_path / name, method=method), ALONE) for name in ("run", "frozen")
    )
    before = weights(first.model)
    for name, p in frozen.model.named_parameters():
        p.requires_grad_(name.startswith("fc."))
    train(first, HEAD)
    train(frozen, HEAD)
    after, expected = weights(first.model), weights(frozen.model)
    heads = [name for name in after if name.startswith("fc.")]
    assert len(heads) == 2
    for name, value in after.items():
        assert torch.equal(value, expected[name])
        assert torch.equal(value, before[name]) == (name not in heads)
    state, params = first.optimizer.state, dict(first.model.named_parameters())
    for name, p in params.items():
        assert int(state[p]["step"]) == HEAD * (name in heads)
    train(first, 1)
    for name, value in weights(first.model).items():
        if name not in heads:
            assert int(state[params[name]]["step"]) == 1
            moved = (value - after[name]).abs().max().item()  # Adam's first step is its rate
            assert moved == pytest.approx(first.config.optimizer.lr, rel=0.02)
    first.close()
    frozen.close()


def test_resumed_while_the_last_layer_learns_alone(root: Path, tmp_path: Path) -> None:
    """The same bits as without a stop, weights and average."""
    whole = build_trainer(config_of(root, tmp_path / "whole"), ALONE)
    whole.fit()
    part = build_trainer(config_of(root, tmp_path / "part"), ALONE)
    train(part, 2)  # the end of the first epoch, where it is saved
    part.close()
    again = build_trainer(config_of(root, tmp_path / "part", "--resume", "auto"), ALONE)
    again.fit()
    for trainer in (whole, again):
        trainer.close()
    assert whole.ema is not None
    assert again.ema is not None
    ours, theirs = again.ema.state_dict(), whole.ema.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert all(torch.equal(value, weights(whole.model)[name]) for name, value in weights(again.model).items())


def on_many(world: Distributed, root: Path, folder: Path) -> list[dict[str, Any]]:
    results = []
    for strategy in ("ddp", "fsdp"):
        flags = ("--parallel.strategy", strategy, "--data.micro_batches", "2", "--precision.channels_last", "false")
        trainer = build_trainer(config_of(root, folder / strategy, *flags, source="[a, b]"), world)
        begin = weights(trainer.model)
        train(trainer, HEAD)
        alone = weights(trainer.model)
        train(trainer, 1)
        evaluation = trainer.validation.run()
        results.append({"begin": begin, "alone": alone, "end": weights(trainer.model), "evaluation": evaluation})
        trainer.close()
    return results


def test_on_many_processes(root: Path, tmp_path: Path) -> None:
    """DDP and FSDP2: nothing waits for gradients that are dropped; all ranks have the same."""
    first, second = run(on_many, 2, root, tmp_path)
    for one, other in zip(first, second, strict=True):
        for name, value in one["end"].items():
            assert torch.equal(value, other["end"][name])
            assert torch.equal(one["begin"][name], one["alone"][name]) == (not name.startswith("fc."))
            assert not torch.equal(one["begin"][name], value)
        assert one["evaluation"] == other["evaluation"]
        assert one["evaluation"]["samples"] == 7 + 5 + 3 * 14


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--domains.source", "[]"), "domains.source is empty: name a domain to train on"),
        (("--domains.holdout", "1"), "domains.holdout is 1.0: it must be in"),
        (("--data.builtin", "digits"), "data.builtin is digits but task is domains"),
        (("--domains.source", "[mnist, scans, print]"), "data.batch_size is 32 and domains.source names 3 domains"),
        (
            ("--data.label_noise.kind", "symmetric", "--data.label_noise.rate", "0.2"),
            "label_noise.kind is symmetric but",
        ),
        (
            ("--adversarial.norm", "linf", "--adversarial.epsilon", "0.1"),
            "adversarial.norm is linf but task is domains",
        ),
        (("--data.repeats", "2"), "data.repeats is 2 but task is domains"),
        (("--task", "classification"), r"domains.source is \['mnist'\] but task is classification"),
        (("--ema.decay", "0.9"), "ema.decay is 0.9 and ema.uniform_from is 200: there is one average"),
    ],
)
def test_refused(flags: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse(["--config", "digit_domains_resnet8_ermpp_sam", *flags])


def test_refused_where_the_data_say_so(root: Path, tmp_path: Path, command: Command) -> None:
    for flags, said in (
        (("--domains.source", "[aa]"), "unknown domain in domains.source 'aa': did you mean 'a'?"),
        (("--domains.target", "[a]"), "'a' is in domains.source and in domains.target"),
        (("--domains.holdout", "0.01"), "domains.holdout is 0.01, of which the 36 images"),
        (
            ("--data.builtin", "digit_domains", "--domains.source", "[mnist]"),
            "exists and is not the digit_domains dataset",
        ),
    ):
        own = ("--data.builtin", "null", "--data.root", root, "--run_dir", tmp_path / "run", "--domains.source", "[a]")
        status, _, err = command("--config", "digit_domains_resnet8_ermpp_sam", *own, *flags)
        assert status == 2
        assert said in err
        assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"data\.builtin is digit_domains but task is"):
        parse(["--config", "digits", "--data.builtin", "digit_domains"])


def test_dry_run(command: Command) -> None:
    status, out, err = command("--config", "digit_domains_resnet8_ermpp_sam", "--dry_run", "--data.image_size", "16")
    assert (status, err) == (0, "")
    assert "acc1_others" in out
