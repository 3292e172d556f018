"""The backbone in the formats of other libraries, checked on real images, with a model card."""

import logging
import tempfile
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mapet.config.evaluation import ExportConfig
from mapet.data.dataset import ViewDataset
from mapet.data.sources import list_images
from mapet.data.views import ViewSpec, normalize
from mapet.errors import MapetError, option
from mapet.evaluation.features import check_finite_features
from mapet.files import atomic_write
from mapet.models.backbone import load_backbone, save_backbone
from mapet.models.export_formats import FORMATS, ExportWrapper, compute_outputs, require_packages
from mapet.reports.card import model_card, origin_of
from mapet.run_state import pretrain_folder, read_command, try_read_state
from mapet.training.tasks.pretraining import load_run

log = logging.getLogger("mapet")
TOLERANCE = 1e-4
"""Largest difference of an output, as a fraction of its root mean square."""
NUM_IMAGES = 8
"""Images of the check."""


def export(config: ExportConfig) -> Path:
    """Write each format, load it again and compare its outputs; return the folder."""
    formats: list[str] = list(dict.fromkeys(["timm", *config.format]))
    for name in formats:
        require_packages(name)
    vit = _load_backbone(config)
    origin = origin_of(config.backbone)
    classes = [str(name) for name in origin.classes] if vit.num_classes else []
    views, description = _make_sample(config, vit)
    pixels = normalize(views, vit.in_chans)
    expected = compute_outputs(ExportWrapper(vit), pixels)
    for output in expected.values():
        check_finite_features(output, config.backbone)
    checks: dict[str, float] = {}
    with atomic_write(config.out) as folder:
        folders = {name: folder if name == "timm" else folder / name for name in formats}
        for name, place in folders.items():
            FORMATS[name].write(vit, place, classes)
            for way, read in FORMATS[name].read(place).items():
                checks[way] = _check(way, read(pixels), expected)
        if "transformers" in folders and (folders["transformers"] / "preprocessor_config.json").is_file():
            way = "transformers, image processor"
            checks[way] = _check(way, _process(folders["transformers"], views), {"pixels": pixels})
        for name in [name for name in folders if name in ("timm", "transformers")]:
            card = model_card(config, folders, vit, origin, checks, description, TOLERANCE, name)
            (folders[name] / "README.md").write_text(card, encoding="utf-8")
    for way, difference in checks.items():
        log.info("%-40s largest relative difference %.1e", way, difference)
    log.info("exported to %s, checked on %s", config.out, description)
    return config.out


def _load_backbone(config: ExportConfig) -> VisionTransformer:
    """Load the backbone with the options' sizes; of a run that isn't finished, that of its newest checkpoint."""
    sizes = {"img_size": config.image_size, "patch_size": config.patch_size, "in_chans": config.channels}
    options = {key: value for key, value in sizes.items() if value is not None} | config.model_args
    inner = pretrain_folder(Path(config.backbone))
    if read_command(inner) != "pretrain" or (inner / "backbone").is_dir():
        return load_backbone(config.backbone, **options).eval()
    with tempfile.TemporaryDirectory(prefix=f"{Path(config.backbone).name}-newest-checkpoint-") as folder:
        save_backbone(load_run(Path(config.backbone)).model.vit, Path(folder) / "backbone")
        return load_backbone(Path(folder) / "backbone", **options).eval()


def _make_sample(config: ExportConfig, vit: VisionTransformer) -> tuple[UInt8[Tensor, "B C H W"], str]:
    """Read a few images as the ViT takes them, and describe them; without `images`, generate some where the run's can't be read."""
    folders = (pretrain_folder(Path(config.backbone)), Path(config.backbone).parent)  # of pre-training, fine-tuning
    states = [state for folder in folders if (state := try_read_state(folder))]
    source = config.images or (states[0].config.get("images") if states else None)
    try:
        if not source:
            raise MapetError("nothing beside the backbone says what images it was trained on")
        views = _read_views(source, vit)
        description = f"{len(views)} images of {Path(source).name}"
    except (MapetError, OSError) as error:
        if config.images is not None:
            raise
        description = f"{NUM_IMAGES} generated images"
        log.warning(f"checking on %s: %s; give some with {option('images')}", description, error)
        shape = (NUM_IMAGES, vit.in_chans, *vit.patch_embed.img_size)
        views = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return views, description


def _read_views(source: str, vit: VisionTransformer) -> Tensor:
    """Read a few images, spread over all, as (B, C, H, W) uint8.

    Raises:
        MapetError: no images, or none that can be read.
    """
    size, images = tuple(vit.patch_embed.img_size), list_images(source)
    dataset = ViewDataset(images, ViewSpec(image_size=size), vit.in_chans, image_size=size)
    chosen = np.unique(np.linspace(0, len(images) - 1, NUM_IMAGES).round().astype(int))
    views = dataset.batch([(0, int(index)) for index in chosen]).images
    if views is None:
        raise MapetError(f"no image of {source} that was tried can be read: give others with {option('images')}")
    return views


def _check(way: str, outputs: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest difference of all outputs, each as a fraction of its own root mean square.

    Raises:
        MapetError: it is more than `TOLERANCE`, or not a number; an output is missing or of another shape.
    """
    differences = [
        float((outputs[name] - value).abs().max() / value.pow(2).mean().sqrt())
        if name in outputs and outputs[name].shape == value.shape
        else float("inf")
        for name, value in expected.items()
    ]
    difference = float(np.max(differences))  # NaN if one is
    if not difference <= TOLERANCE:
        raise MapetError(
            f"the export is not the backbone: loaded by {way} it differs by {difference:.1e} of the outputs' size, more than "
            f"{TOLERANCE:.0e}; nothing was written. Leave out that {option('format')}"
        )
    return difference


def _process(folder: Path, views: Tensor) -> dict[str, Tensor]:
    """Let the exported image processor prepare views, which have the right size already, as pictures."""
    from transformers import AutoImageProcessor  # an extra

    pictures = [Image.fromarray(view.movedim(0, -1).squeeze(-1).numpy()) for view in views]
    processed = AutoImageProcessor.from_pretrained(folder)(pictures, return_tensors="pt")
    return {"pixels": torch.as_tensor(processed["pixel_values"])}
