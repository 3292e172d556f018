"""Errors that a user can put right, and the words for them."""

import difflib
import errno
import shlex
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import NamedTuple


class _Spelling(NamedTuple):
    """How options are written where the user is: keywords in Python, flags on the command line, with their section."""

    flags: bool = False
    section: str = ""
    outside: Collection[str] = ()


_spelling = ContextVar("spelling", default=_Spelling())  # noqa: B039 (it is immutable)


@contextmanager
def _spell(spelling: _Spelling) -> Iterator[None]:
    token = _spelling.set(spelling)
    try:
        yield
    finally:
        _spelling.reset(token)


def spell_as_flags(flags: bool = True) -> AbstractContextManager[None]:
    """Write options as the command line does, `--lr`, until the context ends."""
    return _spell(_spelling.get()._replace(flags=flags))


def spell_in_section(section: str, outside: Collection[str] = ()) -> AbstractContextManager[None]:
    """Write options with the section of the larger config that they are in, `--pretrain.lr`, until the context ends.

    Args:
        outside: options that the larger config has itself, which keep their names.
    """
    return _spell(_spelling.get()._replace(section=f"{_spelling.get().section}{section}.", outside=outside))


def option(name: str, *values: object) -> str:
    """Spell an option where the user sets it: `lr` in Python, `--lr` on the command line, `--pretrain.lr` in a section.

    >>> option("image_size", 32, 32)
    'image_size=(32, 32)'
    """
    flags, section, outside = _spelling.get()
    dotted = name if name in outside else section + name
    if not flags:
        return f"{dotted}={(values[0] if len(values) == 1 else values)!r}" if values else dotted
    no = "no-" if values and values[0] is False else ""
    shown = () if values and isinstance(values[0], bool) else values
    return " ".join([f"--{no}{dotted.replace('_', '-')}", *map(str, shown)])


class MapetError(Exception):
    """Something that a user can put right: the message says what is wrong, where, and what to do.

    The command line prints it on one line without a traceback and exits with `exit_code`.

    Attributes:
        field: the option that is wrong, as the config names it.
        value: what it was given.
        expected: what it should have been, in words.
    """

    exit_code = 2

    def __init__(self, message: str, *, field: str | None = None, value: object = None, expected: str = "") -> None:
        super().__init__(message)
        self.field, self.value, self.expected = field, value, expected


class Interrupted(MapetError):
    """A signal stopped a command after it had saved its work.

    Attributes:
        what: what stopped it and what is saved; the message goes on with how to go on.
    """

    exit_code = 130

    def __init__(self, what: str, again: str = "") -> None:
        super().__init__(f"{what}. Go on with: {again or 'the same command and ' + option('resume', True)}")
        self.what = what


class NewerFormatError(MapetError):
    """Files of a format that only a newer mapet reads."""


def shell_command(*words: object) -> str:
    """'mapet ...' as a person can paste it, whatever is in its paths."""
    return shlex.join(["mapet", *map(str, words)])


def by(size: Sequence[int]) -> str:
    """'224 x 224'."""
    return f"{size[0]} x {size[1]}"


def pluralize(number: int, noun: str) -> str:
    """'1 epoch', '1,437 images'."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def os_error_hint(number: int | None) -> str:
    """What to do about an error of the system, by its number; empty where it says it itself."""
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ": you may not read or write there; give another folder, or change its permissions"
    if number in (errno.ENOSPC, errno.EDQUOT):
        return ": make room, or give a folder on another disk; what was saved is whole"
    return ""


def install_hint(extra: str) -> str:
    """mapet is on no index, where its name could be anybody's."""
    return f"pip install '.[{extra}]' in mapet's folder"


def check_divisible(image_size: tuple[int, int], patch_size: int) -> None:
    """Raises MapetError for sizes, in pixels, that patches don't fill; it names the nearest that they do."""
    if any(side < patch_size or side % patch_size for side in image_size):
        fits = [max(1, round(side / patch_size)) * patch_size for side in image_size]
        wrong = f"image size {by(image_size)} is not divisible by the patch size {patch_size}; the nearest that is: {option('image_size', *fits)}"
        raise MapetError(wrong, field="image_size", value=image_size)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """'; did you mean 'x'?' for the options of that name in any section, else the nearest known word, else the two shortest that
    contain it, else the nearest name in a section; or an empty string."""
    known, name = list(known), word.lstrip("-").rpartition(".")[2]
    lasts = {option: option.lstrip("-").rpartition(".")[2] for option in known}
    near = [option for option in known if lasts[option] == name]
    near = near or difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    near = near or sorted((option for option in known if len(name) > 2 and name in option), key=len)[:2]
    close = difflib.get_close_matches(name, lasts.values(), n=1, cutoff=0.75)
    near = near or [option for option in known if lasts[option] in close]
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
