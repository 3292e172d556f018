"""Plain timm ViTs: created by name, saved as timm's model folders, loaded from what the user names (`resolve_backbone`)."""

import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from timm.models import save_for_hf
from timm.models.beit import Beit
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor

from mapet.config.shared import AS_STORED, ReadOptions
from mapet.data.views import ImageTransform, input_mean_std
from mapet.device import ComputeContext
from mapet.errors import MapetError, check_divisible, did_you_mean, first_line, format_size, option, shell_command
from mapet.files import atomic_write, read_json, translate_write_errors
from mapet.models.checkpoint_conversion import NUM_HEADS, PretrainedViT, adapt_state_dict, from_state_dict
from mapet.run_state import find_config
from mapet.weights import first_names, read_weights

log = logging.getLogger("mapet")

PLAIN_HINT = "choose one of timm's vit_* or deit_* models"
WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")
VITS = ["vit_*", "deit*"]
"""Patterns for `timm.list_models`: the architectures that messages suggest."""
HUB_PREFIXES = ("timm:", "hf-hub:", "hf_hub:")
"""Prefixes of the names of weights that timm downloads."""
SOURCES = "a run, a folder of timm or Hugging Face, a weights file, or timm:NAME"
"""What a backbone may be loaded from, for messages."""
HUGGING_FACE_TYPES = ("vit", "vit_mae", "vit_msn", "dinov2", "dinov2_with_registers", "ijepa", "beit")
"""Values of `model_type` in a config.json of transformers that can be loaded."""
Model = TypeVar("Model", bound=torch.nn.Module)
READ_OPTIONS = "read_options"
"""Key of a ViT's `pretrained_cfg`, and of the config.json beside timm's own keys: the `ReadOptions` of its training images."""
DROPPED_CFG_KEYS = (READ_OPTIONS, "tag", "license", "description", "origin_url", "paper_name", "paper_ids", "notes")
"""Entries of timm's `pretrained_cfg` about the published weights of an architecture, which aren't true of other weights."""
DEFAULT_HF_IMAGE_SIZE, DEFAULT_HF_EPS = 224, 1e-12
"""Defaults of transformers' ViTs, which their config.json may omit."""
MIN_SHOWN_IN_MILLIONS = 50_000
"""Parameters from which on a count is shown in millions: fewer would be 0.0."""
KEYWORD_ALIASES = {
    "width": "embed_dim", "dim": "embed_dim", "hidden_size": "embed_dim", "layers": "depth", "num_layers": "depth", "heads": "num_heads",
}  # fmt: skip
"""Names in other libraries -> timm's keywords."""
KEYWORDS = frozenset(inspect.signature(VisionTransformer.__init__).parameters) - {"self", "args", "kwargs"}
"""Names of the arguments of timm's VisionTransformer."""


def create_vit(
    model: str, image_size: tuple[int, int], patch_size: int | None = None, channels: int = 3,
    model_args: dict[str, Any] | None = None, drop_path: float = 0.0,
) -> VisionTransformer:  # fmt: skip
    """Create an untrained timm VisionTransformer without a classifier.

    Args:
        model: timm's name of the architecture, e.g. 'vit_tiny_patch16_224'.
        image_size: (H, W) pixels.
        patch_size: pixels; None: that of the architecture.
        channels: input channels.
        model_args: further keywords of timm's VisionTransformer, e.g. {'embed_dim': 128, 'depth': 6, 'num_heads': 4}.
        drop_path: drop-path rate of the last block; it increases linearly from 0 in the first.

    Returns:
        The ViT, with random weights.

    Raises:
        MapetError: unknown model or keyword, not a plain ViT, or an image size that the patch size doesn't divide.
    """
    check_model_name(model, timm.list_models(VITS))
    args = dict(model_args or {})
    _check_keywords(args)
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
    except (TypeError, ValueError, AssertionError, RuntimeError, IndexError, ZeroDivisionError) as error:
        hint = f": change {option('model_args')}" if model.startswith(("vit_", "deit")) else f"; {PLAIN_HINT}"
        raise MapetError(
            f"timm cannot create '{model}' as a ViT with {_format_args(args)} ({first_line(error)}){hint}"
        ) from None
    if not isinstance(vit, VisionTransformer):
        raise MapetError(f"'{model}' is a {type(vit).__name__}, not a plain VisionTransformer; {PLAIN_HINT}")
    if not len(vit.blocks):
        raise MapetError(f"{option('model_args')} depth={args.get('depth')}: give at least 1 block", field="model_args")
    if not all(type(block) is Block and type(block.attn) is Attention for block in vit.blocks):
        raise MapetError(f"the blocks of '{model}' are not plain pre-norm attention and MLP; {PLAIN_HINT}")
    check_divisible(image_size, vit.patch_embed.patch_size[0])
    return vit


def _format_args(args: Mapping[str, Any]) -> str:
    """Format keywords for a message: 'embed_dim=128 depth=6', 'default arguments' without any."""
    return " ".join(f"{key}={value}" for key, value in args.items()) or "default arguments"


def _check_keywords(args: Iterable[str]) -> None:
    """Check that timm's VisionTransformer has arguments of these names.

    Raises:
        MapetError: one is unknown; the message suggests a similar one.
    """
    for key in args:
        if key not in KEYWORDS:
            hint = did_you_mean(KEYWORD_ALIASES.get(key, key), KEYWORDS) or f". Known: {', '.join(sorted(KEYWORDS))}"
            raise MapetError(f"unknown model argument '{key}'{hint}")


def prepare_for_device(model: Model, compute: ComputeContext) -> Model:
    """Move a ViT, or a model that contains one, to a device, and choose the implementation of attention that is fastest there.

    On CPUs in bfloat16, PyTorch's fused attention is up to 3x slower than matmul-softmax-matmul for sequences of some hundred tokens.

    Args:
        model: changed in place and returned; its parameters keep their dtype.
        compute: device, and dtype of the matrix products that the model will be run with.
    """
    if compute.device.type == "cpu" and compute.dtype == torch.bfloat16:
        for module in model.modules():
            if isinstance(module, Attention):
                module.fused_attn = False
    return model.to(compute.device)


def save_backbone(
    vit: VisionTransformer, folder: Path, classes: Sequence[str] = (), temperature: float | None = None
) -> None:
    """Save a ViT as a timm model folder (config.json and model.safetensors), atomically.

    `timm.create_model('local-dir:FOLDER', pretrained=True)` loads it, as does `load`. The ViT's `pretrained_cfg`
    loses `DROPPED_CFG_KEYS`.

    Args:
        vit: with or without a classifier.
        folder: is created.
        classes: names of the classifier's classes, in the order of its logits, if they are known.
        temperature: that calibrates the classifier's probabilities (`fit_temperature`); None: they are not calibrated.
    """
    read_options = get_read_options(vit)
    vit.pretrained_cfg = {key: value for key, value in vit.pretrained_cfg.items() if key not in DROPPED_CFG_KEYS}
    config: dict[str, Any] = {"label_names": list(classes)}
    if read_options is not None:
        config[READ_OPTIONS] = read_options.model_dump(mode="json")
    if temperature is not None:
        config["temperature"] = temperature
    args = {"drop_path_rate": 0.0}  # the rate is not the backbone's, but a run's
    options = {"model_config": config, "model_args": args, "data_config": _data_config(vit)}
    with atomic_write(folder) as temporary, translate_write_errors(folder):
        save_for_hf(vit, str(temporary), safe_serialization=True, **options)
    set_read_options(vit, read_options or AS_STORED)


def read_temperature(source: str | Path) -> float | None:
    """Return the temperature that calibrates the probabilities of a fine-tuned model, see `save_backbone`; None: it has none."""
    return read_json(find_backbone(Path(source)) / "config.json", "model folder").get("temperature")


def set_read_options(vit: VisionTransformer, options: ReadOptions) -> None:
    """Keep with a ViT how its training images are read; `save_backbone` writes it, unless they are read as they are stored."""
    vit.pretrained_cfg = {name: value for name, value in vit.pretrained_cfg.items() if name != READ_OPTIONS}
    if options != AS_STORED:
        vit.pretrained_cfg[READ_OPTIONS] = options.model_dump(mode="json")


def get_read_options(model: torch.nn.Module) -> ReadOptions | None:
    """Return how a model's training images were read; None: unknown, as of models of others, or as they are stored."""
    options = getattr(model, "pretrained_cfg", {}).get(READ_OPTIONS)
    return None if options is None else ReadOptions(**options)


def _data_config(vit: VisionTransformer) -> dict[str, Any]:
    """Return the data config with which timm's transforms prepare images as mapet does."""
    mean, std = input_mean_std(vit.in_chans)
    size = (vit.in_chans, *vit.patch_embed.img_size)
    return {"input_size": size, "mean": mean, "std": std, "interpolation": "bicubic", "crop_pct": 1.0}


def load(source: str | Path, pretrained: bool = True, **overrides: Any) -> tuple[VisionTransformer, ImageTransform]:
    """Load a backbone or a fine-tuned model, and the transform that turns images into its input.

    >>> model, transform = load("runs/photos")      # doctest: +SKIP
    >>> features = model.forward_features(transform(["a.jpg", Image.open("b.png")]))      # doctest: +SKIP

    Args:
        source: a run folder, a folder of `mapet finetune`, or anything else that `load_backbone` takes.
        pretrained: False: the same architecture with random weights.
        overrides: keywords of timm's VisionTransformer, e.g. `num_classes=10, drop_path_rate=0.1, img_size=256`; see `load_backbone`.

    Returns:
        The plain timm ViT in evaluation mode, on the CPU; of a fine-tuned model `pretrained_cfg["label_names"]` are the names of its
        classes in the order of its logits. And the transform: image, path or a sequence of them -> the ViT's input.

    Raises:
        MapetError: there is no such model, or it cannot be loaded; see `load_backbone`.
    """
    vit = load_backbone(source, pretrained, **overrides).eval()
    return vit, ImageTransform(vit.patch_embed.img_size, vit.in_chans, get_read_options(vit) or AS_STORED)


def load_backbone(source: str | Path, pretrained: bool = True, **overrides: Any) -> VisionTransformer:
    """Load a pre-trained ViT as a plain timm model, in training mode as timm creates it: call `.eval()` for features.

    It takes images (B, C, H, W) of its own size, normalized by ImageNet's mean and standard deviation (RGB) or by 0.5 and
    0.25 (other channels), as `ImageTransform` makes them.

    Args:
        source: a run folder, its `backbone` folder or an export; a timm or Hugging Face model folder, with or without the
            prefix 'local-dir:'; a weights file in a layout that `checkpoint_conversion` supports (released MaPeT, timm, MAE,
            DINO, DINOv2, BEiT); 'timm:NAME' for timm's own weights. Only runs and timm folders may have a classifier.
        pretrained: False: the same architecture with random weights.
        overrides: keywords of timm's VisionTransformer, e.g. `num_classes=10, drop_path_rate=0.1, img_size=256, in_chans=1`.
            Position embeddings, patch size and channels are adapted; with `num_classes` the classifier is randomly initialized.
            For a weights file also what cannot be inferred from it, e.g. `num_heads=6`.

    Returns:
        The ViT.

    Raises:
        MapetError: an unknown keyword; no model at `source`, or one that is damaged or cannot be downloaded; weights whose number of
            attention heads must be given; an image size that is no multiple of the patch size; or, with `pretrained`, weights of
            another network, or with parts that a plain ViT doesn't support.
    """
    _check_keywords(overrides)
    checkpoint = resolve_backbone(source, pretrained, overrides)
    if pretrained and checkpoint.unsupported:
        raise MapetError(
            f"{source} has {' and '.join(checkpoint.unsupported)}, not supported by a plain ViT: without it the features would "
            "differ. `mapet pretrain --init-from` can start from the rest of it"
        )
    # Lists, as YAML has them, become the tuples that timm expects.
    args = checkpoint.model_args | {key: tuple(v) if isinstance(v, list) else v for key, v in overrides.items()}
    try:
        vit = timm.create_model(checkpoint.model, pretrained=False, **args)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AssertionError) as error:
        hint = "give other arguments, or the file that belongs to them"
        raise MapetError(
            f"cannot load the backbone {source} with {_format_args(args)} ({first_line(error)}): {hint}"
        ) from None
    assert isinstance(vit, VisionTransformer)  # `resolve_backbone` accepts nothing else
    check_divisible(vit.patch_embed.img_size, vit.patch_embed.patch_size[0])
    for module in vit.modules():
        if isinstance(module, torch.nn.LayerNorm) and checkpoint.eps is not None:
            module.eps = checkpoint.eps
    # The input that the weights take once `adapt_state_dict` has adapted them, which may not be the source's.
    vit.pretrained_cfg = vit.default_cfg = vit.pretrained_cfg | _data_config(vit)
    set_read_options(vit, ReadOptions(**(checkpoint.read_options or {})))
    if pretrained:
        if "num_classes" in overrides:  # also if the source has as many classes: they are others
            without_head = {name: t for name, t in checkpoint.state_dict.items() if not name.startswith("head.")}
            checkpoint = checkpoint._replace(state_dict=without_head)
        _load_adapted(vit, checkpoint, source)
    return vit


def init_from(vit: VisionTransformer, source: str | Path) -> None:
    """Initialize a ViT with pre-trained weights, adapted to its sizes; the log says what was changed.

    Parts of the pre-trained network that a plain ViT doesn't support are omitted, with a warning.

    Args:
        vit: changed in place.
        source: see `load_backbone`.

    Raises:
        MapetError: another network: width, depth, heads or activation differ.
    """
    first = vit.blocks[0]
    checkpoint = resolve_backbone(source, True, {"num_heads": first.attn.num_heads})
    with torch.device("meta"):
        source_first = timm.create_model(checkpoint.model, pretrained=False, **checkpoint.model_args).blocks[0]
    expected, actual = (
        f"{block.attn.num_heads} attention heads, {type(block.mlp.act).__name__}" for block in (first, source_first)
    )
    if actual != expected:
        hint = f"choose {option('model')} and {option('model_args')} as of these weights, or other weights"
        raise MapetError(f"the weights of {source} don't fit this ViT: expected {expected}, found {actual}: {hint}")
    if checkpoint.unsupported:
        parts = " and ".join(checkpoint.unsupported)
        log.warning("%s has %s, which a plain ViT lacks: training starts from the other weights alone", source, parts)
    _load_adapted(vit, checkpoint, source)
    if checkpoint.eps not in (None, vit.norm.eps):
        log.info("weights of %s: trained with norms of eps %g, here %g", source, checkpoint.eps, vit.norm.eps)


def _load_adapted(vit: VisionTransformer, checkpoint: PretrainedViT, source: str | Path) -> None:
    """Load pre-trained weights into the ViT, adapted to it, and log what that has changed.

    Args:
        vit: changed in place.
        checkpoint: what `source` contains.
        source: named by errors and the log.
    """
    weights, notes = adapt_state_dict(checkpoint, vit, source)
    vit.load_state_dict(weights)
    if checkpoint.unexpected_keys:
        modules = dict.fromkeys(name.split(".")[0] for name in checkpoint.unexpected_keys)
        notes.append(f"not loaded, as no part of the encoder: {first_names(list(modules))}")
    if notes:
        log.info("weights of %s: %s", source, "; ".join(notes))


def num_parameters(module: torch.nn.Module) -> int:
    """Return the number of scalar parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def format_num_params(module: torch.nn.Module) -> str:
    """Format the number of parameters: '5.5 M parameters', of small modules '8,320 parameters'."""
    count = num_parameters(module)
    return f"{count / 1e6:.1f} M parameters" if count >= MIN_SHOWN_IN_MILLIONS else f"{count:,} parameters"


# ---- pre-trained ViTs by what a user names


def resolve_backbone(source: str | Path, pretrained: bool, overrides: Mapping[str, Any]) -> PretrainedViT:
    """Find a pre-trained ViT, read its weights and infer its sizes.

    Args:
        source: see `load_backbone`.
        pretrained: whether timm loads published weights for a name with one of `HUB_PREFIXES`; False: they are random. Files and folders
            are always read.
        overrides: timm keywords of the ViT that is to be made; used for a weights file alone, where they tell what cannot be inferred
            from it (`num_heads`, `img_size`).

    Returns:
        Its weights under timm's names, and the keywords of timm that make its ViT.

    Raises:
        MapetError: there is no model or file of that name, it is damaged, or it is no ViT.
    """
    name = str(source)
    if name.startswith(HUB_PREFIXES):
        vit = create_timm_model(name, pretrained)
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
        reason = f"its config.json is not one that timm writes for a ViT ({first_line(error)})"
        raise MapetError(f"cannot load the backbone {folder}: {reason}. Expected {SOURCES}") from None
    return _from_timm(f"local-dir:{folder}", vit, weights, {})._replace(read_options=config.get(READ_OPTIONS))


def check_model_name(name: str, suggested: list[str]) -> None:
    """Check that timm has an architecture.

    Args:
        name: with or without the tag of its weights, 'vit_tiny_patch16_224.augreg_in21k'.
        suggested: names from which the error suggests a similar one.

    Raises:
        MapetError: timm has none of that name.
    """
    if name.split(".")[0] not in timm.list_models():
        hint = _suggest_model(name, suggested) or "."
        raise MapetError(f"timm has no model '{name}'{hint} `timm.list_models('vit_*')` lists its ViTs")


def _suggest_model(name: str, known: list[str], prefix: str = "") -> str:
    """Suggest a model name for one that is unknown.

    Args:
        name: as the user wrote it. For one without sizes, e.g. 'vit_tiny', it is the model of 16 px patches at 224 px.
        known: names that may be suggested.
        prefix: put before the suggested name, e.g. 'timm:'.

    Returns:
        "; did you mean 'vit_tiny_patch16_224'?", or '' if no known name is similar.
    """
    exact = [candidate for candidate in (name, f"{name}_patch16_224") if candidate in known][:1]
    return did_you_mean(name, [prefix + candidate for candidate in exact or known])


def create_timm_model(name: str, pretrained: bool) -> torch.nn.Module:
    """Create any timm model, not only ViTs, without a classifier.

    Args:
        name: of timm, with or without the prefix 'timm:', or of the Hub, 'hf-hub:OWNER/NAME'.
        pretrained: load its published weights, from this machine's cache or else from the Hub.

    Raises:
        MapetError: there is no such model, or its weights cannot be downloaded.
    """
    name = name.removeprefix("timm:")
    if not name.startswith(("hf-hub:", "hf_hub:")):
        check_model_name(name, [*timm.list_models(), *timm.list_models(VITS, pretrained=True)])
    if pretrained:
        log.info("weights of %s: from this machine's cache, or else downloaded from the Hub", name)
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0)
    except Exception as error:  # hub, network and file errors of many kinds
        raise MapetError(
            f"cannot load timm's weights of '{name}': {first_line(error)}. Without a network, give a file or folder that holds them"
        ) from None


def _from_timm(name: str, vit: torch.nn.Module, weights: dict[str, Tensor], args: dict[str, Any]) -> PretrainedViT:
    """Return the weights, sizes and input normalization of a timm model as a `PretrainedViT`.

    Args:
        name: for timm's `create_model`.
        vit: the model that timm creates from `name`, which may be on the meta device: only its sizes and `pretrained_cfg` are
            read.
        weights: its state dict.
        args: keywords for timm's `create_model` with which the ViT is made again later.

    Raises:
        MapetError: it is neither a VisionTransformer nor a Beit.
    """
    config = getattr(vit, "pretrained_cfg", {})
    mean_std = tuple(config.get("mean", ())), tuple(config.get("std", ()))
    if isinstance(vit, Beit):  # a plain ViT but for relative positions
        size = tuple(config["input_size"][1:])
        return from_state_dict(weights, name, {"img_size": size})._replace(mean_std=mean_std)
    if not isinstance(vit, VisionTransformer):
        raise MapetError(f"'{name}' is a {type(vit).__name__}, not a plain VisionTransformer; {PLAIN_HINT}")
    input_stats = mean_std if len(mean_std[0]) == vit.in_chans else None
    return PretrainedViT(weights, name, args, tuple(vit.patch_embed.grid_size), input_stats)


def _from_hugging_face(weights: dict[str, Tensor], folder: Path, config: dict[str, Any]) -> PretrainedViT:
    """Return the weights, sizes and input normalization of a model folder of transformers as a `PretrainedViT`.

    Args:
        weights: of its weights file, by transformers' names.
        folder: may have a preprocessor_config.json, which says how the input is normalized.
        config: content of its config.json.

    Returns:
        Its mean and std are of pixels in [0, 1]; None without a preprocessor_config.json. What a plain ViT cannot compute, such as
        another activation, is in `unsupported`, which callers refuse or warn about.

    Raises:
        MapetError: a model that is no ViT, or not one of `HUGGING_FACE_TYPES`.
    """
    if config["model_type"] not in HUGGING_FACE_TYPES:
        supported = ", ".join(HUGGING_FACE_TYPES)
        problem = f"{folder} holds a transformers model '{config['model_type']}'"
        raise MapetError(f"{problem}: give one of {supported}")
    size = config.get("image_size", DEFAULT_HF_IMAGE_SIZE)
    size = (size, size) if isinstance(size, int) else tuple(size)
    overrides = {"num_heads": config["num_attention_heads"], "img_size": size}
    eps = float(config.get("layer_norm_eps", DEFAULT_HF_EPS))
    vit = from_state_dict(weights, folder, overrides)._replace(eps=eps)
    if config.get("hidden_act", "gelu") != "gelu":
        vit = vit._replace(unsupported=(*vit.unsupported, f"activation '{config['hidden_act']}'"))
    processor, channels = folder / "preprocessor_config.json", config.get("num_channels", 3)
    pixels = read_json(processor, "model folder") if processor.is_file() else {}
    if not pixels.get("do_normalize", True):
        return vit._replace(mean_std=((0.0,) * channels, (1.0,) * channels))
    if "image_mean" in pixels:
        return vit._replace(mean_std=(tuple(pixels["image_mean"]), tuple(pixels["image_std"])))
    log.info("%s has no preprocessor_config.json with image_mean: mapet's normalization is assumed", folder)
    return vit


def _from_file(path: Path, overrides: Mapping[str, Any]) -> PretrainedViT:
    """Return the weights and sizes of a weights file as a `PretrainedViT`; the layout is recognized by the names of its tensors.

    Args:
        path: of safetensors or of PyTorch.
        overrides: timm keywords; `num_heads` and `img_size` are used where they cannot be inferred.

    Raises:
        MapetError: no ViT, or its number of attention heads cannot be inferred and isn't given.
    """
    size = overrides.get("img_size")
    vit = from_state_dict(read_weights(path), path, img_size=(size, size) if isinstance(size, int) else size)
    args = vit.model_args
    args["num_heads"] = overrides.get("num_heads", args["num_heads"])
    if args["num_heads"] is None:
        raise MapetError(
            f"{path}: the number of attention heads cannot be inferred from weights of width {args['embed_dim']} (only of "
            f"{', '.join(map(str, NUM_HEADS))}): give it to `mapet export` as {option('model_args')} num_heads=N and use "
            "what that writes, in Python mapet.load(..., num_heads=N)"
        )
    log.info(
        "%s: a ViT of width %d, depth %d, %d heads, %s px in patches of %d; assumed: input normalized as by mapet (RGB: ImageNet's)",
        path, args["embed_dim"], args["depth"], args["num_heads"], format_size(args["img_size"]), args["patch_size"],
    )  # fmt: skip
    return vit


def find_backbone(path: Path) -> Path:
    """Return the model folder at `path`: itself, or the one in a (pre-training, fine-tuning or whole) run.

    Args:
        path: of a model folder or run.

    Raises:
        MapetError: there is none; the message says why, and how to get one.
    """
    for folder in (path, path / "backbone", path / "pretrain" / "backbone", path / "model"):
        if (folder / "config.json").is_file() and any((folder / name).is_file() for name in WEIGHTS_FILES):
            return folder
    if not path.exists():
        names = [*timm.list_models(VITS), *timm.list_models(VITS, pretrained=True)]
        hint = _suggest_model(path.name, names, "timm:") if path.name == str(path) else ""
        raise MapetError(f"{path} does not exist: expected {SOURCES}{hint}")
    has_checkpoints = any((folder / "checkpoints").is_dir() for folder in (path, path / "pretrain"))
    if has_checkpoints and (run := find_config(path, ("run", "pretrain", "finetune"))):
        raise MapetError(f"{path} holds no backbone: {_explain_unfinished(path, *run)}")
    if seeds := sorted(path.glob("seed-*/model")):
        raise MapetError(f"{path} holds a model of each seed: give one of them, e.g. {seeds[0].parent}")
    raise MapetError(
        f"{path} holds no backbone: expected {SOURCES}; a folder has config.json and model.safetensors, or is a finished run"
    )


def _explain_unfinished(path: Path, command: str, config: Path) -> str:
    """Say why a run has no backbone yet, and how to get one.

    Args:
        path: folder of the run, or of the `run` that it is a part of.
        command: that resumes it: run, pretrain or finetune.
        config: its config.yaml.
    """
    export = f"take its newest checkpoint: {shell_command('export', '--backbone', path, '--out', 'NEW')}"
    bundles = sorted(config.parent.glob("debug/step-*")) or sorted(path.glob("pretrain/debug/step-*"))
    if bundles:
        return (
            f"the run stopped at NaN or Inf. See why with: {shell_command('debug-step', bundles[0])}. "
            f"Start again with a lower {option('lr')}, or {export}, if that is from before"
        )
    resume = f"the run is not finished. Resume with: {shell_command(command, config, '--resume')}"
    return resume if command == "finetune" else f"{resume}; or {export}"
