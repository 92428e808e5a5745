"""Checkpoints of SAM code from elsewhere, whose state holds copies of the weights."""

from __future__ import annotations

import warnings
from typing import Any

_COPIES = ("old_p", "e_w")  # davda54/sam saves the first with every parameter; others leave either behind


def readable(owner: str, state_dict: dict[str, Any], *, adaptive: bool) -> dict[str, Any]:
    """A checkpoint without copies of weights, which a base optimizer would take for state of its own.

    davda54/sam saves nothing of its base optimizer: what is left then is no state at all, which begins anew.

    Args:
        owner: the class that loads, for messages.
        state_dict: as `torch.optim.Optimizer.state_dict` gives it; stays unchanged.
        adaptive: whether the class that loads has a setting ``adaptive``.

    Raises:
        ValueError: where the checkpoint is of SAM with ``adaptive=True``, and the class knows nothing of it.
    """
    if not adaptive and any(group.get("adaptive") for group in state_dict.get("param_groups", ())):
        raise ValueError(
            f"{owner}: the checkpoint is of SAM with adaptive=True, which {owner} would go on without. Load it into "
            "lesam_dist.compat.davda54.SAM."
        )
    state = state_dict.get("state", {})
    if not any(isinstance(own, dict) and own.keys() & set(_COPIES) for own in state.values()):
        return state_dict
    kept = {key: {name: value for name, value in own.items() if name not in _COPIES} for key, own in state.items()}
    kept = {key: own for key, own in kept.items() if own}
    if not kept:
        warnings.warn(
            f"{owner}: the checkpoint has copies of the weights and nothing of the base optimizer, as those of "
            "davda54/sam. Settings are loaded; momenta begin anew.",
            stacklevel=4,
        )
    return {**state_dict, "state": kept}
