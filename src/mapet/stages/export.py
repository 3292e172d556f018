"""Stage: the backbone as a folder that timm loads."""

import logging
from pathlib import Path

from mapet.recipe import Config, stage

log = logging.getLogger("mapet")


class ExportConfig(Config):
    """Options of `export`."""

    run: Path
    """Run folder of `pretrain` or `run`, finished or not (then its newest checkpoint is taken)."""
    out: Path
    """New folder for config.json and model.safetensors."""


@stage
def export(config: ExportConfig) -> Path:
    """Export the backbone as a timm model folder (safetensors + config), reload it and compare features.

    Example:
      mapet export --run runs/photos --out backbone
      python -c "import timm; timm.create_model('local-dir:backbone', pretrained=True)"
    """
    import torch

    from mapet.errors import MapetError
    from mapet.files import new_folder
    from mapet.model.backbone import find_backbone, load_backbone, save_backbone
    from mapet.stages.pretrain import PretrainConfig
    from mapet.training.build import load_run

    try:
        vit = load_backbone(find_backbone(config.run))
    except MapetError:
        vit = load_run(config.run, PretrainConfig).model.vit
    vit.eval()
    new_folder(config.out, create=False)
    save_backbone(vit, config.out)
    images = torch.randn(2, vit.in_chans, *vit.patch_embed.img_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before, after = vit.forward_features(images), load_backbone(config.out).eval().forward_features(images)
    error = float((after - before).norm() / before.norm())
    if not error < 1e-6:
        raise MapetError(
            f"the export in {config.out} gives other features (relative difference {error:.1e}): don't use it"
        )
    log.info("exported to %s; reloaded through timm, features agree to %.0e", config.out, error)
    return config.out
