"""What is in a compiled kernel: its instructions, as PTX and as the GPU gets them (SASS), and what it occupies."""

from __future__ import annotations

import re
import struct
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import triton

_BYTES = 16  # of an instruction, from sm_70 on


def ptx_of(path: Path) -> Counter[str]:
    """How often each opcode occurs, such as "ld.global.v4.b32"."""
    return Counter(re.findall(r"^\s*(?:@!?%p\d+\s+)?([a-z]\w*\.[\w.:]+)\s[^;]*;", path.read_text(), re.MULTILINE))


def sass_of(cubins: Sequence[Path], arch: int) -> list[Counter[str]]:
    """The same of machine code, such as "LDG.E.128", by kernel.

    All go to the disassembler as one: it takes 0.25 s to start, and 0.01 s for a kernel.
    """
    codes = [_section(cubin.read_bytes(), b".text.") for cubin in cubins]
    together = cubins[0].with_name("together.bin")
    together.write_bytes(b"".join(codes))
    target = f"SM{arch}a" if arch >= 90 else f"SM{arch}"  # as Triton compiles
    lines = _run(triton.knobs.nvidia.nvdisasm.path, "--binary", target, str(together))
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*[\w.]*)", lines)
    assert len(opcodes) == sum(map(len, codes)) // _BYTES, "the disassembler left out instructions"
    remaining = iter(opcodes)
    return [Counter(next(remaining) for _ in range(len(code) // _BYTES)) for code in codes]


def resources_of(cubin: Path) -> dict[str, int]:
    """Registers per thread, and bytes of local memory (stack and spills) per thread."""
    use = _run(triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin))
    registers, stack, local = (int(re.findall(rf"{name}:(\d+)", use)[0]) for name in ("REG", "STACK", "LOCAL"))
    return {"registers": registers, "local": stack + local}


def _section(elf: bytes, prefix: bytes) -> bytes:
    """The first section of an ELF file (64 bits, little endian) whose name begins so."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<II4Q", elf, table + i * size) for i in range(count)]
    names = headers[names_index][4]
    for name, _, _, _, offset, length in headers:
        if elf.startswith(prefix, names + name):
            return elf[offset : offset + length]
    raise ValueError(f"the file has no section {prefix.decode()}")


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
