"""An optimizer that wraps a base optimizer and shares its `param_groups` and `state`, through every round trip."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lesam_dist.optim.engine.base_optimizer import BaseOptimizer, build_base
from lesam_dist.optim.engine.foreign import readable

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class SharedOptimizer(Optimizer):
    """Groups and state are properties that read the base optimizer's: nothing can part what is one object.

    They are changed in place, since a base that wraps another one may compute the attributes.

    Args:
        params: parameters or param groups.
        base_optimizer: builds the base optimizer from the groups and ``base_kwargs``, or is one of these parameters:
            its groups then hold, with what they set.
        defaults: the wrapper's own hyper-parameters, kept in every param group beside the base optimizer's.
        base_kwargs: for ``base_optimizer``; torch's fused implementation of SGD, Adam and AdamW is chosen unless they
            say otherwise.

    Raises:
        TypeError: for a parameter of an unsupported dtype, or an argument that neither has.
        ValueError: where both have a hyper-parameter of the same name, a parameter is given twice, or a base optimizer
            that is there has other parameters.
    """

    _built = False  # the base optimizer knows its groups before this one does

    def __init__(
        self, params: ParamsT, base_optimizer: BaseOptimizer, defaults: dict[str, Any], **base_kwargs: Any
    ) -> None:
        own = [key for key in defaults if key not in ("perturb", "ascent_step")]
        self.base_optimizer: Optimizer = build_base(
            type(self).__name__, base_optimizer, _as_groups(params), base_kwargs, own
        )
        clash = defaults.keys() & self.base_optimizer.defaults.keys()
        if clash:
            raise ValueError(
                f"{type(self).__name__} and {type(self.base_optimizer).__name__} both have a hyper-parameter "
                f"{sorted(clash)[0]!r}, and they share their param groups. Choose another base optimizer."
            )
        made = dict(self.base_optimizer.state)
        super().__init__(list(self.base_optimizer.param_groups), defaults)  # torch's starts from no groups and no state
        self.state.update(made)
        self.defaults = {**self.base_optimizer.defaults, **defaults}
        self._built = True

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError for a hyper-parameter of this group that is out of range."""

    def forget(self) -> None:
        """Drop what was derived from groups and state; called whenever either may have been replaced."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's groups."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups[:] = list(groups)

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The base optimizer's state."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        own, new = self.base_optimizer.state, dict(state)
        own.clear()
        own.update(new)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; also checks the group's dtypes and hyper-parameters."""
        if self._built:
            self.base_optimizer.add_param_group(param_group)
            for key, value in self.defaults.items():
                self.param_groups[-1].setdefault(key, value)
        else:
            super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self.forget()

    def _check(self, group: dict[str, Any]) -> None:
        names = group.get("param_names", range(len(group["params"])))
        for name, p in zip(names, group["params"], strict=True):
            if p.dtype not in _DTYPES:
                raise TypeError(
                    f"{type(self).__name__}: parameter {name!r} is {p.dtype}; supported are float32, bfloat16, float16 "
                    "and float64 (not with backend='triton'). Leave it out of the param groups or convert it."
                )
        if len(set(group["params"])) < len(group["params"]):
            raise ValueError(
                f"{type(self).__name__}: a param group holds the same parameter twice. It would be perturbed twice and "
                "not come back exactly: give each parameter once (model.parameters() does)."
            )
        self.check_group(group)

    def state_dict(self) -> dict[str, Any]:
        """As torch's, or the base optimizer's where that has one of its own.

        Raises:
            RuntimeError: for a base optimizer whose own is of another shape.
        """
        state_dict, base = super().state_dict(), self.base_optimizer
        if type(base).state_dict is Optimizer.state_dict:
            return state_dict
        its = base.state_dict()
        if not its.keys() >= state_dict.keys():
            raise RuntimeError(
                f"{type(self).__name__}.state_dict: {type(base).__name__} has no state and param_groups in its own but "
                f"{', '.join(sorted(its))}. Save and load optimizer.base_optimizer.state_dict() instead."
            )
        return {**state_dict, **its}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, and as the base optimizer's where that has rules of its own."""
        state_dict = readable(type(self).__name__, state_dict, adaptive="adaptive" in self.defaults)
        super().load_state_dict(state_dict)
        base = self.base_optimizer
        if type(base).load_state_dict is not Optimizer.load_state_dict:
            groups = self.param_groups
            base.load_state_dict(state_dict)
            _fill(self.param_groups, groups)
            self.forget()

    def __getstate__(self) -> dict[str, Any]:
        return {"base_optimizer": self.base_optimizer, "defaults": self.defaults}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Called by pickle with what __getstate__ gave, and by load_state_dict with new state and param_groups.
        state = dict(state)
        if "base_optimizer" in state:
            self.base_optimizer = state.pop("base_optimizer")
        else:
            groups = state.pop("param_groups")
            _fill(groups, self.param_groups)
            self.state, self.param_groups = state.pop("state"), groups
            self.base_optimizer.__setstate__({"state": self.state, "param_groups": self.param_groups})
        super().__setstate__(state)
        self._built = True
        self.forget()


def _fill(groups: list[dict[str, Any]], before: list[dict[str, Any]]) -> None:
    """Keep what loaded groups lack, as a plain base optimizer's checkpoint has no sigma."""
    for group, old in zip(groups, before, strict=True):
        for key, value in old.items():
            group.setdefault(key, value)


def _as_groups(params: ParamsT) -> list[Any]:
    """The parameters as lists that can be read twice; torch checks the rest."""
    return [
        {**g, "params": list(g["params"])} if isinstance(g, dict) and isinstance(g["params"], Iterator) else g
        for g in params
    ]
