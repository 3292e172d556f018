"""Stage: resize every image once, for data that is read many times."""

import logging
from pathlib import Path

from mapet.commands.command import command
from mapet.config.prepare import PrepareConfig
from mapet.config.shared import automatic_workers
from mapet.errors import Interrupted

log = logging.getLogger("mapet")


@command(PrepareConfig)
def prepare(config: PrepareConfig) -> Path:
    """Resize every image once and pack them into a few files that are mapped into memory; returns the folder.

    It pays when images are much larger than the input and are read many times (an epoch is one reading), when they are
    many small files on a slow or shared disk, or when the resized ones fit into memory and the originals do not. For
    images near the input's size it gains little.

    Example:
      mapet prepare --images PHOTOS --out PREPARED --short-side 256
      mapet run --images PREPARED --out runs/photos
      mapet prepare --images SCANS --out PREPARED --channels 1 --value-range 0 4095   # 12 bits in files of 16
      mapet prepare --images hf:NAME:train --streaming --out PREPARED      # larger than this disk
    """
    from tqdm import tqdm

    from mapet.data.dataset import Quarantine
    from mapet.data.decode import Window
    from mapet.data.prepared import MANIFEST, write_prepared
    from mapet.data.sources import scan
    from mapet.data.streamed import Stream, write_streamed
    from mapet.files import new_folder

    if not (config.resume and (config.out / MANIFEST).exists()):
        new_folder(config.out, resume_hint=", or go on with --resume")
    window = Window(*config.value_range) if config.value_range else None
    how = (
        config.out,
        config.short_side,
        config.channels,
        config.jpeg_quality,
        window,
        automatic_workers() + 1,
    )
    try:
        with tqdm(desc="prepare", unit="img", disable=None) as bar:
            if config.streaming:
                stream = Stream(str(config.images))
                bar.total, quarantine = stream.expected, Quarantine(stream, config.max_unreadable)
                made = write_streamed(stream, *how, lambda index, reason: quarantine.add([(index, reason)]), bar.update)
            else:
                images = scan(config.images)
                bar.total, quarantine = len(images), Quarantine(images, config.max_unreadable)
                made = write_prepared(images, *how, lambda index, reason: quarantine.add([(index, reason)]), bar.update)
    except KeyboardInterrupt:
        if not (config.out / MANIFEST).exists():
            raise
        raise Interrupted(f"interrupted; what was done is kept in {config.out}") from None
    total, good = int(made.file_sizes.sum()), made.manifest["num_images"] - len(made.manifest["bad"])
    log.info(
        "%s images in %s, %.1f MB (%.1f kB each), %d unreadable left out",
        f"{good:,}", config.out, total / 1e6, total / 1e3 / max(1, good), len(made.manifest["bad"]),
    )  # fmt: skip
    return config.out
