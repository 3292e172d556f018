"""Plain timm ViTs: made by name, saved and loaded as timm's own model folders."""

import inspect
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import timm
import torch
from timm.models import save_for_hf
from timm.models.vision_transformer import Attention, Block, VisionTransformer

from mapet.compute import Compute
from mapet.errors import MapetError, did_you_mean
from mapet.files import atomic, naming_the_cause

PLAIN = "choose one of timm's vit_* or deit_* models"
M = TypeVar("M", bound=torch.nn.Module)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def pixel_stats(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel in [0, 1]: ImageNet's for RGB, 0.5 and 0.25 otherwise."""
    return IMAGENET if channels == 3 else ((0.5,) * channels, (0.25,) * channels)


def create_vit(
    model: str,
    image_size: tuple[int, int],
    patch_size: int | None = None,
    channels: int = 3,
    model_args: dict[str, Any] | None = None,
    drop_path: float = 0.0,
) -> VisionTransformer:
    """An untrained timm VisionTransformer without a classifier.

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
    known = timm.list_models()
    if model.split(".")[0] not in known:
        raise MapetError(f"unknown model '{model}'{did_you_mean(model, known)} `timm.list_models('vit_*')` lists them")
    extra = dict(model_args or {})
    allowed = set(inspect.signature(VisionTransformer.__init__).parameters) - {"self", "args", "kwargs"}
    for key in extra:
        if key not in allowed:
            raise MapetError(f"unknown model argument '{key}'{did_you_mean(key, allowed)}")
    if patch_size is not None:
        extra["patch_size"] = patch_size
    if extra.get("class_token") is False:
        # Mean pooling; `fc_norm=False` keeps the final norm where pre-training learns it.
        extra = {"global_pool": "avg", "fc_norm": False} | extra
    _check_size(image_size, _own_patch_size(model) if patch_size is None else patch_size)
    try:
        vit = timm.create_model(
            model, img_size=image_size, in_chans=channels, num_classes=0, drop_path_rate=drop_path, **extra
        )
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise MapetError(f"timm cannot make a VisionTransformer of '{model}' with {extra}: {error}; {PLAIN}") from None
    if not isinstance(vit, VisionTransformer):
        raise MapetError(f"'{model}' is a {type(vit).__name__}, not a plain VisionTransformer; {PLAIN}")
    if not all(type(block) is Block and type(block.attn) is Attention for block in vit.blocks):
        raise MapetError(f"the blocks of '{model}' are not plain pre-norm attention and MLP; {PLAIN}")
    return vit


def _own_patch_size(model: str) -> int | None:
    digits = model.partition("_patch")[2].split("_")[0].split(".")[0]
    return int(digits) if digits.isdigit() else None


def _check_size(image_size: tuple[int, int], patch: int | None) -> None:
    if patch is not None and patch < 1:
        raise MapetError(f"patch size {patch}: must be at least 1 pixel")
    if patch is not None and any(side < patch or side % patch for side in image_size):
        fits = " ".join(str(max(1, round(side / patch)) * patch) for side in image_size)
        raise MapetError(
            f"image size {image_size[0]} x {image_size[1]} is not divisible by the patch size {patch}; "
            f"the nearest that is: --image-size {fits}"
        )


def on_device(model: M, compute: Compute) -> M:
    """Move a ViT, or a model that holds one, to where it runs, with the attention that is fastest there.

    On CPUs PyTorch's fused attention is up to 3x slower in bfloat16, for the short sequences here, than plain
    matmul-softmax-matmul.
    """
    plain = compute.device.type == "cpu" and compute.dtype == torch.bfloat16
    for module in model.modules():
        if plain and isinstance(module, Attention):
            module.fused_attn = False
    return model.to(compute.device)


def save_backbone(vit: VisionTransformer, folder: Path) -> None:
    """Save as a timm model folder (config.json + model.safetensors), atomically.

    `timm.create_model('local-dir:FOLDER', pretrained=True)` loads it, as does `load_backbone`.
    """
    mean, std = pixel_stats(vit.in_chans)
    size = vit.patch_embed.img_size
    data = {"input_size": (vit.in_chans, *size), "mean": mean, "std": std, "interpolation": "bicubic", "crop_pct": 1.0}
    with atomic(folder) as temporary, naming_the_cause(folder):
        save_for_hf(vit, str(temporary), model_args={"drop_path_rate": 0.0}, data_config=data, safe_serialization=True)


def load_backbone(path: str | Path, pretrained: bool = True, **overrides: Any) -> VisionTransformer:
    """The pre-trained ViT of a run or export folder, as a plain timm model without a classifier.

    Args:
        path: a run folder, its `backbone` folder, or an export.
        pretrained: False gives the same architecture with random weights.
        overrides: timm keywords, e.g. `num_classes=10, drop_path_rate=0.1, img_size=256` (positions are resampled).

    Raises:
        MapetError: not such a folder, or its weights don't fit.
    """
    folder = find_backbone(Path(path))
    try:
        vit = timm.create_model(f"local-dir:{folder}", pretrained=pretrained, **overrides)
    except (
        OSError,
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
        AssertionError,
        safetensors.SafetensorError,
    ) as error:
        raise MapetError(f"cannot load the backbone {folder}: {str(error).splitlines()[0]}") from None
    if not isinstance(vit, VisionTransformer):
        raise MapetError(f"{folder} holds a {type(vit).__name__}, not a VisionTransformer")
    return vit


def find_backbone(path: Path) -> Path:
    """The timm model folder at `path`: itself, or the backbone of a (pre-training or whole) run."""
    for folder in (path, path / "backbone", path / "pretrain" / "backbone"):
        if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
            return folder
    raise MapetError(
        f"{path} holds no backbone: expected a folder with config.json and model.safetensors, or a finished run"
    )


def num_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
