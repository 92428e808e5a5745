"""The trainer: `python -m lesam_dist.train`, alone or under torchrun."""
