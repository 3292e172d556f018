"""A ViT in the formats of other libraries: each writer beside the reader that shows what those libraries make of it."""

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
from mapet.errors import MapetError, install_hint, option
from mapet.files import write_json, write_tensors
from mapet.models.backbone import save_backbone
from mapet.models.checkpoint_conversion import fold_layer_scale

OPSET = 20
"""Of ONNX: the first that has GELU."""
OUTPUT_NAMES = ("features", "logits")
Outputs = dict[str, Tensor]
Reader = Callable[[Float[Tensor, "B C H W"]], Outputs]
"""Normalized images -> 'features' (B, prefix + N, D), after the last norm, and 'logits' (B, K) if there is a classifier."""
Architecture = Literal["vit", "dinov2"]
"""Prefix of the weights in transformers' models with a classifier."""


class Format(NamedTuple):
    """A file format of another library.

    Attributes:
        write: write into a new folder, with the names of the classes.
        read: load as the library itself does: name of the way -> function.
        requires: modules that an installation without the extra 'export' lacks.
    """

    write: Callable[[VisionTransformer, Path, list[str]], None]
    read: Callable[[Path], dict[str, Reader]]
    requires: tuple[str, ...] = ()


class ExportWrapper(nn.Module):
    """A ViT that returns (features,) or, with a classifier, (features, logits)."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, pixel_values: Float[Tensor, "B C H W"]) -> tuple[Tensor, ...]:
        features = self.vit.forward_features(pixel_values)
        return (features, self.vit.forward_head(features)) if self.vit.num_classes else (features,)


def compute_outputs(model: nn.Module, pixels: Float[Tensor, "B C H W"]) -> Outputs:
    """Compute the outputs that every format must give, of an `ExportWrapper` or a program made of one."""
    with torch.inference_mode():
        return dict(zip(OUTPUT_NAMES, model(pixels), strict=False))


def require_packages(name: str) -> None:
    """Check that the libraries of a format are installed.

    Raises:
        MapetError: one is not.
    """
    for module in FORMATS[name].requires:
        try:
            importlib.import_module(module)
        except ImportError as error:
            hint = install_hint("export")
            raise MapetError(f"{option('format')} {name} needs {module} ({error}): {hint}") from None


@contextmanager
def _suppress_output() -> Iterator[None]:
    """Silence exporters, which print and warn about their own insides."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


# ---- timm


def write_timm(vit: VisionTransformer, folder: Path, classes: list[str]) -> None:
    """Write config.json and model.safetensors."""
    save_backbone(vit, folder)
    if classes:
        path = folder / "config.json"
        write_json(path, json.loads(path.read_text()) | {"label_names": classes})


def read_timm(folder: Path) -> dict[str, Reader]:
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
"""Patterns of timm's names -> names in the files of ViTModel and of Dinov2Model."""


def write_transformers(vit: VisionTransformer, folder: Path, classes: list[str]) -> None:
    """Write config.json, model.safetensors and preprocessor_config.json.

    A ViTModel, whose `pooler_output` is the class token's feature (a pooler of identities) and into whose linear layers
    LayerScale is multiplied; with a classifier of the class token, ViTForImageClassification. A classifier of the mean of the
    patches, as `finetune` trains it, is one of Dinov2ForImageClassification, which is the same network but for its classifier.

    Raises:
        MapetError: neither can be this ViT.
    """
    import transformers

    kind: Architecture = "dinov2" if vit.num_classes and vit.global_pool == "avg" else "vit"
    if reasons := _list_unsupported(vit, kind):
        hint = "Choose other formats: timm, onnx, torch-export"
        raise MapetError(f"transformers' ViT can't be this one, for it has {'; '.join(reasons)}. {hint}")
    first, (height, width) = vit.blocks[0], vit.patch_embed.img_size
    hidden = first.mlp.fc1.out_features
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
        config = transformers.ViTConfig(**options, intermediate_size=hidden, pooler_act="linear")
    else:
        options["architectures"] = ["Dinov2ForImageClassification"]
        config = transformers.Dinov2Config(**options, mlp_ratio=hidden // vit.embed_dim, use_mask_token=False)
    config.save_pretrained(folder)
    write_tensors(folder / "model.safetensors", _to_transformers(vit, kind), {"format": "pt"})
    if vit.in_chans in (1, 3):
        _write_processor(vit, folder)


def _write_processor(vit: VisionTransformer, folder: Path) -> None:
    """Write the image processor that prepares pictures as mapet does; for a size that isn't square it squeezes them."""
    import transformers

    mean, std = map(list, input_mean_std(vit.in_chans))
    common = {"resample": 3, "image_mean": mean, "image_std": std, "do_convert_rgb": vit.in_chans == 3}
    height, width = vit.patch_embed.img_size
    size = {"height": height, "width": width}
    if height == width:
        square = {"size": {"shortest_edge": height}, "do_center_crop": True, "crop_size": size}
        transformers.BitImageProcessor(**square, **common).save_pretrained(folder)
    else:
        transformers.ViTImageProcessor(size=size, **common).save_pretrained(folder)


def _list_unsupported(vit: VisionTransformer, kind: Architecture) -> list[str]:
    """List what this ViT has and transformers' models have not."""
    first, (height, width) = vit.blocks[0], vit.patch_embed.img_size
    plain_attention = type(first.attn) is Attention and isinstance(first.attn.q_norm, nn.Identity)
    gelu = isinstance(first.mlp.act, nn.GELU) and first.mlp.act.approximate == "none"
    odd = kind == "dinov2" and (height != width or first.mlp.fc1.out_features % vit.embed_dim)
    checks = {
        "no class token": not vit.has_class_token,
        "register tokens": vit.num_reg_tokens,
        "no learned positions": vit.pos_embed is None,
        "a norm before its blocks": not isinstance(vit.norm_pre, nn.Identity),
        "its last norm after the pooling": type(vit.norm) is nn.Identity,
        f"norms that are {type(first.norm1).__name__}": not isinstance(first.norm1, nn.LayerNorm),
        "another attention (norms of queries and keys, or more)": not plain_attention,
        f"the activation {type(first.mlp.act).__name__}": not gelu,
        f"a classifier of the pooling '{vit.global_pool}'": vit.num_classes and vit.global_pool not in ("token", "avg"),
        "a classifier of the mean of the patches, with images that aren't square or an MLP of an odd width": odd,
    }
    return [reason for reason, holds in checks.items() if holds]


def _to_transformers(vit: VisionTransformer, kind: Architecture) -> dict[str, Tensor]:
    """Return the weights under the names of transformers' model, which has positions of the class token too."""
    weights = dict(vit.state_dict())
    if vit.no_embed_class:
        weights["pos_embed"] = torch.cat([torch.zeros_like(weights["cls_token"]), weights["pos_embed"]], dim=1)
    if kind == "vit":
        weights = fold_layer_scale(weights)
    else:
        names = (f"blocks.{index}.ls{part}.gamma" for index in range(len(vit.blocks)) for part in (1, 2))
        weights = {name: torch.ones(vit.embed_dim) for name in names} | weights
    out: dict[str, Tensor] = {}
    if vit.num_classes:
        head = weights.pop("head.weight")
        # theirs reads class token and mean of the patches, side by side
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


def read_transformers(folder: Path) -> dict[str, Reader]:
    import transformers

    [name] = json.loads((folder / "config.json").read_text())["architectures"]
    transformers.utils.logging.disable_progress_bar()
    with _suppress_output():
        model, loading = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    if any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        raise MapetError(f"transformers did not take all weights: {loading}")

    @torch.inference_mode()
    def read(pixels: Tensor) -> Outputs:
        outputs = {"features": model.eval().base_model(pixels).last_hidden_state}
        return outputs if name == "ViTModel" else outputs | {"logits": model(pixels).logits}

    return {f"transformers, {name}": read}


# ---- ONNX and torch.export


def _trace(vit: VisionTransformer, export: Callable[..., Any], *files: Path, **options: Any) -> Any:
    """Let an exporter follow the ViT's computation; the number of images is free."""
    example = torch.zeros(2, vit.in_chans, *vit.patch_embed.img_size)
    with _suppress_output():
        return export(
            ExportWrapper(vit.eval()), (example,), *files, dynamic_shapes=({0: torch.export.Dim("batch")},), **options
        )


def write_onnx(vit: VisionTransformer, folder: Path, classes: list[str]) -> None:
    """Write model.onnx: `pixel_values` (batch, C, H, W), normalized -> `features`, `logits`; any batch, one image size."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {"input_names": ["pixel_values"], "output_names": OUTPUT_NAMES[: 2 if vit.num_classes else 1]}
    options = {"dynamo": True, "external_data": False, "opset_version": OPSET, "verbose": False}
    _trace(vit, torch.onnx.export, folder / "model.onnx", **names, **options)


def read_onnx(folder: Path) -> dict[str, Reader]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])

    def read(pixels: Tensor) -> Outputs:
        values = session.run(None, {"pixel_values": pixels.numpy()})
        return dict(zip(OUTPUT_NAMES, map(torch.from_numpy, values), strict=False))

    return {"onnxruntime": read}


def write_torch_export(vit: VisionTransformer, folder: Path, classes: list[str]) -> None:
    """Write model.pt2: the program of `torch.export`, for any batch size; no Python class of ours or timm's is needed."""
    folder.mkdir(parents=True, exist_ok=True)
    with _suppress_output():
        torch.export.save(_trace(vit, torch.export.export), folder / "model.pt2")


def read_torch_export(folder: Path) -> dict[str, Reader]:
    with _suppress_output():
        module = torch.export.load(folder / "model.pt2").module()
    return {"torch.export": partial(compute_outputs, module)}


FORMATS = {
    "timm": Format(write_timm, read_timm),
    "transformers": Format(write_transformers, read_transformers, ("transformers",)),
    "onnx": Format(write_onnx, read_onnx, ("onnx", "onnxscript", "onnxruntime")),
    "torch-export": Format(write_torch_export, read_torch_export),
}
