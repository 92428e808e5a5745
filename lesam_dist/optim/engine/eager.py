"""The modes in which a step runs, whatever those of its caller are."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch._compile import _disable_dynamo

P = ParamSpec("P")
R = TypeVar("R")


def eager(method: Callable[P, R]) -> Callable[P, R]:
    """Run outside of torch.compile, of inference_mode and of autograd.

    A compiled function that calls it is compiled up to it and after it, as with torch's own `zero_grad`; what a closure
    calls runs as it is, so compile the model. Copies and state that were made in inference mode would fail outside.
    """

    @wraps(method)
    def in_modes(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                return method(*args, **kwargs)
        with torch.no_grad():
            return method(*args, **kwargs)

    # torch's optimizers mark their methods so: unlike torch.compiler.disable it does not import the compiler at once.
    marked: Callable[P, R] = _disable_dynamo(in_modes)
    return marked
