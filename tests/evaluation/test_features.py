"""What `evaluate` sees of a backbone, against the original model on pixels as it was trained to take them."""

import json
import re

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import save_for_hf

from mapet.device import ComputeContext
from mapet.evaluation.features import BackboneWrapper
from mapet.models.backbone import save_backbone
from tests.refused import refused

CPU = ComputeContext(torch.device("cpu"), torch.float32)
IMAGENET = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
HALF, ODD, NONE = ((0.5,) * 3, (0.5,) * 3), ((0.5, 0.4, 0.3), (0.5, 0.6, 0.2)), ((0.0,) * 3, (1.0,) * 3)


pytestmark = pytest.mark.usefixtures("one_thread")


def original(size=(32, 32), channels=3, **more):
    """A ViT of a published width, from which the number of heads follows, at an unusual size."""
    torch.manual_seed(0)
    options = {"img_size": size, "patch_size": 8, "depth": 2, "in_chans": channels, "num_classes": 0} | more
    vit = timm.create_model("vit_tiny_patch16_224", **options).eval()
    with torch.no_grad():  # nothing at its special first value
        for parameter in vit.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return vit


def some_images(size=(32, 32), channels=3):
    return torch.randint(0, 256, (3, channels, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def layers_of(vit, images, stats):
    """Tokens after each block and the last norm, written out."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in stats)
    x = vit.patch_drop(vit._pos_embed(vit.patch_embed((images.double() / 255 - mean).div(std).float())))
    tokens = []
    for block in vit.blocks:
        x = block(x)
        tokens.append(vit.norm(x))
    return tokens


def assert_sees_as(encoder, vit, stats, size=(32, 32), channels=3, eps=1e-5):
    assert (encoder.image_size, encoder.channels) == (size, channels)
    images = some_images(size, channels)
    tokens = layers_of(vit, images, stats)
    for pool, pooled in (("mean", lambda x: x[:, 1:].mean(1)), ("cls", lambda x: x[:, 0])):
        for result, expected in zip(encoder.pooled_features(images, [0, 1], pool), tokens, strict=True):
            assert float((result - pooled(expected)).abs().max()) < eps
    patches = encoder.last_layer(images).flatten(2).transpose(1, 2)
    assert float((patches - tokens[1][:, 1:]).abs().max()) < 2 * eps


def mae(vit):
    decoder = {"mask_token": torch.zeros(1, 1, 16), "decoder_embed.weight": torch.zeros(16, 192)}
    return {"model": vit.state_dict() | decoder}


def test_a_weights_file(tmp_path):
    """In MAE's and timm's layout, without normalization: ImageNet's is assumed."""
    vit = original()
    torch.save(mae(vit), tmp_path / "mae_pretrain.pth")
    save_file(vit.state_dict() | {"head.weight": torch.ones(5, 192)}, tmp_path / "model.safetensors")
    for name in ("mae_pretrain.pth", "model.safetensors"):
        assert_sees_as(BackboneWrapper.load(str(tmp_path / name), CPU), vit, IMAGENET)


@pytest.mark.parametrize("stats", [IMAGENET, HALF, ODD])
@pytest.mark.parametrize("size", [(32, 32), (16, 40)])
def test_a_timm_folder(stats, size, tmp_path):
    """As timm writes it for any model."""
    vit = original(size)
    data = {"input_size": (3, *size), "mean": stats[0], "std": stats[1]}
    args = {"img_size": size, "patch_size": 8, "depth": 2}
    save_for_hf(vit, str(tmp_path / "vit"), model_args=args, data_config=data, safe_serialization=True)
    for source in (f"{tmp_path}/vit", f"local-dir:{tmp_path}/vit"):
        assert_sees_as(BackboneWrapper.load(source, CPU), vit, stats, size)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels(channels, tmp_path):
    vit = original(channels=channels)
    save_backbone(vit, tmp_path / "vit")
    encoder = BackboneWrapper.load(str(tmp_path / "vit"), CPU)
    assert_sees_as(encoder, vit, ((0.5,) * channels, (0.25,) * channels), channels=channels)


def hugging_face_names(weights):
    """timm's names and its joined queries, keys and values, as transformers' ViTModel has them."""
    renamed = {}
    for name, tensor in weights.items():
        for pattern, new in (
            (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."), (r"^pos_embed$", "embeddings.position_embeddings"),
            (r"^cls_token$", "embeddings.cls_token"), (r"^norm\.", "layernorm."), (r"^blocks\.", "encoder.layer."),
            (r"\.norm1\.", ".layernorm_before."), (r"\.norm2\.", ".layernorm_after."), (r"\.attn\.proj\.", ".attention.output.dense."),
            (r"\.mlp\.fc1\.", ".intermediate.dense."), (r"\.mlp\.fc2\.", ".output.dense."),
        ):  # fmt: skip
            name = re.sub(pattern, new, name)
        if ".attn.qkv." in name:
            for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[name.replace(".attn.qkv.", f".attention.attention.{part}.")] = third.contiguous()
        else:
            renamed[name] = tensor
    return renamed


@pytest.mark.parametrize(
    ("preprocessor", "stats"),
    [
        ({"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}, HALF),
        ({"image_mean": list(IMAGENET[0]), "image_std": list(IMAGENET[1])}, IMAGENET),
        ({"do_normalize": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}, NONE),
        (None, IMAGENET),
    ],
)
def test_a_hugging_face_folder(preprocessor, stats, tmp_path):
    vit = original()
    save_file(hugging_face_names(vit.state_dict()), tmp_path / "model.safetensors")
    config = {"model_type": "vit", "num_attention_heads": 3, "image_size": 32, "layer_norm_eps": 1e-6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if preprocessor:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    assert_sees_as(BackboneWrapper.load(str(tmp_path), CPU), vit, stats)


def test_a_folder_that_transformers_writes(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8
    )
    torch.manual_seed(0)
    model = transformers.ViTModel(config).eval()
    model.save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}, do_normalize=False).save_pretrained(tmp_path)
    images = some_images()
    with torch.inference_mode():
        expected = model(images / 255).last_hidden_state[:, 0]
    result = BackboneWrapper.load(str(tmp_path), CPU).pooled_features(images, [1], "cls")[0]
    assert float((result - expected).abs().max()) < 1e-5


def test_random_weights_of_a_folder_take_its_size_and_our_pixels(tmp_path):
    save_backbone(original((16, 40)), tmp_path / "vit")
    first, again, other = (BackboneWrapper.load(f"random:{tmp_path / 'vit'}", CPU, seed) for seed in (0, 0, 1))
    assert (first.image_size, first.mean, first.std) == ((16, 40), *IMAGENET)
    result = [encoder.pooled_features(some_images((16, 40)), [1], "mean")[0] for encoder in (first, again, other)]
    assert torch.equal(result[0], result[1]) and not torch.allclose(result[0], result[2], atol=0.01)


FAMILIES = {
    # name: (layers, widths of the first and the last)
    "efficientnet_lite0": (5, 16, 320),
    "mobilenetv3_small_050": (5, 16, 288),
    "xcit_nano_12_p8_224": (12, 128, 128),
    "cait_xxs24_224": (24, 192, 192),
    "hiera_tiny_224": (4, 96, 768),
    "resnet10t": (5, 64, 512),
    "convnext_atto": (4, 40, 320),
    "swin_tiny_patch4_window7_224": (4, 96, 768),
    "mixer_s32_224": (8, 512, 512),
    "deit_tiny_distilled_patch16_224": (12, 192, 192),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_of_timm(name):
    """Layers are timm's own, of pixels normalized as the model's, the last norm taken where timm takes it."""
    layers, first, last = FAMILIES[name]
    encoder = BackboneWrapper.load(f"random:{name}", CPU)
    data = timm.data.resolve_model_data_config(encoder.model)
    assert encoder.image_size == tuple(data["input_size"][1:])
    images = some_images(encoder.image_size)[:1]
    result = encoder.pooled_features(images, [0, layers - 1], "mean")
    assert [part.shape for part in result] == [(1, first), (1, last)]
    mean, std = (torch.tensor(data[key]).view(-1, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        norm = {} if name.startswith("hiera") else {"norm": True}
        grids = encoder.model.forward_intermediates((images / 255 - mean) / std, intermediates_only=True, **norm)
    assert len(grids) == layers
    for part, grid in ((result[0], grids[0]), (result[1], grids[-1])):
        torch.testing.assert_close(part, grid.mean((2, 3)), atol=1e-5, rtol=1e-4)
    assert torch.equal(encoder.last_layer(images), grids[-1])


def test_a_class_token_that_timm_does_not_give():
    encoder = BackboneWrapper.load("random:xcit_nano_12_p8_224", CPU)
    with refused("cls", field="pool"):
        encoder.pooled_features(some_images(encoder.image_size)[:1], [1], "cls")


@pytest.mark.parametrize(
    ("name", "size"), [("xcit_nano_12_p8_224", 72), ("hiera_tiny_224", 224), ("resnet10t", 96), ("test_vit", 80)]
)
def test_families_at_other_sizes(name, size):
    """In multiples of what they take; where a network can't, the error says so."""
    encoder = BackboneWrapper.load(f"random:{name}", CPU)
    assert size % encoder.patch_size == 0
    resized = encoder.with_image_size((size, size))
    assert resized.image_size == (size, size)
    assert resized.last_layer(some_images((size, size))[:1]).isfinite().all()


def test_a_size_that_a_network_cannot_take():
    with refused("random:mixer_s32_224", "96 x 96"):
        BackboneWrapper.load("random:mixer_s32_224", CPU).with_image_size((96, 96))
