"""Checkpoints that are whole or absent: written aside, renamed, pointed to by `latest`, checked before they are read.

    RUN_DIR/checkpoints/
      step_00000240/
        rank_00000.safetensors   what this rank wrote: whole tensors, or its parts of them
        index.json               every tensor: dtype, size, and which part is in which file
        manifest.json            format, progress, every value that is no tensor, checksums of all files
      latest                     the name of the newest

Nothing in it is ever unpickled. Every process takes part in saving and loading; on several nodes RUN_DIR must be a
shared file system.
"""

from lesam_dist.train.checkpoint.checkpointer import Checkpointer, Loaded

__all__ = ["Checkpointer", "Loaded"]
