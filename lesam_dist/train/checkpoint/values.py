"""What a state holds besides tensors: numbers, texts, None and lists, which go into JSON and come back as they were."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from lesam_dist.errors import SharedError, UserError
from lesam_dist.train.checkpoint import payload


def split(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors in a nested state, and its other values, by the path to each, with dots.

    Raises:
        UserError: for a value that JSON cannot hold, a tensor of a dtype that safetensors does not know.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for path, _, _, value in _leaves(state):
        if path in tensors or path in values:
            raise UserError(
                f"two parts of the state have the name '{path}', and a checkpoint can keep one: rename one."
            )
        if isinstance(value, Tensor):
            tensors[path] = _known(path, value)
        else:
            values[path] = _as_json(path, value)
    return tensors, values


def put_back(state: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Replace the values of a state, not its tensors, by saved ones.

    JSON has no tuples: one that takes the place of a tuple becomes one.

    Raises:
        SharedError: where one is not among the saved.
    """
    for path, container, key, value in list(_leaves(state)):
        if not isinstance(value, Tensor):
            if path not in values:
                raise SharedError(f"it has no '{path}'")
            container[key] = _like(value, values[path])


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any, Any, Any]]:
    """Path, container, key and value of everything that is not a container of tensors or of names."""
    for key, value in node.items() if isinstance(node, Mapping) else enumerate(node):
        here = f"{path}.{key}" if path else str(key)
        inner = isinstance(value, list) and any(isinstance(item, (Mapping, list, Tensor)) for item in value)
        tensors = isinstance(value, tuple) and value and all(isinstance(item, Tensor) for item in value)
        if isinstance(value, Mapping) or inner or tensors:
            yield from _leaves(value, here)
        else:
            yield here, node, key, value


def _known(path: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in payload.NAMES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in payload.NAMES)
        raise UserError(f"'{path}' cannot be saved: it is of {tensor.dtype}, and a checkpoint holds {known}.")
    return tensor


def _as_json(path: str, value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_as_json(path, item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise UserError(
        f"'{path}' cannot be saved: it is a {type(value).__qualname__}, and a checkpoint holds tensors, numbers, "
        "texts, None, and lists and dicts of them: make it one of these."
    )


def _like(there: Any, saved: Any) -> Any:
    if isinstance(there, tuple) and isinstance(saved, list):
        alike = len(there) == len(saved)
        return tuple(_like(a, b) for a, b in zip(there, saved, strict=True)) if alike else tuple(saved)
    return saved
