"""train.log of a run: when it ran and on what, how it ended, what it warned of."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from mapet.signals import STOP_SIGNALS

ASKED = tuple(f"{name}: " for name in STOP_SIGNALS)
"""How lines begin that are no warnings: somebody asked the run to stop."""


@dataclass(frozen=True)
class Log:
    """What train.log tells.

    Attributes:
        sessions: (start, last line) of each time the run was started or resumed.
        systems: (device and versions, command) of each of them.
        description: the run in one line, as `pretrain` wrote it.
        stopped: why it stopped, if it said so last.
    """

    sessions: list[tuple[datetime, datetime]]
    systems: tuple[tuple[str, str], ...] = ()
    description: str = ""
    stopped: str = ""
    warnings: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path) -> "Log":
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return cls([])
        sessions: list[tuple[datetime, datetime]] = []
        description = stopped = ""
        found = []
        for moment, level, message in _log_lines(text):
            stopped = message.split(": ", 2)[-1] if message.startswith("stopped: ") else ""  # without the error's class
            if message in ("started with", "resumed with"):
                sessions.append((moment, moment))
            elif sessions:
                sessions[-1] = sessions[-1][0], moment
            if level in ("WARNING", "ERROR") and not message.startswith(ASKED):
                found.append(message)
            if " parameters, " in message and " images of " in message:
                description = message
        systems = tuple(re.findall(r"^system: (.*); (.*)$", text, flags=re.M))
        return cls(sessions, systems, description, stopped, tuple(found))

    @property
    def duration(self) -> timedelta:
        """Time that the run was at work, over all sessions."""
        return sum((end - start for start, end in self.sessions), timedelta())

    @property
    def images(self) -> int | None:
        """How many the run was trained on."""
        found = re.search(r" on ([\d,]+) images of ", self.description)
        return int(found[1].replace(",", "")) if found else None


def _log_lines(text: str) -> Iterator[tuple[datetime, str, str]]:
    for stamp, level, message in re.findall(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ ([A-Z]+) (.*)$", text, flags=re.M):
        try:
            yield datetime.fromisoformat(stamp), level, message
        except ValueError:
            continue
