"""Several hosts on one machine for a benchmark: network namespaces on a bridge, each behind a slow link.

Linux and root; iproute2's `ip` and `tc`.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_CLONE_NEWNET = 0x40000000
_MTU = 9000
_BURST = 32 * 1024  # bytes that may pass at once: 5 ms at 50 Mbit
_QUEUE = 64 * 2**20  # bytes that wait: nothing is dropped, as in the networks of clusters


def can_make_hosts() -> bool:
    """Whether this process is root, and iproute2 is there."""
    return os.geteuid() == 0 and all(shutil.which(tool, path=_PATH) for tool in ("ip", "tc"))


@contextmanager
def limited_hosts(count: int, mbit: float) -> Iterator[list[str]]:
    """Names of so many namespaces, with the addresses `address` gives them; each sends at most ``mbit`` Mbit/s.

    A token bucket at each end shapes what the host sends; the bridge between them does not limit anything. Frames are
    jumbo ones, and segmentation is not left to a device that does not exist.
    """
    own = f"plan{os.getpid()}"
    bridge, hosts = f"{own}x", [f"{own}n{i}" for i in range(count)]
    try:
        _run("ip", "netns", "add", bridge)
        _run("ip", "-n", bridge, "link", "add", "bridge0", "type", "bridge")
        _run("ip", "-n", bridge, "link", "set", "bridge0", "up")
        for i, host in enumerate(hosts):
            _run("ip", "netns", "add", host)
            _run("ip", "-n", host, "link", "add", "eth0", "type", "veth", "peer", "name", f"port{i}", "netns", bridge)
            _run("ip", "-n", bridge, "link", "set", f"port{i}", "mtu", str(_MTU))
            _run("ip", "-n", host, "link", "set", "eth0", "mtu", str(_MTU), "gso_max_segs", "1")
            _run("ip", "-n", bridge, "link", "set", f"port{i}", "master", "bridge0", "up")
            _run("ip", "-n", host, "address", "add", f"{address(i)}/24", "dev", "eth0")
            for interface in ("eth0", "lo"):
                _run("ip", "-n", host, "link", "set", interface, "up")
            limit = ["rate", f"{mbit}mbit", "burst", str(_BURST), "limit", str(_QUEUE)]
            _run("ip", "netns", "exec", host, "tc", "qdisc", "add", "dev", "eth0", "root", "tbf", *limit)
        yield hosts
    finally:
        for host in (*hosts, bridge):
            subprocess.run(["ip", "netns", "delete", host], capture_output=True, env={**os.environ, "PATH": _PATH})


def address(index: int) -> str:
    """Of a host by its place in the list."""
    return f"10.79.0.{index + 1}"


def enter(host: str) -> None:
    """Move this process, which must have no other threads, to a host."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/var/run/netns/{host}") as namespace:
        if libc.setns(namespace.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def bytes_sent() -> int:
    """By this process's host so far, headers included."""
    with open("/proc/net/dev") as table:  # of the namespace of this process
        (line,) = (line for line in table if line.strip().startswith("eth0:"))
    return int(line.split(":")[1].split()[8])


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PATH": _PATH})
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")
