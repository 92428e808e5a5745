"""What `lesam-dist` prints without a command, and the list of all commands. Imports the standard library alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

WELCOME = """\
lesam-dist {version}: sharpness-aware training, from a laptop to many GPUs.

Train a network on scanned digits, a minute on two CPU cores:
  lesam-dist train --config digits --epochs 5

Look for a recipe, by data set, model, method or table of the paper:
  lesam-dist recipes cifar100 wrn28_10

See whether this machine has what a run needs:
  lesam-dist doctor

Use the optimizer in a loop of your own (docs/optimizers.md, examples/):
  python -c "import lesam_dist; help(lesam_dist.LESAM)"

Train on images of your own, in DIR/train/CLASS/ and DIR/val/CLASS/:
  lesam-dist train --data.root DIR --model.name resnet18 --epochs 20
  lesam-dist plan --config imagenet_resnet50_lesam --gpus 8

All commands: lesam-dist --help. All of one: lesam-dist COMMAND --help.
"""

GROUPS: Mapping[str, Sequence[str]] = {
    "train and compare": ("train", "compare", "sweep", "domains"),
    "data": ("scan", "index", "pack"),
    "look at results": ("eval", "predict", "analyze", "report", "checkpoints", "export"),
    "this machine": ("doctor", "plan", "recipes", "methods", "completion"),
}
"""The commands under the headings of `lesam-dist --help`."""

_REST = "more"


def usage(texts: Mapping[str, str]) -> str:
    """All commands in groups, each with its line of ``texts``; those of no group come last."""
    grouped = {name for names in GROUPS.values() for name in names}
    groups = {**GROUPS, _REST: [name for name in texts if name not in grouped]}
    width = max(map(len, texts)) + 2
    lines = ["usage: lesam-dist COMMAND ..."]
    for heading, names in groups.items():
        known = [name for name in names if name in texts]
        lines += ["", f"{heading}:", *(f"  {name:{width}s}{texts[name]}" for name in known)] if known else []
    return "\n".join([*lines, "", "What a command does and takes: lesam-dist COMMAND --help"])
