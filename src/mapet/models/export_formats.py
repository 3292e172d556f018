"""A ViT in the formats of other libraries: each writer beside the reader that shows what those libraries make of it."""

import importlib
import io
import json
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from jaxtyping import Float
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn

from mapet.errors import MapetError, how_to_install
from mapet.files import write_json, write_tensors
from mapet.models.adapt import fold_layer_scale, input_mean_std
from mapet.models.backbone import save_backbone

OPSET = 20
"""Of ONNX: the first that has GELU."""
Outputs = dict[str, Tensor]
Reader = Callable[[Float[Tensor, "B C H W"]], Outputs]
"""Normalised images -> 'features' (B, prefix + N, D), after the last norm, and 'logits' (B, K) if there is a classifier."""


class Format(NamedTuple):
    """Attributes:
    write: into a new folder.
    read: as the library itself does: name of the way -> function.
    needs: modules that an installation without the extra 'export' lacks.
    """

    write: Callable[[VisionTransformer, Path, list[str]], None]
    read: Callable[[Path], dict[str, Reader]]
    needs: tuple[str, ...] = ()


class ExportWrapper(nn.Module):
    """Features, and logits if there is a classifier, as a tuple."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, pixel_values: Float[Tensor, "B C H W"]) -> tuple[Tensor, ...]:
        features = self.vit.forward_features(pixel_values)
        return (features, self.vit.forward_head(features)) if self.vit.num_classes else (features,)


def outputs_of(vit: VisionTransformer, pixels: Float[Tensor, "B C H W"]) -> Outputs:
    """What every format must give."""
    with torch.inference_mode():
        return _named(ExportWrapper(vit.eval())(pixels))


def _named(values: Any) -> Outputs:
    return dict(zip(("features", "logits"), values, strict=False))


def require(name: str) -> None:
    """Raises:
    MapetError: a library that the format needs is not installed.
    """
    for module in FORMATS[name].needs:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise MapetError(f"--format {name} needs {module} ({error}): {how_to_install('export')}") from None


@contextmanager
def _quietly() -> Iterator[None]:
    """Exporters print and warn about their own insides."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


# ---- timm


def write_timm(vit: VisionTransformer, folder: Path, classes: list[str]) -> None:
    """config.json and model.safetensors."""
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
    return {name: lambda pixels, vit=model: outputs_of(vit, pixels) for name, model in models.items()}  # type: ignore[misc]


# ---- Hugging Face Transformers

BOTH = (
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.(\d+)\.", r"encoder.layer.\1."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.(query|key|value)\.", r".attention.attention.\1."),
)
HUGGING_FACE = {
    "vit": (
        *BOTH,
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    ),
    "dinov2": (*BOTH, (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1")),
}
"""timm's names -> those of the files of ViTModel and of Dinov2Model."""


def write_transformers(vit: VisionTransformer, folder: Path, classes: list[str]) -> None:
    """config.json, model.safetensors, preprocessor_config.json.

    A ViTModel, whose `pooler_output` is the class token's feature (a pooler of identities) and into whose linear layers
    LayerScale is multiplied; with a classifier of the class token, ViTForImageClassification. A classifier of the mean of the
    patches, as `finetune` trains it, is one of Dinov2ForImageClassification, which is the same network but for its classifier.

    Raises:
        MapetError: neither can be this ViT.
    """
    import transformers

    kind = "dinov2" if vit.num_classes and vit.global_pool == "avg" else "vit"
    if reasons := list(_beyond_transformers(vit, kind)):
        raise MapetError(
            f"transformers' ViT can't be this one, for it has {'; '.join(reasons)}. Choose other formats: timm, onnx, torch-export"
        )
    first, (height, width) = vit.blocks[0], vit.patch_embed.img_size
    options: dict[str, Any] = {
        "hidden_size": vit.embed_dim,
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": first.attn.num_heads,
        "layer_norm_eps": vit.norm.eps,
        "image_size": height if height == width else [height, width],
        "patch_size": vit.patch_embed.patch_size[0],
        "num_channels": vit.in_chans,
        "qkv_bias": first.attn.qkv.bias is not None,
    }
    if vit.num_classes:
        names = classes or [f"LABEL_{number}" for number in range(vit.num_classes)]
        options |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    if kind == "vit":
        architecture = "ViTForImageClassification" if vit.num_classes else "ViTModel"
        hidden = first.mlp.fc1.out_features
        config = transformers.ViTConfig(
            **options, intermediate_size=hidden, pooler_act="linear", architectures=[architecture]
        )
    else:
        ratio = first.mlp.fc1.out_features // vit.embed_dim
        config = transformers.Dinov2Config(
            **options, mlp_ratio=ratio, use_mask_token=False, architectures=["Dinov2ForImageClassification"]
        )
    config.save_pretrained(folder)
    write_tensors(folder / "model.safetensors", _for_transformers(vit, kind), {"format": "pt"})
    _write_processor(vit, folder)


def _write_processor(vit: VisionTransformer, folder: Path) -> None:
    import transformers

    if vit.in_chans not in (1, 3):  # no pictures
        return
    mean, std = map(list, input_mean_std(vit.in_chans))
    common = {"resample": 3, "image_mean": mean, "image_std": std, "do_convert_rgb": vit.in_chans == 3}
    height, width = vit.patch_embed.img_size
    if height == width:
        crop = {"height": height, "width": width}
        processor = transformers.BitImageProcessor(
            size={"shortest_edge": height}, do_center_crop=True, crop_size=crop, **common
        )
    else:
        processor = transformers.ViTImageProcessor(size={"height": height, "width": width}, **common)
    processor.save_pretrained(folder)


def _beyond_transformers(vit: VisionTransformer, kind: str) -> Iterator[str]:
    first = vit.blocks[0]
    if not vit.has_class_token:
        yield "no class token"
    if vit.num_reg_tokens:
        yield "register tokens"
    if vit.pos_embed is None:
        yield "no learned positions"
    if not isinstance(vit.norm_pre, nn.Identity):
        yield "a norm before its blocks"
    if type(vit.norm) is nn.Identity:
        yield "its last norm after the pooling"
    if not isinstance(first.norm1, nn.LayerNorm):
        yield f"norms that are {type(first.norm1).__name__}"
    if type(first.attn) is not Attention or not isinstance(first.attn.q_norm, nn.Identity):
        yield "another attention (norms of queries and keys, or more)"
    if not isinstance(first.mlp.act, nn.GELU) or first.mlp.act.approximate != "none":
        yield f"the activation {type(first.mlp.act).__name__}"
    if vit.num_classes and vit.global_pool not in ("token", "avg"):
        yield f"a classifier of the pooling '{vit.global_pool}'"
    height, width = vit.patch_embed.img_size
    if kind == "dinov2" and (height != width or first.mlp.fc1.out_features % vit.embed_dim):
        yield "a classifier of the mean of the patches, with images that aren't square or an MLP of an odd width"


def _for_transformers(vit: VisionTransformer, kind: str) -> dict[str, Tensor]:
    weights = dict(vit.state_dict())
    if vit.no_embed_class:
        weights["pos_embed"] = torch.cat([torch.zeros_like(weights["cls_token"]), weights["pos_embed"]], dim=1)
    if kind == "vit":
        weights = fold_layer_scale(weights)
    else:
        ones = {
            f"blocks.{i}.ls{part}.gamma": torch.ones(vit.embed_dim) for i in range(len(vit.blocks)) for part in (1, 2)
        }
        weights = ones | weights
    out: dict[str, Tensor] = {}
    if vit.num_classes:
        head = weights.pop("head.weight")
        # theirs reads class token and mean of the patches, side by side
        out["classifier.weight"] = torch.cat([torch.zeros_like(head), head], dim=1) if kind == "dinov2" else head
        out["classifier.bias"] = weights.pop("head.bias")
    for name, tensor in weights.items():
        parts = {name: tensor}
        if ".qkv." in name:
            parts = {name.replace("qkv", p): t for p, t in zip(("query", "key", "value"), tensor.chunk(3), strict=True)}
        for part, value in parts.items():
            for pattern, replacement in HUGGING_FACE[kind]:
                part = re.sub(pattern, replacement, part)
            out[f"{kind}.{part}" if vit.num_classes else part] = value
    if not vit.num_classes:
        out |= {"pooler.dense.weight": torch.eye(vit.embed_dim), "pooler.dense.bias": torch.zeros(vit.embed_dim)}
    return out


def read_transformers(folder: Path) -> dict[str, Reader]:
    import transformers

    [name] = json.loads((folder / "config.json").read_text())["architectures"]
    transformers.utils.logging.disable_progress_bar()
    with _quietly():
        model, loading = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    if any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        raise MapetError(f"transformers did not take all weights: {loading}")

    def read(pixels: Tensor) -> Outputs:
        with torch.inference_mode():
            outputs = {"features": model.eval().base_model(pixels).last_hidden_state}
            return outputs if name == "ViTModel" else outputs | {"logits": model(pixels).logits}

    return {f"transformers, {name}": read}


# ---- ONNX and torch.export


def write_onnx(vit: VisionTransformer, folder: Path, classes: list[str]) -> None:
    """model.onnx: `pixel_values` (batch, C, H, W), normalised -> `features`, `logits`; any batch size, one image size."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(outputs_of(vit, _example(vit)))
    with _quietly():
        torch.onnx.export(
            ExportWrapper(vit.eval()), (_example(vit),), str(folder / "model.onnx"), dynamo=True, external_data=False,
            input_names=["pixel_values"], output_names=names, opset_version=OPSET, verbose=False,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )  # fmt: skip


def read_onnx(folder: Path) -> dict[str, Reader]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def read(pixels: Tensor) -> Outputs:
        given = session.run(names, {"pixel_values": pixels.numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(names, given, strict=True)}

    return {"onnxruntime": read}


def write_torch_export(vit: VisionTransformer, folder: Path, classes: list[str]) -> None:
    """model.pt2: the program of `torch.export`, for any batch size; no Python class of ours or timm's is needed."""
    folder.mkdir(parents=True, exist_ok=True)
    with _quietly():
        program = torch.export.export(
            ExportWrapper(vit.eval()), (_example(vit),), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
        torch.export.save(program, folder / "model.pt2")


def read_torch_export(folder: Path) -> dict[str, Reader]:
    with _quietly():
        module = torch.export.load(folder / "model.pt2").module()

    def read(pixels: Tensor) -> Outputs:
        with torch.inference_mode():
            return _named(module(pixels))

    return {"torch.export": read}


def _example(vit: VisionTransformer) -> Float[Tensor, "2 C H W"]:
    return torch.zeros(2, vit.in_chans, *vit.patch_embed.img_size)


FORMATS = {
    "timm": Format(write_timm, read_timm),
    "transformers": Format(write_transformers, read_transformers, ("transformers",)),
    "onnx": Format(write_onnx, read_onnx, ("onnx", "onnxscript", "onnxruntime")),
    "torch-export": Format(write_torch_export, read_torch_export),
}
