"""K-means against faiss, features in memory or in a scratch file, and teachers.

    python -m benchmarks tokenizer --photos PHOTOS
    python -m benchmarks tokenizer --photos PHOTOS --features pixels --max-patches 30000   # 768 values a patch
    python -m benchmarks tokenizer --photos PHOTOS --features pixels --max-patches 20000 --vocab-size 512 --iterations 10 --modes

K-means clusters a teacher's features of the images' patches (benchmarks/proxy_teacher.py names its packages). Its time is that
of the whole call, its exact last assignment included. faiss (`pip install faiss-cpu`, needed here alone) runs over all points
from the same start; mapet runs as many rounds, and as few as reach faiss's error within 0.1 %. Errors are those of the exact
assignment. They take turns; times are medians, ratios those of neighbors. timm's teachers have random weights.
"""

import argparse
import functools
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import timm
import torch

from benchmarks.core import Result, Row, in_new_process, in_turns, median_ratio, median_seconds, peak_memory, timed
from benchmarks.data import write_photos
from benchmarks.tables import Table
from mapet.config.tokenizers import TeacherOptions
from mapet.data.dataset import UnreadableImages, ViewDataset, position_batches, readable_batches
from mapet.data.sources import list_images
from mapet.data.views import ViewSpec
from mapet.device import ComputeContext
from mapet.tokenizers.feature_store import DistributedPoints, FeatureStore
from mapet.tokenizers.kmeans import KMeans, assign, kmeans_plusplus_init, random_init
from mapet.tokenizers.tokenizer import Teacher, make_teacher

PROXY = "benchmarks.proxy_teacher:efficientnet_lite0"
TIMM = ("resnet50_clip.openai", "vit_base_patch16_clip_224.openai")
SIZE = (224, 224)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--photos", type=Path, help="500 photographs give 98,000 patches; default: scikit-learn's two")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--features", default=PROXY, help="teacher whose features are clustered (default: %(default)s)")
    parser.add_argument("--max-patches", type=int, default=1 << 20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--modes", action="store_true", help="only the error of each start, metric and batch")


def run(args: argparse.Namespace) -> Result:
    """Streaming and teachers only with the proxy teacher's features."""
    compute = ComputeContext.from_options()
    with tempfile.TemporaryDirectory() as folder:
        photos = args.photos or Path(folder) / "photos"
        if args.photos is None:
            write_photos(None, photos, 32)
        features = patch_features(args.features, photos, compute, args.max_patches)
        points = {
            "features": f"{args.features.partition(':')[2] or args.features}, {len(features):,} x {features.shape[1]}"
        }
        if args.modes:
            rows = modes(features, args, compute)
        else:
            rows = [points | row for row in clustering(features, args, compute)]
            rows += [
                product_rate(features, args.vocab_size, dtype, compute) for dtype in (torch.float32, torch.bfloat16)
            ]
            kmeans = KMeans(args.vocab_size, 1, dtype=compute.dtype)
            codebook, part = kmeans.fit(features).centroids, features[:16384]
            rate = len(part) / median_seconds(lambda: assign(part, codebook))
            rows.append({"what": "exact assignment, float32", "value": rate, "unit": "patches/s"})
        if args.features == PROXY and not args.modes:
            rows += [streamed(in_memory) for in_memory in (True, False)] if sys.platform == "linux" else []
            rows += teacher_rates(photos, compute)
    return Result(
        rows, f"{args.photos or 'crops of scikit-learn photographs'}; K = {args.vocab_size}, {args.iterations} rounds"
    )


def patch_features(name: str, images: Path, compute: ComputeContext, most: int) -> torch.Tensor:
    """Up to `most` patch features of a teacher."""
    listed = list_images(images)
    options = TeacherOptions(teacher=name, image_size=SIZE)
    teacher = make_teacher(options, compute.precision).to(compute.device)
    dataset = ViewDataset(listed, ViewSpec(image_size=SIZE), teacher_size=SIZE)
    store = FeatureStore(min(most, 196 * len(listed)), 1 << 40, Path(), compute.device)
    for batch in readable_batches(
        dataset, position_batches(range(len(listed)), 32), UnreadableImages(listed, 0.05), "teacher features"
    ):
        store.append(teacher.batch_features(batch, listed, compute).permute(0, 2, 3, 1).flatten(0, 2))
    return store.take(torch.arange(len(store)))


def error(points: torch.Tensor, centroids: torch.Tensor) -> float:
    """Mean squared distance of the exact assignment."""
    return float(assign(points, centroids)[1].mean())


def faiss_kmeans(features: torch.Tensor, start: torch.Tensor, iterations: int, spherical: bool = False) -> torch.Tensor:
    """Centroids of faiss over all points."""
    import faiss

    fit = faiss.Kmeans(
        features.shape[1], len(start), niter=iterations, seed=0, min_points_per_centroid=1, max_points_per_centroid=len(features),
        spherical=spherical,
    )  # fmt: skip
    fit.train(features.cpu().numpy(), init_centroids=start.cpu().numpy())
    return torch.from_numpy(fit.centroids).to(features.device)


def has_faiss() -> bool:
    try:
        import faiss  # noqa: F401
    except ImportError:
        print("faiss is not installed, its rows are skipped: pip install faiss-cpu", file=sys.stderr)
        return False
    return True


def clustering(features: torch.Tensor, args: argparse.Namespace, compute: ComputeContext) -> list[Row]:
    """K-means of mapet and faiss in turns; a second row of mapet with as few iterations as reach faiss's error."""
    centroids: dict[int, torch.Tensor] = {}

    def mapet(rounds: int) -> torch.Tensor:
        centroids[rounds] = KMeans(args.vocab_size, rounds, dtype=compute.dtype).fit(features).centroids
        return centroids[rounds]

    works: dict[int, Callable[[], Any]] = {args.iterations: functools.partial(mapet, args.iterations)}
    faiss: Row = {}
    if has_faiss():
        start = features[random_init(DistributedPoints(FeatureStore.from_tensor(features)), args.vocab_size)]
        works[0] = functools.partial(faiss_kmeans, features, start, args.iterations)  # 0: faiss
        faiss["faiss_error"], fewer = error(features, works[0]()), args.iterations
        while fewer > 1 and error(features, mapet(fewer - 1)) <= 1.001 * faiss["faiss_error"]:
            fewer -= 1
        works[fewer] = functools.partial(mapet, fewer)
    seconds = in_turns(works, args.rounds)
    faiss |= {"faiss_seconds": statistics.median(seconds[0])} if 0 in seconds else {}
    return [
        {"rounds": rounds, "seconds": statistics.median(spent), "error": error(features, centroids[rounds]), **faiss}
        | ({"speedup": median_ratio(seconds[0], spent)} if faiss else {})
        for rounds, spent in seconds.items()
        if rounds
    ]


def product_rate(features: torch.Tensor, vocab_size: int, dtype: torch.dtype, compute: ComputeContext) -> Row:
    """Rate of the matmul of an iteration."""
    x = features[:2048].to(dtype)
    centroids = torch.randn(features.shape[1], vocab_size, dtype=dtype, device=compute.device)
    table = torch.empty(len(x), vocab_size, dtype=dtype, device=compute.device)
    spent = median_seconds(lambda: torch.mm(x, centroids, out=table), 9)
    rate = 2 * centroids.numel() * len(x) / spent / 1e9
    return {"what": f"matrix product of 2048 points, {dtype}", "value": rate, "unit": "GFLOP/s"}


def modes(features: torch.Tensor, args: argparse.Namespace, compute: ComputeContext) -> list[Row]:
    """Error and time of each metric, initialization and batch; faiss from the same centroids, with all points."""
    rows: list[Row] = []
    metrics: list[Literal["l2", "cosine"]] = ["l2", "cosine"]
    for metric in metrics:
        points = DistributedPoints(FeatureStore.from_tensor(features), metric)
        clustered = points.take(torch.arange(len(points)))
        starts: dict[Literal["random", "k-means++"], Callable[..., torch.Tensor]] = {
            "random": random_init,
            "k-means++": kmeans_plusplus_init,
        }
        for start, choose in starts.items():
            row: Row = {"mode": f"{metric}, {start}"}
            for batch in (None, len(points) // 4):
                kmeans = KMeans(args.vocab_size, args.iterations, 1, 0, compute.dtype, start, batch, metric)
                spent, codebook = timed(functools.partial(kmeans.fit, features))
                name = "part" if batch else "all"
                row |= {f"{name}_error": error(clustered, codebook.centroids), f"{name}_seconds": spent}
            if has_faiss():
                given = clustered[choose(points, args.vocab_size)]
                spent, centroids = timed(lambda: faiss_kmeans(clustered, given, args.iterations, metric == "cosine"))  # noqa: B023
                row |= {"faiss_error": error(clustered, centroids), "faiss_seconds": spent}
            rows.append(row)
    return rows


def streamed(in_memory: bool, count: int = 100_000) -> Row:
    """Peak memory of two rounds over random features, all or none of them held in memory, in a process of its own."""
    value = in_new_process(peak_of_kmeans, count, in_memory) / 1e9
    where = "in memory" if in_memory else "in a scratch file"
    return {"what": f"peak memory, {count * 2048 * 2 / 1e9:.2g} GB of features {where}", "value": value, "unit": "GB"}


def peak_of_kmeans(count: int, in_memory: bool) -> int:
    with tempfile.TemporaryDirectory() as scratch, FeatureStore(count, in_memory << 40, Path(scratch)) as store:
        for _ in range(count // 1000):
            store.append(torch.randn(1000, 2048))
        KMeans(128, 2, dtype=torch.bfloat16).fit(store)
    return peak_memory()


def teacher_rates(images: Path, compute: ComputeContext) -> list[Row]:
    """Return images/s of teachers, in float32 and in this machine's precision."""
    listed = list_images(images)
    dataset = ViewDataset(listed, ViewSpec(image_size=SIZE), teacher_size=SIZE)
    batch = dataset.batch([(0, index % len(listed)) for index in range(16)]).teacher_images
    assert batch is not None
    rows = []
    for name in (PROXY, *TIMM):
        for precision in dict.fromkeys(("float32", compute.precision)):
            work = functools.partial(random_teacher(name, precision).to(compute.device), compute.to(batch))
            rows.append(
                {"what": f"teacher {name}, {precision}", "value": len(batch) / median_seconds(work), "unit": "images/s"}
            )
    return rows


def random_teacher(name: str, precision: str) -> Teacher:
    """A teacher whose weights, if they are timm's, are random."""
    if name == PROXY:
        return make_teacher(TeacherOptions(teacher=name, image_size=SIZE), precision)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pth"
        torch.save(timm.create_model(name).state_dict(), weights)
        options = TeacherOptions(teacher=name, image_size=SIZE, teacher_checkpoint=str(weights))
        return make_teacher(options, precision)


SMOKE = ["--features", "pixels", "--max-patches", "2000", "--vocab-size", "64", "--iterations", "2", "--rounds", "1"]
TABLES = {
    "main": Table({
        "features": "{features}", "iterations": "{rounds}", "mapet": "{seconds:.1f} s", "faiss-cpu": "{faiss_seconds:.1f} s",
        "speedup": "{speedup:.2f}", "mean squared distance": "{error:.5g}", "faiss's": "{faiss_error:.5g}",
    }, rows=lambda rows: [row for row in rows if "features" in row]),
    "modes": Table({
        "metric, init": "{mode}", "mapet, all points": "{all_error:.4g} ({all_seconds:.1f} s)",
        "mapet, a quarter per iteration": "{part_error:.4g} ({part_seconds:.1f} s)",
        "faiss, all points, the same init": "{faiss_error:.4g} ({faiss_seconds:.1f} s)",
    }, rows=lambda rows: [row for row in rows if "mode" in row]),
    "rates": Table({
        "what": "{what}", "value": "{value:.4g} {unit}",
    }, rows=lambda rows: [row for row in rows if "what" in row]),
}  # fmt: skip
