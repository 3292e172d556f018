"""What a list of a million images costs, in a folder or in tar shards, and how well an epoch is shuffled.

    python -m benchmarks image_lists                    # about 5 minutes, 1.1 GB in a temporary folder
    python -m benchmarks image_lists --num-images 50000

Tar shards of 10,000 tiny members (100 bytes: headers are what is measured) are listed twice, from their headers and from
the cache; a folder of empty files in 1,000 class folders once. Files are in the page cache. Then epochs of a full shuffle, as
mapet does it, are compared with a buffer that is filled from shards in random order, as streaming loaders do it.
"""

import argparse
import os
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.core import Result, Row, in_new_process, memory_now, peak_memory, timed
from benchmarks.tables import Table
from mapet.data.sources import list_images
from mapet.data.tar_shards import TarImageList
from mapet.evaluation.datasets import LabeledSet, split_train_test

PER_SHARD, BATCH = 10_000, 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-images", type=int, default=1_000_000)


def run(args: argparse.Namespace) -> Result:
    count = args.num_images
    rows = [*shards(count), *folder(count), *shuffles(count)]
    return Result(rows, f"{count:,} members of 100 bytes in tar shards, as many empty files in 1,000 folders")


def shards(count: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["XDG_CACHE_HOME"] = temporary
        write_shards(Path(temporary), count)
        pattern = f"{temporary}/*.tar"
        rows = []
        for name in ("first listing, from headers, one process", "later listings, from the index"):
            seconds, retained, peak = in_new_process(listing, pattern)
            rows.append(cost(name, count, seconds, retained, peak))
        on_disk = sum(path.stat().st_size for path in Path(temporary).glob("mapet/shards/*"))
        images = TarImageList(pattern)
        chosen = np.random.default_rng(0).integers(count, size=10_000).tolist()
        works: dict[str, Callable[[], Any]] = {
            "hash of the list": lambda: images.hash,
            "labels from folders": images.classes,
            "order of an epoch": lambda: np.random.default_rng([0, 1]).permutation(np.arange(count)),
        }
        rows += [cost(name, count, timed(work)[0]) for name, work in works.items()]
        reading, _ = timed(lambda: [images.data(index) for index in chosen])
    return [
        *rows,
        cost("index on disk", count, None, on_disk),
        {"what": "an image's bytes from a shard, at random", "ms": reading / 10},
    ]


def folder(count: int) -> list[Row]:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as temporary:
        for index in range(count):
            path = Path(temporary) / f"class{index % 1000:04d}" / f"image_{index:08d}.jpg"
            if index < 1000:
                path.parent.mkdir()
            path.touch()
        seconds, retained, peak = in_new_process(listing, temporary)
        rows = [cost("scan of a folder", count, seconds, retained, peak)]
        images = list_images(Path(temporary))
        works: dict[str, Callable[[], Any]] = {
            "subset of half": lambda: images.subset(np.arange(0, len(images), 2)),
            "split into training and test set": lambda: split_train_test(LabeledSet.from_images(images)),
        }
        return rows + [cost(f"folder: {name}", count, timed(work)[0]) for name, work in works.items()]


def cost(
    what: str, count: int, seconds: float | None = None, retained: float | None = None, peak: float | None = None
) -> Row:
    """Row for a list of `count` images: seconds, bytes that are kept, bytes at most; all as of a million."""
    scale = 1e6 / count
    row = {"what": what, "seconds": seconds, "MB": retained and retained / 1e6, "peak_MB": peak and peak / 1e6}
    return {key: value * scale if isinstance(value, float) else value for key, value in row.items()}


def listing(pattern: str) -> tuple[float, int, int]:
    """Seconds; bytes of memory that the list keeps; that it needs at most."""
    if "*" in pattern:
        TarImageList(pattern.replace("*", "shard-00000"))  # imports, and what does not grow with the images
    before = memory_now()
    seconds, images = timed(lambda: TarImageList(pattern) if "*" in pattern else list_images(pattern))
    assert len(images)
    return seconds, memory_now() - before, peak_memory() - before


def write_shards(folder: Path, count: int) -> None:
    for shard in range(-(-count // PER_SHARD)):
        with open(folder / f"shard-{shard:05d}.tar", "wb") as file:
            for index in range(shard * PER_SHARD, min(count, (shard + 1) * PER_SHARD)):
                member = tarfile.TarInfo(f"folder{index // 1000:05d}/{index:09d}.jpg")
                member.size = 100
                file.write(member.tobuf(tarfile.USTAR_FORMAT) + bytes(512))
            file.write(bytes(tarfile.RECORDSIZE))


def shuffles(count: int) -> list[Row]:
    """Measure how far an epoch's order is from that on disk."""
    orders: dict[str, Callable[[int], np.ndarray]] = {
        "full shuffle (mapet)": lambda epoch: np.random.default_rng([0, epoch]).permutation(count),
        "buffer of 1,000": lambda epoch: buffered(count, 1_000, epoch),
        "buffer of 10,000": lambda epoch: buffered(count, 10_000, epoch),
        "buffer of 10,000, shards in order": lambda epoch: buffered(count, 10_000, epoch, shuffle_shards=False),
    }
    rows = []
    for name, order in orders.items():
        first, second = order(0), order(1)
        shard = first // PER_SHARD
        batches = shard[: len(shard) // BATCH * BATCH].reshape(-1, BATCH)
        position = np.empty(count, np.int64)
        position[second] = np.arange(count)
        rows.append({
            "order": name,
            "same_shard": float((shard[1:] == shard[:-1]).mean()),
            "shards_in_batch": float(np.mean([len(np.unique(batch)) for batch in batches])),
            "neighbors_again": float((np.abs(position[first[1:]] - position[first[:-1]]) < BATCH).mean()),
            "correlation": float(np.corrcoef(first, np.arange(count))[0, 1]),
        })  # fmt: skip
    return rows


def buffered(count: int, size: int, epoch: int, shuffle_shards: bool = True) -> np.ndarray:
    """Order in which a stream of shards leaves a shuffle buffer."""
    rng = np.random.default_rng([0, epoch])
    shards = np.arange(-(-count // PER_SHARD))
    shards = rng.permutation(shards) if shuffle_shards else shards
    stream = np.concatenate([np.arange(s * PER_SHARD, min(count, (s + 1) * PER_SHARD)) for s in shards.tolist()])
    buffer, out = stream[:size].tolist(), []
    for new, place in zip(stream[size:].tolist(), rng.integers(size, size=max(0, count - size)).tolist(), strict=True):
        out.append(buffer[place])
        buffer[place] = new
    return np.array([*out, *rng.permutation(buffer)])


def extrapolated(rows: list[Row]) -> list[Row]:
    """Costs, and for 100 million images what was measured there or a hundred times as much."""
    costs = [{"seconds": None, "MB": None, "seconds_100M": None} | row for row in rows if "what" in row]
    return [
        row
        | {
            "seconds_100M": row["seconds_100M"] or (row["seconds"] and 100 * row["seconds"]),
            "GB_100M": row["MB"] and row["MB"] / 10,
        }
        for row in costs
    ]


SMOKE = ["--num-images", "10000"]
TABLES = {
    "main": Table({
        "": "{what}", "1 million: s": "{seconds:.2g}", "ms per image": "{ms:.2g}", "MB": "{MB:,.0f}", "at most, MB": "{peak_MB:,.0f}",
        "100 million: s": "{seconds_100M:,.0f}", "GB": "{GB_100M:.1f}",
    }, rows=extrapolated),
    "shuffles": Table({
        "": "{order}", "neighbors from one shard": "{same_shard:.2g}", f"shards in a batch of {BATCH}": "{shards_in_batch:.2g}",
        f"neighbors that are within {BATCH} again in the next epoch": "{neighbors_again:.2g}",
        "correlation of position and index": "{correlation:.4g}",
    }, rows=lambda rows: [row for row in rows if "order" in row]),
}  # fmt: skip
