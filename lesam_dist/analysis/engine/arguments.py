"""The arguments that all analyses have."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path

from lesam_dist.config.explain import unknown_key
from lesam_dist.config.flags import read_flags
from lesam_dist.config.parser import Parser
from lesam_dist.errors import UserError

_SPLITS = ("train", "val")
_EPILOG = """example:
  lesam-dist analyze {name} {checkpoints}

on several GPUs:
  torchrun --nproc-per-node 8 -m lesam_dist analyze {name} {checkpoints}

Other flags are those of `lesam-dist train`, over the run's own config:
--data.root DIR, --data.eval_batch_size N, --parallel.device cpu. The same
command again goes on where it was interrupted."""


class AnalysisParser(Parser):
    """The arguments of an analysis of checkpoints.

    Args:
        name: of the analysis.
        text: what it does.
        least, most: how many checkpoints it takes; None: any number.
        split: whose images, by default.
    """

    def __init__(self, name: str, text: str, least: int = 1, most: int | None = 1, split: str = "train") -> None:
        example = " ".join(["runs/digits", "runs/other"][: 1 if most == 1 else 2])
        super().__init__(f"analyze {name}", text, _EPILOG.format(name=name, checkpoints=example))
        self._least, self._most = least, most
        self.add_argument(
            "checkpoints",
            metavar="checkpoint",
            nargs="+",
            type=Path,
            help="folder of a checkpoint; of a run, for its latest one; or a file of a state_dict, with --config",
        )
        self.add_argument("--config", help="recipe or YAML file that a file of weights is of")
        self.add_argument("--ema", action="store_true", help="the averaged weights, of a run that keeps an average")
        self.add_argument("--split", choices=_SPLITS, default=split, help=f"whose images (default: {split})")
        self.add_argument("--samples", type=_samples, default=1024, help="number of images, or all (default: 1024)")
        self.add_argument("--seed", type=int, default=0, help="of the choice of images and of directions (default: 0)")
        self.add_argument("--output", type=Path, help="folder for the results (default: RUN_DIR/analysis)")
        self.add_argument("--force", action="store_true", help="replace results that were made with other settings")

    def check(self, arguments: argparse.Namespace, flags: Sequence[str]) -> None:
        """Refuse what each argument's own type lets pass, and flags that `lesam-dist train` does not have.

        Raises:
            UserError: for another number of checkpoints, a negative seed, an unknown flag.
        """
        own = [option for action in self._actions for option in action.option_strings]
        for path, _ in read_flags(flags):
            if wrong := unknown_key([path]):
                near = difflib.get_close_matches(f"--{path}", own, n=1, cutoff=0.7)
                raise UserError(f"unknown option --{path}: did you mean {near[0]}?" if near else wrong)
        given = len(arguments.checkpoints)
        if given < self._least or (self._most is not None and given > self._most):
            wanted = f"at least {self._least}" if self._most is None else str(self._most)
            self.error(f"this is an analysis of {wanted} checkpoint{'s' * (wanted != '1')}, and there are {given}")
        if arguments.seed < 0:
            raise UserError(f"--seed is {arguments.seed}: it must be at least 0.")


def _samples(text: str) -> int | None:
    """A number of images, at least 1; None for "all"."""
    if text == "all":
        return None
    value = int(text)
    if value < 1:
        raise ValueError
    return value


_samples.__name__ = "number of images, which is at least 1 or all,"  # in argparse's message
