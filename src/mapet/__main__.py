"""The `mapet` command, and `python -m mapet`."""

import sys

from mapet.signals import exit_on_sigint_during_import


def console() -> None:
    """Run the command that was typed, and exit with its code."""
    exit_on_sigint_during_import()  # before the imports that take time
    from mapet.cli import main

    sys.exit(main())


if __name__ == "__main__":
    console()
