"""Errors a person can act on."""

import difflib
from collections.abc import Iterable, Sequence


class MapetError(Exception):
    """Something a user can put right: the message says what, where and how to go on.

    The command line prints it on one line without a traceback and exits with `exit_code`.
    """

    exit_code = 2


class Interrupted(MapetError):
    """A signal stopped a stage after it had saved its work."""

    exit_code = 130


class MadeByNewer(MapetError):
    """Files of a format that only a newer mapet reads."""


def by(size: Sequence[int]) -> str:
    """'224 x 224'."""
    return f"{size[0]} x {size[1]}"


def counted(number: int, noun: str) -> str:
    """'1 epoch', '1,437 images'."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """'; did you mean 'x'?' for the nearest known word, or an empty string."""
    nearest = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{nearest[0]}'?" if nearest else ""
