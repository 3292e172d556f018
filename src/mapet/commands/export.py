"""Stage: the backbone in the formats of other libraries, checked on real images, with a model card."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mapet.commands.command import command
from mapet.config.export import ExportConfig
from mapet.errors import MapetError
from mapet.run_state import command_of, pretrain_folder, read_or_none

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer
    from torch import Tensor

log = logging.getLogger("mapet")
TOLERANCE = 1e-4
"""Largest difference of an output, as a share of its root mean square."""
COUNT = 8
"""Images of the check."""


@command(ExportConfig)
def export(config: ExportConfig) -> Path:
    """Export a backbone for timm, Transformers, ONNX or torch.export; every file is loaded again and compared on real images.

    Example:
      mapet export --backbone runs/photos --out backbone
      mapet export --backbone runs/photos --out backbone --format transformers onnx torch-export --image-size 160 320
      mapet export --backbone vit_standard_small_patch16_224.tar --out mapet-small --images PHOTOS
    """
    from mapet.evaluation.features import must_be_finite_features
    from mapet.files import atomic, new_folder
    from mapet.models.export_formats import FORMATS, outputs_of, require
    from mapet.reports.card import model_card, origin_of

    new_folder(config.out, create=False)
    formats = list(dict.fromkeys(["timm", *config.format]))
    for name in formats:
        require(name)
    vit = _backbone(config)
    origin = origin_of(config.backbone)
    classes = [str(name) for name in origin.classes] if vit.num_classes else []
    sample = _sample(config, vit)
    expected = outputs_of(vit, sample.pixels)
    for output in expected.values():
        must_be_finite_features(output, config.backbone)
    checks: dict[str, float] = {}
    with atomic(config.out) as folder:
        for name in formats:
            place = folder if name == "timm" else folder / name
            FORMATS[name].write(vit, place, classes)
            for way, read in FORMATS[name].read(place).items():
                checks[way] = largest_difference(read(sample.pixels), expected)
                _must_agree(way, checks[way])
        if (folder / "transformers" / "preprocessor_config.json").is_file():
            way = "transformers, image processor"
            checks[way] = _processor_difference(folder / "transformers", sample)
            _must_agree(way, checks[way])
        for library, place in {"timm": folder, "transformers": folder / "transformers"}.items():
            if place.is_dir():
                card = model_card(
                    config.out.name, folder, config.backbone, vit, origin, formats, checks, sample.words, TOLERANCE,
                    config.license, classes, library,
                )  # fmt: skip
                (place / "README.md").write_text(card, encoding="utf-8")
    for way, difference in checks.items():
        log.info("%-40s largest relative difference %.1e", way, difference)
    log.info("exported to %s, checked on %s", config.out, sample.words.partition(",")[0])
    return config.out


class _Sample(NamedTuple):
    """Images to check with: uint8 views, the same normalised, and where they are from, in words."""

    views: "Tensor"
    pixels: "Tensor"
    words: str


def _backbone(config: ExportConfig) -> "VisionTransformer":
    import tempfile

    from mapet.models.backbone import load_backbone, save_backbone
    from mapet.training.build import load_run

    wanted = {"img_size": config.image_size, "patch_size": config.patch_size, "in_chans": config.channels}
    options = {key: value for key, value in wanted.items() if value is not None} | config.model_args
    run = Path(config.backbone)
    inner = pretrain_folder(run)
    if command_of(inner) == "pretrain" and not (inner / "backbone").is_dir():
        with tempfile.TemporaryDirectory() as folder:
            save_backbone(load_run(run).model.vit, Path(folder) / "vit")
            try:
                return load_backbone(Path(folder) / "vit", **options).eval()
            except MapetError as error:
                raise MapetError(str(error).replace(str(Path(folder) / "vit"), config.backbone)) from None
    return load_backbone(config.backbone, **options).eval()


def _sample(config: ExportConfig, vit: "VisionTransformer") -> _Sample:
    """A few images as the ViT is to see them; random ones, the same each time, where none can be read."""
    import numpy as np
    import torch

    from mapet.data.dataset import ViewDataset
    from mapet.data.sources import scan
    from mapet.data.views import ViewSpec
    from mapet.evaluation.features import normalize

    size = tuple(vit.patch_embed.img_size)
    folder = config.images or _images_of_run(config.backbone)
    views = None
    why = f"none of {folder} could be read" if folder else "nothing beside the backbone says what images it has seen"
    words = f"{COUNT} generated images, for {why}; give some with --images"
    if folder is not None:
        try:
            images = scan(folder)
            wanted = np.unique(np.linspace(0, len(images) - 1, COUNT).round().astype(int))
            dataset = ViewDataset(images, ViewSpec(image_size=size), vit.in_chans, image_size=size)
            batch = dataset.batch([(0, int(index)) for index in wanted])
            views, words = batch.images, f"{len(batch)} images of {Path(folder).name}"
        except (MapetError, OSError):
            if config.images is not None:
                raise
    if views is None:
        if config.images is not None:
            raise MapetError(
                f"none of the images of {config.images} that were tried can be read: give others with --images"
            )
        log.warning("checking on %s", words)
        shape = (COUNT, vit.in_chans, *size)
        views = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return _Sample(views, normalize(views, vit.in_chans), words)


def _images_of_run(source: str) -> str | None:
    """The images that a run was trained on, pre-training or fine-tuning."""
    folders = (pretrain_folder(Path(source)), Path(source).parent)
    states = (state for folder in folders if (state := read_or_none(folder)))
    return next((state.config.get("images") for state in states), None)


def largest_difference(given: dict[str, "Tensor"], expected: dict[str, "Tensor"]) -> float:
    """Of all outputs, each as a share of its own root mean square; infinite if one is missing or of another shape."""
    if any(name not in given or given[name].shape != value.shape for name, value in expected.items()):
        return float("inf")
    shares = [float((given[name] - value).abs().max() / value.pow(2).mean().sqrt()) for name, value in expected.items()]
    return max(shares)


def _must_agree(way: str, difference: float) -> None:
    if not difference <= TOLERANCE:  # also where it is not a number
        raise MapetError(
            f"the export is not the backbone: loaded by {way} it differs by {difference:.1e} of the outputs' size, more than "
            f"{TOLERANCE:.0e}; nothing was written. Leave out that --format"
        )


def _processor_difference(folder: Path, sample: _Sample) -> float:
    """Views of the right size, as pictures, must come out of the image processor as we normalise them."""
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder)
    pictures = [Image.fromarray(view.movedim(0, -1).squeeze(-1).numpy()) for view in sample.views]
    pixels = torch.as_tensor(processor(pictures, return_tensors="pt")["pixel_values"])
    return largest_difference({"pixels": pixels}, {"pixels": sample.pixels})
