"""Errors that the user can correct, and the formatting of what their messages contain."""

import difflib
import errno
import shlex
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import NamedTuple

MIN_PART_SIMILARITY, MIN_NAME_SIMILARITY = 0.75, 0.6
"""Similarity, 0 to 1, from which on difflib takes the last parts of two names, or two names, for alike."""
MAX_REASON_CHARS = 300
"""Characters of another library's error that are quoted."""


class _Spelling(NamedTuple):
    """Spelling of options in messages.

    Attributes:
        flags: as flags of the command line, `--lr`; else as Python keywords, `lr`.
        section: prefix that ends in a dot, e.g. 'pretrain.', or ''.
        outside: options that are written without the section.
    """

    flags: bool = False
    section: str = ""
    outside: Collection[str] = ()


_spelling = ContextVar("spelling", default=_Spelling())  # noqa: B039 (it is immutable)


@contextmanager
def _spell(spelling: _Spelling) -> Iterator[None]:
    """Make `option` use a spelling until the context ends."""
    token = _spelling.set(spelling)
    try:
        yield
    finally:
        _spelling.reset(token)


def spell_as_flags(flags: bool = True) -> AbstractContextManager[None]:
    """Make `option` write `--lr`, as the command line does (`flags=False`: `lr`), until the context ends."""
    return _spell(_spelling.get()._replace(flags=flags))


def spell_in_section(section: str, outside: Collection[str] = ()) -> AbstractContextManager[None]:
    """Make `option` prefix names with a section of a config, `--pretrain.lr`, until the context ends; sections nest.

    Args:
        section: name of the section, e.g. 'pretrain'.
        outside: options that the enclosing config has itself: they are written without the section.
    """
    return _spell(_spelling.get()._replace(section=f"{_spelling.get().section}{section}.", outside=outside))


def option(name: str, *values: object) -> str:
    """Return an option as the user writes it: `lr` in Python, `--lr` on the command line, `--pretrain.lr` in a section.

    With values it is the whole assignment: `image_size=(32, 32)`, `--image-size 32 32`; booleans are `resume=True`,
    `--resume`, `--no-resume`.

    Args:
        name: of the config's field.
        values: none, one, or the items of a sequence.
    """
    flags, section, outside = _spelling.get()
    dotted = name if name in outside else section + name
    if not flags:
        value = values[0] if len(values) == 1 else values
        return f"{dotted}={value!r}" if values else dotted
    flag = dotted.replace("_", "-")
    if values and isinstance(values[0], bool):
        return f"--{flag}" if values[0] else f"--no-{flag}"
    return " ".join([f"--{flag}", *map(str, values)])


class MapetError(Exception):
    """An error that the user can correct: the message says what is wrong, where, and what to do.

    The command line prints it on one line without a traceback and exits with `exit_code`.

    Attributes:
        field: the wrong option's name in its config; None if the error is not about one option.
        value: the option's value.
        expected: what the value must be, as text for the user; '' if unknown.
    """

    exit_code = 2

    def __init__(self, message: str, *, field: str | None = None, value: object = None, expected: str = "") -> None:
        super().__init__(message)
        self.field, self.value, self.expected = field, value, expected


class Interrupted(MapetError):
    """A signal has stopped a command, which had saved its work.

    Attributes:
        what: what has stopped it and what is saved; the message adds how to resume.
    """

    exit_code = 130

    def __init__(self, what: str, command: str = "") -> None:
        """Make the error.

        Args:
            what: see the class.
            command: what resumes the work; '': the same command with the option `resume`.
        """
        super().__init__(f"{what}. Resume with: {command or 'the same command and ' + option('resume', True)}")
        self.what = what


class NewerFormatError(MapetError):
    """Files have a format that only a newer mapet can read."""


def shell_command(*args: object) -> str:
    """Return the shell command 'mapet ARGS', quoted so that it can be pasted."""
    return shlex.join(["mapet", *map(str, args)])


def format_size(size: Sequence[int]) -> str:
    """Format a height and a width: '224 x 224'."""
    return f"{size[0]} x {size[1]}"


def pluralize(count: int, noun: str) -> str:
    """Format a count and its noun: '1 epoch', '1,437 images'."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def os_error_hint(code: int | None) -> str:
    """Return ': ' and what to do about an error of the system, or '' if its own text suffices.

    Args:
        code: the `errno` of the OSError; None if unknown.
    """
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ": you may not read or write there; give another folder, or change its permissions"
    if code in (errno.ENOSPC, errno.EDQUOT):
        return ": make room, or give a folder on another disk; what was saved before is intact"
    return ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text for a message, at most `MAX_REASON_CHARS` and without a final period.

    Where an error has no text it is the name of its type.
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0][:MAX_REASON_CHARS].rstrip(".")


def describe_key_error(error: Exception) -> str:
    """Return why the content of a file cannot be used: the key that it lacks, for a KeyError, else `first_line`."""
    return f"it has no {error.args[0]!r}" if isinstance(error, KeyError) and error.args else first_line(error)


def install_hint(extra: str) -> str:
    """Return how to install an optional dependency group (extra) of mapet.

    The command installs from mapet's own folder: mapet is on no package index, where another project may take its name.
    """
    return f"pip install '.[{extra}]' in mapet's folder"


def check_divisible(image_size: tuple[int, int], patch_size: int) -> None:
    """Check that patches fill an image.

    Args:
        image_size: (H, W) pixels.
        patch_size: pixels of a side.

    Raises:
        MapetError: a side is no multiple of the patch size; the message names the nearest size that is.
    """
    if any(side < patch_size or side % patch_size for side in image_size):
        nearest = [max(1, round(side / patch_size)) * patch_size for side in image_size]
        problem = f"image size {format_size(image_size)} is not divisible by the patch size {patch_size}"
        raise MapetError(
            f"{problem}; the nearest that is: {option('image_size', *nearest)}", field="image_size", value=image_size
        )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Suggest known names similar to an unknown one: "; did you mean 'x'?", "; did you mean 'x' or 'y'?", or '' if none is.

    Names may be options with sections, '--pretrain.lr', whose last part is 'lr'. The first rule that finds any decides:
    names with the same last part; the most similar name; the two shortest names that contain the last part; names whose last
    part is the most similar; the shortest name that begins similarly.
    """
    last_parts = {candidate: candidate.lstrip("-").rpartition(".")[2] for candidate in known}
    last_part = name.lstrip("-").rpartition(".")[2]
    containing = [candidate for candidate in last_parts if len(last_part) > 2 and last_part in candidate]
    closest_parts = difflib.get_close_matches(last_part, last_parts.values(), n=1, cutoff=MIN_PART_SIMILARITY)
    # 4: what shorter names begin with says nothing
    beginnings = difflib.get_close_matches(name, {known[: len(name)] for known in last_parts if len(name) >= 4}, n=1)
    similar = (
        [candidate for candidate, part in last_parts.items() if part == last_part]
        or difflib.get_close_matches(name, last_parts, n=1, cutoff=MIN_NAME_SIMILARITY)
        or sorted(containing, key=len)[:2]
        or [candidate for candidate, part in last_parts.items() if part in closest_parts]
        or sorted((candidate for candidate in last_parts if candidate[: len(name)] in beginnings), key=len)[:1]
    )
    return f"; did you mean {' or '.join(map(repr, similar))}?" if similar else ""
