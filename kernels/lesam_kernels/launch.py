"""Launches kernels without Triton's front end, where what it would find is known from an earlier launch.

`kernel[grid](...)` works out anew in each launch for which types, alignments and constants a kernel is to be compiled,
and finds it in its cache: several times what the launch itself costs. A step launches the same four kernels with the
same specialisation each time.
"""

from __future__ import annotations

from typing import Any

import triton

_DIRECT_VERSIONS = ((3, 5), (3, 9))
"""First and last version of Triton whose ``compiled[grid](*args)`` is known to be what `Launcher` makes of it.

3.5.1, 3.6.0, 3.7.1, 3.8.0 and 3.9.0 went through tests/kernels/test_launch.py, as a later one must. With any other
one kernels are launched in the plain way, which is correct and slower.
"""


class Launcher:
    """Launches the kernels of one device: ``launch(kernel, programs, *args, **constants)``.

    Does what ``kernel[(programs,)](*args, **constants)`` does, hooks of profilers included. What that compiled is
    kept, and launched directly where everything that it was specialised on is the same again. Never kept is what the
    interpreter or a backend other than CUDA's runs.
    """

    def __init__(self) -> None:
        self._compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}  # with the constants of the signature

    def __call__(self, kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
        """Launch ``kernel`` on the current device and stream.

        Args:
            kernel: a @triton.jit function whose constexprs come last.
            programs: size of the grid, one-dimensional.
            args: tensors, integers and None in the order of the kernel's arguments. Tensors must be on the current
                device: a direct launch passes their addresses, which CUDA does not check.
            constants: the kernel's constexprs, and options of the compiler.
        """
        passed = [arg if arg is None or type(arg) is int else arg.data_ptr() for arg in args]
        # All that Triton specialises on: pointers by dtype and alignment, integers by value, what is not given. The
        # kernel by identity: it lives as long as what is kept, and Triton's own hash of it is slow.
        dtypes = [arg if arg is None or type(arg) is int else arg.dtype for arg in args]
        offsets = [address and address % 16 for address in passed]
        key = (id(kernel), *constants, *constants.values(), *_settings(), *dtypes, *offsets)
        known = self._compiled.get(key)
        if known is not None and not _must_see(kernel):
            compiled, last_args = known
            compiled[(programs, 1, 1)](*passed, *last_args)
            return
        compiled = kernel[(programs,)](*args, **constants)
        if _is_direct(compiled):
            self._compiled[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(args) :])


def _settings() -> tuple[object, ...]:
    """What a profiler or a user may change between two launches, and Triton compiles for."""
    runtime, compilation = triton.knobs.runtime, triton.knobs.compilation
    return (
        runtime.debug,
        getattr(compilation, "instrumentation_mode", None),
        getattr(compilation, "fpsan_homomorphic_casts", None),
    )


def _must_see(kernel: Any) -> bool:
    """Whether someone wants to see or change each launch before it is made."""
    return bool(kernel.pre_run_hooks) or getattr(triton.knobs.runtime, "add_stages_inspection_hook", None) is not None


def _is_direct(compiled: Any) -> bool:
    """Whether ``compiled``, which a plain launch returned, can be launched by itself."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    first, last = _DIRECT_VERSIONS
    metadata = getattr(compiled, "metadata", None)  # the interpreter returns nothing
    return metadata is not None and metadata.target.backend == "cuda" and first <= version <= last
