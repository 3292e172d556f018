"""A ViT in the file formats of other libraries: for each a writer, and a reader that computes with that library what it reads."""

import importlib
import io
import json
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import timm
import torch
from jaxtyping import Float
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn

from mapet.data.views import input_mean_std
from mapet.errors import MapetError, first_line, install_hint, option
from mapet.files import write_tensors
from mapet.models.backbone import READ_OPTIONS, get_read_options, save_backbone
from mapet.models.checkpoint_conversion import fold_layer_scale
from mapet.weights import first_names

ONNX_OPSET = 20
"""The first version of ONNX's operators that has GELU."""
OUTPUT_NAMES = ("features", "logits")
Outputs = dict[str, Tensor]
"""'features' (B, prefix + N, D), after the last norm, and 'logits' (B, K) if there is a classifier."""
Forward = Callable[[Float[Tensor, "B C H W"]], Outputs]
"""Computes the outputs for normalized images."""
Architecture = Literal["vit", "dinov2"]
"""Models of transformers, ViT and Dinov2, by the prefix of their weights where they have a classifier."""


class Format(NamedTuple):
    """A file format of another library.

    Attributes:
        write: writes a ViT into a new folder; the list has the names of its classes, or is empty.
        read: loads that folder as the library's users do. Returns, for each way to load it, the way's name and the function
            that computes with what was loaded.
        requires: modules that an installation without the extra 'export' lacks.
    """

    write: Callable[[VisionTransformer, Path, list[str]], None]
    read: Callable[[Path], dict[str, Forward]]
    requires: tuple[str, ...] = ()


class ExportWrapper(nn.Module):
    """A ViT whose forward pass returns (features,) or, with a classifier, (features, logits); see `Outputs`."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, pixel_values: Float[Tensor, "B C H W"]) -> tuple[Tensor, ...]:
        """Return the outputs in the order of `OUTPUT_NAMES`."""
        features = self.vit.forward_features(pixel_values)
        return (features, self.vit.forward_head(features)) if self.vit.num_classes else (features,)


def compute_outputs(model: nn.Module, pixels: Float[Tensor, "B C H W"]) -> Outputs:
    """Compute the outputs of an `ExportWrapper`, or of a program exported from one, without gradient.

    Args:
        model: returns a tuple of 1 or 2 tensors in the order of `OUTPUT_NAMES`.
        pixels: normalized, of the model's image size.

    Returns:
        'features' -> (B, prefix + N, D), after the last norm; with a classifier also 'logits' -> (B, K).
    """
    with torch.inference_mode():
        return dict(zip(OUTPUT_NAMES, model(pixels), strict=False))


def require_packages(name: str) -> None:
    """Check that the libraries of a format can be imported.

    Args:
        name: key of `FORMATS`.

    Raises:
        MapetError: one cannot; the message says how to install it.
    """
    for module in FORMATS[name].requires:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise MapetError(
                f"{option('format')} {name} needs {module} ({first_line(error)}): {install_hint('export')}"
            ) from None


@contextmanager
def _suppress_output() -> Iterator[None]:
    """Discard warnings and what is printed to stdout until the context ends, as exporters report on their own internals there."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


# ---- timm


def read_timm(folder: Path) -> dict[str, Forward]:
    """Load an exported timm folder as timm's users do: as a local folder, and as a weights file of its architecture.

    Args:
        folder: with config.json and model.safetensors.

    Returns:
        Name of the way to load it -> function that computes the outputs ('features', and 'logits' with a classifier) of
        normalized images (B, C, H, W) with what was loaded.
    """
    config = json.loads((folder / "config.json").read_text())
    weights, args = str(folder / "model.safetensors"), config["model_args"]
    models = {
        "timm, local-dir": timm.create_model(f"local-dir:{folder}", pretrained=True),
        "timm, checkpoint_path": timm.create_model(config["architecture"], checkpoint_path=weights, **args),
    }
    return {name: partial(compute_outputs, ExportWrapper(vit.eval())) for name, vit in models.items()}


# ---- Hugging Face Transformers

COMMON_KEYS = {
    r"^cls_token$": "embeddings.cls_token",
    r"^pos_embed$": "embeddings.position_embeddings",
    r"^patch_embed\.proj\.": "embeddings.patch_embeddings.projection.",
    r"^norm\.": "layernorm.",
    r"^blocks\.(\d+)\.": r"encoder.layer.\1.",
    r"\.attn\.proj\.": ".attention.output.dense.",
    r"\.attn\.(query|key|value)\.": r".attention.attention.\1.",
}
HUGGING_FACE_KEYS: dict[Architecture, dict[str, str]] = {
    "vit": COMMON_KEYS | {
        r"\.norm1\.": ".layernorm_before.",
        r"\.norm2\.": ".layernorm_after.",
        r"\.mlp\.fc1\.": ".intermediate.dense.",
        r"\.mlp\.fc2\.": ".output.dense.",
    },
    "dinov2": COMMON_KEYS | {r"\.ls([12])\.gamma$": r".layer_scale\1.lambda1"},
}  # fmt: skip
"""Patterns of timm's names -> names in the files of ViTModel and of Dinov2Model, applied in this order."""


def write_transformers(vit: VisionTransformer, folder: Path, classes: list[str]) -> None:
    """Write config.json, model.safetensors and, for gray or RGB input, preprocessor_config.json; see `Format.write`.

    Without a classifier it is a ViTModel, whose `pooler_output` is the class token's feature (its pooler is the identity);
    with a classifier of the class token, ViTForImageClassification. In both LayerScale is multiplied into the linear layers
    before it. A classifier of the mean of the patches, as `finetune` trains it, needs Dinov2ForImageClassification.

    Args:
        vit: with or without a classifier.
        folder: is created.
        classes: names of the classifier's classes, in the order of its logits; []: they are called LABEL_0, LABEL_1, ...

    Raises:
        MapetError: transformers has no model that computes the same as this ViT.
    """
    import transformers

    kind: Architecture = "dinov2" if vit.num_classes and vit.global_pool == "avg" else "vit"
    if reasons := _list_unsupported(vit, kind):
        hint = f"Choose other formats: {option('format')} timm, onnx or torch-export"
        raise MapetError(f"transformers has no ViT with {'; '.join(reasons)}. {hint}")
    first, (height, width) = vit.blocks[0], vit.patch_embed.img_size
    mlp_width = first.mlp.fc1.out_features
    options: dict[str, Any] = {
        "hidden_size": vit.embed_dim, "num_hidden_layers": len(vit.blocks), "num_attention_heads": first.attn.num_heads,
        "qkv_bias": first.attn.qkv.bias is not None, "layer_norm_eps": vit.norm.eps, "num_channels": vit.in_chans,
        "image_size": height if height == width else [height, width], "patch_size": vit.patch_embed.patch_size[0],
    }  # fmt: skip
    if vit.num_classes:
        names = classes or [f"LABEL_{index}" for index in range(vit.num_classes)]
        options |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    if kind == "vit":
        options["architectures"] = ["ViTForImageClassification" if vit.num_classes else "ViTModel"]
        config = transformers.ViTConfig(**options, intermediate_size=mlp_width, pooler_act="linear")
    else:
        options["architectures"] = ["Dinov2ForImageClassification"]
        config = transformers.Dinov2Config(**options, mlp_ratio=mlp_width // vit.embed_dim, use_mask_token=False)
    config.save_pretrained(folder)
    write_tensors(folder / "model.safetensors", _to_transformers(vit, kind), {"format": "pt"})
    if vit.in_chans in (1, 3):
        _write_processor(vit, folder)


def _write_processor(vit: VisionTransformer, folder: Path) -> None:
    """Write the image processor that prepares images as mapet does.

    For square input it resizes the shorter side and crops the center; for other sizes, which transformers cannot crop to
    after such a resize, it resizes the whole image, which changes its aspect ratio.

    Args:
        vit: its image size and channels (1 or 3) are used.
        folder: of the exported model; gets preprocessor_config.json.
    """
    import transformers

    mean, std = map(list, input_mean_std(vit.in_chans))
    # 3: bicubic, as PIL numbers it
    common = {"resample": 3, "image_mean": mean, "image_std": std, "do_convert_rgb": vit.in_chans == 3}
    height, width = vit.patch_embed.img_size
    size = {"height": height, "width": width}
    processor = transformers.ViTImageProcessor(size=size, **common)
    if height == width:
        processor = transformers.BitImageProcessor(
            size={"shortest_edge": height}, do_center_crop=True, crop_size=size, **common
        )
    processor.save_pretrained(folder)


def _list_unsupported(vit: VisionTransformer, kind: Architecture) -> list[str]:
    """List what prevents a ViT from being computed by transformers, as texts for a message.

    Args:
        vit: with or without a classifier.
        kind: model of transformers that is to compute it: 'vit' or 'dinov2'.

    Returns:
        Noun phrases that continue 'transformers has no ViT with'; [] if the ViT is supported.
    """
    first, (height, width) = vit.blocks[0], vit.patch_embed.img_size
    has_plain_attention = type(first.attn) is Attention and isinstance(first.attn.q_norm, nn.Identity)
    has_gelu = isinstance(first.mlp.act, nn.GELU) and first.mlp.act.approximate == "none"
    # Dinov2 takes one image size, and the width of its MLP as a whole multiple of its own.
    unfit_for_dinov2 = kind == "dinov2" and (height != width or first.mlp.fc1.out_features % vit.embed_dim)
    checks = {
        "no class token": not vit.has_class_token,
        "register tokens": vit.num_reg_tokens,
        "no position embeddings": vit.pos_embed is None,
        "a norm before its blocks": not isinstance(vit.norm_pre, nn.Identity),
        "its last norm after the pooling": type(vit.norm) is nn.Identity,
        f"norms of the kind {type(first.norm1).__name__}": not isinstance(first.norm1, nn.LayerNorm),
        "another attention (norms of queries and keys, or more)": not has_plain_attention,
        f"the activation {type(first.mlp.act).__name__}": not has_gelu,
        f"a classifier of the pooling '{vit.global_pool}'": vit.num_classes and vit.global_pool not in ("token", "avg"),
        "a classifier of the mean of the patches, with images that aren't square or an MLP whose width is no multiple of the ViT's": unfit_for_dinov2,
    }
    return [reason for reason, holds in checks.items() if holds]


def _to_transformers(vit: VisionTransformer, kind: Architecture) -> dict[str, Tensor]:
    """Return the ViT's weights with the names and shapes of a model of transformers: ViT ('vit') or Dinov2 ('dinov2').

    The class token gets a position of zeros where the ViT has none. LayerScale is multiplied into other weights for a ViT,
    and for Dinov2, which always has it, is 1 where the ViT has none. Queries, keys and values are split. Without a classifier
    there is a pooler, which is the identity.

    Args:
        vit: that `_list_unsupported` has found nothing against; it is not changed.
        kind: 'vit' or 'dinov2'; 'dinov2' only for a classifier of the mean of the patches.

    Returns:
        Name -> tensor; some share memory with `vit`. With a classifier, names of the encoder begin with `kind` and a dot.
    """
    weights = dict(vit.state_dict())
    if vit.no_embed_class:
        weights["pos_embed"] = torch.cat([torch.zeros_like(weights["cls_token"]), weights["pos_embed"]], dim=1)
    if kind == "vit":
        weights = fold_layer_scale(weights)
    else:
        names = [f"blocks.{index}.ls{branch}.gamma" for index in range(len(vit.blocks)) for branch in (1, 2)]
        weights = {name: torch.ones(vit.embed_dim) for name in names} | weights
    out: dict[str, Tensor] = {}
    if vit.num_classes:
        head = weights.pop("head.weight")
        # Dinov2's classifier takes the class token and the mean of the patches, concatenated.
        out["classifier.weight"] = torch.cat([torch.zeros_like(head), head], dim=1) if kind == "dinov2" else head
        out["classifier.bias"] = weights.pop("head.bias")
    else:
        out |= {"pooler.dense.weight": torch.eye(vit.embed_dim), "pooler.dense.bias": torch.zeros(vit.embed_dim)}
    for name in [name for name in weights if ".qkv." in name]:
        for projection, tensor in zip(("query", "key", "value"), weights.pop(name).chunk(3), strict=True):
            weights[name.replace("qkv", projection)] = tensor
    for name, tensor in weights.items():
        for pattern, replacement in HUGGING_FACE_KEYS[kind].items():
            name = re.sub(pattern, replacement, name)
        out[f"{kind}.{name}" if vit.num_classes else name] = tensor
    return out


def read_transformers(folder: Path) -> dict[str, Forward]:
    """Load an exported folder by `from_pretrained` of the transformers class that its config.json names.

    Args:
        folder: of the export.

    Returns:
        'transformers, CLASS' -> function that computes the outputs ('features', and 'logits' with a classifier) of normalized
        images (B, C, H, W).

    Raises:
        MapetError: names or shapes of the weights are not those of the class.
    """
    import transformers

    [class_name] = json.loads((folder / "config.json").read_text())["architectures"]
    transformers.utils.logging.disable_progress_bar()
    with _suppress_output():
        model, loading = getattr(transformers, class_name).from_pretrained(folder, output_loading_info=True)
    mismatched = {key.removesuffix("_keys"): sorted(map(str, loading[key])) for key in loading if key.endswith("_keys")}
    if any(mismatched.values()):
        different = "; ".join(f"{kind}: {first_names(names)}" for kind, names in mismatched.items() if names)
        problem = f"the weights in {folder} are not those that {class_name} of transformers expects: {different}"
        raise MapetError(f"{problem}. Update transformers and export again, or choose another {option('format')}")

    @torch.inference_mode()
    def forward(pixels: Tensor) -> Outputs:
        """Compute the outputs of normalized images."""
        outputs = {"features": model.eval().base_model(pixels).last_hidden_state}
        return outputs if class_name == "ViTModel" else outputs | {"logits": model(pixels).logits}

    return {f"transformers, {class_name}": forward}


# ---- ONNX and torch.export


def _trace(vit: VisionTransformer, export: Callable[..., Any], *files: Path, **options: Any) -> Any:
    """Call an exporter of torch on an `ExportWrapper` of the ViT, for any batch size and the ViT's own image size.

    Args:
        vit: is put into evaluation mode; on the CPU, as the example input of 2 images is.
        export: `torch.export.export` or `torch.onnx.export`.
        files: positional arguments of the exporter after model and example input.
        options: further keywords of the exporter.

    Returns:
        What the exporter returns.
    """
    example = torch.zeros(2, vit.in_chans, *vit.patch_embed.img_size)
    with _suppress_output():
        return export(
            ExportWrapper(vit.eval()), (example,), *files, dynamic_shapes=({0: torch.export.Dim("batch")},), **options
        )


def write_onnx(vit: VisionTransformer, folder: Path, classes: list[str]) -> None:
    """Write model.onnx, which takes any batch size: `pixel_values` (batch, C, H, W), normalized -> `features` and, if any, `logits`.

    Its metadata hold how the training images were read (`get_read_options`), if that is known.

    Args:
        vit: with or without a classifier; it is put into evaluation mode.
        folder: is created.
        classes: not used, as ONNX has no place for their names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    options = {"dynamo": True, "external_data": False, "opset_version": ONNX_OPSET, "verbose": False}
    outputs = OUTPUT_NAMES[: 2 if vit.num_classes else 1]
    _trace(vit, torch.onnx.export, folder / "model.onnx", input_names=["pixel_values"], output_names=outputs, **options)
    if (read_options := get_read_options(vit)) is not None:
        import onnx

        model = onnx.load(folder / "model.onnx")
        onnx.helper.set_model_props(model, {READ_OPTIONS: read_options.model_dump_json()})
        onnx.save(model, folder / "model.onnx")


def read_onnx(folder: Path) -> dict[str, Forward]:
    """Load model.onnx of an exported folder into onnxruntime, on the CPU.

    Returns:
        'onnxruntime' -> function that computes the outputs ('features', and 'logits' with a classifier) of normalized images (B, C, H, W).
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])

    def forward(pixels: Tensor) -> Outputs:
        values = session.run(None, {"pixel_values": pixels.numpy()})
        return dict(zip(OUTPUT_NAMES, map(torch.from_numpy, values), strict=False))

    return {"onnxruntime": forward}


def write_torch_export(vit: VisionTransformer, folder: Path, classes: list[str]) -> None:
    """Write model.pt2, the program of `torch.export`, which takes any batch size and is loaded without classes of mapet or timm.

    Args:
        vit: with or without a classifier; it is put into evaluation mode.
        folder: is created.
        classes: not used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _suppress_output():
        torch.export.save(_trace(vit, torch.export.export), folder / "model.pt2")


def read_torch_export(folder: Path) -> dict[str, Forward]:
    """Load model.pt2 of an exported folder by `torch.export.load`.

    Returns:
        'torch.export' -> function that computes the outputs ('features', and 'logits' with a classifier) of normalized images.
    """
    with _suppress_output():
        module = torch.export.load(folder / "model.pt2").module()
    return {"torch.export": partial(compute_outputs, module)}


FORMATS = {
    "timm": Format(save_backbone, read_timm),
    "transformers": Format(write_transformers, read_transformers, ("transformers",)),
    "onnx": Format(write_onnx, read_onnx, ("onnx", "onnxscript", "onnxruntime")),
    "torch-export": Format(write_torch_export, read_torch_export),
}
