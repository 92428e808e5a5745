"""A short run of `fuzz_cli`, with a fresh seed."""

from __future__ import annotations

from tests.config.fuzz_cli import fuzz


def test_every_command_line_ends_well(seed: int) -> None:
    """Status 0, or 2 with one line: nothing else, and both of them often."""
    counts = fuzz(cases=120, dry_runs=4, plans=1, seed=seed)
    assert counts.keys() == {"0", "2"}
    assert min(counts.values()) > 10
