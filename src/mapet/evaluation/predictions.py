"""Labels and probabilities of many images by a fine-tuned model, as a CSV or Parquet file; an interrupted job can be resumed.

The logits are written as `mapet embed` writes features, in the folder .NAME.partial beside the file, which is removed once the file is whole.
"""

import importlib.util
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from mapet import files
from mapet.config.evaluation import EmbedConfig, PredictConfig
from mapet.config.shared import ReadOptions
from mapet.data.dataset_stats import warn_outside_range
from mapet.data.image_list import ImageList
from mapet.data.sources import list_as_trained
from mapet.device import ComputeContext
from mapet.errors import MapetError, install_hint, option
from mapet.evaluation.calibration import probabilities
from mapet.evaluation.embeddings import ROWS, compute_rows
from mapet.evaluation.features import BackboneWrapper, check_finite_features
from mapet.lock import folder_lock
from mapet.models.backbone import read_temperature

log = logging.getLogger("mapet")
BLOCK_ROWS = 8192
"""Images whose rows are written together."""


def predict(config: PredictConfig) -> Path:
    """Classify every image of a source, and write a row for each into the file `config.out`; return that file.

    Columns: `id`, `label` (the most probable class), `probability` (that of the label), `error` (why an image is unreadable: its other
    columns are empty), and `probability:CLASS` of each class. A model without a temperature (`fit_temperature`) has the columns
    `uncalibrated_probability` and `uncalibrated_probability:CLASS` instead, and a warning says so.

    Args:
        config: options of `mapet predict`.

    Returns:
        The file `config.out`.

    Raises:
        Interrupted: a signal such as Ctrl-C came before the last image; the logits so far are saved.
        MapetError: pyarrow is missing for Parquet; the model cannot be loaded or has no classes; the file exists, or (without `resume`)
            an unfinished one; too many images are unreadable; or logits are NaN or infinite.
    """
    out = config.out
    if out.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise MapetError(f"{option('out')} {out} needs pyarrow: {install_hint('export')}", field="out", value=out)
    folder = out.with_name(f".{out.name}.partial")
    if out.exists() and config.resume and not out.is_dir():
        shutil.rmtree(folder, ignore_errors=True)  # left by a kill after the file was written
        log.info("%s is finished", out)
        return out
    files.create_output_dir(out, create=False)
    compute = ComputeContext.from_options(config.device, config.precision)
    backbone = BackboneWrapper.load(config.backbone, compute)
    if not backbone.classes:
        problem = f"{config.backbone} is no fine-tuned model: it has no classifier with names of classes"
        raise MapetError(f"{problem}. Make one with `mapet finetune`", field="backbone", value=config.backbone)
    temperature = read_temperature(config.backbone)
    images = list_as_trained(config.images, config, backbone.read_options)
    warn_outside_range(images, backbone.channels)
    if temperature is None:
        log.warning(
            "the probabilities are not calibrated: %s was fine-tuned with too few held-out images, or by another program; fine-tune with more "
            "labeled images to calibrate them",
            config.backbone,
        )

    def compute_logits(pixels: torch.Tensor) -> np.ndarray:
        """Return the logits of a batch; raise MapetError if one is NaN or infinite."""
        logits = backbone.logits(pixels)
        check_finite_features(logits, backbone.name)
        return logits.cpu().numpy()

    options = config.model_dump(include={"backbone", "images", "max_unreadable", "resume", *ReadOptions.model_fields})
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder, config.take_over):
        manifest = compute_rows(EmbedConfig(**options, out=folder), images, backbone, compute_logits, {}, "predictions")
        predictions = Predictions(
            images, files.read_array(folder / ROWS, "r"), manifest["unreadable"], backbone.classes, temperature
        )
        if out.suffix == ".csv":
            files.write_csv(out, predictions.columns, predictions.csv_rows())
        else:
            predictions.write_parquet(out)
        shutil.rmtree(folder)
    log.info("labels and %sprobabilities of %s images in %s (%d unreadable)", "" if temperature else "uncalibrated ",
        f"{len(images):,}", out, len(manifest["unreadable"]))  # fmt: skip
    return out


class Predictions(NamedTuple):
    """Logits of all images, with names of images and classes, as rows of a table.

    Attributes:
        images: the list.
        logits: (n, K) float32, mapped from disk; rows of unreadable images are NaN.
        unreadable: index of an image, as text -> reason.
        classes: names of the K classes.
        temperature: of the probabilities; None: they are not calibrated.
    """

    images: ImageList
    logits: Float[np.ndarray, "n K"]
    unreadable: dict[str, str]
    classes: tuple[str, ...]
    temperature: float | None

    @property
    def columns(self) -> list[str]:
        """Return the names of the columns: id, label, probability, error, probability of each class."""
        name = "probability" if self.temperature else "uncalibrated_probability"
        return ["id", "label", name, "error", *(f"{name}:{each}" for each in self.classes)]

    def blocks(self) -> Iterator[tuple[list[str], list[str | None], list[str | None], Float[np.ndarray, "b K"]]]:
        """Yield (ids, labels, errors, probabilities) of consecutive images; of an unreadable one label and probabilities are None and NaN."""
        for start in range(0, len(self.images), BLOCK_ROWS):
            logits = torch.from_numpy(np.array(self.logits[start : start + BLOCK_ROWS]))
            chances = probabilities(logits, self.temperature).numpy()
            rows = range(start, start + len(logits))
            errors = [self.unreadable.get(str(row)) for row in rows]
            best = logits.argmax(1).tolist()
            labels = [None if error else self.classes[index] for error, index in zip(errors, best, strict=True)]
            yield [self.images.printable_id(row) for row in rows], labels, errors, chances

    def csv_rows(self) -> Iterator[list[str]]:
        """Yield the cells of each row of the CSV file."""
        for ids, labels, errors, chances in self.blocks():
            for name, label, error, row in zip(ids, labels, errors, chances.tolist(), strict=True):
                first, *others = ["" if error else f"{value:.6f}" for value in (max(row), *row)]
                yield [name, label or "", first, error or "", *others]

    def write_parquet(self, path: Path) -> None:
        """Write a Parquet file atomically, with the columns of the CSV file; probabilities are float32."""
        import pyarrow
        import pyarrow.parquet

        text, probability = pyarrow.string(), pyarrow.float32()
        types = [text, text, probability, text, *(probability for _ in self.classes)]
        schema = pyarrow.schema(list(zip(self.columns, types, strict=True)))
        with files.atomic_write(path) as temporary, pyarrow.parquet.ParquetWriter(temporary, schema) as writer:
            for ids, labels, errors, chances in self.blocks():
                values = [ids, labels, chances.max(1), errors, *chances.T]
                arrays = [
                    pyarrow.array(each, kind, from_pandas=True) for each, kind in zip(values, types, strict=True)
                ]  # NaN becomes null
                writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))
