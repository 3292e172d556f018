"""metrics.jsonl, read as far as it has been written: whole at the end of a run, or a little more each time while it goes on."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import isfinite
from operator import mul
from pathlib import Path
from typing import Any, NamedTuple

Record = dict[str, float]
"""A line: step, and figures by name. Those that were not finite are left out."""


class Series(NamedTuple):
    """One figure over the steps at which it was recorded."""

    steps: list[float]
    values: list[float]

    @property
    def last(self) -> float:
        return self.values[-1]


@dataclass
class History:
    """The records of a run so far.

    Attributes:
        generation: how often the file was begun anew (a run that resumes drops what came after its checkpoint); with it
            all records before are void.
    """

    path: Path
    records: list[Record] = field(default_factory=list)
    generation: int = 0
    _offset: int = 0
    _inode: int = 0

    @classmethod
    def read(cls, path: Path) -> "History":
        history = cls(path)
        history.update()
        return history

    def update(self) -> None:
        """Read what was added; a last line without an end is left for the next time. A file that isn't there has no records."""
        try:
            file = self.path.open("rb")
        except OSError:
            return
        with file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._offset:
                self.generation += bool(self._inode)
                self.records, self._offset, self._inode = [], 0, status.st_ino
            file.seek(self._offset)
            whole, _, _ = file.read().rpartition(b"\n")
        if whole:
            self._offset += len(whole) + 1
            self.records += [record for line in whole.split(b"\n") if (record := _record(line))]

    def __getitem__(self, name: str) -> Series:
        """A figure's series, empty if it was never recorded."""
        found = [(record["step"], record[name]) for record in self.records if name in record]
        return Series([step for step, _ in found], [value for _, value in found])

    @property
    def names(self) -> list[str]:
        """Of all figures, in order of appearance."""
        return list(dict.fromkeys(name for record in self.records for name in record if name != "step"))

    @property
    def steps_per_epoch(self) -> float | None:
        """None before the first record that tells."""
        known = [record["step"] / record["epoch"] for record in self.records if record.get("epoch")]
        return known[-1] if known else None

    def over_last_epoch(self, name: str) -> float:
        """Mean of a recorded figure over as many steps as an epoch has: a record alone may be of a single step.

        Each record stands for the steps since the one before it.
        """
        steps, values = self[name]
        start = steps[-1] - (self.steps_per_epoch or 0)
        weights = [max(0.0, end - max(begin, start)) for begin, end in pairwise([0.0, *steps])]
        total = sum(weights)
        return sum(map(mul, weights, values)) / total if total else values[-1]


def _record(line: bytes) -> Record | None:
    """None for what is no record: a line that a crash cut short."""
    try:
        content: Any = json.loads(line)
        numbers = {str(key): float(value) for key, value in content.items() if isinstance(value, (int, float))}
    except (ValueError, AttributeError, OverflowError, RecursionError):
        return None
    record = {key: value for key, value in numbers.items() if isfinite(value)}
    return record if "step" in record else None


def thinned(series: Series, most: int) -> Series:
    """At most `most` points, each the mean of as many neighbours; the first and the last stay as they are."""
    count = len(series.steps)
    if count <= most:
        return series
    buckets = [(1 + (count - 2) * i // (most - 2), 1 + (count - 2) * (i + 1) // (most - 2)) for i in range(most - 2)]
    steps, values = ([column[0], *(_mean(column[a:b]) for a, b in buckets), column[-1]] for column in series)
    return Series(steps, values)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
