"""Stage: resize every image once, for data that is read many times."""

import logging
from pathlib import Path

from mapet.commands.command import command
from mapet.config.data import PrepareConfig
from mapet.errors import Interrupted, option

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
    from mapet.data.hugging_face import HFStream, write_streamed
    from mapet.data.prepared import write_prepared_dataset
    from mapet.data.sources import scan
    from mapet.files import MANIFEST, new_folder

    if not (config.resume and (config.out / MANIFEST).exists()):
        new_folder(config.out, resume_hint=f", or go on with {option('resume', True)}")
    source = HFStream(str(config.images)) if config.streaming else scan(config.images)
    unreadable = Quarantine(source, config.max_unreadable)

    def on_bad(index: int, reason: str) -> None:
        unreadable.add([(index, reason)])

    try:
        total = source.expected if isinstance(source, HFStream) else len(source)
        with tqdm(desc="prepare", unit="img", total=total, disable=None) as bar:
            if isinstance(source, HFStream):
                made = write_streamed(source, config, on_bad, bar.update)
            else:
                made = write_prepared_dataset(source, config, on_bad, bar.update)
    except KeyboardInterrupt:
        if not (config.out / MANIFEST).exists():
            raise
        raise Interrupted(f"interrupted; what was done is kept in {config.out}") from None
    total, good = int(made.file_sizes.sum()), made.manifest["num_images"] - len(made.manifest["unreadable"])
    log.info(
        "%s images in %s, %.1f MB (%.1f kB each), %d unreadable left out",
        f"{good:,}", config.out, total / 1e6, total / 1e3 / max(1, good), len(made.manifest["unreadable"]),
    )  # fmt: skip
    return config.out
