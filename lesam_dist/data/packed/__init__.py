"""A data set as tar files of thousands of images each, with an index: what `lesam-dist pack` writes and runs read.

Any program that reads WebDataset reads the tar files. Through the index this package reads any image of any of them, so
that a run takes the same images in the same order, with the same crops, as from class folders.
"""

from lesam_dist.data.packed.reading import holds_shards, open_packed

__all__ = ["holds_shards", "open_packed"]
