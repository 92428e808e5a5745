"""What is said of an image that cannot be had."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import UnidentifiedImageError

from lesam_dist.errors import UserError


@dataclass(frozen=True)
class Failure:
    """One image of a batch that could not be had.

    Attributes:
        index: its place in the batch.
        path: of the file.
        reason: the decoder's own, in one line, or that of the operating system.
        size: of the file in bytes; None where it could not even be read, which may be the file system's fault.
    """

    index: int
    path: str
    reason: str
    size: int | None

    @property
    def what(self) -> str:
        """The first half of a message."""
        if self.size is None:
            return f"cannot open the image '{self.path}' ({self.reason})"
        return f"cannot decode the image '{self.path}' of {self.size} bytes ({self.reason})"


def reason_of(error: BaseException) -> str:
    """An error of the operating system or of Pillow in one line, without what differs from run to run."""
    if isinstance(error, UnidentifiedImageError):
        return "cannot identify image file"  # Pillow's words, which go on with an address in memory
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def unreadable_image(failure: Failure) -> UserError:
    """Name the file and what to do."""
    if failure.size is None:
        return UserError(
            f"{failure.what}, which was there when its folder was listed: put it back, or start again without it."
        )
    return UserError(
        f"{failure.what}: remove the file or re-encode it. It may be truncated, or of another format than its name "
        "says. `lesam-dist scan` finds all such files, and data.skip_list leaves them out."
    )
