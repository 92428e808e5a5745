"""What a process keeps in memory, as Linux counts it."""

from __future__ import annotations

from pathlib import Path


def memory() -> dict[str, float]:
    """Of this process in MiB: its own (Private), and its share of what it has together with others (Pss)."""
    lines = [line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]]
    kib = {words[0].rstrip(":"): int(words[1]) for words in lines}
    return {"private": (kib["Private_Clean"] + kib["Private_Dirty"]) / 1024, "pss": kib["Pss"] / 1024}
