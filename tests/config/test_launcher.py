"""The trainer under `accelerate launch`: its settings arrive, flags win, what cannot be honoured is an error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lesam_dist.config.command_line import parse
from lesam_dist.config.launcher import accelerate_flags
from lesam_dist.errors import UserError
from tests.parallel.processes import free_port

ROOT = Path(__file__).parents[2]
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def test_without_the_launcher_nothing_changes() -> None:
    assert accelerate_flags({}) == []
    assert accelerate_flags({"ACCELERATE_MIXED_PRECISION": "no"}) == []


def test_precedence_is_flag_then_launcher_then_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse(["--config", "imagenet_resnet50_lesam"]).precision.compute == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert parse(["--config", "imagenet_resnet50_lesam"]).precision.compute == "fp16"
    flags = ["--precision.compute", "fp32", "--config", "imagenet_resnet50_lesam"]
    assert parse(flags).precision.compute == "fp32"


def test_fsdp_and_hsdp_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**FSDP, "FSDP_RESHARD_AFTER_FORWARD": "false", "ACCELERATE_USE_CPU": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "Bottleneck,BasicBlock")
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
    config = parse(["--config", "digits"])
    assert config.model.activation_checkpointing
    parallel = config.parallel
    assert (parallel.strategy, parallel.reshard_after_forward, parallel.device) == ("fsdp", False, "cpu")
    assert parallel.wrap_classes == ["Bottleneck", "BasicBlock"]
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "2")
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_SHARD_SIZE", "4")
    parallel = parse(["--config", "digits"]).parallel
    assert (parallel.strategy, parallel.replicate_size, parallel.shard_size) == ("hsdp", 2, 4)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed_precision is 'fp8'"),
        ({**FSDP, "FSDP_VERSION": "1"}, "set fsdp_version: 2"),
        ({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, "does not offload"),
        ({**FSDP, "PARALLELISM_CONFIG_TP_SIZE": "2"}, "tp_size is 2"),
    ],
)
def test_settings_that_cannot_be_honoured(environ: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        accelerate_flags(environ)


@pytest.mark.parametrize("node", [0, 3])
@pytest.mark.parametrize(("name", "strategy"), [("ddp", "ddp"), ("fsdp2", "fsdp"), ("hsdp", "hsdp")])
def test_accelerate_on_several_nodes(name: str, strategy: str, node: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file's own command line: what accelerate hands to torchrun, and what it tells the trainer."""
    from accelerate.commands import launch  # these two take a second
    from torch.distributed import run as torchrun

    file = ROOT / "launch" / "accelerate" / f"{name}_multi_node.yaml"
    lines = "".join(line.removeprefix("#") for line in file.read_text().splitlines() if line.startswith("#"))
    words = lines.partition("accelerate launch ")[2].replace("\\", " ").replace("...", "").split()
    assert words[1] == str(file.relative_to(ROOT))
    given: list[Any] = []
    monkeypatch.setattr(torchrun, "run", lambda args: given.append((torchrun.config_from_args(args), {**os.environ})))
    monkeypatch.chdir(ROOT)
    port = str(free_port())  # accelerate looks whether the file's is in use here
    command = ["--main_process_port", port, *(word.replace("$NODE_RANK", str(node)) for word in words)]
    launch.launch_command(launch.launch_command_parser().parse_args(command))
    ((config, _, entry), environ) = given.pop()
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node) == (4, 4, 8)
    assert (config.rdzv_backend, config.rdzv_endpoint) == ("static", f"node0:{port}")
    assert config.rdzv_configs["rank"] == node
    for key in environ:
        if key.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_")):
            monkeypatch.setenv(key, environ[key])
    run = parse(entry[entry.index("lesam_dist.train") + 1 :])
    assert (run.parallel.strategy, run.precision.compute, run.run_dir) == (strategy, "bf16", "/shared/run")
    if strategy == "hsdp":
        assert (run.parallel.replicate_size, run.parallel.shard_size) == (4, 8)


@pytest.mark.parametrize(
    ("name", "changes", "shown"),
    [
        ("ddp", {}, "fp32, 2 x cpu, ddp"),
        ("fsdp2", {"mixed_precision: 'no'": "mixed_precision: bf16"}, "bf16, 2 x cpu, fsdp"),
        ("hsdp", {"num_processes: 8": "num_processes: 4", "shard_size: 4": "shard_size: 2"}, "fp32, 4 x cpu, hsdp"),
    ],
    ids=["ddp", "fsdp2", "hsdp"],
)
def test_accelerate_launch_trains(tmp_path: Path, name: str, changes: dict[str, str], shown: str) -> None:
    """Each file of launch/accelerate, with fewer processes and on the CPU: it starts them, and they train two steps.

    The sizes of HSDP's mesh must fill the processes, so that it trains shows that the trainer got both.
    """
    text = (ROOT / "launch" / "accelerate" / f"{name}.yaml").read_text()
    for old, new in {"num_processes: 8": "num_processes: 2", **changes}.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    (tmp_path / "launch.yaml").write_text(text)
    flags = ["--config", "digits", "--dry_run", "--data.batch_size", "4"]
    result = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "launch.yaml")),
            *("--main_process_port", str(free_port())),
            *("-m", "lesam_dist.train", *flags, "--parallel.device", "cpu"),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert result.returncode == 0, result.stderr
    assert shown in result.stdout
    assert result.stdout.count("[train]") == 2
