"""`python -m brim` and the `brim` command."""

import sys


def main() -> None:
    """Run the command line and exit with its code."""
    from brim.cli.app import main as run_command

    sys.exit(run_command(sys.argv[1:]))


if __name__ == "__main__":
    main()
