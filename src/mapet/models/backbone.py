"""Plain timm ViTs: made by name, saved as timm's own model folders, loaded from what a user names (`resolve_backbone`)."""

import inspect
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from timm.models import save_for_hf
from timm.models.beit import Beit
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor

from mapet.data.views import input_mean_std
from mapet.device import ComputeContext
from mapet.errors import MapetError, check_divisible, did_you_mean, format_size, option, shell_command
from mapet.files import atomic_write, read_json, translate_write_errors
from mapet.models.checkpoint_conversion import NUM_HEADS, PretrainedViT, adapt_state_dict, from_state_dict
from mapet.run_state import find_config
from mapet.weights import first_names, read_weights

log = logging.getLogger("mapet")

PLAIN_HINT = "choose one of timm's vit_* or deit_* models"
WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")
VITS = ["vit_*", "deit*"]
HUB_PREFIXES = ("timm:", "hf-hub:", "hf_hub:")
"""How names of what timm loads begin."""
SOURCES = "a run, a folder of timm or Hugging Face, a weights file, or timm:NAME"
HUGGING_FACE_TYPES = ("vit", "vit_mae", "vit_msn", "dinov2", "dinov2_with_registers", "ijepa", "beit")
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
    model: str, image_size: tuple[int, int], patch_size: int | None = None, channels: int = 3,
    model_args: dict[str, Any] | None = None, drop_path: float = 0.0,
) -> VisionTransformer:  # fmt: skip
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
    check_model_name(model, timm.list_models(VITS))
    args = dict(model_args or {})
    if unknown := [key for key in args if key not in KEYWORDS]:
        raise MapetError(f"unknown model argument '{unknown[0]}'{_suggest_keyword(unknown[0])}")
    if patch_size is not None:
        check_divisible(image_size, patch_size)
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
    check_divisible(image_size, vit.patch_embed.patch_size[0])
    return vit


def _suggest_keyword(key: str) -> str:
    return did_you_mean(KEYWORD_ALIASES.get(key, key), KEYWORDS)


def prepare_for_device(model: Model, compute: ComputeContext) -> Model:
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
    with atomic_write(folder) as temporary, translate_write_errors(folder):
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
    check_divisible(vit.patch_embed.img_size, vit.patch_embed.patch_size[0])
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


# ---- pre-trained ViTs by what a user names


def resolve_backbone(source: str | Path, pretrained: bool, overrides: Mapping[str, Any]) -> PretrainedViT:
    """Find and read the weights and sizes of a pre-trained ViT.

    Args:
        source: see `load_backbone`.
        pretrained: whether weights of timm's are fetched.
        overrides: timm keywords given beside it; a file is asked only for what it and they don't tell.

    Raises:
        MapetError: there is nothing of the kind.
    """
    name = str(source)
    if name.startswith(HUB_PREFIXES):
        vit = timm_model(name, pretrained)
        return _from_timm(name.removeprefix("timm:"), vit, vit.state_dict(), {"num_classes": 0})
    path = Path(name.removeprefix("local-dir:"))
    if path.is_file():
        return _from_file(path, overrides)
    folder = find_backbone(path)
    config = read_json(folder / "config.json", "model folder")
    weights = read_weights(next(folder / name for name in WEIGHTS_FILES if (folder / name).is_file()))
    if "model_type" in config:
        return _from_hugging_face(weights, folder, config)
    try:
        with torch.device("meta"):
            vit = timm.create_model(f"local-dir:{folder}", pretrained=False)
    except Exception as error:
        reason = f"its config.json is not timm's of a ViT ({error})"
        raise MapetError(f"cannot load the backbone {folder}: {reason}") from None
    return _from_timm(f"local-dir:{folder}", vit, weights, {})


def check_model_name(name: str, suggested: list[str]) -> None:
    """Check that timm knows an architecture, or a tag of one.

    Raises:
        MapetError: unknown; it names a similar one of `suggested`.
    """
    if name.split(".")[0] not in timm.list_models():
        hint = _suggest_model(name, suggested) or "."
        raise MapetError(f"unknown model '{name}'{hint} `timm.list_models('vit_*')` lists them")


def _suggest_model(name: str, known: list[str], prefix: str = "") -> str:
    """Suggest a similar model name, for a size alone ('vit_tiny') the usual one; `prefix` is what names are given with."""
    usual = [candidate for candidate in (name, f"{name}_patch16_224") if candidate in known][:1]
    return did_you_mean(name, [prefix + candidate for candidate in usual or dict.fromkeys(known)])


def timm_model(name: str, pretrained: bool) -> torch.nn.Module:
    """Create any model of timm's by its name, 'timm:' before it or not, without a classifier.

    Raises:
        MapetError: there is none, or its weights can't be had.
    """
    name = name.removeprefix("timm:")
    if not name.startswith(("hf-hub:", "hf_hub:")):
        check_model_name(name, [*timm.list_models(), *timm.list_models(VITS, pretrained=True)])
    if pretrained:
        log.info("weights of %s: from this machine's cache, else from the Hub", name)
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0)
    except Exception as error:  # hub, network and file errors of many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300].rstrip(".")
        raise MapetError(
            f"cannot load timm's weights of '{name}': {reason}. Without a network, give a file or folder that holds them"
        ) from None


def _from_timm(name: str, vit: torch.nn.Module, weights: dict[str, Tensor], args: dict[str, Any]) -> PretrainedViT:
    """Describe weights of timm's.

    Args:
        name: for timm's `create_model`.
        vit: what timm makes of the name and `args`, of which nothing but sizes and its config are read.
    """
    config = getattr(vit, "pretrained_cfg", {})
    mean_std = tuple(config.get("mean", ())), tuple(config.get("std", ()))
    if isinstance(vit, Beit):  # a plain ViT but for relative positions
        size = tuple(config["input_size"][1:])
        return from_state_dict(weights, name, {"img_size": size})._replace(mean_std=mean_std)
    if not isinstance(vit, VisionTransformer):
        raise MapetError(f"'{name}' is a {type(vit).__name__}, not a plain VisionTransformer; {PLAIN_HINT}")
    known = mean_std if len(mean_std[0]) == vit.in_chans else None
    return PretrainedViT(weights, name, args, tuple(vit.patch_embed.grid_size), known)


def _from_hugging_face(weights: dict[str, Tensor], folder: Path, config: dict[str, Any]) -> PretrainedViT:
    if config["model_type"] not in HUGGING_FACE_TYPES:
        found = f"a '{config['model_type']}' of transformers"
        raise MapetError(f"{folder} is {found}; ViT, ViTMAE, DINOv2 and BEiT are known")
    size = config.get("image_size", 224)
    size = (size, size) if isinstance(size, int) else tuple(size)
    known = {"num_heads": config["num_attention_heads"], "img_size": size}
    vit = from_state_dict(weights, folder, known)._replace(eps=float(config.get("layer_norm_eps", 1e-12)))
    if config.get("hidden_act", "gelu") != "gelu":
        vit = vit._replace(unsupported=(*vit.unsupported, f"activation '{config['hidden_act']}'"))
    processor, channels = folder / "preprocessor_config.json", config.get("num_channels", 3)
    pixels = read_json(processor, "model folder") if processor.is_file() else {}
    if not pixels.get("do_normalize", True):
        return vit._replace(mean_std=((0.0,) * channels, (1.0,) * channels))
    if "image_mean" in pixels:
        return vit._replace(mean_std=(tuple(pixels["image_mean"]), tuple(pixels["image_std"])))
    log.info("%s doesn't say how its input is normalized: taken to be as ours", folder)
    return vit


def _from_file(path: Path, overrides: Mapping[str, Any]) -> PretrainedViT:
    size = overrides.get("img_size")
    vit = from_state_dict(read_weights(path), path, img_size=(size, size) if isinstance(size, int) else size)
    args = vit.model_args
    args["num_heads"] = overrides.get("num_heads", args["num_heads"])
    if args["num_heads"] is None:
        raise MapetError(
            f"{path}: weights of width {args['embed_dim']} don't tell how many attention heads there are (known widths: "
            f"{', '.join(map(str, NUM_HEADS))}): give it to `mapet export` as {option('model_args')} num_heads=N and use "
            "what that writes, in Python load_backbone(..., num_heads=N)"
        )
    log.info(
        "%s: a ViT of width %d, depth %d, %d heads, %s px in patches of %d; its input is taken to be normalized as ours",
        path, args["embed_dim"], args["depth"], args["num_heads"], format_size(args["img_size"]), args["patch_size"],
    )  # fmt: skip
    return vit


def find_backbone(path: Path) -> Path:
    """Find the model folder at `path`: itself, or the one in a (pre-training, fine-tuning or whole) run.

    Raises:
        MapetError: there is none; it says why, and how to get one.
    """
    for folder in (path, path / "backbone", path / "pretrain" / "backbone", path / "model"):
        if (folder / "config.json").is_file() and any((folder / name).is_file() for name in WEIGHTS_FILES):
            return folder
    if not path.exists():
        known = [*timm.list_models(VITS), *timm.list_models(VITS, pretrained=True)]
        hint = _suggest_model(path.name, known, "timm:") if path.name == str(path) else ""
        raise MapetError(f"{path} does not exist: expected {SOURCES}{hint}")
    begun = any((folder / "checkpoints").is_dir() for folder in (path, path / "pretrain"))
    if begun and (found := find_config(path, ("run", "pretrain", "finetune"))):
        name, config = found
        export = f"take its newest checkpoint: {shell_command('export', '--backbone', path, '--out', 'NEW')}"
        bundles = sorted(config.parent.glob("debug/step-*")) or sorted(path.glob("pretrain/debug/step-*"))
        if bundles:
            reason = (
                f"the run stopped, for its numbers were not finite. See why with: {shell_command('debug-step', bundles[0])}. "
                f"Start again with a lower {option('lr')}, or {export}, if that is from before"
            )
        else:
            others = f"; or {export}" if name != "finetune" else ""
            reason = f"the run is not finished. Resume with: {shell_command(name, config, '--resume')}{others}"
        raise MapetError(f"{path} holds no backbone: {reason}")
    if seeds := sorted(path.glob("seed-*/model")):
        raise MapetError(f"{path} holds a model of each seed: give one of them, e.g. {seeds[0].parent}")
    raise MapetError(
        f"{path} holds no backbone: expected {SOURCES}; a folder has config.json and model.safetensors, or is a finished run"
    )
