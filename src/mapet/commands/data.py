"""What is in a folder of images and what the next stages will cost; images resized once, for data that is read many times."""

import logging
from pathlib import Path

from tqdm import tqdm

from mapet.config.data import CheckConfig, PrepareConfig
from mapet.config.shared import UnreadableImageOptions
from mapet.data.dataset import UnreadableImages
from mapet.data.dataset_stats import DatasetStats, compute_dataset_stats
from mapet.data.hugging_face import HFStream
from mapet.data.prepared import write_prepared_dataset
from mapet.data.sources import list_images
from mapet.device import num_workers
from mapet.errors import Interrupted
from mapet.files import MANIFEST, atomic_write, create_output_dir
from mapet.training.estimate import estimate

log = logging.getLogger("mapet")


def check(config: CheckConfig) -> DatasetStats:
    """Read every image, report, and estimate costs."""
    images = list_images(config.images)
    stats = compute_dataset_stats(images, config.channels, num_workers() + 1)
    for line in stats.lines():
        log.info("%s", line)
    for line in stats.warnings(config.image_size, UnreadableImageOptions().max_unreadable):
        log.warning("%s", line)
    if config.out:
        lines = "".join(f"{why}\t{name}\n" for name, why in stats.unreadable.items())
        with atomic_write(config.out) as temporary:
            temporary.write_text(lines, encoding="utf-8", errors="surrogateescape")
        log.info("list of unreadable images in %s", config.out)
    if config.benchmark and len(stats.unreadable) < len(images):
        for line in estimate(config, images, [i for i in range(len(images)) if images.id(i) not in stats.unreadable]):
            log.info("%s", line)
    return stats


def prepare(config: PrepareConfig) -> Path:
    """Resize and pack images; return the folder."""
    if not (config.resume and (config.out / MANIFEST).exists()):
        create_output_dir(config.out)
    source = HFStream(config.images) if config.streaming else list_images(config.images)
    unreadable = UnreadableImages(source, config.max_unreadable)

    def on_bad(index: int, reason: str) -> None:
        unreadable.add([(index, reason)])

    total = source.num_rows if isinstance(source, HFStream) else len(source)
    try:
        with tqdm(desc="prepare", unit="img", total=total, disable=None) as bar:
            made = write_prepared_dataset(source, config, on_bad, bar.update)
    except KeyboardInterrupt:
        if not (config.out / MANIFEST).exists():
            raise
        raise Interrupted(f"interrupted; what was done is kept in {config.out}") from None
    size, num_bad = int(made.file_sizes.sum()), len(made.manifest["unreadable"])
    good = made.manifest["num_images"] - num_bad
    log.info(
        "%s images in %s, %.1f MB (%.1f kB each), %d unreadable left out",
        f"{good:,}", config.out, size / 1e6, size / 1e3 / max(1, good), num_bad,
    )  # fmt: skip
    return config.out
