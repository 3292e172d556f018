"""How fast images become batches: plain Pillow and torchvision, mapet, and mapet from prepared images.

    python benchmarks/data_path.py --photos PHOTOS --json data_path.json
    python benchmarks/data_path.py --paths 1000000        # scanning a million files, instead

Photos (of a folder, else crops of scikit-learn's two) become 500 x 375 JPEGs of quality 90 in a temporary folder, and
batches of 64 at 224 px with colour jitter 0.4, token look-up and permutation. One process, one thread; rounds of all
contestants in turn; medians, and the median of the ratios to the plain pipeline's centred views (or crops) of the same round.
Plain batches are float and normalized. mapet's are bytes, with the jitter's factors: normalization and jitter are done on
the model's device, and timed here on the same core, as the rows `+ normalized here`. Files are in the page cache.
"""

# ruff: noqa: B023 (functions are called in the round that makes them)
import argparse
import pickle
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision import transforms

import mapet
from mapet.data.dataset import ViewDataset, in_order, make_loader
from mapet.data.image_list import ImageList
from mapet.data.sources import scan
from mapet.data.token_store import TokenStore
from mapet.data.views import ViewSpec, draw_view, render
from mapet.device import Compute
from mapet.evaluation.features import labelled, normalize, split
from mapet.files import write_json
from mapet.models.adapt import input_mean_std

SIZE, JITTER, GRID = (224, 224), 0.4, (14, 14)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="any folder of photographs")
    parser.add_argument("--quick", action="store_true", help="fewer images and rounds")
    parser.add_argument("--paths", type=int, help="measure lists of so many files instead")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = measure_paths(options.paths) if options.paths else measure(options.photos, options.quick)
    for row in rows:
        print(
            "  ".join(
                f"{value:.3g}".rjust(9) if isinstance(value, float) else str(value).ljust(44) for value in row.values()
            )
        )
    if options.json:
        write_json(options.json, rows)


def measure(photos: Path | None = None, quick: bool = False) -> list[dict[str, Any]]:
    """One row a measurement: name, ms_per_image, images_per_second, times_plain (None where there is no such ratio)."""
    count, rounds = (32, 3) if quick else (64, 9)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    Compute.choose("cpu")  # as every stage does: memory that is freed is kept
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _measure(Path(folder), photos, count, rounds)
    finally:
        torch.set_num_threads(threads)


def _measure(folder: Path, photos: Path | None, count: int, rounds: int) -> list[dict[str, Any]]:
    write_photos(photos, folder / "photos", count)
    started = time.perf_counter()
    mapet.prepare(images=folder / "photos", out=folder / "prepared", threads=1)
    preparing = (time.perf_counter() - started) / count
    images, prepared = scan(folder / "photos"), scan(folder / "prepared")
    times: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], Any], images_done: int = count) -> Any:
        started = time.perf_counter()
        result = work()
        times.setdefault(name, []).append((time.perf_counter() - started) / images_done)
        return result

    sources = {"mapet": images, "mapet, prepared": prepared}
    datasets = {}
    for name, source in sources.items():
        for kind in ("center", "random-crop"):
            spec = ViewSpec(kind=kind, image_size=SIZE)
            store = token_store(folder / f"tokens {name} {kind}", source, spec)
            datasets[name, kind] = ViewDataset(source, spec, 3, SIZE, None, store, GRID, jitter=JITTER)
    for number in range(rounds):
        for kind in ("center", "random-crop"):
            plain = plain_transform(kind)
            timed(f"plain, {kind}", lambda: torch.stack([plain(Image.open(path).convert("RGB")) for path in images]))
            for name in sources:
                batch = timed(
                    f"{name}, {kind}",
                    lambda: datasets[name, kind].batch([(number, i) for i in range(count)]),
                )
                times[f"{name}, {kind}, + normalized here"] = [
                    *times.get(f"{name}, {kind}, + normalized here", []),
                    times[f"{name}, {kind}"][-1] + alone(lambda: normalize(batch.images, 3, batch.jitter)) / count,
                ]
        stages(timed, datasets["mapet", "center"], number)
        if number < 3:  # four times the images, in batches of 32, so that starting the workers counts little
            order = in_order(count, 32, number=number) * (2048 // count)
            loader = iter(make_loader(datasets["mapet", "center"], order, workers=2))
            next(loader)
            timed("mapet, center, loader with 2 workers", lambda: sum(1 for _ in loader), 32 * (len(order) - 1))
    rows = []
    for name, values in times.items():
        plain_times = times.get(f"plain, {'crop' if 'crop' in name else 'center'}", [])
        ratios = [p / v for p, v in zip(plain_times, values, strict=False)]
        whole = not name.startswith("stage")
        rows.append(row(name, statistics.median(values), statistics.median(ratios) if whole else None))
    size = sum(file.stat().st_size for file in (folder / "prepared").iterdir()) / count
    rows.append(row("preparing, one thread", preparing) | {"bytes_per_image": size})
    return rows


def row(name: str, seconds: float, times_plain: float | None = None) -> dict[str, Any]:
    return {"name": name, "ms_per_image": 1000 * seconds, "images_per_second": 1 / seconds, "times_plain": times_plain}


def alone(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def stages(timed: Callable[..., Any], dataset: ViewDataset, number: int) -> None:
    """The parts of making a batch."""
    everything = range(len(dataset.images))
    pictures = timed("stage: open", lambda: [dataset.images.open(i, 3) for i in everything])
    views = timed(
        "stage: draw view",
        lambda: [draw_view(dataset.spec, p.size, dataset.images.key(i), number) for i, p in enumerate(pictures)],
    )
    both = list(zip(pictures, views, strict=True))
    timed("stage: decode", lambda: [picture.read(view.box, SIZE) for picture, view in both])
    timed("stage: crop and resize", lambda: [render(picture, view, SIZE) for picture, view in both])  # decoded above
    batch = dataset.batch([(number, i) for i in everything])
    timed("stage: normalize (on the device)", lambda: normalize(batch.images, 3))
    timed("stage: normalize and jitter (on the device)", lambda: normalize(batch.images, 3, batch.jitter))


def plain_transform(kind: str) -> Callable[[Image.Image], torch.Tensor]:
    bicubic = transforms.InterpolationMode.BICUBIC
    crop: list[Any] = [
        transforms.RandomResizedCrop(SIZE, (0.2, 1.0), interpolation=bicubic),
        transforms.RandomHorizontalFlip(),
    ]
    center: list[Any] = [transforms.Resize(SIZE[0], interpolation=bicubic), transforms.CenterCrop(SIZE)]
    jitter = transforms.ColorJitter(JITTER, JITTER, JITTER)
    return transforms.Compose(
        [
            *(crop if kind == "random-crop" else center),
            jitter,
            transforms.ToTensor(),
            transforms.Normalize(*input_mean_std(3)),
        ]
    )


def write_photos(photos: Path | None, folder: Path, count: int, size: tuple[int, int] = (500, 375)) -> None:
    """`count` photographs as JPEGs of quality 90 and (width, height) `size`."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    found: ImageList | None = None if photos is None else scan(photos)
    samples = [Image.fromarray(image) for image in load_sample_images().images]
    for number in range(count):
        if found is None:
            image = samples[number % 2]
            left, top = (int(rng.integers(1 + full - part)) for full, part in zip(image.size, (480, 360), strict=True))
            image = image.crop((left, top, left + 480, top + 360))
        else:
            image = Image.open(found[number % len(found)]).convert("RGB")
        scale = max(size[0] / image.width, size[1] / image.height)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - size[0]) // 2, (image.height - size[1]) // 2
        image.crop((left, top, left + size[0], top + size[1])).save(folder / f"{number:04d}.jpg", quality=90)


def token_store(folder: Path, images: ImageList, spec: ViewSpec) -> TokenStore:
    folder.mkdir()
    store = TokenStore.create(folder, images, "none", 1024, GRID, spec, 8)
    for part in store.parts:
        store.begin(part)
        store.write(part, np.zeros((part.count, 8, GRID[0] * GRID[1]), np.int64), {})
    return store


def measure_paths(count: int) -> list[dict[str, Any]]:
    """Scanning and indexing so many (empty) files in 1,000 class folders; seconds, and bytes a path."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as temporary:
        root = Path(temporary)
        for folder in range(1000):
            (root / f"class{folder:04d}").mkdir()
            for number in range(folder, count, 1000):
                (root / f"class{folder:04d}" / f"image_{number:08d}.jpg").touch()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seconds = {}
        started = time.perf_counter()
        images = scan(root)
        seconds["scan"] = time.perf_counter() - started
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        half = np.arange(0, len(images), 2)
        for name, work in {
            "subset of half": lambda: images.subset(half),
            "classes": images.classes,
            "keys": images.keys,
            "hash": lambda: images.hash,
            "split into training and test set": lambda: split(labelled(images)),
        }.items():
            seconds[name] = alone(work)
        return [
            *({"name": f"{count:,} paths: {name}, s", "value": value} for name, value in seconds.items()),
            {"name": "bytes a path, kept", "value": len(pickle.dumps(images)) / len(images)},
            {"name": "bytes a path, at the peak of scanning", "value": peak / len(images)},
        ]


if __name__ == "__main__":
    main()
