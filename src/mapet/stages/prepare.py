"""Stage: resize every image once, for data that is read many times."""

import logging
from math import isfinite
from pathlib import Path

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from mapet.errors import Interrupted
from mapet.recipe import HUGGING_FACE, Source, stage
from mapet.stages.options import BadImages, automatic_workers

log = logging.getLogger("mapet")


class PrepareConfig(BadImages):
    """Options of `prepare`."""

    images: Source
    """Folder of images, text file of paths, .tar shards (also by URL), or hf:NAME[:SPLIT] of Hugging Face's `datasets`."""
    out: Path
    """New folder for the prepared images; give it to other stages as --images."""
    size: PositiveInt = 256
    """Short side of the prepared images, pixels; at least the student's and the teacher's input. Smaller ones are kept."""
    channels: PositiveInt = 3
    """Channels: 1 grey, 3 RGB, others from .npy arrays."""
    quality: int = Field(90, ge=1, le=100)
    """JPEG quality of resized images."""
    value_range: tuple[float, float] | None = None
    """Values of 16-bit, integer and floating-point images that become 0 and 255, e.g. 0 4095 for 12 bits, -1000 400 for lungs in
    a CT; beyond is cut off, 8-bit images stay as they are; automatic: the upper 8 of 16 bits, others are bad images."""
    threads: NonNegativeInt | None = None
    """Images worked on at a time; automatic: one a core, at most 9."""
    stream: bool = False
    """With hf:NAME: read it once as it comes, in order; its originals are never all on this disk."""
    resume: bool = False
    """Go on with an unfinished one."""

    @model_validator(mode="after")
    def _streams_of_the_hub(self) -> "PrepareConfig":
        if self.stream and not str(self.images).startswith(HUGGING_FACE):
            raise ValueError(
                f"--stream is for hf:NAME, not {self.images}: other sources are read where they are, tar shards by URL too"
            )
        return self

    @model_validator(mode="after")
    def _a_range(self) -> "PrepareConfig":
        if self.value_range is not None and not (
            all(map(isfinite, self.value_range)) and self.value_range[0] < self.value_range[1]
        ):
            raise ValueError(
                f"--value-range {self.value_range[0]:g} {self.value_range[1]:g}: the smaller first, e.g. 0 4095"
            )
        return self


@stage
def prepare(config: PrepareConfig) -> Path:
    """Resize every image once and pack them into a few files that are mapped into memory; returns the folder.

    It pays when images are much larger than the input and are read many times (an epoch is one reading), when they are
    many small files on a slow or shared disk, or when the resized ones fit into memory and the originals do not. For
    images near the input's size it gains little.

    Example:
      mapet prepare --images PHOTOS --out PREPARED --size 256
      mapet run --images PREPARED --out runs/photos
      mapet prepare --images SCANS --out PREPARED --channels 1 --value-range 0 4095   # 12 bits in files of 16
      mapet prepare --images hf:NAME:train --stream --out PREPARED      # larger than this disk
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
    how = config.out, config.size, config.channels, config.quality, window, config.threads or automatic_workers() + 1
    try:
        with tqdm(desc="prepare", unit="img", disable=None) as bar:
            if config.stream:
                stream = Stream(str(config.images))
                bar.total, quarantine = stream.expected, Quarantine(stream, config.max_bad)
                made = write_streamed(stream, *how, lambda index, reason: quarantine.add([(index, reason)]), bar.update)
            else:
                images = scan(config.images)
                bar.total, quarantine = len(images), Quarantine(images, config.max_bad)
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
