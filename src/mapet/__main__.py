"""The `mapet` command, and `python -m mapet`."""

import sys

from mapet.signals import leave_at_once_while_importing


def console() -> None:
    """Run the command that was typed, and exit with its code."""
    leave_at_once_while_importing()  # before the imports that take time
    from mapet.cli import main

    sys.exit(main())


if __name__ == "__main__":
    console()
