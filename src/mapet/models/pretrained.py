"""Pre-trained ViTs by what a user names: a run, a model folder of timm or Hugging Face, a weights file, timm:NAME."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer

from mapet.errors import MapetError, by, did_you_mean, option, shell_command
from mapet.files import read_json
from mapet.models.checkpoint_conversion import NUM_HEADS, PretrainedViT, from_state_dict
from mapet.run_state import find_config
from mapet.weights import read_weights

log = logging.getLogger("mapet")

PLAIN_HINT = "choose one of timm's vit_* or deit_* models"
WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")
HUB_PREFIXES = ("timm:", "hf-hub:", "hf_hub:")
"""How names of what timm loads begin."""
SOURCES = "a run, a folder of timm or Hugging Face, a weights file, or timm:NAME"
HUGGING_FACE_TYPES = ("vit", "vit_mae", "vit_msn", "dinov2", "dinov2_with_registers", "ijepa", "beit")


def resolve_backbone(
    source: str | Path, pretrained: bool = True, overrides: Mapping[str, Any] | None = None
) -> PretrainedViT:
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
        return _from_file(path, overrides or {})
    folder = find_backbone(path)
    config = read_json(folder / "config.json", "model folder")
    weights = read_weights(next(folder / name for name in WEIGHTS_FILES if (folder / name).is_file()))
    if "model_type" in config:
        return _from_hugging_face(weights, folder, config)
    return _from_timm_folder(weights, folder)


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


def _list_vits() -> list[str]:
    """List timm's ViTs, by architecture and by weights."""
    return [*timm.list_models(["vit_*", "deit*"]), *timm.list_models(["vit_*", "deit*"], pretrained=True)]


def timm_model(name: str, pretrained: bool) -> torch.nn.Module:
    """Create any model of timm's by its name, 'timm:' before it or not, without a classifier.

    Raises:
        MapetError: there is none, or its weights can't be had.
    """
    name = name.removeprefix("timm:")
    if not name.startswith(("hf-hub:", "hf_hub:")):
        check_model_name(name, [*timm.list_models(), *_list_vits()])
    if pretrained:
        log.info("weights of %s: from this machine's cache, else from the Hub", name)
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0)
    except Exception as error:  # hub, network and file errors of many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300].rstrip(".")
        raise MapetError(
            f"cannot load timm's weights of '{name}': {reason}. Without a network, give a file or folder that holds them"
        ) from None


def _from_timm(
    name: str, vit: torch.nn.Module, weights: dict[str, torch.Tensor], model_args: dict[str, Any]
) -> PretrainedViT:
    """Describe weights of timm's.

    Args:
        name: for timm's `create_model`.
        vit: what timm makes of the name and `model_args`, of which nothing but sizes and its config are read.
    """
    config = getattr(vit, "pretrained_cfg", {})
    mean_std = tuple(config.get("mean", ())), tuple(config.get("std", ()))
    if isinstance(vit, Beit):  # a plain ViT but for relative positions
        size = tuple(config["input_size"][1:])
        return from_state_dict(weights, name, {"img_size": size})._replace(mean_std=mean_std)
    if not isinstance(vit, VisionTransformer):
        raise MapetError(f"'{name}' is a {type(vit).__name__}, not a plain VisionTransformer; {PLAIN_HINT}")
    known = mean_std if len(mean_std[0]) == vit.in_chans else None
    return PretrainedViT(weights, name, model_args, tuple(vit.patch_embed.grid_size), known)


def _from_timm_folder(weights: dict[str, torch.Tensor], folder: Path) -> PretrainedViT:
    name = f"local-dir:{folder}"
    try:
        with torch.device("meta"):
            vit = timm.create_model(name, pretrained=False)
    except Exception as error:
        raise MapetError(
            f"cannot load the backbone {folder}: its config.json is not timm's of a ViT ({error})"
        ) from None
    return _from_timm(name, vit, weights, {})


def _from_hugging_face(weights: dict[str, torch.Tensor], folder: Path, config: dict[str, Any]) -> PretrainedViT:
    if config["model_type"] not in HUGGING_FACE_TYPES:
        raise MapetError(
            f"{folder} is a '{config['model_type']}' of transformers; ViT, ViTMAE, DINOv2 and BEiT are known"
        )
    size = config.get("image_size", 224)
    known = {
        "num_heads": config["num_attention_heads"],
        "img_size": (size, size) if isinstance(size, int) else tuple(size),
    }
    vit = from_state_dict(weights, folder, known)._replace(eps=float(config.get("layer_norm_eps", 1e-12)))
    if config.get("hidden_act", "gelu") != "gelu":
        vit = vit._replace(unsupported=(*vit.unsupported, f"activation '{config['hidden_act']}'"))
    processor = folder / "preprocessor_config.json"
    pixels = read_json(processor, "model folder") if processor.is_file() else {}
    channels = config.get("num_channels", 3)
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
        path, args["embed_dim"], args["depth"], args["num_heads"], by(args["img_size"]), args["patch_size"],
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
    raise MapetError(_explain_missing(path))


def _explain_missing(path: Path) -> str:
    """Say why there is no model folder at `path`, and how to get one."""
    if not path.exists():
        hint = _suggest_model(path.name, _list_vits(), "timm:") if path.name == str(path) else ""
        return f"{path} does not exist: expected {SOURCES}{hint}"
    begun = any((folder / "checkpoints").is_dir() for folder in (path, path / "pretrain"))
    if begun and (found := find_config(path, ("run", "pretrain", "finetune"))):
        name, config = found
        export = f"take its newest checkpoint: {shell_command('export', '--backbone', path, '--out', 'NEW')}"
        bundles = sorted(config.parent.glob("debug/step-*")) or sorted(path.glob("pretrain/debug/step-*"))
        if bundles:
            return (
                f"{path} holds no backbone: the run stopped, for its numbers were not finite. See why with: "
                f"{shell_command('debug-step', bundles[0])}. Start again with a lower {option('lr')}, or {export}, if that is from before"
            )
        resume = shell_command(name, config, "--resume")
        return (
            f"{path} holds no backbone: the run is not finished. Go on with: {resume}"
            f"{f'; or {export}' if name != 'finetune' else ''}"
        )
    if seeds := sorted(path.glob("seed-*/model")):
        return f"{path} holds a model of each seed: give one of them, e.g. {seeds[0].parent}"
    return f"{path} holds no backbone: expected {SOURCES}; a folder has config.json and model.safetensors, or is a finished run"
