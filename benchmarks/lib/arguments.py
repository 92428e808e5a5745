"""The options that benchmarks have in common, under one name and with one meaning."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from lib.traffic import BASES


class Parser(argparse.ArgumentParser):
    """A parser of one benchmark, with those of the shared options that it asks for."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add_files(self) -> None:
        """What `report.Report` writes."""
        self.add_argument(
            "--json", type=Path, metavar="FILE", help="also write every number there, in seconds and bytes"
        )
        self.add_argument("--markdown", type=Path, metavar="FILE", help="also write the text of stdout there")

    def add_device(self) -> None:
        default = "cuda" if torch.cuda.is_available() else "cpu"
        self.add_argument("--device", choices=("cpu", "cuda"), default=default, help=f"default here: {default}")

    def add_seed(self, of: str) -> None:
        self.add_argument("--seed", type=int, default=torch.seed() % 2**31, metavar="N", help=f"of {of}; default: any")

    def add_names(self, flag: str, known: Iterable[str], default: Sequence[str] | None, note: str) -> None:
        """A list of names with commas between them; ``note`` says what the default is."""
        names = list(known)
        text = f"some of {', '.join(names)}; {note}"
        self.add_argument(flag, type=names_of(names), default=default, metavar="A,B", help=text)

    def add_bases(self) -> None:
        self.add_names("--base", BASES, BASES, "sgd has momentum; default: both")

    def add_integers(self, flag: str, default: Sequence[int] | None, text: str) -> None:
        """A list of numbers with commas between them."""
        self.add_argument(flag, type=_integers, default=default, metavar="N,M", help=text)

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """The arguments, by default the process's; ``argv`` of the result is what was parsed."""
        argv = sys.argv[1:] if argv is None else list(argv)
        args = self.parse_args(argv)
        args.argv = argv
        return args


def names_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """An argparse type: "a,b" to ["a", "b"], all of them in ``known``."""

    def names(text: str) -> list[str]:
        given = [name for name in text.split(",") if name]
        unknown = sorted(set(given) - set(known))
        if unknown or not given:
            what = f"unknown: {', '.join(unknown)}" if unknown else "no name given"
            raise argparse.ArgumentTypeError(f"{what}; choose from {', '.join(known)}")
        return given

    return names


def _integers(text: str) -> list[int]:
    return [int(word) for word in text.split(",") if word]


_integers.__name__ = "list of integers"  # in argparse's message
