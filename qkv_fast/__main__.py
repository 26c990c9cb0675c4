"""The command `qkv-fast`, also `python -m qkv_fast`: configuration, self-check, benchmark."""

import sys


def main(argv: list[str] | None = None) -> int:
    """Run the command line in `argv` (default: the process's own) and return its exit status."""
    from .bench.cli import main as run  # only here: importing the package must stay cheap

    status: int = run(argv)
    return status


if __name__ == "__main__":
    sys.exit(main())
