"""The operations of RandAugment and TrivialAugment in DALI's graph, chosen outside of it: DALI draws nothing.

Moves are one warp with a matrix, which comes with each image, and are torchvision's. The others are those of
``nvidia.dali.auto_aug``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import nvidia.dali
from numpy.typing import NDArray
from nvidia.dali.auto_aug import augmentations
from nvidia.dali.auto_aug.core import select
from nvidia.dali.pipeline import do_not_convert

from lesam_dist.data.auto_augment import MOVES, OPERATIONS, Policy
from lesam_dist.data.transform import Draws

dali: Any = nvidia.dali  # its type stubs leave out much of what it exports
fn, types = dali.fn, dali.types

OPERATION_INPUTS = [(types.INT32, 1), (types.INT32, 1), (types.FLOAT, 3)]
"""Type and dimensions of what `operation_inputs` gives for an image."""

_FIRST_MOVE = OPERATIONS.index(MOVES[0])
# An operation's number in the graph, where all moves are the first of them.
_NUMBERS = np.array([_FIRST_MOVE if name in MOVES else i for i, name in enumerate(OPERATIONS)])
_NUMBERS = (_NUMBERS - np.where(_NUMBERS > _FIRST_MOVE, len(MOVES) - 1, 0)).astype(np.int32)


def operation_inputs(policy: Policy, draws: Draws) -> tuple[NDArray[Any], ...]:
    """What the graph is given for a batch of B images of K operations each.

    Returns:
        Operations and levels, int32 ``(B, K)``; and the moves' matrices, float32 ``(B, K, 2, 3)``.
    """
    matrices = np.zeros((*draws.operation.shape, 2, 3), dtype=np.float32)
    matrices[..., 0, 0] = matrices[..., 1, 1] = 1
    side = int(draws.side[0])
    for place in np.argwhere(_NUMBERS[draws.operation] == _FIRST_MOVE):
        name = OPERATIONS[draws.operation[tuple(place)]]
        matrices[tuple(place)] = _source(name, policy.magnitude(name, int(draws.level[tuple(place)]), side), side)
    return _NUMBERS[draws.operation], draws.level, matrices


def _source(name: str, magnitude: float, side: int) -> list[list[float]]:
    """Where a pixel of the moved image comes from: the matrix from its place (across, down), in pixels, to that."""
    if name == "shear_x":
        return [[1, magnitude, 0], [0, 1, 0]]
    if name == "shear_y":
        return [[1, 0, 0], [magnitude, 1, 0]]
    if name == "translate_x":
        return [[1, 0, -magnitude], [0, 1, 0]]
    if name == "translate_y":
        return [[1, 0, 0], [0, 1, -magnitude]]
    cos, sin, centre = math.cos(math.radians(magnitude)), math.sin(math.radians(magnitude)), side / 2
    return [[cos, -sin, centre * (1 - cos + sin)], [sin, cos, centre * (1 - cos - sin)]]


def augment_graph(image: Any, policy: Policy, operations: Any, levels: Any, matrices: Any) -> Any:
    """`torchvision_augment.augment` as a DALI graph, in a pipeline with conditionals.

    Args:
        image: uint8 ``(S, S, 3)``.
        policy: that chose the operations.
        operations, levels, matrices: from `operation_inputs`.
    """
    choices = _choices(policy)
    for k in range(policy.count):
        image = select(choices, operations[k], image, levels[k], matrices[k])
    return image


@do_not_convert
def _choices(policy: Policy) -> list[Any]:
    """The operations by their number in the graph: functions of an image, a level and a matrix."""
    others = [_with_magnitudes(name, policy) for name in OPERATIONS[_FIRST_MOVE + len(MOVES) :]]
    return [do_not_convert(choice) for choice in (_identity, _move, *others)]


def _identity(image: Any, _level: Any, _matrix: Any) -> Any:
    return image


def _move(image: Any, _level: Any, matrix: Any) -> Any:
    return fn.warp_affine(image, matrix=matrix, fill_value=0, interp_type=types.INTERP_LINEAR)


def _newest(name: str) -> Any:
    """DALI 2.4 warns each user of a name under ``experimental``, as its own `auto_aug`, where there is another."""
    return getattr(fn, name, None) or getattr(fn.experimental, name)


_RENAMED: dict[str, Callable[[Any, Any], Any]] = {
    "sharpness": lambda image, kernel: _newest("filter")(image, kernel),
    "equalize": lambda image, _: _newest("equalize")(image),
}


def _with_magnitudes(name: str, policy: Policy) -> Callable[[Any, Any, Any], Any]:
    """An operation of DALI's with the policy's magnitudes.

    Not by calling it, which would have every line of it converted for conditionals that it does not have: seconds.
    """
    operation: Any = getattr(augmentations, name)
    function = _RENAMED.get(name, operation.op)
    magnitudes = policy.magnitudes.get(name)
    if magnitudes is None:
        return lambda image, _level, _matrix: function(image, None)
    scale = 255 if name == "solarize" else 1
    parameters = np.array([operation.mag_to_param(np.float32(scale * value)) for value in magnitudes])

    def apply(image: Any, level: Any, _matrix: Any) -> Any:
        device = image.device if operation.param_device == "auto" else "cpu"
        return function(image, types.Constant(parameters, device=device)[level])

    return apply
