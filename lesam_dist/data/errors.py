"""The one message about an image that cannot be decoded."""

from __future__ import annotations

import os

from lesam_dist.errors import UserError


def unreadable_image(path: str, reason: object) -> UserError:
    """Name the file and what to do; ``reason`` is the decoder's own message, cut to its first line."""
    try:
        size = os.path.getsize(path)
    except OSError as error:
        return UserError(
            f"cannot open the image '{path}' ({error.strerror}), which was there when its folder was listed: "
            "put it back, or start again without it."
        )
    first_line = (str(reason).strip() or type(reason).__name__).splitlines()[0]
    return UserError(
        f"cannot decode the image '{path}' of {size} bytes ({first_line}): remove the file or re-encode it. "
        "It may be truncated, or of another format than its name says."
    )
