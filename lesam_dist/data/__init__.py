"""Images to normalised batches on the device: from class folders, with DALI or with torchvision, or CIFAR's.

What a batch holds is decided in :mod:`~lesam_dist.data.plan` as a pure function of (seed, epoch); the two
backends only decode. So a run continues exactly after a restart, on any number of processes.

``lesam_dist.data.digits`` is left out here, so that ``python -m lesam_dist.data.digits`` runs it just once, and
``lesam_dist.data.cifar``, which imports torchvision.
"""

from lesam_dist.data.folder import ImageFolder, scan_split
from lesam_dist.data.loader import BACKENDS, Loader, build_loader
from lesam_dist.data.order import epoch_order, rank_batches
from lesam_dist.data.synthetic import SyntheticLoader
from lesam_dist.data.transform import Transform

__all__ = [
    "BACKENDS",
    "ImageFolder",
    "Loader",
    "SyntheticLoader",
    "Transform",
    "build_loader",
    "epoch_order",
    "rank_batches",
    "scan_split",
]
