"""Two hosts, between which the network breaks in the middle of a run: both say so and end, and the run goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lesam_dist import cli
from tests.parallel import processes
from tests.parallel.hosts import Host, can_make_hosts, two_hosts
from tests.parallel.terminal import launch, torchrun_like

pytestmark = pytest.mark.skipif(not can_make_hosts(), reason="needs root, and ip netns of iproute2")

EPOCHS = 12
TIMEOUT = 6.0


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as both:
        yield both


@pytest.fixture
def flags(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of a run in RUN_DIR "run"; also in the file `flags`, for processes that are forked."""
    monkeypatch.chdir(tmp_path)
    words = f"--config digits --data.root {images} --data.builtin null --data.batch_size 20 --data.image_size 16 "
    words += f"--data.val_resize 16 --data.workers 1 --epochs {EPOCHS} "
    words += "--schedule.lr_warmup_epochs 1 --schedule.anneal_start_epoch null --logging.every_steps 1 "
    words += f"--logging.tensorboard false --parallel.device cpu --parallel.timeout_s {TIMEOUT}"
    Path("flags").write_text(words)
    return words.split()


def trains(rank: int) -> None:
    """On a host of its own, where the file `hosts` says so."""
    if Path("hosts").exists():
        host = Host(**json.loads(Path("hosts").read_text())[rank])
        os.environ |= {"GLOO_SOCKET_IFNAME": host.interface, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        host.enter()
    cli._train(Path("flags").read_text().split() + Path("more").read_text().split())


def on_two_hosts(rank: int, world_size: int, port: int) -> dict[str, str]:
    first = json.loads(Path("hosts").read_text())[0]
    place = {"MASTER_ADDR": first["address"], "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    return torchrun_like(rank, world_size, port) | place


def weights(run: str) -> dict[str, torch.Tensor]:
    """All tensors of the run's last checkpoint, by file and name."""
    last = max(Path(run, "checkpoints").glob("step_*"))
    found = {f"{path.name}/{name}": t for path in last.glob("*.safetensors") for name, t in load_file(path).items()}
    assert found
    return found


def assert_same_weights() -> None:
    reached, expected = weights("run"), weights("undisturbed")
    assert reached.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(reached[name], expected[name])]
    assert different == []


class Cut(threading.Thread):
    """Cuts a host's cable as soon as the run in "run" has made a checkpoint or two."""

    def __init__(self, host: Host) -> None:
        super().__init__()
        self._host, self.at = host, 0.0
        self._given_up = threading.Event()

    def run(self) -> None:
        while not self._given_up.wait(0.01):
            if any(Path("run/checkpoints").glob("step_*")):
                self.at = time.monotonic()
                self._host.switch("down")
                return

    def __enter__(self) -> Cut:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._given_up.set()
        self.join()
        assert self.at, "there was no checkpoint"


def run_undisturbed() -> None:
    Path("more").write_text("--run_dir undisturbed")
    statuses, err = launch(trains, Path(), torchrun_like)
    assert statuses == [0, 0], err


def test_a_cable_that_is_cut(hosts: tuple[Host, Host], flags: list[str]) -> None:
    """Each side says whom it has lost; mended, the run goes on to the weights of one that was never disturbed."""
    run_undisturbed()
    Path("hosts").write_text(json.dumps([asdict(host) for host in hosts]))
    Path("more").write_text("--run_dir run --resume auto")
    with Cut(hosts[1]) as cut:
        statuses, err = launch(trains, Path(), on_two_hosts)
        took = time.monotonic() - cut.at
    assert statuses == [1, 1], err
    assert took < 10 * TIMEOUT
    first, second = (host.name for host in hosts)
    lines = [line for line in err.splitlines() if line.startswith("lesam-dist: error")]
    assert len(lines) == 2, err
    kept, lost = sorted(lines, key=lambda line: "no step for" not in line)
    assert f"rank 1 on {second} is silent, stopped or cut off (last seen in " in kept
    assert f"rank 1 on {second}: stopped" in lost
    assert f"rank 0 on {first}, which keeps the store at {hosts[0].address}:" in lost
    assert f"does not answer for {TIMEOUT:g} s (parallel.timeout_s)" in lost
    hosts[1].switch("up")
    statuses, err = launch(trains, Path(), on_two_hosts)
    assert statuses == [0, 0], err
    assert_same_weights()


@pytest.mark.full
def test_a_cable_that_is_cut_under_torchrun(hosts: tuple[Host, Host], flags: list[str]) -> None:
    """Its own connection to the store may then wait for as long as the cable is cut: the workers do not."""
    run_undisturbed()
    flags = [*flags, "--parallel.timeout_s", str(2.5 * TIMEOUT)]  # the processes do not start at one time
    with torchrun(hosts, flags) as agents:
        with Cut(hosts[0]) as cut:
            cut.join(120)
        said = [errors_in(f"stderr{index}") for index in range(2)]
        assert [len(lines) for lines in said] == [1, 1]
        hosts[0].switch("up")
    assert all(agent.returncode for agent in agents)
    text = said[0][0] + said[1][0]
    assert "is silent, stopped or cut off (last seen in " in text  # says who is on the host that keeps the store
    assert "torchrun's first node, which keeps the store at" in text
    with torchrun(hosts, flags) as agents:
        pass
    assert [agent.returncode for agent in agents] == [0, 0], Path("stderr0").read_text() + Path("stderr1").read_text()
    assert_same_weights()


def errors_in(file: str) -> list[str]:
    """The errors of `lesam-dist`, when there is one."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        lines = [line for line in Path(file).read_text().splitlines(keepends=True) if "lesam-dist: error" in line]
        if lines and lines[-1].endswith("\n"):
            return lines
        time.sleep(0.1)
    raise AssertionError(Path(file).read_text())


@contextmanager
def torchrun(hosts: tuple[Host, Host], flags: list[str]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """`torchrun` on each host, waited for at the end; stderr is in the files `stderr0` and `stderr1`."""
    port, started = processes.free_port(), []
    for index, host in enumerate(hosts):
        words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        words += ["--rdzv-backend", "c10d", "--rdzv-id", "two", "--rdzv-endpoint", f"{hosts[0].address}:{port}"]
        words += ["--rdzv-conf", f"is_host={1 - index}", "--local-addr", host.address]
        words += ["-m", "lesam_dist.train", *flags, "--run_dir", "run", "--resume", "auto"]
        environ = os.environ | {"GLOO_SOCKET_IFNAME": host.interface, "PYTHONPATH": os.pathsep.join(sys.path)}
        with open(f"stderr{index}", "wb") as err:
            started.append(subprocess.Popen(host.command(*words), stderr=err, stdout=subprocess.DEVNULL, env=environ))
    try:
        yield started
        for agent in started:
            with suppress(subprocess.TimeoutExpired):
                agent.wait(120)
    finally:
        for agent in started:
            agent.kill()  # its worker ends with it
            agent.wait()
