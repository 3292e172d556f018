"""Checks of refused mistakes: the type of the error, its field and value, and the names in its message; no test holds its prose."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest

from mapet import cli
from mapet.errors import MapetError


@contextmanager
def refused(*named: object, kind: type[Exception] = MapetError, **attributes: object) -> Iterator[Any]:
    """Expect an error of one line that names the values.

    Args:
        named: file names, options, numbers, commands: the values that the message must hold, not its prose.
        attributes: of the error, e.g. `field="lr"`, `value=0`.
    """
    with pytest.raises(kind) as caught:
        yield caught
    message = str(caught.value)
    assert "\n" not in message
    for value in named:
        assert str(value) in message, f"{value!r} is not in: {message}"
    for name, value in attributes.items():
        assert getattr(caught.value, name) == value


def fails(capsys: Any, *argv: object, named: Sequence[object] = (), code: int = 2, **attributes: object) -> str:
    """Run a command of the command line that must end with one line of error; return the line.

    Args:
        capsys: the fixture of pytest.
        argv: the command's name and its arguments.
        named: values that the line must hold, as of `refused`.
        code: the exit code.
        attributes: of the error, as of `refused`.
    """
    errors: list[MapetError] = []

    def run_command(name: str, arguments: list[str], original: Any = cli.run_command) -> Any:
        try:
            return original(name, arguments)
        except MapetError as error:
            errors.append(error)
            raise

    with mock.patch.object(cli, "run_command", run_command):
        assert cli.main([str(arg) for arg in argv]) == code
    printed = capsys.readouterr().err.strip()
    lines = [line for line in printed.splitlines() if line.startswith("mapet ")]
    assert len(lines) == 1 and "Traceback" not in printed, printed
    for value in named:
        assert str(value) in lines[0], f"{value!r} is not in: {lines[0]}"
    for name, value in attributes.items():
        assert getattr(errors[0], name) == value
    return lines[0]
