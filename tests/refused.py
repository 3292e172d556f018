"""The check of a refused mistake: the type of its error, field and value; no test holds to the prose of a message."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

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
