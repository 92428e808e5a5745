"""Two hosts on one: network namespaces with a link between them that can be cut. Needs root and iproute2."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

SUBNET = "10.77.0"


class Link:
    """A pair of namespaces, made by `link`. Rank r is in ``names[r]``, where its interface is ``interfaces[r]``."""

    def __init__(self, number: int) -> None:
        self.names = [f"fault-{number}-{side}" for side in (0, 1)]
        self.interfaces = [f"f{number}-{side}" for side in (0, 1)]
        self.address = f"{SUBNET}.1"

    def cut(self) -> None:
        """Nothing passes any more, and nobody is told."""
        _ip("-n", self.names[0], "link", "set", self.interfaces[0], "down")

    def mend(self) -> None:
        """As before."""
        _ip("-n", self.names[0], "link", "set", self.interfaces[0], "up")


@contextmanager
def link() -> Iterator[Link]:
    """Make both hosts and the link, and remove them at the end.

    Raises:
        OSError: for want of rights or of iproute2.
    """
    made = Link(os.getpid())
    try:
        for name in made.names:
            _ip("netns", "add", name)
        _ip("link", "add", made.interfaces[0], "type", "veth", "peer", "name", made.interfaces[1])
        for side, (name, interface) in enumerate(zip(made.names, made.interfaces, strict=True)):
            _ip("link", "set", interface, "netns", name)
            _ip("-n", name, "addr", "add", f"{SUBNET}.{side + 1}/24", "dev", interface)
            for device in ("lo", interface):
                _ip("-n", name, "link", "set", device, "up")
        yield made
    finally:
        for name in made.names:
            with suppress(OSError):
                _ip("netns", "delete", name)


@cache
def can_link() -> bool:
    """Whether `link` works here."""
    try:
        with link():
            return True
    except OSError:
        return False


def _ip(*words: str) -> None:
    if shutil.which("ip") is None:
        raise OSError("iproute2 is not installed")
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
