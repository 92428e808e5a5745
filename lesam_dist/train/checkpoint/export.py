"""`lesam-dist export`: the weights of a checkpoint as one safetensors file, in one process and without the model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from lesam_dist.config.parser import Parser, examples
from lesam_dist.errors import UserError
from lesam_dist.train.checkpoint import payload
from lesam_dist.train.checkpoint.weights import checkpoint_in, weights_of

_TEXT = """
Write the weights and buffers of a checkpoint into one safetensors file, by the names of the model's state_dict():

  model.load_state_dict(safetensors.torch.load_file("model.safetensors"))

All files are verified first. In the middle of an epoch BatchNorm's statistics are the mean over the processes.
"""


def export(argv: Sequence[str]) -> None:
    """The command.

    Raises:
        UserError: no checkpoint there, or a damaged one; no averages in it; the file exists or cannot be written.
    """
    parser = Parser("export", _TEXT, examples("export runs/default model.safetensors --ema"))
    parser.add_argument("checkpoint", type=Path, help="folder of a checkpoint; or of a run, for its latest one")
    parser.add_argument("output", type=Path, help="file to write, model.safetensors")
    parser.add_argument("--ema", action="store_true", help="the averaged weights, of a run that keeps an average")
    parser.add_argument("--force", action="store_true", help="overwrite the file")
    args = parser.parse_args(argv)
    _require_free(args.output, args.force)
    source = checkpoint_in(args.checkpoint)
    weights, content = weights_of(source, averaged=args.ema)
    aside = args.output.with_name(f".{args.output.name}.partial")
    try:
        aside.unlink(missing_ok=True)
        payload.write(aside, weights)
        os.replace(aside, args.output)
    except OSError as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise UserError(f"'{args.output}' cannot be written: {error.strerror or error}.") from error
    what = "averaged weights" if args.ema else "weights"
    elements = sum(tensor.numel() for tensor in weights.values())
    print(f"{args.output}: {what} of step {content.get('step')}, {len(weights)} tensors with {elements:,} elements")


def _require_free(output: Path, force: bool) -> None:
    if output.is_dir():
        raise UserError(f"'{output}' is a folder: name a file in it, as {output / 'model.safetensors'}.")
    if output.exists() and not force:
        raise UserError(f"'{output}' exists: choose another name, or overwrite it with --force.")
    if not output.parent.is_dir():
        raise UserError(f"'{output.parent}' is no folder: make it first.")
