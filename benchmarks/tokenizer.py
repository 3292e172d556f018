"""How fast is the tokenizer? K-means against faiss, features in memory or streamed, and teachers, on this machine.

    python benchmarks/tokenizer.py --images PHOTOS
    python benchmarks/tokenizer.py --images PHOTOS --features pixels --most 30000   # 768 numbers a patch
    python benchmarks/tokenizer.py --images PHOTOS --features pixels --modes        # start, metric, mini-batches alone
    python benchmarks/tokenizer.py --images PHOTOS --quick --json tokenizer.json

K-means clusters a teacher's features of the images' patches (the stand-in's, benchmarks/stand_in.py names its packages). Its
time is that of the whole call, its exact last assignment included. faiss runs over all points from the same start; mapet
runs as many rounds, and as few as reach faiss's error within 0.1 %. All errors are those of the exact assignment. They take
turns; figures are medians, ratios those of neighbours. faiss is needed here alone: `pip install faiss-cpu`. timm's teachers
have random weights.
"""

import argparse
import functools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch

from mapet.data.dataset import Quarantine, ViewDataset
from mapet.data.sources import scan
from mapet.data.views import ViewSpec
from mapet.device import Compute
from mapet.files import write_json
from mapet.tokenizers.extract import FeatureExtractor
from mapet.tokenizers.feature_store import FeatureStore
from mapet.tokenizers.kmeans import Start, assign, kmeans, plus_plus_start, random_start
from mapet.tokenizers.points import Metric, Points
from mapet.tokenizers.teachers import Teacher, make_teacher

STAND_IN = "stand_in:efficientnet_lite0"
TIMM = ("resnet50_clip.openai", "vit_base_patch16_clip_224.openai")
SIZE = (224, 224)
ROW = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="500 photographs give 98,000 patches")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument(
        "--features", default=STAND_IN, help="teacher whose features are clustered (default: %(default)s)"
    )
    parser.add_argument("--most", type=int, default=1 << 20, help="cluster at most so many patches")
    parser.add_argument("--modes", action="store_true", help="only the error of each start, metric and batch")
    parser.add_argument("--quick", action="store_true", help="fewer patches, words and rounds: does it run?")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = measure(
        options.quick,
        options.images,
        options.vocab_size,
        options.iterations,
        options.features,
        options.most,
        options.modes,
    )
    print("| what | how | figure | unit |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['what']} | {row['how']} | {row['value']:.4g} | {row['unit']} |")
    if options.json:
        write_json(options.json, {"device": str(Compute.choose()), "torch": torch.__version__, "rows": rows})


def measure(
    quick: bool,
    images: Path,
    vocab_size: int = 8192,
    iterations: int = 20,
    features_of: str = STAND_IN,
    most: int = 1 << 20,
    only_modes: bool = False,
) -> list[ROW]:
    """All rows: {what, how, value, unit}; streaming and teachers only with the stand-in's features."""
    if quick:
        vocab_size, iterations, most = min(vocab_size, 256), min(iterations, 3), min(most, 5000)
    compute = Compute.choose()
    sys.path.insert(0, str(Path(__file__).parent))
    features = patch_features(features_of, images, compute, most)
    if only_modes:
        return modes(features, vocab_size, iterations, compute)
    rows = clustering(features, vocab_size, iterations, compute, 1 if quick else 3)
    if features_of != STAND_IN:
        return rows
    if sys.platform == "linux":
        rows += [streamed(limit, quick) for limit in ("all", "none")]
    return rows + teachers(images, compute, quick)


def patch_features(name: str, images: Path, compute: Compute, most: int) -> torch.Tensor:
    """Up to `most` patch features of a teacher."""
    listed = scan(images)
    teacher = make_teacher(name, SIZE, 16, precision=compute.precision).to(compute.device)
    dataset = ViewDataset(listed, ViewSpec(image_size=SIZE), teacher_size=SIZE)
    store = FeatureStore(min(most, 196 * len(listed)), 1 << 40, Path(), compute.device)
    for rows in FeatureExtractor(teacher, dataset, Quarantine(listed, 0.05), compute, 32, 1).patch_features(
        range(len(listed))
    ):
        store.append(rows)
    return store.take(torch.arange(len(store)))


def clustering(features: torch.Tensor, vocab_size: int, iterations: int, compute: Compute, turns: int = 3) -> list[ROW]:
    """K-means of mapet and faiss in turns, and the machine's matrix products, in one run."""
    points, width = features.shape

    def with_mapet(rounds: int) -> torch.Tensor:
        return kmeans(features, vocab_size, rounds, dtype=compute.dtype).centroids

    def error(centroids: torch.Tensor) -> float:
        return float(assign(features, centroids)[1].mean())

    mapet = f"mapet {compute.precision}"
    runs: dict[str, Callable[[], torch.Tensor]] = {mapet: functools.partial(with_mapet, iterations)}
    faiss = faiss_if_there()
    if faiss:

        def with_faiss() -> torch.Tensor:
            start = features[random_start(Points(FeatureStore.of(features)), vocab_size)]
            return faiss_kmeans(faiss, features, start, iterations)

        runs[f"faiss {faiss.__version__} float32"] = with_faiss
        wanted, fewer = 1.001 * error(with_faiss()), iterations
        while fewer > 1 and error(with_mapet(fewer - 1)) <= wanted:
            fewer -= 1
        if fewer < iterations:
            runs[f"{mapet}, {fewer} rounds"] = functools.partial(with_mapet, fewer)
    what = f"k-means, {points:,} x {width}, K = {vocab_size}, {iterations} rounds"
    rows: list[ROW] = []
    seconds: dict[str, list[float]] = {how: [] for how in runs}
    found = {}
    for _ in range(turns):
        for how, run in runs.items():
            started = time.perf_counter()
            found[how] = run()
            _finish(compute)
            seconds[how].append(time.perf_counter() - started)
    operations = 2 * points * width * vocab_size * iterations
    for how, centroids in found.items():
        spent = statistics.median(seconds[how])
        rows += [
            {"what": what, "how": how, "value": spent, "unit": "s"},
            {"what": what, "how": how, "value": error(centroids), "unit": "mean squared distance"},
        ]
        if how == mapet:
            rows.append({"what": what, "how": how, "value": operations / spent / 1e9, "unit": "GFLOP/s"})
    for faiss_run in (how for how in runs if how.startswith("faiss")):
        for how in (how for how in runs if how.startswith(mapet)):
            ratio = statistics.median(b / a for a, b in zip(seconds[how], seconds[faiss_run], strict=True))
            rows.append({"what": what, "how": f"faiss's time / that of {how}", "value": ratio, "unit": "x"})
    for dtype in (torch.float32, torch.bfloat16):
        x, c = features[:2048].to(dtype), centroids.to(dtype)
        table = torch.empty(len(x), vocab_size, dtype=dtype, device=x.device)
        spent = _seconds(functools.partial(torch.mm, x, c.T, out=table), compute, 9)
        rate = 2 * len(x) * width * vocab_size / spent / 1e9
        rows.append({"what": "matrix product of 2048 points", "how": str(dtype), "value": rate, "unit": "GFLOP/s"})
    part = features[:16384]
    rate = len(part) / _seconds(lambda: assign(part, centroids), compute)
    rows.append({"what": "assignment, exact", "how": "float32", "value": rate, "unit": "patches/s"})
    return rows


def modes(features: torch.Tensor, vocab_size: int, iterations: int, compute: Compute) -> list[ROW]:
    """Error and time of each metric, start and batch; beside it faiss from the same centroids, with all points."""
    rows: list[ROW] = []
    faiss = faiss_if_there()
    what = f"k-means, {features.shape[0]:,} x {features.shape[1]}, K = {vocab_size}, {iterations} rounds"
    metrics: tuple[Metric, ...] = ("l2", "cosine")
    for metric in metrics:
        points = Points(FeatureStore.of(features), metric)
        clustered = points.take(torch.arange(len(points)))

        def add(how: str, fit: Callable[[], torch.Tensor], clustered: torch.Tensor = clustered) -> None:
            started = time.perf_counter()
            centroids = fit()
            _finish(compute)
            spent, error = time.perf_counter() - started, float(assign(clustered, centroids)[1].mean())
            rows.append({"what": what, "how": how, "value": spent, "unit": "s"})
            rows.append({"what": what, "how": how, "value": error, "unit": "mean squared distance"})

        starts: tuple[tuple[Start, Callable[..., torch.Tensor]], ...] = (
            ("random", random_start),
            ("k-means++", plus_plus_start),
        )
        for start, choose in starts:
            for batch in (None, len(points) // 4):
                fit = functools.partial(
                    kmeans, features, vocab_size, iterations, dtype=compute.dtype, start=start, metric=metric, batch_points=batch
                )  # fmt: skip
                add(f"mapet, {metric}, {start}, {batch or 'all'} points a round", lambda fit=fit: fit().centroids)
            if faiss:
                given = clustered[choose(points, vocab_size)]
                add(
                    f"faiss, {metric}, from mapet's {start} start",
                    functools.partial(faiss_kmeans, faiss, clustered, given, iterations, metric == "cosine"),
                )
    return rows


def faiss_if_there() -> Any:
    try:
        import faiss
    except ImportError:
        print("faiss is not installed, its rows are left out: pip install faiss-cpu", file=sys.stderr)
        return None
    return faiss


def faiss_kmeans(
    faiss: Any, features: torch.Tensor, start: torch.Tensor, iterations: int, spherical: bool = False
) -> torch.Tensor:
    """Centroids of faiss over all points."""
    points, width = features.shape
    fit = faiss.Kmeans(
        width, len(start), niter=iterations, seed=0, min_points_per_centroid=1, max_points_per_centroid=points,
        spherical=spherical,
    )  # fmt: skip
    fit.train(features.cpu().numpy(), init_centroids=start.cpu().numpy())
    return torch.from_numpy(fit.centroids).to(features.device)


def streamed(limit: str, quick: bool) -> ROW:
    """Peak memory of two rounds over random features, all or none of them held in memory, in a process of its own."""
    count = 2_000 if quick else 200_000
    script = f"""if True:
        import sys, torch
        from pathlib import Path
        from mapet.tokenizers.feature_store import FeatureStore
        from mapet.tokenizers.kmeans import kmeans
        with FeatureStore({count}, {0 if limit == "none" else 1 << 40}, Path(sys.argv[1])) as store:
            for _ in range({count} // 1000):
                store.append(torch.randn(1000, 2048))
            kmeans(store, 128, 2, dtype=torch.bfloat16)
        status = Path("/proc/self/status").read_text()  # getrusage's peak is also that of the process that started this one
        print(status.partition("VmHWM:")[2].split()[0])
    """
    with tempfile.TemporaryDirectory() as scratch:
        child = subprocess.run([sys.executable, "-c", script, scratch], capture_output=True, text=True, check=True)
    what = f"peak memory, {count * 2048 * 2 / 1e9:.2g} GB of features"
    return {"what": what, "how": f"{limit} in memory", "value": int(child.stdout) * 1024 / 1e9, "unit": "GB"}


def teachers(images: Path, compute: Compute, quick: bool) -> list[ROW]:
    """Images a second of teachers, in float32 and in this machine's precision."""
    listed = scan(images)
    dataset = ViewDataset(listed, ViewSpec(image_size=SIZE), teacher_size=SIZE)
    batch = dataset.batch([(0, index % len(listed)) for index in range(2 if quick else 16)]).teacher_images
    assert batch is not None
    rows = []
    for name in (STAND_IN, *TIMM[: 0 if quick else None]):
        for precision in dict.fromkeys(("float32", compute.precision)):
            teacher = random_teacher(name, precision).to(compute.device)
            views = compute.to(batch)
            rate = len(batch) / _seconds(functools.partial(teacher, views), compute)
            rows.append({"what": f"teacher {name}", "how": precision, "value": rate, "unit": "images/s"})
    return rows


def random_teacher(name: str, precision: str) -> Teacher:
    """A teacher whose weights, if they are timm's, are random."""
    if name == STAND_IN:
        return make_teacher(name, SIZE, 16, precision=precision)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pth"
        torch.save(timm.create_model(name).state_dict(), weights)
        return make_teacher(name, SIZE, 16, checkpoint=str(weights), precision=precision)


def _seconds(work: Callable[[], Any], compute: Compute, times: int = 3) -> float:
    """Median time, after a first call that doesn't count."""
    spent = []
    for _ in range(times + 1):
        started = time.perf_counter()
        work()
        _finish(compute)
        spent.append(time.perf_counter() - started)
    return statistics.median(spent[1:])


def _finish(compute: Compute) -> None:
    if compute.device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
