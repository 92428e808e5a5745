"""Triton's interpreter without half of its work: it patches the language anew in every call of every function."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock


class _Kept:
    def restore(self) -> None:
        """The patch stays: see `language_patched_once`."""


@contextmanager
def language_patched_once() -> Iterator[None]:
    """Within, kernels run in the interpreter as always, but the language is patched for the first of them alone.

    Nothing happens where kernels are compiled. Kernels cannot be compiled within, once one was interpreted.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    patch = getattr(interpreter, "_patch_lang", None)
    if patch is None:  # another version of Triton: its own way will do
        yield
        return
    scopes: dict[frozenset[int], Any] = {}

    def patch_once(function: Any) -> _Kept:
        languages = frozenset(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)
        if languages not in scopes:
            scopes[languages] = patch(function)
        return _Kept()

    try:
        with mock.patch.object(interpreter, "_patch_lang", patch_once):
            yield
    finally:
        for scope in reversed(scopes.values()):
            if scope is not None:  # Triton 3.5 restores nothing
                scope.restore()
