"""Addresses of data that is not in a file system."""

from __future__ import annotations

import re

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


class Url(str):
    """An address such as ``s3://bucket/folder``, to which ``/`` adds as it does to a `pathlib.Path`."""

    __slots__ = ()

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self.rstrip('/')}/{name}")


def is_url(text: str) -> bool:
    """Whether it begins with a scheme; "file:///..." does, "C:\\..." and "./s3:" do not."""
    return _SCHEME.match(text) is not None
