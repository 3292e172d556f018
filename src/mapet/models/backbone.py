"""Plain timm ViTs: made by name, saved as timm's own model folders, loaded from anything that `pretrained` resolves."""

import inspect
import json
import logging
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from timm.models import save_for_hf
from timm.models.vision_transformer import Attention, Block, VisionTransformer

from mapet.device import Compute
from mapet.errors import MapetError, did_you_mean, must_be_divisible
from mapet.files import atomic, naming_the_cause
from mapet.models.adapt import adapt_state_dict, input_mean_std
from mapet.models.checkpoint_conversion import PretrainedViT
from mapet.models.pretrained import PLAIN_HINT, check_model_name, resolve_backbone
from mapet.weights import first_names

log = logging.getLogger("mapet")

Model = TypeVar("Model", bound=torch.nn.Module)
DROPPED_CFG_KEYS = ("tag", "license", "description", "origin_url", "paper_name", "paper_ids", "notes")
"""What timm's config says of the published weights of the same architecture, and not of ours."""
KEYWORD_ALIASES = {
    "width": "embed_dim", "dim": "embed_dim", "hidden_size": "embed_dim", "layers": "depth", "num_layers": "depth", "heads": "num_heads",
}  # fmt: skip
"""What others call timm's keywords."""
KEYWORDS = frozenset(inspect.signature(VisionTransformer.__init__).parameters) - {"self", "args", "kwargs"}
"""What timm's ViT takes."""


def create_vit(
    model: str,
    image_size: tuple[int, int],
    patch_size: int | None = None,
    channels: int = 3,
    model_args: dict[str, Any] | None = None,
    drop_path: float = 0.0,
) -> VisionTransformer:
    """Create an untrained timm VisionTransformer without a classifier.

    Args:
        model: a name of timm's, e.g. 'vit_tiny_patch16_224'.
        image_size: (H, W) pixels.
        patch_size: pixels; None keeps the model's own.
        channels: input channels.
        model_args: further keywords of the ViT, e.g. {'embed_dim': 128, 'depth': 6, 'num_heads': 4}.
        drop_path: stochastic depth of the last block, rising linearly from 0.

    Raises:
        MapetError: unknown model or keyword, not a plain ViT, or an image size the patch doesn't divide.
    """
    check_model_name(model, timm.list_models(["vit_*", "deit*"]))
    args = dict(model_args or {})
    if unknown := [key for key in args if key not in KEYWORDS]:
        raise MapetError(f"unknown model argument '{unknown[0]}'{_suggest_keyword(unknown[0])}")
    if patch_size is not None:
        must_be_divisible(image_size, patch_size)
        args["patch_size"] = patch_size
    if args.get("class_token") is False:
        # Mean pooling; `fc_norm=False` keeps the final norm where pre-training learns it.
        args = {"global_pool": "avg", "fc_norm": False} | args
    try:
        vit = timm.create_model(
            model, img_size=image_size, in_chans=channels, num_classes=0, drop_path_rate=drop_path, **args
        )
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        if not model.startswith(("vit_", "deit")):
            raise MapetError(f"timm makes no VisionTransformer of '{model}'; {PLAIN_HINT}") from None
        raise MapetError(f"timm cannot make a VisionTransformer of '{model}' with {args}: {error}") from None
    if not isinstance(vit, VisionTransformer):
        raise MapetError(f"'{model}' is a {type(vit).__name__}, not a plain VisionTransformer; {PLAIN_HINT}")
    if not all(type(block) is Block and type(block.attn) is Attention for block in vit.blocks):
        raise MapetError(f"the blocks of '{model}' are not plain pre-norm attention and MLP; {PLAIN_HINT}")
    must_be_divisible(image_size, vit.patch_embed.patch_size[0])
    return vit


def _suggest_keyword(key: str) -> str:
    return did_you_mean(KEYWORD_ALIASES.get(key, key), KEYWORDS)


def prepare_for_device(model: Model, compute: Compute) -> Model:
    """Move a ViT, or a model that holds one, to its device, with the attention that is fastest there.

    On CPUs PyTorch's fused attention is up to 3x slower in bfloat16, for the short sequences here, than plain
    matmul-softmax-matmul.
    """
    if compute.device.type == "cpu" and compute.dtype == torch.bfloat16:
        for module in model.modules():
            if isinstance(module, Attention):
                module.fused_attn = False
    return model.to(compute.device)


def save_backbone(vit: VisionTransformer, folder: Path) -> None:
    """Save as a timm model folder (config.json + model.safetensors), atomically.

    `timm.create_model('local-dir:FOLDER', pretrained=True)` loads it, as does `load_backbone`.
    """
    data = _data_config(vit)
    with atomic(folder) as temporary, naming_the_cause(folder):
        save_for_hf(vit, str(temporary), model_args={"drop_path_rate": 0.0}, data_config=data, safe_serialization=True)
        config = json.loads((temporary / "config.json").read_text())
        for key in DROPPED_CFG_KEYS:
            config["pretrained_cfg"].pop(key, None)
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _data_config(vit: VisionTransformer) -> dict[str, Any]:
    """Return timm's data config with which its transforms prepare images as mapet does."""
    mean, std = input_mean_std(vit.in_chans)
    size = (vit.in_chans, *vit.patch_embed.img_size)
    return {"input_size": size, "mean": mean, "std": std, "interpolation": "bicubic", "crop_pct": 1.0}


def load_backbone(source: str | Path, pretrained: bool = True, **overrides: Any) -> VisionTransformer:
    """Load a pre-trained ViT as a plain timm model, in training mode as timm makes it: `.eval()` for features.

    It takes images (B, C, H, W) of its own size, normalized by ImageNet's statistics (RGB) or 0.5 and 0.25, as
    `timm.data.create_transform(**timm.data.resolve_model_data_config(vit))` makes them of PIL images.

    Args:
        source: a run folder, its `backbone` folder or an export; a timm or Hugging Face model folder ('local-dir:' before it
            changes nothing); a weights file in a layout that `checkpoint_conversion` knows (released MaPeT, timm, MAE, DINO,
            DINOv2, BEiT); 'timm:NAME' for timm's own weights. Classifiers come with runs and timm folders alone.
        pretrained: False gives the same architecture with random weights.
        overrides: timm keywords, e.g. `num_classes=10, drop_path_rate=0.1, img_size=256, in_chans=1`: positions, patches and
            channels are adapted, and a classifier that is asked for is a fresh one. For a file also what it doesn't tell, e.g.
            `num_heads=6`.

    Raises:
        MapetError: nothing of the kind, weights that don't fit, or that a plain ViT can't compute with.
    """
    checkpoint = resolve_backbone(source, pretrained, overrides)
    if pretrained and checkpoint.unsupported:
        raise MapetError(
            f"{source} has {' and '.join(checkpoint.unsupported)}, which a plain ViT has not: without it the features would be "
            "others. `mapet pretrain --init-from` can start from the rest of it"
        )
    args = checkpoint.model_args | {key: tuple(v) if isinstance(v, list) else v for key, v in overrides.items()}
    try:
        vit = timm.create_model(checkpoint.model, pretrained=False, **args)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AssertionError) as error:
        hints = (_suggest_keyword(key) for key in overrides if key not in KEYWORDS and key in str(error))
        raise MapetError(f"cannot load the backbone {source}: {str(error).splitlines()[0]}{next(hints, '')}") from None
    if not isinstance(vit, VisionTransformer):
        raise MapetError(f"{source} holds a {type(vit).__name__}, not a VisionTransformer")
    must_be_divisible(vit.patch_embed.img_size, vit.patch_embed.patch_size[0])
    for module in vit.modules():
        if isinstance(module, torch.nn.LayerNorm) and checkpoint.eps is not None:
            module.eps = checkpoint.eps
    # Of what the weights take now, not of the source: see `adapt_state_dict`.
    vit.pretrained_cfg = vit.default_cfg = vit.pretrained_cfg | _data_config(vit)
    if pretrained:
        if "num_classes" in overrides:  # also where the source's has as many classes: they are others
            kept = {name: t for name, t in checkpoint.state_dict.items() if not name.startswith("head.")}
            checkpoint = checkpoint._replace(state_dict=kept)
        _load_adapted(vit, checkpoint, source)
    return vit


def init_from(vit: VisionTransformer, source: str | Path) -> None:
    """Give a ViT the weights of `source` (see `load_backbone`) as far as they fit; a log line says what was changed.

    Raises:
        MapetError: another network: width, depth, heads or activation differ.
    """
    first = vit.blocks[0]
    checkpoint = resolve_backbone(source, True, {"num_heads": first.attn.num_heads})
    with torch.device("meta"):
        there = timm.create_model(checkpoint.model, pretrained=False, **checkpoint.model_args).blocks[0]
    for what, value, wanted in (
        ("attention heads", there.attn.num_heads, first.attn.num_heads),
        ("the activation", type(there.mlp.act).__name__, type(first.mlp.act).__name__),
    ):
        if value != wanted:
            raise MapetError(f"the weights of {source} don't fit this ViT: {what}: {value} there, {wanted} here")
    if checkpoint.unsupported:
        parts = " and ".join(checkpoint.unsupported)
        log.warning("%s has %s, which a plain ViT has not: it starts without, so with another function", source, parts)
    _load_adapted(vit, checkpoint, source)
    if checkpoint.eps not in (None, vit.norm.eps):
        log.info("weights of %s: the norms' eps is %g here, %g there", source, vit.norm.eps, checkpoint.eps)


def _load_adapted(vit: VisionTransformer, checkpoint: PretrainedViT, source: str | Path) -> None:
    """Load the weights, adapted to the ViT, and log what that changed."""
    weights, notes = adapt_state_dict(checkpoint, vit, source)
    vit.load_state_dict(weights)
    if checkpoint.unexpected_keys:
        kinds = dict.fromkeys(name.split(".")[0] for name in checkpoint.unexpected_keys)
        notes.append(f"left out, being no part of the encoder: {first_names(list(kinds))}")
    if notes:
        log.info("weights of %s: %s", source, "; ".join(notes))


def num_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def format_num_params(module: torch.nn.Module) -> str:
    """'5.5 M parameters', of small ones '8,320 parameters'."""
    number = num_parameters(module)
    return f"{f'{number / 1e6:.1f} M' if number >= 50_000 else f'{number:,}'} parameters"
