"""Files of tensors in the safetensors format: a JSON header and the plain bytes, which cannot hold code.

safetensors' own writer wants all tensors on the host before it writes the first; it neither syncs the file nor sums it
up. This one has one tensor at a time there, and makes the checksum as it writes. The library reads what it has written.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lesam_dist.train.checkpoint.manifest import Checksum, DamagedError

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What safetensors calls a dtype."""
DTYPES = {name: dtype for dtype, name in NAMES.items()}
_PIECE = 1 << 20  # bytes written at a time: still in the processor's cache when they are summed up


def write(path: Path, tensors: Mapping[str, Tensor]) -> Checksum:
    """Write a new file of these tensors, which may be on a device, and have it on disk.

    Raises:
        OSError: where it cannot be written; a part of it may be there.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    # The widest first: then each begins at a multiple of its width.
    names, end = sorted(tensors, key=lambda name: -tensors[name].element_size()), 0
    for name in names:
        begin, end = end, end + tensors[name].numel() * tensors[name].element_size()
        dtype, shape = NAMES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    crc = zlib.crc32(start)
    with path.open("xb") as file:
        file.write(start)
        for name in names:
            data = _bytes_of(tensors[name])
            for begin in range(0, len(data), _PIECE):
                piece = data[begin : begin + _PIECE]
                file.write(piece)
                crc = zlib.crc32(piece, crc)
        file.flush()
        os.fsync(file.fileno())
    return {"size": len(start) + end, "crc32": crc}


def check_header(path: Path, expected: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> None:
    """Compare what a file says it holds with dtype and shape by name.

    Raises:
        DamagedError: where it holds anything else, or is no such file.
    """
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            found = {name: (part.get_dtype(), list(part.get_shape())) for name, part in slices.items()}
    except (OSError, SafetensorError) as error:
        raise DamagedError(f"{path} is no safetensors file ({error})") from error
    wanted = {name: (NAMES[dtype], list(shape)) for name, (dtype, shape) in expected.items()}
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise DamagedError(f"{path}: its '{name}' is {found.get(name)}, and {wanted.get(name)} by the index")


def _bytes_of(tensor: Tensor) -> memoryview:
    flat: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)
