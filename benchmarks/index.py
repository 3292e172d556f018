"""What a list of a million images costs, and how well an epoch is shuffled.

    python benchmarks/index.py --json index.json            # about 5 minutes, 1.1 GB in a temporary folder
    python benchmarks/index.py --images 50000               # quick

Tar shards of 10,000 tiny members (100 bytes: headers are what is measured) are listed twice, from their headers and from
the cache. Files are in the page cache. Then epochs of a full shuffle, as mapet does it, are held against a buffer that is
filled from shards in random order, as streaming loaders do it.
"""

import argparse
import multiprocessing
import os
import resource
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mapet.data.tar_shards import list_shards
from mapet.files import write_json

PER_SHARD, BATCH = 10_000, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [*costs(options.images), *shuffles(options.images)]
    if options.json:
        write_json(options.json, rows)


def costs(count: int) -> Iterator[dict[str, Any]]:
    """name, value, unit."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        write_shards(Path(folder), count)
        for name in ("from headers", "from the index"):
            seconds, kept, peak = in_new_process(listing, f"{folder}/*.tar")
            yield row(f"listing {name}", seconds / count * 1e6, "us/image")
            yield row("  the process grows by", kept / count, "bytes/image")
            yield row("  at most, meanwhile", peak / count, "bytes/image")
        on_disk = sum(path.stat().st_size for path in Path(folder).glob("mapet/shards/*"))
        yield row("index on disk", on_disk / count, "bytes/image")
        images = list_shards(f"{folder}/*.tar")
        yield row("ids of the list", len(images._names.block) / count, "bytes/image")
        yield row("their places, sizes and offsets", 24, "bytes/image")
        yield row("hash of the list", timed(lambda: images.hash)[1], "s")
        yield row("labels from folders", timed(images.classes)[1], "s")
        chosen = np.random.default_rng(0).integers(count, size=10_000).tolist()
        yield row("an image's bytes, at random", timed(lambda: [images.data(i) for i in chosen])[1] / 1e4 * 1e6, "us")
        yield row("an image's key", timed(lambda: [images.key(i) for i in chosen])[1] / 1e4 * 1e6, "us")
    yield row("order of an epoch", timed(lambda: np.random.default_rng([0, 1]).permutation(np.arange(count)))[1], "s")
    yield row("its memory, with the list of indices", 16, "bytes/image")


def listing(pattern: str) -> tuple[float, int, int]:
    """Seconds; bytes of memory that the list keeps; that are needed for a while."""
    list_shards(pattern.replace("*", "shard-00000"))  # imports, and what does not grow with the images
    before, _ = memory()
    images, seconds = timed(lambda: list_shards(pattern))
    now, peak = memory()
    assert len(images)
    return seconds, now - before, peak - before


def in_new_process(work: Callable[..., Any], *given: Any) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *given).result()


def write_shards(folder: Path, count: int) -> None:
    for shard in range(-(-count // PER_SHARD)):
        with open(folder / f"shard-{shard:05d}.tar", "wb") as file:
            for number in range(shard * PER_SHARD, min(count, (shard + 1) * PER_SHARD)):
                member = tarfile.TarInfo(f"folder{number // 1000:05d}/{number:09d}.jpg")
                member.size = 100
                file.write(member.tobuf(tarfile.USTAR_FORMAT) + bytes(512))
            file.write(bytes(tarfile.RECORDSIZE))


def shuffles(count: int) -> Iterator[dict[str, Any]]:
    """name, value, unit: how far an epoch's order is from that on disk, where neighbours are alike."""
    orders: dict[str, Callable[[int], np.ndarray]] = {
        "full shuffle": lambda epoch: np.random.default_rng([0, epoch]).permutation(count),
        "buffer of 1,000": lambda epoch: buffered(count, 1_000, epoch),
        "buffer of 10,000": lambda epoch: buffered(count, 10_000, epoch),
        "buffer of 10,000, shards in order": lambda epoch: buffered(count, 10_000, epoch, shuffle_shards=False),
    }
    for name, order in orders.items():
        first, second = order(0), order(1)
        shards = first // PER_SHARD
        batches = shards[: len(shards) // BATCH * BATCH].reshape(-1, BATCH)
        distinct = np.mean([len(np.unique(batch)) for batch in batches])
        where = np.empty(count, np.int64)
        where[second] = np.arange(count)
        apart = np.abs(where[first[1:]] - where[first[:-1]])
        yield row(f"{name}: correlation of position and index", float(np.corrcoef(first, np.arange(count))[0, 1]), "")
        yield row(f"{name}: neighbours of one shard", float((shards[1:] == shards[:-1]).mean()), "of pairs")
        yield row(f"{name}: shards in a batch of {BATCH}", float(distinct), "")
        yield row(f"{name}: neighbours again within a batch next epoch", float((apart < BATCH).mean()), "of pairs")


def buffered(count: int, size: int, epoch: int, shuffle_shards: bool = True) -> np.ndarray:
    """The order in which a stream of shards leaves a shuffle buffer."""
    rng = np.random.default_rng([0, epoch])
    shards = np.arange(-(-count // PER_SHARD))
    shards = rng.permutation(shards) if shuffle_shards else shards
    stream = np.concatenate([np.arange(s * PER_SHARD, min(count, (s + 1) * PER_SHARD)) for s in shards])
    buffer, out = stream[:size].tolist(), []
    for new, place in zip(stream[size:].tolist(), rng.integers(size, size=max(0, count - size)).tolist(), strict=True):
        out.append(buffer[place])
        buffer[place] = new
    return np.array([*out, *rng.permutation(buffer)])


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started


def memory() -> tuple[int, int]:
    """Bytes of this process, now and at most so far."""
    now = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return now, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def row(name: str, value: float, unit: str) -> dict[str, Any]:
    print(f"{name:<75}{value:>12.4g} {unit}", flush=True)
    return {"name": name, "value": value, "unit": unit}


if __name__ == "__main__":
    main()
