"""The methods and their arguments for `--help`, in the shape that argparse gives its own."""

from __future__ import annotations

import re
import textwrap
from inspect import Parameter

from lesam_dist.config.methods import in_words, shown
from lesam_dist.optim.engine.arguments import Argument
from lesam_dist.optim.engine.registry import Method, methods

_WIDTH, _INDENT = 78, 24
_HEADING = "methods, and the --optimizer.args.NAME of each:"


def methods_help() -> str:
    """What each method perturbs along, its passes, and its arguments with meaning, range and default."""
    return "\n".join([_HEADING, *map(_method, methods().values())])


def _method(method: Method) -> str:
    known = method.registration
    names = sorted(set(method.names) - {method.name, method.class_name.lower()})
    also = f"; also called {', '.join(names)}" if names else ""
    lines = [_entry(f"  {method.name}", f"along {known.along}; passes a step: {known.passes}{also}")]
    return "\n".join([*lines, *map(_argument, method.arguments.values())])


def _argument(argument: Argument) -> str:
    meaning = re.split(r"\.\s", _of_module(argument.text), maxsplit=1)[0]
    meaning = re.sub(r", (?:[<>]=? [\d.]+|in [\[(][^\])]*[\])])(?=[.;:]|$| \()", "", meaning)  # it is said behind
    return _entry(f"    {argument.name}", f"{meaning} ({_limits(argument)})")


def argument_in_full(argument: Argument) -> str:
    """An argument with all that its class says of it, its range and its default."""
    return _entry(f"    {argument.name}", f"{_of_module(argument.text) or 'see above'} ({_limits(argument)})")


def _of_module(text: str) -> str:
    """What a docstring says from within its file."""
    return text.replace("see the module's text", "see the formula")


def _limits(argument: Argument) -> str:
    """The range and the default: that of the method's class, which null takes too where null is no value."""
    limits = in_words(argument).replace("a finite number ", "")
    if argument.default is Parameter.empty:
        return f"{limits}; must be given"
    return f"{limits}; default: {shown(argument.default)}"


def bounded(name: str, text: str, indent: int = _INDENT) -> str:
    """A name on the left, the text on the right; below it where the name is too long."""
    filled = textwrap.fill(text.replace("`", ""), _WIDTH, initial_indent=" " * indent, subsequent_indent=" " * indent)
    return name.ljust(indent) + filled[indent:] if len(name) < indent - 1 else f"{name}\n{filled}"


def _entry(name: str, text: str) -> str:
    return bounded(name, re.sub(r"\bNone\b", "null", text))
