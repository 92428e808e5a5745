"""How DALI works on a GPU: what is measured there, and set once for a machine. It does not need DALI."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DaliOptions:
    """Settings of the pipeline. What is for a GPU is left alone where the pipeline works on the CPU.

    Attributes:
        decoder: of JPEGs: "gpu" decodes there (with the hardware decoder, where the GPU has one), "cpu" in the
            pipeline's threads, and resizes on the GPU. Decoding on the GPU takes its time from training.
        hardware_load: share of the images that the hardware decoder takes, 0 to 1.
        preallocate: (width, height) in pixels of the largest image, for which the hardware decoder makes room at the
            start; None: it grows when a larger image comes, which stops all work on the GPU.
        device_padding: MiB of GPU memory that each thread of the decoder has from the start.
        host_padding: likewise, of pinned memory of the host.
        prefetch: batches that are worked on ahead of the one in use.
        affinity: bind each thread to a core. DALI_AFFINITY_MASK says to which.
        channels_last: images lie channels last in memory; only their strides tell.
    """

    decoder: Literal["gpu", "cpu"] = "gpu"
    hardware_load: float = 0.65
    preallocate: tuple[int, int] | None = None
    device_padding: int = 16
    host_padding: int = 8
    prefetch: int = 2
    affinity: bool = False
    channels_last: bool = False

    def decoder_arguments(self) -> dict[str, object]:
        """Of DALI's decoder in a pipeline on a GPU."""
        if self.decoder == "cpu":
            return {"device": "cpu"}
        width, height = self.preallocate or (0, 0)
        return {
            "device": "mixed",
            "hw_decoder_load": self.hardware_load,
            "preallocate_width_hint": width,
            "preallocate_height_hint": height,
            "device_memory_padding": self.device_padding << 20,
            "host_memory_padding": self.host_padding << 20,
        }
