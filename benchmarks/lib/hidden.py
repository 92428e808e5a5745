"""Norms hidden behind backward (`norm_in_backward`): what that can save of a step, at most.

A norm is one read of the gradients, and a step has two. Where hooks take them group by group, on a stream of their own,
all but the last group may cost no time: if the device has room beside backward. It has where backward waits for
arithmetic or for other processes; not where it waits for memory, as in the BatchNorms of a ResNet, and a kernel of
matrix products that fills the registers of a multiprocessor leaves room only between its waves. Taken on backward's own
stream they would hide nothing: a group that is still in L2 is read at about twice the speed of memory, 3 us less for 16
MiB, which its launch costs again.

Rates and links are assumptions, and stand in the settings.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lib import ideas, machine, traffic
from lib.l2 import Walk

GROUPS = 8  # see lesam_dist.optim.engine.early_sums
GROUP_US, HOOK_US = 35.0, 1.8
"""On the host: a launch with a group's new addresses, and the hook of one parameter, where backward itself spends 3 us
on each of its nodes. Measured here without the launch (22 us), plus its 12.5 us; streams and events come on top."""


class Setting(NamedTuple):
    """A network on some processes, and how fast they are assumed to be.

    Attributes:
        params: elements, float32. tensors: their number.
        macs: multiplications of one sample's forward; backward does twice as many.
        batch: samples per process. rate: operations per second that the network reaches.
        wrapper: "none", "ddp" or "fsdp". processes, link: their number, and bytes per second to and from each.
    """

    name: str
    params: float
    tensors: int
    macs: float
    batch: int
    rate: float
    wrapper: str = "none"
    processes: int = 1
    link: float = 0.0


class Saving(NamedTuple):
    """Seconds of one step: both passes, the optimizer's phase, the two norms in it, what hiding them saves at most, and
    what the host does more."""

    passes: float
    phase: float
    norms: float
    saved: float
    host: float

    @property
    def share(self) -> float:
        """Of the step, what is saved at most."""
        return self.saved / (self.passes + self.phase)


def predict(setting: Setting, bandwidth: float) -> Saving:
    """With P elements of 4 bytes on N processes, each of which owns P' of them (P / N under FSDP2, else P):

    passes  2 max(6 macs batch / rate, communication): arithmetic and communication are taken to overlap fully
            communication per pass, times (N - 1) / N over the link: DDP 8 P (reduce-scatter and all-gather of
            float32); FSDP2 8 P (two all-gathers in bfloat16, a reduce-scatter in float32)
    phase   11 passes over P' at ``bandwidth``, norms 2 of them
    saved   all but the last group of each norm, less what climb and update find in L2 where the norm is right before
            them (half of L2 of use, see `ideas.walk`): on small shards, as much as the norms take
    host    a launch per group and a hook per parameter, in both passes
    """
    _, params, tensors, macs, batch, rate, wrapper, processes, link = setting
    arithmetic = 6 * macs * batch / rate
    moved = 0.0 if wrapper == "none" else 8 * params * (processes - 1) / processes / link
    own = int(params / processes if wrapper == "fsdp" else params)
    phase = traffic.seconds(traffic.step("sgd"), own, torch.float32, bandwidth)
    norms = traffic.seconds([traffic.sum_sq()] * 2, own, torch.float32, bandwidth)
    host = 2 * (GROUPS * GROUP_US + tensors * HOOK_US) * 1e-6
    found = ideas.walk("sgd", own, 4, Walk(blocks=True), machine.L2 / 2) * own * 4 / bandwidth
    return Saving(2 * max(arithmetic, moved), phase, norms, norms * (1 - 1 / GROUPS) - found, host)


_RESNET = Setting("resnet50", 25.6e6, 161, 4.1e9, 128, 75e12)
_VIT_L = Setting("vit_l_16", 304e6, 296, 61.6e9, 32, 350e12)
_VIT_H = Setting("vit_h_14", 632e6, 392, 167e9, 8, 350e12)
_TEXT = Setting("transformer, 2048 tokens", 1.3e9, 300, 1.3e9 * 2048, 1, 400e12)
NVLINK, NETWORK = 360e9, 40e9

SETTINGS = [
    _RESNET,
    _RESNET._replace(batch=32),
    _VIT_L._replace(batch=128),
    _VIT_L,
    _VIT_L._replace(batch=8),
    _VIT_H,
    _VIT_H._replace(batch=2),
    _TEXT,
    _VIT_L._replace(batch=8, wrapper="ddp", processes=8, link=NVLINK),
    _TEXT._replace(wrapper="ddp", processes=8, link=NVLINK),
    _TEXT._replace(wrapper="ddp", processes=8, link=NETWORK),
    _VIT_L._replace(batch=8, wrapper="fsdp", processes=2, link=NVLINK),
    _TEXT._replace(wrapper="fsdp", processes=2, link=NVLINK),
    _TEXT._replace(wrapper="fsdp", processes=8, link=NVLINK),
    _TEXT._replace(wrapper="fsdp", processes=8, link=NETWORK),
    _VIT_L._replace(batch=8, wrapper="fsdp", processes=64, link=NETWORK),
]
