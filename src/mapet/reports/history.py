"""metrics.jsonl, read as far as it has been written: whole at the end of a run, or a little more each time while it goes on."""

import json
import os
from dataclasses import dataclass, field
from itertools import pairwise
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

Record = dict[str, float]
"""A line: step, and metrics by name. Those that were not finite are left out."""


class Series(NamedTuple):
    """One metric over the steps at which it was recorded."""

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
            whole, end, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(end)
        self.records += filter(None, map(_record, whole.split(b"\n")))

    def __getitem__(self, name: str) -> Series:
        """A metric's series, empty if it was never recorded."""
        found = [record for record in self.records if name in record]
        return Series([record["step"] for record in found], [record[name] for record in found])

    @property
    def names(self) -> list[str]:
        """Of all metrics, in order of appearance."""
        return list(dict.fromkeys(name for record in self.records for name in record if name != "step"))

    @property
    def steps_per_epoch(self) -> float | None:
        """None before the first record that tells."""
        known = (record["step"] / record["epoch"] for record in reversed(self.records) if record.get("epoch"))
        return next(known, None)

    def over_last_epoch(self, name: str) -> float:
        """Mean of a recorded metric over as many steps as an epoch has: a record alone may be of a single step.

        Each record stands for the steps since the one before it.
        """
        steps, values = self[name]
        start = steps[-1] - (self.steps_per_epoch or 0)
        weights = [max(0.0, end - max(begin, start)) for begin, end in pairwise([0.0, *steps])]
        return fmean(values, weights) if any(weights) else values[-1]


def _record(line: bytes) -> Record | None:
    """None for what is no record: a line that a crash cut short."""
    try:
        numbers = {key: float(value) for key, value in json.loads(line).items() if isinstance(value, (int, float))}
    except (ValueError, AttributeError, OverflowError, RecursionError):
        return None
    return {key: value for key, value in numbers.items() if isfinite(value)} if "step" in numbers else None


def thinned(series: Series, most: int) -> Series:
    """At most `most` points, each the mean of as many neighbours; the first and the last stay as they are."""
    inner, buckets = len(series.steps) - 2, most - 2
    if inner <= buckets:
        return series
    ends = [1 + inner * i // buckets for i in range(buckets + 1)]
    steps, values = ([column[0], *(fmean(column[a:b]) for a, b in pairwise(ends)), column[-1]] for column in series)
    return Series(steps, values)
