"""The command `prepare`, which resizes and packs images once."""

import logging
from pathlib import Path

from tqdm import tqdm

from mapet.config.data import PrepareConfig
from mapet.data.dataset import UnreadableImages
from mapet.data.dataset_stats import find_value_range
from mapet.data.hugging_face import HFStream
from mapet.data.image_list import ImageList
from mapet.data.prepared import write_prepared_dataset
from mapet.data.sources import list_images
from mapet.errors import Interrupted
from mapet.files import MANIFEST

log = logging.getLogger("mapet")


def prepare(config: PrepareConfig) -> Path:
    """Resize and pack images into `config.out`, a new folder or one that was interrupted; return the folder.

    Args:
        config: options of `mapet prepare`.

    Returns:
        The folder `config.out`.

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
