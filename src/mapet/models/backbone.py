"""Plain timm ViTs: made by name, saved as timm's own model folders, loaded from whatever a person names."""

import inspect
import json
import logging
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from timm.models import save_for_hf
from timm.models.beit import Beit
from timm.models.vision_transformer import Attention, Block, VisionTransformer

from mapet.device import Compute
from mapet.errors import MapetError, by, did_you_mean, must_be_divisible, shell_command
from mapet.files import atomic, naming_the_cause, read_json
from mapet.models.adapt import adapted, input_mean_std
from mapet.models.checkpoint_conversion import HEADS, Published, from_weights, shortly
from mapet.runs import recipe_in
from mapet.weights import read_weights

log = logging.getLogger("mapet")

PLAIN = "choose one of timm's vit_* or deit_* models"
M = TypeVar("M", bound=torch.nn.Module)
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
DROPPED_CFG_KEYS = ("tag", "license", "description", "origin_url", "paper_name", "paper_ids", "notes")
"""What timm's config says of the published weights of the same architecture, and not of ours."""
HUB_PREFIXES = ("timm:", "hf-hub:", "hf_hub:")
"""How names of what timm loads begin."""
KEYWORD_ALIASES = {
    "width": "embed_dim", "dim": "embed_dim", "hidden_size": "embed_dim", "layers": "depth", "num_layers": "depth", "heads": "num_heads",
}  # fmt: skip
"""What others call timm's keywords."""
KEYWORDS = frozenset(inspect.signature(VisionTransformer.__init__).parameters) - {"self", "args", "kwargs"}
"""What timm's ViT takes."""
SOURCES = "a run, a folder of timm or Hugging Face, a weights file, or timm:NAME"


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
        raise MapetError(
            f"unknown model '{model}'{_similar(model, timm.list_models(['vit_*', 'deit*'])) or '.'} `timm.list_models('vit_*')` lists them"
        )
    extra = dict(model_args or {})
    for key in extra:
        if key not in KEYWORDS:
            raise MapetError(f"unknown model argument '{key}'{_similar_keyword(key)}")
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
        if not model.startswith(("vit_", "deit")):
            raise MapetError(f"timm makes no VisionTransformer of '{model}'; {PLAIN}") from None
        raise MapetError(f"timm cannot make a VisionTransformer of '{model}' with {extra}: {error}") from None
    if not isinstance(vit, VisionTransformer):
        raise MapetError(f"'{model}' is a {type(vit).__name__}, not a plain VisionTransformer; {PLAIN}")
    if not all(type(block) is Block and type(block.attn) is Attention for block in vit.blocks):
        raise MapetError(f"the blocks of '{model}' are not plain pre-norm attention and MLP; {PLAIN}")
    return vit


def _similar_keyword(key: str) -> str:
    return did_you_mean(KEYWORD_ALIASES.get(key, key), KEYWORDS)


def _vits() -> list[str]:
    """timm's, by architecture and by weights."""
    return [*timm.list_models(["vit_*", "deit*"]), *timm.list_models(["vit_*", "deit*"], pretrained=True)]


def _similar(word: str, names: list[str], prefix: str = "") -> str:
    """`did_you_mean` of model names; of a size alone the usual one. `prefix` is what they are given with."""
    usual = [name for name in (word, f"{word}_patch16_224") if name in names][:1]
    return did_you_mean(word, [prefix + name for name in usual or dict.fromkeys(names)])


def _own_patch_size(model: str) -> int | None:
    digits = model.partition("_patch")[2].split("_")[0].split(".")[0]
    return int(digits) if digits.isdigit() else None


def _check_size(image_size: tuple[int, int], patch: int | None) -> None:
    if patch is not None and patch < 1:
        raise MapetError(f"patch size {patch}: must be at least 1 pixel")
    if patch is not None:
        must_be_divisible(image_size, patch)


def prepare_for_device(model: M, compute: Compute) -> M:
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
    data = _data_config(vit)
    with atomic(folder) as temporary, naming_the_cause(folder):
        save_for_hf(vit, str(temporary), model_args={"drop_path_rate": 0.0}, data_config=data, safe_serialization=True)
        config = json.loads((temporary / "config.json").read_text())
        for key in DROPPED_CFG_KEYS:
            config["pretrained_cfg"].pop(key, None)
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _data_config(vit: VisionTransformer) -> dict[str, Any]:
    """What timm's transforms are to do for images to come as mapet's own."""
    mean, std = input_mean_std(vit.in_chans)
    size = (vit.in_chans, *vit.patch_embed.img_size)
    return {"input_size": size, "mean": mean, "std": std, "interpolation": "bicubic", "crop_pct": 1.0}


def load_backbone(source: str | Path, pretrained: bool = True, **overrides: Any) -> VisionTransformer:
    """A pre-trained ViT as a plain timm model, in training mode as timm makes it: `.eval()` for features.

    It takes images (B, C, H, W) of its own size, normalised by ImageNet's statistics (RGB) or 0.5 and 0.25, as
    `timm.data.create_transform(**timm.data.resolve_model_data_config(vit))` makes them of PIL images.

    Args:
        source: a run folder, its `backbone` folder or an export; a timm or Hugging Face model folder ('local-dir:' before it
            changes nothing); a weights file in a layout that `published` knows (released MaPeT, timm, MAE, DINO, DINOv2, BEiT);
            'timm:NAME' for timm's own weights. Classifiers come with runs and timm folders alone.
        pretrained: False gives the same architecture with random weights.
        overrides: timm keywords, e.g. `num_classes=10, drop_path_rate=0.1, img_size=256, in_chans=1`: positions, patches and
            channels are adapted, and a classifier that is asked for is a fresh one. For a file also what it doesn't tell, e.g.
            `num_heads=6`.

    Raises:
        MapetError: nothing of the kind, weights that don't fit, or that a plain ViT can't compute with.
    """
    published = resolve_backbone(source, pretrained, overrides)
    if pretrained and published.lost:
        raise MapetError(
            f"{source} has {' and '.join(published.lost)}, which a plain ViT has not: without it the features would be others. "
            "`mapet pretrain --init-from` can start from the rest of it"
        )
    args = published.args | {key: tuple(v) if isinstance(v, list) else v for key, v in overrides.items()}
    try:
        vit = timm.create_model(published.model, pretrained=False, **args)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AssertionError) as error:
        hints = (_similar_keyword(key) for key in overrides if key not in KEYWORDS and key in str(error))
        raise MapetError(f"cannot load the backbone {source}: {str(error).splitlines()[0]}{next(hints, '')}") from None
    if not isinstance(vit, VisionTransformer):
        raise MapetError(f"{source} holds a {type(vit).__name__}, not a VisionTransformer")
    _check_size(vit.patch_embed.img_size, vit.patch_embed.patch_size[0])
    if published.eps is not None:
        _set_eps(vit, published.eps)
    # Of what the weights take now, not of the source: see `adapted`.
    vit.pretrained_cfg = vit.default_cfg = vit.pretrained_cfg | _data_config(vit)
    if pretrained:
        if "num_classes" in overrides:  # also where the source's has as many classes: they are others
            kept = {name: tensor for name, tensor in published.weights.items() if not name.startswith("head.")}
            published = published._replace(weights=kept)
        weights, said = adapted(published, vit, source)
        vit.load_state_dict(weights)
        _tell(source, published, said)
    return vit


def init_from(vit: VisionTransformer, source: str | Path) -> None:
    """Give a ViT the weights of `source` (see `load_backbone`) as far as they fit; a log line says what was changed.

    Raises:
        MapetError: another network: width, depth, heads or activation differ.
    """
    own = {"num_heads": vit.blocks[0].attn.num_heads}
    published = resolve_backbone(source, True, own)
    with torch.device("meta"):
        of_source = timm.create_model(published.model, pretrained=False, **published.args)
    for what, value, wanted in (
        ("attention heads", of_source.blocks[0].attn.num_heads, own["num_heads"]),
        ("the activation", type(of_source.blocks[0].mlp.act).__name__, type(vit.blocks[0].mlp.act).__name__),
    ):
        if value != wanted:
            raise MapetError(f"the weights of {source} don't fit this ViT: {what}: {value} there, {wanted} here")
    weights, said = adapted(published, vit, source)
    if published.lost:
        log.warning(
            "%s has %s, which a plain ViT has not: it starts without, so with another function",
            source,
            " and ".join(published.lost),
        )
    if published.eps not in (None, vit.norm.eps):
        said.append(f"the norms' eps is {vit.norm.eps:g} here, {published.eps:g} there")
    vit.load_state_dict(weights)
    _tell(source, published, said)


def _tell(source: str | Path, published: Published, said: list[str]) -> None:
    lines = list(said)
    if published.left_out:
        kinds = dict.fromkeys(name.split(".")[0] for name in published.left_out)
        lines.append(f"left out, being no part of the encoder: {shortly(kinds)}")
    if lines:
        log.info("weights of %s: %s", source, "; ".join(lines))


def _set_eps(vit: VisionTransformer, eps: float) -> None:
    for module in vit.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = eps


def resolve_backbone(source: str | Path, pretrained: bool = True, known: dict[str, Any] | None = None) -> Published:
    """Weights and sizes of whatever a person names.

    Args:
        known: timm keywords that are given beside it; a file is asked only for what it and they don't tell.

    Raises:
        MapetError: there is nothing of the kind.
    """
    name = str(source)
    if name.startswith(HUB_PREFIXES):
        return _from_timm(name.removeprefix("timm:"), pretrained)
    path = Path(name.removeprefix("local-dir:"))
    if path.is_file():
        return _from_file(path, known or {})
    folder = find_backbone(path)
    config = read_json(folder / "config.json", "model folder")
    if "model_type" in config:
        return _from_hugging_face(folder, config)
    return _from_timm_folder(folder, config)


def timm_model(name: str, pretrained: bool) -> torch.nn.Module:
    """Any model of timm's by its name, 'timm:' before it or not, without a classifier.

    Raises:
        MapetError: there is none, or its weights can't be had.
    """
    name, known = name.removeprefix("timm:"), timm.list_models()
    if not name.startswith(("hf-hub:", "hf_hub:")) and name.split(".")[0] not in known:
        raise MapetError(
            f"unknown model '{name}'{_similar(name, [*known, *_vits()]) or '.'} `timm.list_models('vit_*')` lists them"
        )
    if pretrained:
        log.info("weights of %s: from this machine's cache, else from the Hub", name)
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0)
    except Exception as error:  # hub, network and file errors of many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300].rstrip(".")
        raise MapetError(
            f"cannot load timm's weights of '{name}': {reason}. Without a network, give a file or folder that holds them"
        ) from None


def _from_timm(name: str, pretrained: bool) -> Published:
    vit = timm_model(name, pretrained)
    if isinstance(vit, Beit):
        return _from_beit(vit.state_dict(), name, vit.pretrained_cfg)
    if not isinstance(vit, VisionTransformer):
        raise MapetError(f"'{name}' is a {type(vit).__name__}, not a plain VisionTransformer; {PLAIN}")
    stats = (tuple(vit.pretrained_cfg["mean"]), tuple(vit.pretrained_cfg["std"]))
    return Published(vit.state_dict(), name, {"num_classes": 0}, tuple(vit.patch_embed.grid_size), stats)


def _from_beit(weights: dict[str, torch.Tensor], source: object, config: dict[str, Any]) -> Published:
    """timm's Beit, which is a plain ViT but for relative positions."""
    stats = (tuple(config["mean"]), tuple(config["std"]))
    return from_weights(weights, source, {"img_size": tuple(config["input_size"][1:])}, stats=stats)


def _from_timm_folder(folder: Path, config: dict[str, Any]) -> Published:
    weights = read_weights(_weights_file(folder))
    try:
        pretrained_cfg = config.get("pretrained_cfg", config)  # older folders have everything on one level
        if any(name.endswith("relative_position_bias_table") for name in weights):
            return _from_beit(weights, folder, pretrained_cfg)
        channels, *size = pretrained_cfg["input_size"]
        args = config.get("model_args", {})
        size, channels = args.get("img_size", size), args.get("in_chans", channels)
        height, width = (size, size) if isinstance(size, int) else size
        patch = weights["patch_embed.proj.weight"].shape[-1]
        mean, std = (tuple(pretrained_cfg[key]) for key in ("mean", "std"))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise MapetError(
            f"cannot load the backbone {folder}: its config.json is not timm's of a ViT ({error})"
        ) from None
    stats = (mean, std) if len(mean) == channels else None
    return Published(weights, f"local-dir:{folder}", {}, (height // patch, width // patch), stats)


def _from_hugging_face(folder: Path, config: dict[str, Any]) -> Published:
    if config["model_type"] not in ("vit", "vit_mae", "vit_msn", "dinov2", "dinov2_with_registers", "ijepa", "beit"):
        raise MapetError(
            f"{folder} is a '{config['model_type']}' of transformers; ViT, ViTMAE, DINOv2 and BEiT are known"
        )
    size = config.get("image_size", 224)
    known = {
        "num_heads": config["num_attention_heads"],
        "img_size": (size, size) if isinstance(size, int) else tuple(size),
    }
    lost = [f"activation '{config['hidden_act']}'"] if config.get("hidden_act", "gelu") != "gelu" else []
    stats = None
    if (folder / "preprocessor_config.json").is_file():
        pixels = read_json(folder / "preprocessor_config.json", "model folder")
        channels = config.get("num_channels", 3)
        if not pixels.get("do_normalize", True):
            stats = (0.0,) * channels, (1.0,) * channels
        elif "image_mean" in pixels:
            stats = tuple(pixels["image_mean"]), tuple(pixels["image_std"])
    if stats is None:
        log.info("%s doesn't say how its input is normalised: taken to be as ours", folder)
    eps = float(config.get("layer_norm_eps", 1e-12))
    return from_weights(read_weights(_weights_file(folder)), folder, known, stats=stats, eps=eps, lost=tuple(lost))


def _from_file(path: Path, known: dict[str, Any]) -> Published:
    size = known.get("img_size")
    published = from_weights(read_weights(path), path, img_size=(size, size) if isinstance(size, int) else size)
    args = published.args
    args["num_heads"] = known.get("num_heads", args["num_heads"])
    if args["num_heads"] is None:
        raise MapetError(
            f"{path}: weights of width {args['embed_dim']} don't tell how many attention heads there are (known widths: "
            f"{', '.join(map(str, HEADS))}): give it, --model-args num_heads=N, in Python num_heads=N"
        )
    log.info(
        "%s: a ViT of width %d, depth %d, %d heads, %s px in patches of %d; its input is taken to be normalised as ours",
        path,
        args["embed_dim"],
        args["depth"],
        args["num_heads"],
        by(args["img_size"]),
        args["patch_size"],
    )
    return published


def _weights_file(folder: Path) -> Path:
    return next(folder / name for name in WEIGHTS if (folder / name).is_file())


def find_backbone(path: Path) -> Path:
    """The model folder at `path`: itself, or the one in a (pre-training, fine-tuning or whole) run."""
    for folder in (path, path / "backbone", path / "pretrain" / "backbone", path / "model"):
        if (folder / "config.json").is_file() and any((folder / name).is_file() for name in WEIGHTS):
            return folder
    if not path.exists():
        hint = _similar(path.name, _vits(), "timm:") if path.name == str(path) else ""
        raise MapetError(f"{path} does not exist: expected {SOURCES}{hint}")
    begun = any((folder / "checkpoints").is_dir() for folder in (path, path / "pretrain"))
    if begun and (found := recipe_in(path, ("run", "pretrain", "finetune"))):
        stage, recipe = found
        export = f"take its newest checkpoint: {shell_command('export', '--backbone', path, '--out', 'NEW')}"
        bundles = sorted(recipe.parent.glob("replay/step-*")) or sorted(path.glob("pretrain/replay/step-*"))
        if bundles:
            raise MapetError(
                f"{path} holds no backbone: the run stopped, for its numbers were not finite. See why with: "
                f"{shell_command('replay', '--bundle', bundles[0])}. Start again with a lower --lr, or {export}, if that is from before"
            )
        raise MapetError(
            f"{path} holds no backbone: the run is not finished. Go on with: {shell_command(stage, recipe, '--resume')}"
            f"{f'; or {export}' if stage != 'finetune' else ''}"
        )
    if seeds := sorted(path.glob("seed-*/model")):
        raise MapetError(f"{path} holds a model of each seed: give one of them, e.g. {seeds[0].parent}")
    raise MapetError(
        f"{path} holds no backbone: expected {SOURCES}; a folder has config.json and model.safetensors, or is a finished run"
    )


def num_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def format_num_params(module: torch.nn.Module) -> str:
    """'5.5 M parameters', of small ones '8,320 parameters'."""
    number = num_parameters(module)
    return f"{f'{number / 1e6:.1f} M' if number >= 50_000 else f'{number:,}'} parameters"
