"""The command that goes on with a run: what was typed, whoever started the process, with the run's folder behind it."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from pathlib import Path

import pytest

from lesam_dist.config.command_line import parse
from lesam_dist.config.flags import words_without
from lesam_dist.config.same_run import require_longer
from lesam_dist.config.schema import Config
from lesam_dist.config.values import flatten
from lesam_dist.errors import DivergedError, PreemptedError, UserError
from lesam_dist.parallel.peers import PeerError
from lesam_dist.parallel.place import Place, find_place
from lesam_dist.train.out_of_memory import NoMemoryError
from lesam_dist.train.resume_command import RunCommand, Started, processes_above, start_of
from tests.conftest import Command
from tests.parallel.terminal import launch, torchrun_like

WORDS = ["--config", "digits", "--data.root", "/my data", "--optimizer.sigma=0.2"]
WORKER = Started([sys.executable, "-u", "-m", "lesam_dist.train", *WORDS])
TORCHRUN = ["torchrun", "--nproc-per-node", "8", "-m", "lesam_dist.train"]
ACCELERATE = ["accelerate", "launch", "--num_processes", "4", "-m", "lesam_dist.train"]
ALONE = Place()


def started(*words: str, **environ: str) -> Started:
    return Started(words, environ)


SHELL = started("-bash", NNODES="9")


@pytest.mark.parametrize(
    ("own", "above", "wanted"),
    [
        (started("lesam-dist", "train", *WORDS), [SHELL], "lesam-dist train"),
        (started("python3", "-m", "lesam_dist", "train", *WORDS), [SHELL], "python3 -m lesam_dist train"),
        (WORKER, [started(*TORCHRUN, *WORDS), SHELL], " ".join(TORCHRUN)),
        (WORKER, [started(*ACCELERATE, *WORDS), SHELL], " ".join(ACCELERATE)),
        (
            WORKER,
            [started(*TORCHRUN, *WORDS), started("/a b/torchrun.sh", *WORDS, NNODES="2", NODE_RANK="1", HOME="/")],
            "NNODES=2 NODE_RANK=1 '/a b/torchrun.sh'",
        ),
        (WORKER, [started(*TORCHRUN, *WORDS), started("uv", "run", *TORCHRUN, *WORDS), SHELL], "uv run torchrun"),
        (WORKER, [started("-bash"), started(*TORCHRUN, *WORDS)], f"{sys.executable} -u -m lesam_dist.train"),
        (started("python", "mine.py"), [SHELL], "lesam-dist train"),
    ],
)
def test_what_was_typed(own: Started, above: list[Started], wanted: str) -> None:
    assert start_of(WORDS, own, above, ALONE, {}).startswith(wanted)


def test_what_was_typed_of_another_command() -> None:
    own = started("lesam-dist", "compare", *WORDS)
    assert start_of(WORDS, own, [SHELL], ALONE, {}, "compare") == "lesam-dist compare"
    worker, torchrun = started(sys.executable, "-m", "lesam_dist", "compare", *WORDS), [*TORCHRUN[:-1], "lesam_dist"]
    assert start_of(WORDS, worker, [started(*torchrun, "compare", *WORDS)], ALONE, {}, "compare") == shlex.join(
        [*torchrun, "compare"]
    )
    assert start_of(WORDS, started("python", "mine.py"), [SHELL], ALONE, {}, "sweep") == "lesam-dist sweep"


def test_what_was_typed_without_words() -> None:
    """Every command line ends with no words: only a launcher counts."""
    own = started("python", "-m", "lesam_dist.train")
    assert start_of([], own, [started(*TORCHRUN), SHELL], ALONE, {}) == " ".join(TORCHRUN)
    assert start_of([], own, [SHELL, started(*TORCHRUN)], ALONE, {}) == "python -m lesam_dist.train"


def test_a_script_that_resumes_by_itself() -> None:
    """launch/torchrun.sh puts `--resume auto` before the words where nodes come and go."""
    words = ["--resume", "auto", *WORDS]
    above = [started(*TORCHRUN, *words), started("launch/torchrun.sh", *WORDS, NNODES="1:4")]
    assert start_of(words, WORKER, above, ALONE, {}) == "NNODES=1:4 launch/torchrun.sh"


def test_launchers_that_are_not_above() -> None:
    own = started("lesam-dist", "train", *WORDS)
    tasks = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "3", "SLURM_STEP_ID": "0"}
    environ = tasks | {"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_STEP_NUM_NODES": "2", "MASTER_ADDR": "a"}
    found = start_of(WORDS, own, [started("slurmstepd: [7.0]")], find_place(environ), environ)
    assert found == "srun --nodes 2 --ntasks 16 lesam-dist train"


def test_the_parent_is_found() -> None:
    first = next(processes_above())
    assert first.words == [word for word in Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0") if word]
    assert "PATH" in first.environ


def test_flags_are_taken_out_whole() -> None:
    words = [
        "--a",
        "1",
        "--run_dir=x",
        "--run_dir",
        "y",
        "--dry_run",
        "--lr",
        "-0.5",
        "--resume",
        "auto",
        "--optimizer.args.sigma",
        "1",
        "--b",
    ]
    kept = words_without(words, {"run_dir", "resume", "optimizer.args.sigma"})
    assert kept == ["--a", "1", "--dry_run", "--lr", "-0.5", "--b"]
    assert words_without(["--optimizer.sigma", "1"], {"optimizer.args.sigma"}) == []


def command_of(run_dir: str) -> RunCommand:
    words = ["--config", "digits", "--resume", "auto", "--run_dir", "elsewhere", "--epochs=3", "--task_args", "{}"]
    return RunCommand("lesam-dist train", words, parse([*words, "--run_dir", run_dir]))


def test_the_command_says_the_same_run_and_to_resume_it() -> None:
    """Read back by a shell and the trainer's own parser, it is the run's config."""
    command = command_of("my runs/it's")
    words = shlex.split(command.again())
    assert words[:2] == ["lesam-dist", "train"]
    assert parse(words[2:]) == Config(**{**vars(command.config), "resume": "auto"})
    longer = parse(shlex.split(command.longer().partition(": ")[2])[2:])
    assert (longer.epochs, longer.resume, longer.run_dir) == (6, "auto", "my runs/it's")


def test_longer_keeps_what_a_recipe_would_stretch(tmp_path: Path) -> None:
    """What --epochs moves beside the schedules would be refused."""
    file = tmp_path / "config.yaml"
    text = "epochs: 4\noptimizer:\n  start_epoch: 1\n  stop_epoch: 2\nschedule:\n"
    file.write_text(f"{text}  lr_warmup_epochs: 1\n  image_size: [[0, 160], [2, 224]]\n")
    words = ["--config", str(file), "--data.root", "x"]
    config = parse(words)
    longer = shlex.split(RunCommand("lesam-dist train", words, config).longer().partition(": ")[2])[2:]
    require_longer(parse(longer), flatten(config), "then")
    with pytest.raises(UserError, match=r"optimizer.start_epoch: 1.0 then, 2.0 now"):
        require_longer(parse([*words, "--epochs", "8"]), flatten(config), "then")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (PreemptedError(""), "go on with: lesam-dist train"),
        (PeerError("", False), "go on with: lesam-dist train"),
        (KeyboardInterrupt(), "go on with: lesam-dist train"),
        (UserError(""), "when that is mended, go on with: lesam-dist train"),
        (OSError(28, ""), "when that is mended, go on with: lesam-dist train"),
        (NoMemoryError(""), "with one of these changes as a flag behind it, go on with: lesam-dist train"),
    ],
)
def test_what_is_said_of_an_end(error: BaseException, text: str) -> None:
    said = command_of("runs/a").after(error)
    assert said.startswith(text)
    assert "--run_dir runs/a --resume auto" in said
    assert "\n" not in said


def test_a_run_that_diverged_is_not_resumed_as_it_was() -> None:
    command = command_of("runs/a")
    words = shlex.split(command.after(DivergedError("")).partition("from the start: ")[2])[2:]
    again = parse(words)
    assert again.optimizer.lr == command.config.optimizer.lr / 2
    assert (again.run_dir, again.resume) == (f"runs/a_lr{again.optimizer.lr:g}", None)


def preempted(rank: int) -> None:
    from lesam_dist import cli

    cli._train(Path("flags").read_text().split("\n"))


def test_one_line_for_all_processes(small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two processes, stopped by the alarm of one: the last line of stderr is the command, once, behind why."""
    monkeypatch.chdir(tmp_path)
    flags = [*small, "--run_dir", "a run", "--parallel.device", "cpu", "--epochs", "500", "--data.workers", "1"]
    Path("flags").write_text("\n".join(flags))
    statuses, err = launch(stops_itself, tmp_path, torchrun_like)
    assert statuses == [75, 75], err
    assert err.count("go on with: ") == 1
    reason, command = err.strip().splitlines()[-2:]
    assert reason.startswith("lesam-dist: stopped by "), err
    told = shlex.split(command.partition("go on with: ")[2])
    assert told[:2] == ["lesam-dist", "train"]
    assert told[-4:] == ["--run_dir", "a run", "--resume", "auto"]


def stops_itself(rank: int) -> None:
    import threading

    def stop() -> None:
        while not Path("a run/checkpoints/latest").exists():
            threading.Event().wait(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    if rank == 1:
        threading.Thread(target=stop, daemon=True).start()
    preempted(rank)


def test_nothing_is_said_of_a_run_that_has_not_begun(command: Command, tmp_path: Path) -> None:
    status, _, err = command("--config", "digits", "--data.root", tmp_path / "a", "--data.builtin", "null")
    assert status == 2
    assert "go on with" not in err
