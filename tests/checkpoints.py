"""A checkpoint's folder as plain tensors, read by nothing but safetensors and json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "BOOL": torch.bool,
}


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """``model``, ``optimizer`` and maybe ``ema``: tensors by name, unsharded; ``own``: the same by rank; ``values``."""
    index = json.loads((folder / "index.json").read_text())
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    state: dict[str, Any] = {"values": manifest["values"]}
    for name, entry in index["tensors"].items():
        part, _, rest = name.partition(".")
        state.setdefault(part, {})[rest] = join(entry, files)
    state["own"] = [{name: join(entry, files) for name, entry in part.items()} for part in index["own"]]
    return state


def latest(run_dir: Path) -> Path:
    """The folder that a run would go on from."""
    checkpoints = run_dir / "checkpoints"
    return checkpoints / (checkpoints / "latest").read_text()


def join(entry: dict[str, Any], files: dict[str, dict[str, Tensor]]) -> Tensor:
    whole = torch.zeros(entry["size"], dtype=DTYPES[entry["dtype"]])
    for chunk in entry["chunks"]:
        box = tuple(slice(o, o + s) for o, s in zip(chunk["offsets"], chunk["sizes"], strict=True))
        whole[box] = files[chunk["file"]][chunk["key"]]
    return whole
