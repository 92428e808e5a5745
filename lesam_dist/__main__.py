"""`python -m lesam_dist COMMAND ...`, the same as `lesam-dist COMMAND ...`, for torchrun."""

from lesam_dist.cli import main

if __name__ == "__main__":
    main()
