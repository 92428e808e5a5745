"""Launch every kernel without a GPU, and print as JSON what the Triton that is imported made of it.

    python -m tests.kernels.launch_offline 80 90 100

The driver is a stand-in: kernels are specialised, compiled and loaded as on a GPU, and then not run. So what is
compiled is what the launchers ask for, whatever their arguments are by now. Not to be run under TRITON_INTERPRET.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch.optim import SGD, AdamW, Optimizer
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import lesam_kernels
from lesam_dist import optim
from lesam_kernels import TensorTable
from lesam_kernels.launch_config import SUPPORTED_DTYPES, TRITON_DTYPES
from tests.kernels.machine_code import ptx_of, resources_of, sass_of
from tests.methods import CASES

Launcher = Callable[..., Any]

LAUNCHERS: dict[str, Launcher] = {
    name: getattr(lesam_kernels, name) for name in lesam_kernels.__all__ if name != "TensorTable"
}
COLUMNS = ("copy", "g", "g_hat", "ema", "exp_avg", "exp_avg_sq")
OPTIONAL_COLUMNS = {"restore_sgd": ("g_kept", "momentum_buffer"), "restore_adamw": ("g_kept",)}  # with and without
SHAPES = {"radius": (1, 3), "metric": (1, 2), "scalars": (1, 7)}  # of tensors, where not (1,)
DOUBLES = {"sum_sq", "radius", "a_factors", "b_factors"}


class Compiled(NamedTuple):
    """A specialisation: its kernel, its constants (None for an absent tensor), and the files that Triton wrote."""

    kernel: str
    constants: dict[str, Any]
    shared: int  # bytes
    files: dict[str, Path]  # by ending: ptx, cubin


class OfflineDriver:
    """A GPU of an architecture, as far as Triton asks: what it is given to load and to launch, it leaves."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # kernels are cached by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 48 * 1024}  # more than that must be asked for

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[object, object, int, int, int]:
        return object(), object(), 0, 0, 1024

    def unload_module(self, module: object) -> None: ...

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *arguments: None


def compile_all(arch: int) -> tuple[list[Compiled], list[Compiled]]:
    """What launches over every dtype, with every option, compile; and what other lists and values compile beside it."""
    compiled: list[Compiled] = []

    def keep(*, src: Any, metadata: dict[str, Any], metadata_group: dict[str, str], **_: Any) -> None:
        names = src.fn.arg_names
        constants = {names[path[0]]: value for path, value in src.constants.items()}
        files = {Path(path).suffix[1:]: Path(path) for path in metadata_group.values()}
        compiled.append(Compiled(src.fn.__name__, constants, metadata["shared"], files))

    triton.knobs.compilation.listener = keep
    triton.runtime.driver.set_active(OfflineDriver(arch))
    for dtypes in [*((dtype,) for dtype in SUPPORTED_DTYPES), SUPPORTED_DTYPES, ()]:
        launch_all(dtypes, numel=4096)
    step_with_all_methods()
    first = len(compiled)
    for numel in (1, 16, 5000):
        for offset in range(3):
            launch_all(SUPPORTED_DTYPES, numel, offset)
    return compiled[:first], compiled[first:]


def launch_all(dtypes: Sequence[torch.dtype], numel: int, offset: int = 0) -> None:
    """Every launcher over tensors of these dtypes and of ``numel`` elements, with scalars that are views at an offset.

    Without options and with all of them, on bfloat16 also with each alone; the library's steps cover float32.
    """
    tensors = [torch.ones(numel, dtype=dtype) for dtype in dtypes for _ in range(numel % 7 + 1)]
    table = TensorTable("cpu")
    table.build(tensors, [0] * len(tensors))
    for column in COLUMNS:
        table.set(column, tensors)
    table.set("step", [torch.zeros(()) for _ in tensors])
    for name, launcher in LAUNCHERS.items():
        parameters = inspect.signature(launcher).parameters.values()
        columns = OPTIONAL_COLUMNS.get(name, ())
        optional = (*columns, *(p.name for p in parameters if p.default is not p.empty))
        for given in alone_and_together(optional) if dtypes == (torch.bfloat16,) else ((), optional):
            for column in ("g_kept", "momentum_buffer"):
                table.set(column, tensors) if column in given or column not in columns else table.clear(column)
            chosen = [p.name for p in parameters if p.default is p.empty or p.name in given]
            launcher(table, **{key: argument(launcher, key, offset) for key in chosen if key != "table"})


def alone_and_together(options: Sequence[str]) -> Iterator[Sequence[str]]:
    yield ()
    yield from ((option,) for option in options)
    yield options


def argument(launcher: Launcher, name: str, offset: int) -> Any:
    """An argument by its name, which means the same to all launchers; only AdamW's scalars are doubles."""
    if name in ("column", "a", "b"):
        return "g"
    if inspect.signature(launcher).parameters[name].annotation == "bool":
        return True
    shape = SHAPES.get(name, (1,))
    double = name in DOUBLES or (name == "scalars" and launcher is lesam_kernels.restore_adamw)
    values = torch.rand(offset + torch.Size(shape).numel(), dtype=torch.float64 if double else torch.float32)
    return values[offset:].view(shape)


def step_with_all_methods() -> None:
    """What the library launches, on float32: three steps of each method around SGD with and without momentum, AdamW."""
    bases: list[tuple[type[Optimizer], dict[str, float]]] = [(SGD, {"momentum": 0.9}), (SGD, {}), (AdamW, {})]
    triton.knobs.runtime.interpret = True  # the library takes CPU tensors only there; these kernels are not interpreted
    for case in CASES.values():
        for base, settings in bases if case.method is not optim.MSAM else bases[:1]:  # which climbs along the momentum
            for clipping in ({}, {"max_grad_norm": 1.0}):
                w = torch.nn.Parameter(torch.ones(8))
                method = case.method([w], base, lr=0.1, backend="triton", **case.kwargs, **settings, **clipping)

                def closure(w: torch.nn.Parameter = w, **_: Any) -> torch.Tensor:
                    loss = w.square().sum()
                    w.grad = None
                    loss.backward()  # type: ignore[no-untyped-call]
                    return loss

                for _ in range(3):
                    method.step(closure)
    triton.knobs.runtime.interpret = False


def declared() -> set[str]:
    """The kernels of the package: its Triton functions that are launched and not called."""
    modules = [importlib.import_module(f"lesam_kernels.{m.name}") for m in pkgutil.iter_modules(lesam_kernels.__path__)]
    functions = [value for module in modules for value in vars(module).values() if isinstance(value, JITFunction)]
    return {function.__name__ for function in functions if function.__name__.endswith("_kernel")}


def report(arch: int) -> dict[str, Any]:
    """What `compile_kernels.Report` holds."""
    compiled, again = compile_all(arch)
    optional = {(c.kernel, n) for c in compiled for n, value in c.constants.items() if value is None or value is False}
    codes = sass_of([c.files["cubin"] for c in compiled], arch)
    return {
        "triton": triton.__version__,
        "arch": arch,
        "never_launched": sorted(declared() - {c.kernel for c in compiled}),
        "compiled_again": [f"{c.kernel} with {c.constants}" for c in again],
        "kernels": [
            {
                "kernel": c.kernel.strip("_").removesuffix("_kernel"),
                "dtypes": dtypes_of(c),
                "options": sorted(n for k, n in optional if k == c.kernel and c.constants.get(n, True)),
                "shared": c.shared,
                **resources_of(c.files["cubin"]),
                "ptx": ptx_of(c.files["ptx"]),
                "sass": code,
            }
            for c, code in zip(compiled, codes, strict=True)
        ],
    }


def dtypes_of(compiled: Compiled) -> list[str]:
    """Those of the tensors that it reads, as Triton calls them."""
    values = str(compiled.constants.get("DTYPE")), *(str(dtype) for dtype, _ in compiled.constants.get("TYPES", ()))
    return [str(dtype) for dtype in TRITON_DTYPES.values() if any(str(dtype) == value for value in values)]


if __name__ == "__main__":
    json.dump([report(int(arch)) for arch in sys.argv[1:]], sys.stdout)
