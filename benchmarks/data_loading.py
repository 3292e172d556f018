"""How fast images become batches: Pillow and torchvision, mapet, and mapet from prepared images.

Photos (of a folder, else crops of scikit-learn's two) become 500 x 375 JPEGs of quality 90 in a temporary folder, and
batches of 64 at 224 px with color jitter 0.4, token look-up and permutation. One process, one thread; rounds of all
contestants in turn; medians, and the median of the ratios to the plain pipeline of the same round. Plain batches are float and
normalized. mapet's are bytes with the jitter's factors: normalization and jitter are done on the model's device, and in the rows
`normalization and jitter on the same core` here. Files are in the page cache. `prepare`: milliseconds and kB an image.
"""

import argparse
import itertools
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

import mapet
from benchmarks.core import Result, Row, in_turns, median_ratio, timed
from benchmarks.data import write_photos
from benchmarks.tables import Table
from mapet.data.dataset import ViewDataset, position_batches
from mapet.data.image_list import ImageList
from mapet.data.loader import load
from mapet.data.sources import list_images
from mapet.data.token_store import TokenStore
from mapet.data.views import ViewSpec, input_mean_std, normalize
from mapet.device import ComputeContext

SIZE, JITTER, GRID = (224, 224), 0.4, (14, 14)
PLAIN = "Pillow + torchvision"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--photos", type=Path, help="any folder of photographs")
    parser.add_argument("--num-images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)


def run(args: argparse.Namespace) -> Result:
    torch.set_num_threads(1)
    ComputeContext.from_options("cpu")  # as every command does: memory that is freed is kept
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), args.photos, args.num_images, args.rounds)
    return Result(rows, f"{args.num_images} photographs of {args.photos or 'scikit-learn'}")


def measure(folder: Path, photos: Path | None, count: int, rounds: int) -> list[Row]:
    """Return a row per loader: images/s and speedup, of centered and of random crops; one of `prepare`."""
    write_photos(photos, folder / "photos", count)
    preparing, _ = timed(lambda: mapet.prepare(images=folder / "photos", out=folder / "prepared"))
    size = sum(file.stat().st_size for file in (folder / "prepared").iterdir()) / count
    sources = {name: list_images(folder / name) for name in ("photos", "prepared")}
    rows: dict[str, Row] = {}
    for kind in ("center", "random-crop"):
        spec = ViewSpec(kind=kind, image_size=SIZE)
        datasets = {
            name: ViewDataset(
                images, spec, 3, SIZE, None, make_tokens(folder / f"{name}-{kind}", images, spec), GRID, jitter=JITTER
            )
            for name, images in sources.items()
        }
        seconds = in_turns(contestants(datasets, kind, count), rounds)
        for name, values in seconds.items():
            row = rows.setdefault(name, {"name": name})
            row[kind.removeprefix("random-")] = count / statistics.median(values)
            row[f"times_plain_{kind.removeprefix('random-')}"] = median_ratio(seconds[PLAIN], values)
        if kind == "center":
            loader = {"center": 2048 / timed(lambda: read_by_workers(datasets["photos"], count))[0]}  # noqa: B023
    prepare = {"name": "prepare", "ms": 1000 * preparing / count, "kB_per_image": size / 1000}
    return [*rows.values(), prepare, {"name": "mapet, loader with 2 workers", **loader}]


def contestants(datasets: dict[str, ViewDataset], kind: str, count: int) -> dict[str, Callable[[], Any]]:
    """Return name -> function that loads the next batch."""
    plain, epochs, paths = plain_transform(kind), itertools.count(), list(datasets["photos"].images)

    def batch(source: str) -> Any:
        epoch = next(epochs)
        return datasets[source].batch([(epoch, index) for index in range(count)])

    def normalized(source: str) -> torch.Tensor:
        made = batch(source)
        return normalize(made.images, 3, made.jitter)

    return {
        PLAIN: lambda: torch.stack([plain(Image.open(path).convert("RGB")) for path in paths]),
        "mapet, bytes ready for the device": lambda: batch("photos"),
        "mapet from `prepare`d images": lambda: batch("prepared"),
        "mapet, normalization and jitter on the same core": lambda: normalized("photos"),
        "prepared, the same": lambda: normalized("prepared"),
    }


def plain_transform(kind: str) -> Callable[[Image.Image], torch.Tensor]:
    bicubic = transforms.InterpolationMode.BICUBIC
    views: dict[str, list[Any]] = {
        "random-crop": [
            transforms.RandomResizedCrop(SIZE, (0.2, 1.0), interpolation=bicubic),
            transforms.RandomHorizontalFlip(),
        ],
        "center": [transforms.Resize(SIZE[0], interpolation=bicubic), transforms.CenterCrop(SIZE)],
    }
    jitter = transforms.ColorJitter(JITTER, JITTER, JITTER)
    return transforms.Compose([*views[kind], jitter, transforms.ToTensor(), transforms.Normalize(*input_mean_std(3))])


def read_by_workers(dataset: ViewDataset, count: int) -> int:
    """Read 2,048 images in batches of 32, so many that starting the workers takes a small fraction."""
    os.environ["MAPET_WORKERS"] = "2"
    return sum(1 for _ in load(dataset.batch, position_batches(range(count), 32, view_index=0) * (2048 // count)))


def make_tokens(folder: Path, images: ImageList, spec: ViewSpec) -> TokenStore:
    """Create a token store of zeros."""
    folder.mkdir()
    store = TokenStore.create(folder, images, "none", 1024, GRID, spec, 8)
    for part in store.shards:
        part.write(np.zeros((part.count, 8, GRID[0] * GRID[1]), np.int64), {})
    return store


SMOKE = ["--num-images", "8", "--rounds", "1"]
TABLES = {
    "main": Table({
        "": "{name}", "images/s, centered / crop": "{center:,.0f} / {crop:,.0f}",
        "speedup": "{times_plain_center:.2f} / {times_plain_crop:.2f}",
    }, rows=lambda rows: [row for row in rows if "times_plain_crop" in row]),
    "others": Table({
        "": "{name}", "ms per image": "{ms:.1f}", "kB": "{kB_per_image:.0f}", "images/s": "{center:,.0f}",
    }, rows=lambda rows: [row for row in rows if "times_plain_crop" not in row]),
}  # fmt: skip
