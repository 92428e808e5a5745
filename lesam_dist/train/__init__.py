"""The trainer of `lesam-dist train`, on one process or under a launcher: `run` sets up, `trainer` has the loop."""
