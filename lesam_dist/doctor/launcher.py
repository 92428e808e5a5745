"""The environment that a launcher leaves: which process this is, and variables that change a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lesam_dist.config.launcher import accelerate_flags
from lesam_dist.doctor.finding import Finding
from lesam_dist.errors import UserError
from lesam_dist.parallel.place import find_place


def check_launcher(environ: Mapping[str, str], gpus: int) -> Iterator[Finding]:
    """Whether the launcher's variables make sense together."""
    try:
        place = find_place(environ)
    except UserError as error:
        yield Finding("launcher", "problem", str(error), "start with torchrun, srun or mpirun, or unset the variables")
        return
    if place.world_size > 1:
        at = f", which meet at {place.address}" if place.address else ""
        yield Finding("launcher", "ok", f"{place.launcher}, process {place.rank} of {place.world_size}{at}")
        if gpus and place.local_world_size > gpus:
            text = f"{place.local_world_size} processes here, but {gpus} GPU{'s' * (gpus > 1)}"
            yield Finding("processes", "problem", text, "start as many processes as there are GPUs")
    else:
        start = f"torchrun --nproc-per-node {gpus} -m lesam_dist.train ..." if gpus > 1 else ""
        yield Finding("launcher", "ok", "none: a run is one process", start)
    yield from _accelerate(environ)
    yield from _switches(environ, gpus)


def _accelerate(environ: Mapping[str, str]) -> Iterator[Finding]:
    try:
        flags = accelerate_flags(environ)
    except UserError as error:
        yield Finding("accelerate", "problem", str(error), "change it with accelerate config")
        return
    if flags:
        yield Finding("accelerate", "ok", f"asks for {' '.join(flags)}")


def _switches(environ: Mapping[str, str], gpus: int) -> Iterator[Finding]:
    if environ.get("TRITON_INTERPRET") == "1" and gpus:
        text = "TRITON_INTERPRET is 1: the kernels are interpreted, very slowly"
        yield Finding("environment", "warning", text, "unset it, unless you debug")
    if environ.get("CUDA_VISIBLE_DEVICES") == "":
        yield Finding("environment", "warning", "CUDA_VISIBLE_DEVICES is empty: no GPU is seen", "unset it")
