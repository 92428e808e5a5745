"""The Kubernetes manifest and the container image, for what they would run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import config_from_args, get_args_parser

from lesam_dist.config.command_line import parse
from lesam_dist.config.schema import CheckpointConfig
from lesam_dist.errors import PREEMPTED

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
DOCKERFILE = LAUNCH / "Dockerfile"
TORCHRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" > arguments; env > environment
[ -z "{saved}" ] || : > "$LESAM_DIST_PREEMPTED"
exit {status}
"""


def manifest() -> dict[str, Any]:
    job: dict[str, Any] = yaml.safe_load((LAUNCH / "kubernetes" / "pytorchjob.yaml").read_text())
    return job


def instructions(name: str) -> list[str]:
    """The arguments of every instruction of that name, continued lines joined."""
    lines = DOCKERFILE.read_text().replace("\\\n", " ").splitlines()
    return [line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")]


def copied() -> dict[str, str]:
    """Where each path of the repository lies in the image."""
    folder, found = instructions("WORKDIR")[0], {}
    for line in instructions("COPY"):
        *sources, target = line.split()
        for source in sources:
            found[source] = f"{folder}/{source if target == './' else target}"
    return found


def operator_sets(job: dict[str, Any], node: int, *, elastic: bool) -> dict[str, str]:
    """The variables that Kubeflow's training operator adds to a pod (v1.7 and later, envvar.go and elastic.go)."""
    name, spec = job["metadata"]["name"], job["spec"]
    replicas = spec["pytorchReplicaSpecs"]["Worker"]["replicas"]
    both = {"PYTHONUNBUFFERED": "1", "PET_NPROC_PER_NODE": spec["nprocPerNode"]}
    if elastic:
        policy = spec["elasticPolicy"]
        return both | {
            "PET_RDZV_ENDPOINT": f"{name}-worker-0:23456",
            "PET_RDZV_BACKEND": policy["rdzvBackend"],
            "PET_RDZV_ID": policy["rdzvId"],
            "PET_NNODES": f"{policy['minReplicas']}:{policy['maxReplicas']}",
            "PET_MAX_RESTARTS": str(policy["maxRestarts"]),
        }
    return both | {  # a Master and Workers, without a policy
        "MASTER_ADDR": f"{name}-master-0",
        "MASTER_PORT": "23456",
        "WORLD_SIZE": str(replicas * int(spec["nprocPerNode"])),
        "RANK": str(node),
        "PET_NODE_RANK": str(node),
        "PET_NNODES": str(replicas),
    }


def run_pod(
    folder: Path, monkeypatch: pytest.MonkeyPatch, added: dict[str, str], status: int = 0, saved: str = ""
) -> tuple[int, list[str]]:
    """The pod's command with a stand-in for torchrun: its status, and what torchrun got."""
    monkeypatch.chdir(folder)
    Path("torchrun").write_text(TORCHRUN.format(status=status, saved=saved))
    Path("torchrun").chmod(0o755)
    container = manifest()["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    at = {there: here for here, there in copied().items()}
    (command,) = container["command"]
    assert command == yaml.safe_load(instructions("ENTRYPOINT")[0])[0], "the image starts it by itself too"
    script = ROOT / at[os.path.dirname(command)] / os.path.basename(command)
    environ = {variable["name"]: variable["value"] for variable in container["env"]} | added
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "TORCHELASTIC", "PET_"))}
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run([script, *container["args"]], env={**clean, **environ, "PATH": path}, timeout=300)
    return result.returncode, Path("arguments").read_text().splitlines()


@pytest.mark.parametrize("elastic", [True, False])
def test_a_pod_starts_torchrun_on_the_nodes_of_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elastic: bool
) -> None:
    """As torchrun itself reads the line, under the variables of the operator."""
    added = operator_sets(manifest(), 2, elastic=elastic)
    status, arguments = run_pod(tmp_path, monkeypatch, added)
    assert status == 0
    for key, value in added.items():
        monkeypatch.setenv(key, value)
    args = get_args_parser().parse_args(arguments)
    config, _, command = config_from_args(args)
    assert config.nproc_per_node == 8
    if elastic:
        assert (config.min_nodes, config.max_nodes, config.max_restarts, config.run_id) == (1, 4, 3, "lesam")
        assert (config.rdzv_backend, config.rdzv_endpoint) == ("c10d", "lesam-worker-0:23456")
    else:
        assert (config.min_nodes, config.max_nodes, config.max_restarts, args.node_rank) == (4, 4, 0, 2)
        assert (args.master_addr, args.master_port) == ("lesam-master-0", 23456)
    assert command[command.index("-m") + 1] == "lesam_dist.train"
    run = parse(command[command.index("lesam_dist.train") + 1 :])
    assert (run.resume, run.data.root) == ("auto", "/data/imagenet")


@pytest.mark.parametrize(("status", "saved", "made_anew"), [(0, "", False), (1, "", False), (1, "yes", True)])
def test_a_pod_is_made_anew_where_the_run_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, saved: str, made_anew: bool
) -> None:
    """The operator does so after a status of 128 and more (IsRetryableExitCode), and not after ours, 75."""
    ended, _ = run_pod(tmp_path, monkeypatch, operator_sets(manifest(), 0, elastic=True), status, saved)
    assert manifest()["spec"]["pytorchReplicaSpecs"]["Worker"]["restartPolicy"] == "ExitCode"
    assert (ended >= 128) == made_anew
    assert made_anew or ended == status
    assert PREEMPTED < 128


def test_a_pod_has_time_to_save_and_room_to_write() -> None:
    pod = manifest()["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    shutdown = re.search(r"SHUTDOWN_SECONDS:-(\d+)", (LAUNCH / "torchrun.sh").read_text())
    assert shutdown is not None
    assert pod["terminationGracePeriodSeconds"] > int(shutdown[1]) > CheckpointConfig().grace_seconds
    (container,) = pod["containers"]
    assert container["name"] == "pytorch"
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in mounts.values()} == set(volumes)
    assert volumes[mounts["/dev/shm"]["name"]]["emptyDir"]["medium"] == "Memory"
    run = parse(container["args"])
    assert run.data.root is not None
    for path, read_only in ((run.data.root, True), (run.run_dir, False)):
        (mount,) = (mount for at, mount in mounts.items() if path.startswith(f"{at}/"))
        assert mount.get("readOnly", False) == read_only
        assert "persistentVolumeClaim" in volumes[mount["name"]]
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert str(gpus) == manifest()["spec"]["nprocPerNode"]
    assert int(container["resources"]["requests"]["cpu"]) == gpus * run.data.workers
    assert pod["securityContext"]["runAsUser"] == int(instructions("USER")[-1]) > 0


def test_the_dockerfile_has_no_findings() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    result = subprocess.run([linter, "--failure-threshold", "style", DOCKERFILE], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")


def test_what_the_image_copies_is_enough_to_install(tmp_path: Path) -> None:
    """And .dockerignore lets it through, and nothing else."""
    kept = set(re.findall(r"^!(.*)$", DOCKERFILE.with_name("Dockerfile.dockerignore").read_text(), re.M))
    assert kept == set(copied())
    for source in copied():
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        copy(ROOT / source, tmp_path / source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", tmp_path / "site", tmp_path], check=True, timeout=300)
    for package in ("lesam_dist", "lesam_kernels"):
        assert (tmp_path / "site" / package / "__init__.py").exists()
    assert list((tmp_path / "site" / "lesam_dist" / "recipes" / "parts").glob("*/*.yaml"))


def docker_works() -> bool:
    docker = shutil.which("docker")
    return docker is not None and subprocess.run([docker, "info"], capture_output=True).returncode == 0


@pytest.mark.full
@pytest.mark.skipif(not docker_works(), reason="no docker daemon")
def test_the_image_builds_and_dry_runs() -> None:
    build = ["docker", "build", "--quiet", "--file", str(DOCKERFILE), str(ROOT)]
    image = subprocess.run(build, check=True, capture_output=True, text=True).stdout.strip()
    dry = ["--config", "digits", "--parallel.device", "cpu", "--dry_run"]
    run = ["docker", "run", "--rm", "--env", "NPROC_PER_NODE=2", image, *dry]
    assert "[val]" in subprocess.run(run, check=True, capture_output=True, text=True).stdout
