"""The base optimizer that a method is built around: from its class and arguments, or one that is there already."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lesam_dist.optim.engine.fused import fused_if_possible
from lesam_dist.optim.engine.options import Options

BaseOptimizer = Callable[..., Optimizer] | Optimizer
"""A class, or a function of the groups and keywords, that gives an optimizer; or an optimizer."""

# What SAM code from elsewhere calls by names that nothing here has, and what to write instead.
_ELSEWHERE = {
    "adaptive": "take ASAM, or lesam_dist.compat.davda54.SAM, which has it",
    "k": "LookSAM has interval=k, every method ascent_interval=k",
    "lmbda": "FriendlySAM has it as lam",
    "max_norm": "the option is max_grad_norm, and clips the second gradient",
    "use_gc": "centralized gradients are not offered: leave it out",
    "perturb_eps": "nothing is added to the norm, and a zero gradient perturbs nothing: leave it out",
    "sam_eps": "nothing is added to the norm, and a zero gradient perturbs nothing: leave it out",
    "model": "give model.parameters() as the first argument",
    "closure": "give it to step",
}


def build_base(owner: str, base: BaseOptimizer, groups: list[Any], kwargs: dict[str, Any], own: Iterable[str]) -> Any:
    """The base optimizer of a method.

    Args:
        owner: the method's class, for errors.
        base: what the user gave as base optimizer.
        groups: parameters or param groups, as lists.
        kwargs: for the base optimizer; torch's fused implementation is chosen unless they say otherwise.
        own: names of the method's own hyper-parameters, for errors.

    Raises:
        TypeError: for an argument that neither has, or what is no base optimizer.
        ValueError: for an optimizer of other parameters than these, or with arguments that come too late.
    """
    if isinstance(base, Optimizer):
        _require_of(owner, base, groups, kwargs)
        return base
    if not callable(base):
        raise TypeError(
            f"{owner}: base_optimizer is {base!r}; give a class, as torch.optim.SGD with its arguments behind it, or "
            "an optimizer of the same parameters."
        )
    _require_known(owner, base, kwargs, own)
    if not kwargs.keys() & {"fused", "foreach", "capturable", "differentiable"}:
        kwargs = kwargs | fused_if_possible(base, groups)
    return base(groups, **kwargs)


def require_arguments(cls: type, args: tuple[Any, ...]) -> None:
    """Raise TypeError for arguments by position that a method's ``__init__`` does not take so.

    Args:
        cls: the method's class.
        args: what it is called with by position.
    """
    if args and isinstance(args[0], nn.Module) and _names(cls)[:1] == ["params"]:
        raise TypeError(
            f"{cls.__name__}: the first argument is a network, {type(args[0]).__name__}. Give its parameters: "
            f"{cls.__name__}(model.parameters(), torch.optim.SGD, lr=0.1)."
        )
    parameters = list(inspect.signature(cls).parameters.values())
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return
    if surplus := args[len(_names(cls)) :]:
        keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        written = ", ".join(f"{name}={value!r}" for name, value in zip(keywords, surplus, strict=False))
        raise TypeError(
            f"{cls.__name__}: {', '.join(map(repr, surplus))} without a name. Write {written or 'names'}: only "
            f"{' and '.join(_names(cls))} go by position."
        )


def _names(cls: type) -> list[str]:
    """What goes by position."""
    parameters = inspect.signature(cls).parameters.values()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _require_of(owner: str, base: Optimizer, groups: list[Any], kwargs: Mapping[str, Any]) -> None:
    name = type(base).__name__
    if kwargs:
        first = next(iter(kwargs))
        raise ValueError(
            f"{owner}: {first} is {kwargs[first]!r}, but the base optimizer, {name}, is built already. Give {first} to "
            f"it, or its class to {owner}."
        )
    given = {id(p) for p in _params(groups)}
    has = {id(p) for group in base.param_groups for p in group["params"]}
    if given != has:
        raise ValueError(
            f"{owner}: the base optimizer, {name}, has {len(has)} parameters, {len(given & has)} of the {len(given)} "
            f"that {owner} is given. Give both the same, as in {owner}(optimizer.param_groups, optimizer)."
        )
    for group in groups:
        if isinstance(group, dict) and len(group) > 1 and not any(group is its for its in base.param_groups):
            raise ValueError(
                f"{owner}: a param group sets {', '.join(key for key in group if key != 'params')}, but the base "
                f"optimizer, {name}, has groups of its own, which hold. Set it there, and give its param_groups."
            )


def _params(groups: Iterable[Any]) -> Iterable[Tensor]:
    for member in groups:
        members = member["params"] if isinstance(member, dict) else [member]
        for one in [members] if isinstance(members, Tensor) else members:
            yield one[1] if isinstance(one, tuple) else one


def _require_known(owner: str, base: Callable[..., Any], kwargs: Collection[str], own: Iterable[str]) -> None:
    try:
        parameters = inspect.signature(base).parameters.values()
    except (TypeError, ValueError):  # written in C: it says itself what it does not know
        return
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    its = [p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY][1:]
    if not (unknown := [name for name in kwargs if name not in its]):
        return
    wrong, known = unknown[0], [*own, *(item.name for item in fields(Options)), *its]
    near = difflib.get_close_matches(wrong, known, n=1, cutoff=0.6)
    advice = _ELSEWHERE.get(wrong, f"there are {', '.join(known)}") + "."
    if wrong not in _ELSEWHERE and near:
        advice = f"did you mean {near[0]}?"
    name = getattr(base, "__name__", type(base).__name__)
    raise TypeError(f"{owner}: neither it nor {name} has an argument {wrong!r}: {advice}")
