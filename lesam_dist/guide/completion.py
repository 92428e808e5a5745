"""`lesam-dist completion`: a script by which bash or zsh complete commands, flags, recipes, methods and fields.

The script holds all words, so that no key press starts Python. Flags are those that each command's help shows.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec

from lesam_dist.config.methods import PLAIN, argument_paths
from lesam_dist.config.parser import Parser, examples
from lesam_dist.config.recipes import bases, recipes
from lesam_dist.errors import UserError
from lesam_dist.optim.engine.registry import methods

Command = Callable[[Sequence[str]], None]

SHELLS = ("bash", "zsh")
_TEXT = """Print a script by which the shell completes commands, flags, names of recipes and methods, and every field
of a run. Write it to a file, as below, and put `source FILE` into ~/.bashrc or ~/.zshrc (there behind compinit)."""
_OF_RUNS = ("train", "compare", "sweep", "domains", "plan")  # take the fields of a config as flags
_PATHS = re.compile(r"(?:root|dir|list|file|out|output)$|^run_dir$")
_CONFIG = "_lesam_dist_config"
_PREAMBLE = {
    "bash": f"""
{_CONFIG}() {{
  compgen -W "NAMES" -- "$1"
  compgen -f -X '!*.y*ml' -- "$1"
  compgen -d -- "$1"
}}
""",
    "zsh": f"""
{_CONFIG}() {{
  _alternative 'recipes:recipe:(NAMES)' 'files:file:_files -g "*.y*ml"'
}}
""",
}


def completion(argv: Sequence[str], commands: Mapping[str, Command]) -> None:
    """Print the script of a shell.

    Args:
        argv: its name.
        commands: what is completed, by name; each prints its help for ``--help``.

    Raises:
        UserError: for a shell that is not known, or without shtab.
    """
    shell = parser().parse_args(list(argv)).shell
    if find_spec("shtab") is None:
        raise UserError('completion needs shtab, which is not installed: pip install "lesam-dist[completion]"')
    import shtab

    names = " ".join([*recipes(), *bases()])
    preamble = _PREAMBLE[shell].replace("NAMES", names)
    print(shtab.complete(_mirror(commands), shell=shell, root_prefix="lesam_dist", preamble=preamble))


def parser() -> Parser:
    """Its arguments."""
    found = Parser("completion", _TEXT, examples(*(f"completion {shell} > ~/.lesam-dist.{shell}" for shell in SHELLS)))
    found.add_argument("shell", choices=SHELLS, help="the shell")
    return found


def flags_of(text: str) -> dict[str, tuple[str, ...]]:
    """The flags that a help shows, each with its choices where it lists some."""
    found: dict[str, tuple[str, ...]] = {}
    for flag, choices in re.findall(r"(?<![\w-])(--[a-z][\w.]*)(?: \{([^}\n]*)\})?", text):
        found[flag] = tuple(choices.split(",")) if choices else found.get(flag, ())
    return found


def _mirror(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """A parser that has all commands and flags for shtab to read; it parses nothing."""
    root = argparse.ArgumentParser(prog="lesam-dist")
    subparsers = root.add_subparsers()
    fields = flags_of(_printed(commands["train"], "--help.all"))
    fields |= {f"--{path}": () for path in argument_paths() if not path.startswith("optimizer.args.")}
    fields |= {flag: () for flag in flags_of(_printed(commands["train"], "--help")) if flag not in fields}
    for name, command in commands.items():
        # argparse formats help texts: a per cent sign would have to be doubled, so there are none
        own = subparsers.add_parser(name, help=name, add_help=False)
        flags = {"--help": ()} | (fields if name in _OF_RUNS else {}) | flags_of(_help_of(name, command))
        for flag, choices in flags.items():
            _add(own, flag, choices)
        for position in _positions(name, commands):
            own.add_argument(position[0], nargs="*", choices=position[1:] or None)
    return root


def _add(own: argparse.ArgumentParser, flag: str, choices: Sequence[str]) -> None:
    import shtab

    if flag == "--optimizer.name":
        choices = [*methods(), *PLAIN]
    action = own.add_argument(flag, choices=choices or None, help=flag.strip("-"))
    if flag == "--config":
        action.complete = dict.fromkeys(SHELLS, _CONFIG)  # type: ignore[attr-defined]
    elif _PATHS.search(flag) and not choices:
        action.complete = shtab.FILE  # type: ignore[attr-defined]


def _positions(name: str, commands: Mapping[str, Command]) -> list[tuple[str, ...]]:
    """The words that a command takes beside flags: the name of the list, and its words where these are known."""
    if name == "methods":
        return [("name", *methods(), *PLAIN)]
    if name == "recipes":
        return [("words", *bases(), *recipes())]
    if name == "completion":
        return [("shell", *SHELLS)]
    if name == "analyze":
        return [("analysis", *re.findall(r"^  ([a-z_]+)  ", _printed(commands[name], "--help"), re.M))]
    return []


def _help_of(name: str, command: Command) -> str:
    return "" if name == "train" else _printed(command, "--help")


def _printed(command: Command, flag: str) -> str:
    """What a command prints and ends with."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        command([flag])
    return re.sub(r"\x1b\[[\d;]*m", "", out.getvalue())  # FORCE_COLOR colours helps in Python 3.14
