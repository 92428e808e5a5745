"""What each method reads of a config, and its arguments: all of it from the registry, and without torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import fields
from inspect import Parameter
from typing import Any

from lesam_dist.config.schema import OptimizerConfig
from lesam_dist.config.strict_yaml import read_value
from lesam_dist.errors import UserError, one_line, unknown_name
from lesam_dist.optim.engine.arguments import Argument, Count
from lesam_dist.optim.engine.options import Options
from lesam_dist.optim.engine.registry import Method, find, methods

_FIELDS = tuple(item.name for item in fields(OptimizerConfig))
OPTIONS = tuple(item.name for item in fields(Options) if item.name in _FIELDS)
"""The options of every method that a config has."""

OF_BASE = {
    "sgd": ("momentum", "nesterov"),
    "adamw": ("betas",),
    "lars": ("momentum", "nesterov", "trust_coefficient"),
    "lamb": ("betas",),
}
"""What each plain optimizer has beside lr and weight_decay, also as the base of a method."""
PLAIN = tuple(OF_BASE)

_OF_BUDGET = ("schedule.sigma_warmup_epochs", "schedule.anneal_start_epoch")
_ARGS = "optimizer.args"
_MOST = 1_000_000  # of what is counted: more is a typing error that would end in hours of nothing


def method_of(name: str) -> Method | None:
    """The method that a config names; None for the plain optimizers.

    Raises:
        UserError: for a name that no method has, or an import path where there is none.
    """
    if name in PLAIN:
        return None
    try:
        return find(name)
    except UserError:
        if ":" in name:
            raise
        raise unknown_name("optimizer", name, (*methods(), *PLAIN)) from None


def known_method(name: object) -> Method | None:
    """As `method_of`, but None for whatever is no method; that is refused later."""
    with suppress(UserError):
        return method_of(name) if isinstance(name, str) else None
    return None


def canonical(path: str) -> str:
    """The path of a method's argument, which may be given without ``args``: ``optimizer.rho``; any other as it is."""
    section, _, name = path.partition(".")
    is_short = section == "optimizer" and name.isidentifier() and name not in _FIELDS
    return f"{_ARGS}.{name}" if is_short else path


def argument_paths(also: Iterable[Method | None] = ()) -> list[str]:
    """The path of every argument of every method, and of these methods, in full and in short."""
    names = dict.fromkeys(name for method in (*methods().values(), *also) if method for name in method.arguments)
    return [f"{prefix}.{name}" for prefix in (_ARGS, "optimizer") for name in names if name not in _FIELDS]


def paths_read(name: str, base: str) -> set[str]:
    """Paths that this method reads, of those that not every method does."""
    method = known_method(name)
    if name in PLAIN:
        return {f"optimizer.{field}" for field in ("max_grad_norm", *OF_BASE[name])}
    if method is None:
        return set()
    own = {"base", *OPTIONS, *OF_BASE.get(base, ())} - set(method.registration.without)
    schedules = _OF_BUDGET if method.registration.budget else ()
    return {f"optimizer.{field}" for field in own} | {f"{_ARGS}.{field}" for field in method.arguments} | {*schedules}


def paths_of_some() -> set[str]:
    """Paths that not every method reads, but for arguments."""
    names = {"base", *OPTIONS}.union(*OF_BASE.values())
    return {f"optimizer.{name}" for name in names} | {*_OF_BUDGET}


def left_behind(args: Mapping[str, Any], old: Method | None, new: Method | None) -> set[str]:
    """Which of the arguments given for the old method are not meant for the new one.

    Those that it does not have; and one that is a loss budget for one of the two alone, as sigma is for LE-SAM and not
    for F-SAM.
    """
    budgets = [method.registration.budget if method else "" for method in (old, new)]
    known = {name for method in (*methods().values(), old) if method for name in method.arguments}
    has = new.arguments if new else {}
    return {name for name in args if name in known and (name not in has or (name in budgets and len(set(budgets)) > 1))}


def defaults(method: Method) -> dict[str, Any]:
    """The arguments that have a default."""
    return {name: own.default for name, own in method.arguments.items() if own.default is not Parameter.empty}


def complete(optimizer: OptimizerConfig) -> dict[str, Any]:
    """All arguments of the config's method: those given, and the defaults of the others."""
    method = known_method(optimizer.name)
    return {**(defaults(method) if method else {}), **optimizer.args}


def settle(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """As `complete`, with each value checked, and of the type that the argument has.

    Raises:
        UserError: for an argument that the method does not have, or lacks; for a value of another type or out of range.
    """
    method = method_of(name)
    values = defaults(method) if method else {}
    for key, value in given.items():
        argument = method.arguments.get(key) if method else None
        if argument is None:
            _refuse_foreign(name, method, key, value)
        elif value is not None or argument.accepts(None):
            values[key] = _checked(argument, value)
    for key, argument in method.arguments.items() if method else ():
        if key not in values:
            raise UserError(f"{_ARGS}.{key} is missing: {name} needs it. It must be {in_words(argument)}.")
    return values


def _checked(argument: Argument, value: Any) -> Any:
    value, path = as_typed(argument, value), f"{_ARGS}.{argument.name}"
    if not argument.accepts(value):
        near = difflib.get_close_matches(str(value).lower(), [str(choice) for choice in argument.choices], 1, 0.5)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise UserError(f"{path} is {shown(value)}: it must be {in_words(argument)}.{hint}")
    if argument.type == Count and value > _MOST:
        raise UserError(f"{path} is {value}: it must be at most {_MOST}.")
    return value


def as_typed(argument: Argument, value: Any, text: str | None = None) -> Any:
    """A value as the argument has it: 1 as 1.0, and a text that holds a number as that number.

    Args:
        argument: whose value it is.
        value: as YAML reads it.
        text: as it was written, where that is known: an argument may take ``on`` for a word.
    """
    if value is None:
        return None
    if text is not None and not argument.accepts(value) and argument.accepts(text):
        return text
    if isinstance(value, str) and not argument.accepts(value):
        value = read_value(value)
    return argument.typed(value)


def _refuse_foreign(name: str, method: Method | None, key: str, value: Any) -> None:
    """Refuse an argument that the method does not have; null says nothing, so that it may be of another method."""
    of_others = {other for known in methods().values() for other in known.arguments}
    own = tuple(method.arguments) if method else ()
    if key not in of_others:
        near = difflib.get_close_matches(key, own or sorted(of_others), n=1, cutoff=0.5)
        hint = f"did you mean '{_ARGS}.{near[0]}'?" if near else f"{name} has {', '.join(own) or 'none'}."
        raise UserError(f"unknown key '{_ARGS}.{one_line(key)}': {hint}")
    if value is not None:
        has = f"{name} has {', '.join(own)}" if own else f"{name} has none"
        raise UserError(
            f"{_ARGS}.{key} is {shown(value)} but {name} has no {key}, so it would have no effect: leave it out. {has}."
        )


def in_words(argument: Argument) -> str:
    """What a value must be, in YAML's words."""
    if argument.choices:
        return "one of " + ", ".join(map(shown, argument.choices)) + (", or null" if argument.accepts(None) else "")
    return argument.expected.replace("None", "null").replace("True or False", "true or false")


def shown(value: Any) -> str:
    """A value as YAML has it, on one line and not too long."""
    text = {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else value
    return one_line(str(text)) or "empty"
