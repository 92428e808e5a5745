"""The fault campaign: that it would see a lost run, and a small part of it."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import faults
import pytest
import torch
from lib.faults import verdict
from lib.faults.campaign import Journal, run_chains, summary
from lib.faults.damage import break_image, damage_run
from lib.faults.images import TRAIN, UNKNOWN, VAL, numbers_of, write_images
from lib.faults.plan import BAD_IMAGES, KINDS, Chain, draw_chain
from lib.faults.scenarios import BATCH, SCENARIOS, STEPS
from lib.faults.strike import Struck
from lib.faults.verdict import End, WrongError
from PIL import Image
from safetensors.torch import save_file

from lesam_dist.config.command_line import parse
from lesam_dist.data import Transform, build_loader, scan_split
from tests.seeds import seed_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("coloured")
    write_images(root)
    return root


@pytest.mark.parametrize("backend", ["dali", "torchvision"])
def test_what_a_batch_holds_is_read_from_its_pixels(digits: Path, backend: str, seed: int) -> None:
    """Whatever was cropped, flipped and resized: against the names of the files, in the order of the plan."""
    config = parse(["--config", "digits", "--data.root", str(digits)])
    folder, side = scan_split(digits, "train"), int(torch.randint(8, 20, ()))
    transform = Transform(
        image_size=side,
        val_resize=side,
        random_area=(0.2, 1.0),
        random_aspect_ratio=(0.5, 2.0),
        mean=config.data.mean,
        std=config.data.std,
    )
    common: dict[str, Any] = {"rank": 0, "world_size": 1, "device": torch.device("cpu")}
    loader = build_loader(
        folder, backend=backend, train=True, transform=transform, batch_size=BATCH, seed=seed, workers=1, **common
    )
    try:
        found = [number for images, _ in loader.epoch(0) for number in numbers_of(images, config.data)]
    finally:
        loader.close()
    assert sorted(found) == list(range(TRAIN))
    assert sorted(int(Path(path).stem) for path in folder.paths) == list(range(TRAIN))
    assert len(scan_split(digits, "val")) == VAL


def test_a_picture_of_two_files_is_of_none(digits: Path) -> None:
    config = parse(["--config", "digits"]).data
    images = torch.zeros(1, 3, 4, 4)
    images[0, 2, 0, 0] = 1
    assert numbers_of(images, config) == [UNKNOWN]


@pytest.mark.parametrize("how", BAD_IMAGES)
def test_a_broken_image_cannot_be_decoded(digits: Path, tmp_path: Path, how: str) -> None:
    file = tmp_path / "broken.png"
    shutil.copy(next(digits.rglob("0003.png")), file)
    break_image(file, how)
    with pytest.raises((OSError, SyntaxError)), Image.open(file) as image:
        image.load()


class Ended:
    """The files of a run that has ended, drawn at random, to tamper with."""

    def __init__(self, folder: Path, draw: random.Random) -> None:
        self.run_dir, self.consumed = folder / "run", folder / "consumed"
        self.checkpoint = self.run_dir / "checkpoints" / f"step_{STEPS:08d}"
        self.checkpoint.mkdir(parents=True)
        self.tensors = {"a": torch.randn(3, 2), "b": torch.arange(4, dtype=torch.int64)}
        save_file(self.tensors, self.checkpoint / "rank_00000.safetensors")
        self.lines: list[dict[str, Any]] = [
            {"step": step, "split": "train", "loss": draw.random(), "images_per_s": draw.random()}
            for step in range(1, STEPS + 1)
        ]
        self.steps: list[dict[str, Any]] = []
        for _ in range(BATCH * STEPS // TRAIN):
            order = draw.sample(range(TRAIN), TRAIN)
            for i in range(0, TRAIN, BATCH):
                for rank in range(2):
                    part = order[i + rank * BATCH // 2 :][: BATCH // 2]
                    self.steps.append({"start": 0, "rank": rank, "of": 2, "step": len(self.steps) // 2, "images": part})
        self.write()

    def write(self) -> None:
        (self.run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        self.consumed.write_text("".join(json.dumps(line) + "\n" for line in self.steps))

    def end(self) -> End:
        return verdict.end_of(self.run_dir, self.consumed)


@pytest.fixture
def ended(tmp_path: Path, seed: int) -> Ended:
    return Ended(tmp_path, random.Random(seed))


def test_a_step_that_was_made_again_counts_once(ended: Ended, seed: int) -> None:
    """The history that survives is of the last start that made each step."""
    expected = ended.end()
    assert verdict.counted_wrongly(expected.history) == []
    cut = random.Random(seed).randrange(1, STEPS)
    again = [{**line, "start": 1} for line in ended.steps if line["step"] >= cut]
    for line in ended.steps:
        if line["step"] >= cut:
            line["images"] = [0, 0, 0, 0]  # what the lost part of the history had
    ended.steps += again
    ended.lines = [{**line, "images_per_s": 0.0} for line in ended.lines]
    ended.write()
    assert verdict.differences(ended.end(), expected) == []
    assert verdict.first_steps(ended.consumed)[1] == (cut, STEPS - 1)


def test_what_differs_is_said(ended: Ended, seed: int) -> None:
    expected, draw = ended.end(), random.Random(seed)
    weights = ended.tensors["a"].view(torch.int32)
    weights[draw.randrange(3), draw.randrange(2)] ^= 1 << draw.randrange(32)
    save_file(ended.tensors, ended.checkpoint / "rank_00000.safetensors")
    assert verdict.differences(ended.end(), expected) == ["1 of 2 tensors differ, as rank_00000.safetensors/a"]
    line = draw.randrange(STEPS)
    ended.lines[line]["loss"] += 1e-9
    ended.write()
    assert f"metrics differ from train step {line + 1} on: loss" in verdict.differences(ended.end(), expected)
    step = ended.steps[draw.randrange(len(ended.steps))]
    step["images"] = step["images"][::-1]
    ended.write()
    assert any(said.startswith(f"step {step['step']} consumed") for said in verdict.differences(ended.end(), expected))
    step["images"][0] = step["images"][1]
    ended.write()
    assert len(verdict.counted_wrongly(ended.end().history)) == 1


def test_a_batch_that_is_left_out_is_missed_by_nobody(ended: Ended) -> None:
    with pytest.raises(WrongError, match="step 20 was not left out"):
        verdict.end_of(ended.run_dir, ended.consumed, 20)
    ended.lines = [line for line in ended.lines if line["step"] != 21]
    ended.write()
    end = verdict.end_of(ended.run_dir, ended.consumed, 20)
    assert end.history[20] == []
    assert verdict.counted_wrongly(end.history, left_out=20) == []
    assert len(verdict.counted_wrongly(end.history)) == 1


def test_a_run_that_starts_again_may_know_bad_files_earlier(ended: Ended) -> None:
    ended.lines[9:] = [{**line, "bad_files": 1.0} for line in ended.lines[9:]]
    ended.write()
    expected = ended.end()
    ended.lines[2:] = [{**line, "bad_files": 1.0} for line in ended.lines[2:]]
    ended.write()
    assert verdict.differences(ended.end(), expected) == []
    ended.lines[-1]["bad_files"] = 2.0
    ended.write()
    assert verdict.differences(ended.end(), expected) == ["2.0 bad files are counted at the end, not 1.0"]


def test_what_is_wrong_in_itself_is_said(ended: Ended) -> None:
    log = ended.run_dir / "metrics.jsonl"
    for text, message in (
        (log.read_text() + log.read_text().splitlines()[3] + "\n", "has train step 4 twice"),
        (log.read_text() + '{"step": 3', "the last line of metrics.jsonl is torn"),
        (log.read_text().replace("{", "", 1), "line 1 of metrics.jsonl is torn"),
    ):
        log.write_text(text)
        with pytest.raises(WrongError, match=message):
            ended.end()
        ended.write()
    ended.steps = [line for line in ended.steps if (line["step"], line["rank"]) != (5, 1)]
    ended.write()
    with pytest.raises(WrongError, match="rank 1 did not make step 5"):
        ended.end()
    ended.checkpoint.rename(ended.checkpoint.with_name("step_00000023"))
    with pytest.raises(WrongError, match="step_00000023, not that of step 24"):
        ended.end()


def test_chains_are_a_function_of_the_seed(seed: int) -> None:
    chains = [draw_chain(seed, number, list(KINDS)) for number in range(600)]
    assert chains == [draw_chain(seed, number, list(KINDS)) for number in range(600)]
    assert len({(chain.scenario, chain.variant, chain.faults) for chain in chains}) > 550
    kinds = {fault.kind for chain in chains for fault in chain.faults}
    assert kinds == {kind for kind, (make, _) in KINDS.items() if make is not None}
    assert {chain.variant.name.split("-")[0] for chain in chains} == {"plain", "bad", "nan", "loss"}
    assert {chain.scenario for chain in chains} == set(SCENARIOS)
    for chain in chains:
        assert not chain.scenario.without & {fault.kind for fault in chain.faults}
        assert all(fault.resize is None for fault in chain.faults[:-1]), "bits cannot be compared after it"


def test_damage_leaves_an_older_checkpoint(ended: Ended, seed: int) -> None:
    """A single checkpoint is not touched: there would be nothing to go back to, and that is no fault of the run's."""
    draw = random.Random(seed)
    kinds = ["truncated", "bit-flip", "zeros", "missing", "garbage"]
    assert [damage_run(kind, ended.run_dir, draw.randrange(2**31)) for kind in kinds] == [None] * len(kinds)
    older = ended.checkpoint.with_name("step_00000018")
    shutil.copytree(ended.checkpoint, older)
    before = {path: path.read_bytes() for path in ended.run_dir.rglob("*") if path.is_file()}
    for kind in kinds:
        damaged = damage_run(kind, ended.run_dir, draw.randrange(2**31))
        changed = [path for path, content in before.items() if not path.exists() or path.read_bytes() != content]
        assert [f"{path.parent.name}/{path.name}" for path in changed] == [damaged]
        assert older not in {path.parent for path in changed}
        for path in changed:
            path.write_bytes(before[path])


class OneOfThreeIsLost:
    """Stands for the runs: every third chain is lost, and after so many somebody presses Ctrl-C."""

    def __init__(self, patience: int) -> None:
        self.patience, self.made = patience, [0]

    def run(self, chain: Chain) -> list[Struck]:
        if len(self.made) > self.patience:
            raise KeyboardInterrupt
        self.made.append(chain.number)
        return [Struck("kill-start", True, "gone" if chain.number % 3 == 0 else None), Struck("nan", injected=False)]


def test_a_campaign_goes_on_from_its_journal(tmp_path: Path) -> None:
    settings = {"seed": 7, "kinds": ["kill-start"]}
    first = Journal(tmp_path / "journal.jsonl", settings)
    first.open()
    runs: Any = OneOfThreeIsLost(4)
    with pytest.raises(KeyboardInterrupt):
        run_chains(runs, first, 10, 7, ["kill-start"], SCENARIOS)
    with first.path.open("a") as file:
        file.write('{"chain": 4, "fau')  # killed while it wrote
    second = Journal(first.path, settings)
    second.open()
    assert second.done == first.done
    rest: Any = OneOfThreeIsLost(100)
    run_chains(rest, second, 10, 7, ["kill-start"], SCENARIOS)
    assert rest.made[1:] == list(range(4, 10)), "none twice, none left out"
    third = Journal(first.path, settings)
    third.open()
    assert third.done == second.done
    assert "| kill-start | 10 | 6 | 4 |" in summary(third.faults)
    with pytest.raises(ValueError, match="seed 7 there, 8 now"):
        Journal(first.path, {**settings, "seed": 8}).open()


Found = dict[str, list[int]]  # [injected, survived, lost] by kind


@pytest.fixture(scope="module")
def campaigns(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]], int]:
    """What `fault_campaigns.py` printed; the faults of a chain with one that no run survives; a fresh seed."""
    folder, seed = tmp_path_factory.mktemp("campaigns"), seed_of("campaigns")
    command = [sys.executable, Path(__file__).with_name("fault_campaigns.py"), str(folder), str(seed)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environ, timeout=400)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(done.stdout.splitlines()[-1]), seed


def tables(text: str) -> list[Found]:
    found: list[Found] = []
    for kind, *numbers in re.findall(r"^\| ([a-z0-9-]+) \| (\d+) \| (\d+) \| (\d+) \|$", text, re.MULTILINE):
        if not found or "all" in found[-1]:
            found.append({})
        found[-1][kind] = [int(number) for number in numbers]
    return found


def test_runs_survive(campaigns: tuple[str, list[dict[str, Any]], int]) -> None:
    """Eight faults of the campaign, always the same, and a new one each time."""
    text, _, seed = campaigns
    fixed, fresh = tables(text)
    assert fixed["all"][0] >= 8
    assert len(fixed) > 5, "of different kinds"
    assert fixed["all"][2] == 0, text
    assert fresh["all"][0] >= 1
    assert fresh["all"][2] == 0, f"SEED={seed}\n{text}"


def test_a_lost_run_is_seen_and_its_fault_named(campaigns: tuple[str, list[dict[str, Any]], int]) -> None:
    """A gradient that is lost in one start alone, and not the kill after it, which the run survives."""
    _, (planted, survived), _ = campaigns
    assert survived["lost"] is None
    assert "tensors differ" in planted["lost"]


def test_kinds_that_are_impossible_here_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(faults, "can_mount", lambda: False)
    monkeypatch.setattr(faults, "can_link", lambda: False)
    journal = tmp_path / "journal.jsonl"
    assert faults.main(["--faults", "0", "--seed", "3", "--journal", str(journal)]) == 0
    kinds = json.loads(journal.read_text())["kinds"]
    assert set(KINDS) - set(kinds) == {"full-disk", "link-cut"}
    assert faults.main(["--faults", "0", "--seed", "4", "--journal", str(journal)]) == 2
    assert "of another campaign: seed 3 there, 4 now" in capsys.readouterr().err
