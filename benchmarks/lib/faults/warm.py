"""What the server imports and does once, so that none of its children has to; nothing of it starts a thread."""

from __future__ import annotations

from contextlib import suppress

import torch._dynamo
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp  # noqa: F401
import torchvision.models  # noqa: F401

from lesam_dist.config.command_line import parse
from lesam_dist.errors import UserError
from lib.faults import inside  # noqa: F401

with suppress(ImportError):
    import lesam_dist.data.dali  # noqa: F401
with suppress(UserError):
    parse(["--config", "digits"])  # docstrings of all fields are read the first time
