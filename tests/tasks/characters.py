"""A language model of characters: texts of different lengths, in dicts, without BatchNorm."""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lesam_dist.tasks import Metric, Table, Task

LENGTH, WIDTH, PAD = 48, 32, 0
Batch = dict[str, Tensor]


def lines() -> list[str]:
    """Real text: what the standard library says of two of its modules, line by line."""
    text = "\n".join(doc for module in (argparse, textwrap) for doc in docstrings(module))
    found = [line.strip()[: LENGTH + 1] for line in text.splitlines()]
    return [line for line in found if len(line) > 4 and line.isascii()]


def docstrings(module: Any) -> list[str]:
    found = [module.__doc__ or ""]
    for one in vars(module).values():
        if isinstance(one, type) and one.__module__ == module.__name__:
            found += [str(getattr(member, "__doc__", "") or "") for member in (one, *vars(one).values())]
    return found


class Transformer(nn.Module):
    """Two causal blocks, the first characters of which the next is to be told of."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(128, WIDTH), nn.Embedding(LENGTH, WIDTH)
        block = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.1, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 128)

    def forward(self, text: Tensor, padding: Tensor) -> Tensor:
        size = text.shape[1]
        x = self.token(text) + self.place(torch.arange(size))
        causal = torch.ones(size, size, dtype=torch.bool).triu(1)
        logits: Tensor = self.head(self.blocks(x, mask=causal, src_key_padding_mask=padding))
        return logits


class Characters(Task):
    """The next character of a line; each character counts the same, however long its line is."""

    metric = Metric("bits", "bits per character", higher_is_better=False)

    def open_data(self) -> tuple[Table, Table]:
        rows = torch.full((len(lines()), LENGTH + 1), PAD)
        for row, line in zip(rows, lines(), strict=True):
            row[: len(line)] = torch.tensor([ord(character) for character in line])
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
        train, val = rows[: -len(rows) // 5], rows[-len(rows) // 5 :]
        return Table({"text": train}), Table({"text": val})

    def build_model(self) -> nn.Module:
        return Transformer()

    def draw(self, batch: Batch, at: object) -> Batch:
        return self.split(batch)

    def split(self, batch: Batch) -> Batch:
        text = batch["text"]
        return {"text": text[:, :-1], "next": text[:, 1:], "padding": text[:, :-1] == PAD}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.summed(model, batch) / self.count(batch)

    def count(self, batch: Batch) -> Tensor:
        return (batch["next"] != PAD).sum()

    def summed(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(batch["text"], batch["padding"])
        return F.cross_entropy(logits.flatten(0, 1), batch["next"].flatten(), ignore_index=PAD, reduction="sum")

    def measure(self, model: nn.Module, batch: Batch) -> dict[str, Tensor | float]:
        whole = self.split(batch)
        return {
            "loss": self.summed(model, whole),
            "characters": self.count(whole),
            "samples": len(batch["text"]),
        }

    def report(self, sums: Any) -> dict[str, float]:
        loss = float(sums["loss"] / sums["characters"])
        return {"loss": loss, "bits": loss / torch.log(torch.tensor(2.0)).item()}
