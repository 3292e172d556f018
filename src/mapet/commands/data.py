"""The commands `check`, which reports on images and estimates costs, and `prepare`, which resizes and packs them once."""

import logging
from pathlib import Path

from tqdm import tqdm

from mapet.config.data import CheckConfig, PrepareConfig
from mapet.config.shared import UnreadableImageOptions
from mapet.data.dataset import UnreadableImages
from mapet.data.dataset_stats import DatasetStats, compute_dataset_stats, find_value_range
from mapet.data.hugging_face import HFStream
from mapet.data.image_list import ImageList
from mapet.data.prepared import write_prepared_dataset
from mapet.data.sources import list_images
from mapet.device import num_workers
from mapet.errors import Interrupted
from mapet.files import MANIFEST, atomic_write
from mapet.training.estimate import estimate

log = logging.getLogger("mapet")


def check(config: CheckConfig) -> DatasetStats:
    """Read every image; log a report, warnings and an estimate of costs; return the statistics.

    In this order: the report and the warnings of `DatasetStats`; the unreadable images, as lines `reason<TAB>id` in
    `config.out` if that is given; time and memory of training, measured on one batch, if `config.benchmark`.
    """
    images = find_value_range(list_images(config.images, config), config.channels)
    stats = compute_dataset_stats(images, config.channels, num_workers() + 1)
    for line in stats.lines():
        log.info("%s", line)
    for line in stats.warnings(config.image_size, UnreadableImageOptions().max_unreadable):
        log.warning("%s", line)
    if config.out:
        lines = "".join(f"{reason}\t{name}\n" for name, reason in stats.unreadable.items())
        with atomic_write(config.out) as temporary:
            temporary.write_text(lines, encoding="utf-8", errors="surrogateescape")  # ids may be no UTF-8
        log.info("list of unreadable images in %s", config.out)
    if config.benchmark and len(stats.unreadable) < len(images):
        for line in estimate(config, images, [i for i in range(len(images)) if images.id(i) not in stats.unreadable]):
            log.info("%s", line)
    return stats


def prepare(config: PrepareConfig) -> Path:
    """Resize and pack images into `config.out`, a new folder or one that was interrupted; return the folder.

    Raises:
        Interrupted: the user interrupted it; complete shards are kept.
        MapetError: the folder is of other images or options; too many images are unreadable.
    """
    images: ImageList | HFStream
    if config.streaming:
        images = HFStream(config.images)
    else:
        images = find_value_range(list_images(config.images, config), config.channels)
        config = config.model_copy(update={"value_range": images.read_options.value_range})
    total = images.num_rows if isinstance(images, HFStream) else len(images)
    unreadable = UnreadableImages(images, config.max_unreadable)
    try:
        with tqdm(desc="prepare", unit="img", total=total, disable=None) as bar:
            prepared = write_prepared_dataset(images, config, unreadable, bar)
    except KeyboardInterrupt:
        if not (config.out / MANIFEST).exists():
            raise
        raise Interrupted(f"interrupted; what was done is kept in {config.out}") from None
    num_readable = len(prepared) - len(unreadable.reasons)
    megabytes = int(prepared.file_sizes.sum()) / 1e6
    log.info(
        "%s images in %s, %.1f MB (%.1f kB each), %d unreadable excluded",
        f"{num_readable:,}", config.out, megabytes, 1000 * megabytes / max(1, num_readable), len(unreadable.reasons),
    )  # fmt: skip
    return config.out
