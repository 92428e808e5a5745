"""Command lines, configs and folders for `fuzz_cli`: most of them right in most things, so that late checks are met."""

from __future__ import annotations

import contextlib
import io
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from lesam_dist.config.explain import sections
from lesam_dist.config.methods import PLAIN, argument_paths
from lesam_dist.config.recipes import bases, compose, methods, recipes
from lesam_dist.config.values import default_values
from lesam_dist.data.packed.command import pack
from lesam_dist.optim.engine.registry import methods as registered
from lesam_dist.planning.hardware import DEVICES

_NASTY = (
    *(
        "nan",
        "inf",
        "-inf",
        "-1",
        "0",
        "1",
        "2.5",
        "1e400",
        "1e-400",
        "-0.0",
        "1000000000",
        "9" * 30,
        "9" * 5000,
        "0x10",
    ),
    *(
        "null",
        "~",
        "true",
        "yes",
        "",
        " ",
        "''",
        '"',
        "[",
        "]",
        "{}",
        "[]",
        "[[]]",
        "[null]",
        "{a: 1}",
        "a: b",
        "- 1",
        "a\nb",
        "epochs: 3\n",
    ),
    *("0.5,0.5,0.5", "[1,2]", "[1,2,3]", "[nan,1]", "[a,b]", "&a [*a]", "*a", "!!python/none", "%", "\t", "x" * 3000),
    *(
        "\udcff",
        "ein Wörtchen",
        "日本",
        "--",
        "-x",
        "/",
        "..",
        "@",
        "1:30",
        "2001-99-99",
        "auto",
        "AUTO",
        "None",
        "none",
    ),
)
_PLAN = {
    "--gpus": ("1", "8", "1,2", "64,8", "2,,4", "3", "0", "4096", "1000000", "8 , 16"),
    "--gpu": (*DEVICES, "H100", "h1000"),
    "--interconnect": ("400gbit", "100gbit/node", "50GB/s", "1mbit", "0gbit", "400", "gbit", "1e300gbit", "-1gbit"),
    "--gpus_per_node": ("1", "8", "4", "72"),
    "--batch_per_gpu": ("1", "8", "32", "128"),
    "--images": ("1", "100", "1281167"),
    "--hourly": ("2.5", "0.01", "1e308"),
    "--efficiency": ("0.5", "1", "1e-9", "2"),
    "--cores_per_gpu": ("1", "16", "0.5", "1e-9"),
    "--decode_rate": ("300", "1e-9", "1e9"),
    "--json": ("plan.json", "a_file/plan.json", "empty"),
    "--plot": ("plan.png", "plan.xyz", "plan", "empty"),
    "--measure": (),
    "--calibrate": (),
}
_PACK = {
    "--resize": ("16", "17", "64", "15", "100000"),
    "--quality": ("1", "50", "100", "101"),
    "--images_per_shard": ("1", "2", "3", "2000"),
    "--skip_list": ("skip.json", "a_file", "gone.json", "empty"),
    "--workers": ("1", "2", "1024"),
    "--verify": (),
}
_INDEX: dict[str, tuple[str, ...]] = {"--verify": ()}
_ROOTS = ("good", "good", "good", "good/", "./good", "broken", "packed", "empty", "a_file", "gone", "good/train", ".")
_ROOTS += ("damaged", "s3://bucket/x", "file:good", "foo://x", "~nobody/x")
_OUTS = ("out", "out/deeper", "good", "good/train", "good/train/x", "packed", "empty", "a_file", "a_file/x", "s3://b/x")
_SMALL = (
    *("--model.name", "cifar_resnet8", "--model.pretrained", "false", "--data.image_size", "16"),
    *("--data.val_resize", "16", "--data.batch_size", "4", "--data.eval_batch_size", "4", "--parallel.device", "cpu"),
    *("--optimizer.power_steps", "null", "--model.compile", "false"),
)


@dataclass
class Case:
    """A command line, the files that it names, and whether a dry run, or what a plan predicts, follows."""

    argv: list[str]
    files: dict[str, bytes] = field(default_factory=dict)
    runs: bool = False


def make_case(rng: random.Random, runs: bool = False) -> Case:
    """A case in which most things are right, so that the checks behind the first are reached too."""
    case = Case([], runs=runs)
    others = ["compare", "sweep", "trian", "--version", "plan", "plan", "pack", "pack", "index"]
    command = "train" if runs else rng.choice(["train"] * 8 + others)
    if command in ("plan", "pack", "index"):
        return {"plan": make_plan, "pack": _pack, "index": _index}[command](rng)
    case.argv.append(command)
    if runs:
        case.argv += ["--config", rng.choice(recipes())]
    for _ in range(rng.choice([0, 1, 1, 1, 2]) if not runs else rng.choice([0, 0, 0, 1])):
        case.argv += _config(rng, case)
    if command == "compare":
        case.argv += ["--methods", ",".join(rng.choices([*methods(), "lesm", "", "a\nb"], k=rng.randint(1, 3)))]
    if command == "sweep":
        key = rng.choice([*default_values(), "optimizer", "x"])
        case.argv += ["--field", key, "--values", ",".join(_value(rng, key) for _ in range(rng.randint(1, 3)))]
    if command in ("compare", "sweep") and rng.random() < 0.5:
        case.argv += ["--seeds", rng.choice(["1", "2", "0", "x", "1000000000"])]
    for _ in range(rng.choice([0, 1, 1, 2, 3, 6] if not runs else [0, 1, 1, 2])):
        case.argv += _flag(rng)
    if runs:
        case.argv += ["--dry_run", *_SMALL]
    return case


def make_plan(rng: random.Random, runs: bool = False) -> Case:
    """A case of `plan`; one that runs is of a tiny network, and predicts something unless a flag is wrong."""
    case = Case(["plan"], runs=runs)
    if runs or rng.random() < 0.7:
        case.argv += ["--config", rng.choice(recipes())]
    else:
        case.argv += _config(rng, case)
    if runs or rng.random() < 0.9:
        case.argv += ["--gpus", rng.choice(["1", "1,2", "4,2"]) if runs else _one_of(rng, _PLAN["--gpus"])]
    for _ in range(rng.choice([0, 1, 2, 4])):
        case.argv += _own_flag(rng, _PLAN)
    for _ in range(rng.choice([0, 0, 1, 2])):
        case.argv += _flag(rng)
    if runs:
        case.argv += _SMALL
    return case


def _pack(rng: random.Random) -> Case:
    words = [_one_of(rng, _ROOTS)]
    if rng.random() < 0.9:
        words.append(_one_of(rng, (*_OUTS, *(f"out_{rng.randrange(10**9)}",) * len(_OUTS))))
    for _ in range(rng.choice([0, 1, 1, 2, 4])):
        words += _own_flag(rng, _PACK)
    return Case(["pack", *words])


def _index(rng: random.Random) -> Case:
    words = [_one_of(rng, _ROOTS)] if rng.random() < 0.9 else []
    for _ in range(rng.choice([0, 0, 1, 2])):
        words += _own_flag(rng, _INDEX)
    return Case(["index", *words])


def _one_of(rng: random.Random, values: tuple[str, ...]) -> str:
    return rng.choice(_NASTY if rng.random() < 0.15 else values)


def _own_flag(rng: random.Random, flags: dict[str, tuple[str, ...]]) -> list[str]:
    flag = rng.choice([*flags])
    values = flags[flag]
    if rng.random() < 0.04:
        return [_mangled(rng, flag)]
    if not values or rng.random() < 0.02:
        return [flag]
    value = _one_of(rng, values)
    return [f"{flag}={value}"] if rng.random() < 0.3 else [flag, value]


def make_folders(folder: Path, rng: random.Random) -> None:
    """Data sets that are right, packed, broken, damaged and empty."""
    for root in ("good", "broken"):
        for split, count in (("train", 5), ("val", 2)):
            for i in range(count):
                file = folder / root / split / f"class {i % 2}" / f"{i}.jpg"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.frombytes("RGB", (20, 18), rng.randbytes(20 * 18 * 3)).save(file)
    file.write_bytes(file.read_bytes()[:99])
    (folder / "empty").mkdir()
    (folder / "a_file").touch()
    (folder / "skip.json").write_text('{"version": 1, "skip": [{"path": "val/class 1/1.jpg"}]}')
    with contextlib.redirect_stdout(io.StringIO()):
        for name in ("packed", "damaged"):
            pack([str(folder / "good"), str(folder / name), "--images_per_shard", "2", "--workers", "1"])
    shard = folder / "damaged" / "train-000000.tar"
    shard.write_bytes(bytes(len(shard.read_bytes())))


def _config(rng: random.Random, case: Case) -> list[str]:
    kind = rng.random()
    if kind < 0.5:
        name = rng.choice(recipes())
    elif kind < 0.6:
        name = _mangled(rng, rng.choice([*recipes(), *bases()]))
    else:
        name = f"file_{len(case.files)}.yaml"
        case.files[name] = _file(rng)
    return [f"--config={name}"] if rng.random() < 0.2 else ["--config", name]


def _file(rng: random.Random) -> bytes:
    tree: dict[str, Any] = compose(rng.choice(recipes())) if rng.random() < 0.5 else {}
    tree = {key: dict(value) if isinstance(value, dict) else value for key, value in tree.items()}
    for _ in range(rng.randint(0, 4)):
        key = _key(rng)
        try:
            value = yaml.safe_load(_value(rng, key))
        except (yaml.YAMLError, ValueError):
            value = rng.choice([None, [], {}, "x", 1, -1.5, float("nan")])
        section, _, leaf = key.partition(".")
        if leaf and rng.random() < 0.8:
            part = tree.setdefault(section, {})
            if isinstance(part, dict):
                part[leaf] = value
        else:
            tree[rng.choice([key, section])] = value
    text = yaml.safe_dump(tree, sort_keys=False, default_flow_style=rng.choice([None, True, False]))
    data = bytearray(text.encode())
    for _ in range(rng.choice([0, 0, 0, 1, 3])):  # a slip of the finger, or of the disk
        place = rng.randrange(len(data) + 1)
        data[place : place + rng.randint(0, 3)] = rng.choice(
            [b":", b" ", b"\n", b"\t", b"*a", b"&a ", b"\xff", b"\0", b"- "]
        )
    if rng.random() < 0.1:
        lines = bytes(data).splitlines(keepends=True)
        data += rng.choice(lines)  # a line twice
    return bytes(data)


def _flag(rng: random.Random) -> list[str]:
    key = _key(rng)
    value = _value(rng, key)
    return rng.choice(
        [[f"--{key}", value]] * 8 + [[f"--{key}={value}"]] * 4 + [[f"--{key}"], [value], [f"-{key}", value]]
    )


def _key(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.88:
        return rng.choice([*default_values(), *argument_paths()])
    if kind < 0.94:
        return _mangled(rng, rng.choice([*default_values(), *argument_paths()]))
    return rng.choice([*sections(), "help", "print_config", "optimizer.help", "config", "", "data.mean.x"])


def _value(rng: random.Random, key: str) -> str:
    if rng.random() < 0.2:
        return rng.choice([*_NASTY, "a\nb", "a\nb/c\n", "[a\n]"] if rng.random() < 0.8 else ["a\nb"])
    default = default_values().get(key)
    if key == "optimizer.name":
        return rng.choice([*registered(), *PLAIN])
    if isinstance(default, bool):
        return rng.choice(["true", "false"])
    if isinstance(default, int):
        return str(rng.choice([1, 2, 3, 4, 8, 32, 100]))
    if isinstance(default, list):
        return json.dumps([round(rng.random(), 2) for _ in default])
    if isinstance(default, str):
        return rng.choice(
            ["fp32", "bf16", "fp16", "ddp", "fsdp", "hsdp", "none", "sgd", "adamw", "local", "batch", "x", default]
        )
    return rng.choice(["null", "1", "2", str(round(rng.random(), 3)), f"{10 ** rng.uniform(-6, 1):.3g}"])


def _mangled(rng: random.Random, text: str) -> str:
    place = rng.randrange(len(text) + 1)
    return rng.choice(
        [
            text.upper(),
            text.replace("_", "-"),
            text[:place] + text[place + 1 :],
            text[:place] + rng.choice("x\n.") + text[place:],
        ]
    )
