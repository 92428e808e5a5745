"""Triton as on an H100, but for CUDA's driver: kernels are specialised, compiled and launched, and nothing runs.

Everything from `kernel[grid](...)` down to the call of cuLaunchKernelEx is Triton's own, its launcher in C included;
only libcuda.so.1 is a stub, compiled from libcuda_stub.c. Addresses are those of CPU tensors, which nobody follows.

Needs a C compiler, as Triton itself does. To be installed before anything else loads libcuda, so in a process of its
own, and not under TRITON_INTERPRET.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

_SOURCE = Path(__file__).with_name("libcuda_stub.c")


class Launched(NamedTuple):
    """A launch as the driver would have seen it: the compiled kernel's handle, the grid and the first parameters."""

    function: int
    grid: int
    params: tuple[int, ...]


class StubDriver:
    """The stub, once it is installed; it is to be kept as long as kernels are launched."""

    def __init__(self, folder: tempfile.TemporaryDirectory[str], library: ctypes.CDLL) -> None:
        self._folder = folder  # Triton links each launcher that it compiles against the library in it
        self._launches = ctypes.c_int64.in_dll(library, "stub_launches")
        self._function = ctypes.c_int64.in_dll(library, "stub_function")
        self._grid = ctypes.c_int64.in_dll(library, "stub_grid")
        self._num_params = ctypes.c_int32.in_dll(library, "stub_num_params")
        self._params = (ctypes.c_int64 * 64).in_dll(library, "stub_params")

    @property
    def launches(self) -> int:
        """Kernels launched so far."""
        return self._launches.value

    def record(self, num_params: int) -> None:
        """From now on note so many parameters of each launch; each must have that many."""
        self._num_params.value = num_params

    @property
    def last(self) -> Launched:
        """The last launch."""
        return Launched(self._function.value, self._grid.value, tuple(self._params[: self._num_params.value]))


def install(arch: int = 90) -> StubDriver:
    """Let Triton launch on a stubbed GPU of this compute capability, from now on in this process.

    Raises:
        RuntimeError: Triton interprets its kernels, or the stub cannot be compiled.
    """
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError("TRITON_INTERPRET is set: kernels would be interpreted, not launched. Unset it.")
    folder = tempfile.TemporaryDirectory(prefix="libcuda-stub-")
    stub = StubDriver(folder, _build(Path(folder.name)))
    os.environ["TRITON_LIBCUDA_PATH"] = folder.name  # Triton's own compilation of its launcher looks there
    _activate(arch)
    return stub


def _build(folder: Path) -> ctypes.CDLL:
    """Compile the stub and load it, so that the name libcuda.so.1 is taken for all that is loaded later."""
    path = folder / "libcuda.so.1"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError("the stub of libcuda.so.1 needs a C compiler: install gcc, or set CC to one.")
    command = [compiler, "-shared", "-fPIC", "-O2", "-Wl,-soname,libcuda.so.1", "-o", str(path), str(_SOURCE)]
    (folder / "libcuda.so").symlink_to(path.name)  # the name to link against up to Triton 3.5
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed:\n{built.stderr}")
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def _activate(arch: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver

    class Driver(CudaDriver):
        """Asks torch nothing: it may be one without CUDA."""

        def __init__(self) -> None:
            super().__init__()
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0
            self.get_device_capability = lambda device: divmod(arch, 10)

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", arch, 32)

    triton.runtime.driver.set_active(Driver())
