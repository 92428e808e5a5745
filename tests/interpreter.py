"""Triton's interpreter without the most of its work: it patches the language anew in every call of every function."""

from __future__ import annotations

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

    Outside of kernels the patched language must not be used; host code needs no more of it than its dtypes.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch, scopes = interpreter._patch_lang, {}

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
            scope.restore()
