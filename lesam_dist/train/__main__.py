"""`python -m lesam_dist.train`, the same as `lesam-dist train`."""

from lesam_dist.cli import run

if __name__ == "__main__":
    run("train")
