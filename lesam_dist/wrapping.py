"""Deprecated: `wrap` is in `lesam_dist.parallel`."""

import warnings

from lesam_dist.parallel import wrap

__all__ = ["wrap"]

warnings.warn("lesam_dist.wrapping is now lesam_dist.parallel: import wrap from there.", FutureWarning, stacklevel=2)
