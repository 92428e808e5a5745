"""Two hosts on one machine: network namespaces with a cable between them, which a test can cut."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_IP = shutil.which("ip") or shutil.which("ip", path="/usr/sbin:/sbin")
_CLONE_NEWUTS, _CLONE_NEWNET = 0x04000000, 0x40000000


@dataclass(frozen=True)
class Host:
    """A network namespace and its end of the cable."""

    name: str
    interface: str
    address: str

    def command(self, *words: str) -> list[str]:
        """The command line that runs ``words`` there, under the host's own name."""
        script = 'hostname "$0"; exec "$@"'
        return [str(_IP), "netns", "exec", self.name, "unshare", "--uts", "sh", "-c", script, self.name, *words]

    def enter(self) -> None:
        """Move this process there, which must have no other threads."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/var/run/netns/{self.name}") as namespace:
            failed = libc.setns(namespace.fileno(), _CLONE_NEWNET) or libc.unshare(_CLONE_NEWUTS)
        if failed:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        socket.sethostname(self.name)

    def switch(self, state: str) -> None:
        """Cut the cable at this end ("down"), or mend it ("up")."""
        _ip("-n", self.name, "link", "set", self.interface, state)


def can_make_hosts() -> bool:
    """Whether this process may make namespaces: it is root, and iproute2 is there."""
    if _IP is None or os.geteuid() != 0:
        return False
    name = f"lesam{os.getpid()}x"
    made = subprocess.run([_IP, "netns", "add", name], capture_output=True)
    if made.returncode == 0:
        _ip("netns", "delete", name)
    return made.returncode == 0


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts that see each other and nothing else; gone at the end, and with them their cable."""
    own = os.getpid()
    first, second = (Host(f"lesam{own}{x}", f"veth{own}{x}", f"10.77.0.{i}") for i, x in enumerate("ab", 1))
    try:
        for host in (first, second):
            _ip("netns", "add", host.name)
        _ip("-n", first.name, "link", "add", first.interface, "type", "veth", "peer", "name", second.interface)
        _ip("-n", first.name, "link", "set", second.interface, "netns", second.name)
        for host in (first, second):
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", host.interface)
            for interface in (host.interface, "lo"):
                _ip("-n", host.name, "link", "set", interface, "up")
        yield first, second
    finally:
        for host in (first, second):
            subprocess.run([str(_IP), "netns", "delete", host.name], capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run([str(_IP), *words], check=True, capture_output=True)
