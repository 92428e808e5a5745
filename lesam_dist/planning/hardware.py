"""What machines can do: from data sheets, with the shares of it that a run is assumed to reach.

Sources. GPUs: NVIDIA's data sheets of A100 80GB SXM (2021), H100 SXM (2023), H200 SXM (2024) and DGX B200 (2024); rates
without sparsity, links in one direction. Nodes: DGX A100 (2 x 64 cores), DGX H100, H200 and B200 (2 x 56 cores), 8 GPUs
each. Latencies: those per hop of NCCL's own model, protocol "simple" (src/graph/tuning.cc: NVLink 3.4 us, network
14 us). The CPU's numbers are a guess for one core; `lesam-dist plan --calibrate` measures them.
"""

from __future__ import annotations

from dataclasses import dataclass

from lesam_dist.errors import UserError, unknown_name
from lesam_dist.planning.collectives import Link


@dataclass(frozen=True)
class Device:
    """One GPU, or one process on a CPU, among those of its node.

    Attributes:
        peak: operations per second of matrix products, by format: fp32, tf32, bf16, fp16.
        bandwidth: bytes per second that its memory reads and writes.
        memory: bytes.
        link: to the others of its node, bytes per second in one direction.
        latency: seconds of one message to another of its node.
        per_node: how many a usual node has.
        cores: of the CPU, for each of them.
        floor: seconds of the shortest operation: a launch by torch without graphs.
        backend: of torch.distributed.
    """

    name: str
    peak: dict[str, float]
    bandwidth: float
    memory: float
    link: float
    latency: float = 3.4e-6
    per_node: int = 8
    cores: float = 14
    floor: float = 5e-6
    backend: str = "nccl"

    def rate(self, compute: str, tf32: bool) -> float:
        """Peak of the products of a forward that computes in this format."""
        return self.peak["tf32" if compute == "fp32" and tf32 else compute]


def _gpu(name: str, fp32: float, tf32: float, half: float, memory: tuple[float, float], link: float) -> Device:
    """Rates in TFLOP/s, memory in TB/s and GB, link in GB/s."""
    peak = {"fp32": fp32 * 1e12, "tf32": tf32 * 1e12, "bf16": half * 1e12, "fp16": half * 1e12}
    return Device(name, peak, memory[0] * 1e12, memory[1] * 1e9, link * 1e9, cores=16 if name == "a100" else 14)


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        _gpu("a100", 19.5, 156, 312, (2.039, 80), 300),
        _gpu("h100", 67, 494.7, 989.4, (3.35, 80), 450),
        _gpu("h200", 67, 494.7, 989.4, (4.8, 141), 450),
        _gpu("b200", 75, 1100, 2250, (8.0, 180), 900),
        Device(
            "cpu",
            dict.fromkeys(("fp32", "tf32", "bf16", "fp16"), 60e9),
            bandwidth=10e9,
            memory=8e9,
            link=2e9,
            latency=50e-6,
            cores=1,
            floor=10e-6,
            backend="gloo",
        ),
    )
}


@dataclass(frozen=True)
class Shares:
    """What a run is assumed to reach of a data sheet: nothing of this was measured, `--efficiency` changes the first.

    Attributes:
        products: of `Device.peak`, by convolutions and matrix products.
        memory: of `Device.bandwidth`.
        link: of links and network.
        reserved: bytes of a GPU that are taken by CUDA's context, NCCL's buffers and the libraries' workspaces.
    """

    products: float = 0.5
    memory: float = 0.85
    link: float = 0.8
    reserved: float = 2e9


NETWORK_LATENCY = 14e-6
"""Seconds of one message between nodes."""


def device_of(name: str) -> Device:
    """The device of a name, in any case.

    Raises:
        UserError: for a name that the table does not have.
    """
    if name.lower() not in DEVICES:
        raise unknown_name("--gpu", name, DEVICES)
    return DEVICES[name.lower()]


_UNITS = {"kbit": 1e3 / 8, "mbit": 1e6 / 8, "gbit": 1e9 / 8, "kb/s": 1e3, "mb/s": 1e6, "gb/s": 1e9}


def interconnect_of(text: str, per_node: int) -> Link:
    """What "400gbit" says: bytes per second and direction from each GPU to other nodes, and the latency.

    Behind "/node" all GPUs of a node share it: "100gbit/node". Units: kbit, mbit, gbit (bits), KB/s, MB/s, GB/s.

    Raises:
        UserError: for any other text.
    """
    lower = text.strip().lower()
    shared = lower.endswith("/node")
    number = lower.removesuffix("/node")
    unit = next((unit for unit in _UNITS if number.endswith(unit)), "")
    try:
        value = float(number.removesuffix(unit))
    except ValueError:
        value = 0.0
    if not unit or not 0 < value < 1e9:
        raise UserError(
            f"--interconnect is '{text[:60]}': give each GPU's bandwidth to other nodes with its unit, e.g. 400gbit or "
            "50GB/s, or what the GPUs of a node share, e.g. 100gbit/node."
        )
    return Link(NETWORK_LATENCY, value * _UNITS[unit] / (per_node if shared else 1))
