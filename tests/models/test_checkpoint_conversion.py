"""Weights files in the layouts that others publish, written here in those formats, against the ViT they are of."""

import argparse
import json
import logging
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer

import mapet
from mapet.cli import main
from mapet.data.views import input_mean_std
from mapet.errors import MapetError
from mapet.models.backbone import create_vit, init_from, load_backbone, save_backbone
from tests.refused import fails, refused

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def vit_of(size=(16, 16), patch=4, channels=3, **more):
    torch.manual_seed(1)
    vit = VisionTransformer(size, patch, channels, num_classes=0, **(TINY | more)).eval()
    with torch.no_grad():  # so that nothing is at its special first value
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return vit


def images(size=(16, 16), channels=3, count=2):
    return torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(2))


def is_close(a, b, tolerance=1e-5):
    return ((a - b).abs().max() / b.std()).item() < tolerance


def split(weights, names):
    """qkv of each block in pieces, `names` -> how many of q, k, v."""
    out = {}
    for name, tensor in weights.items():
        if ".qkv." in name:
            for piece, part in zip(names, tensor.split([n * len(tensor) // 3 for n in names.values()]), strict=True):
                out[name.replace("qkv", piece)] = part
        else:
            out[name] = tensor
    return out


def released(vit):
    """The authors' files: a training pickle of timm's, q and kv apart, a mask token, a token head."""
    weights = split(vit.state_dict(), {"q": 1, "kv": 2})
    more = {"mask_token": torch.zeros(1, 1, 32), "head.weight": torch.zeros(64, 32), "head.bias": torch.zeros(64)}
    return {"epoch": 299, "arch": "vit_tiny", "args": argparse.Namespace(lr=1.5e-3), "state_dict": weights | more}


def mae(vit):
    decoder = {"mask_token": torch.zeros(1, 1, 16), "decoder_embed.weight": torch.zeros(16, 32)}
    decoder |= {"decoder_blocks.0.attn.qkv.weight": torch.zeros(48, 16), "decoder_pos_embed": torch.zeros(1, 17, 16)}
    return {"model": vit.state_dict() | decoder}


def dino(vit):
    def network(weights):
        return {f"backbone.{k}": v for k, v in weights.items()} | {"head.mlp.0.weight": torch.zeros(8, 32)}

    student = {f"module.{k}": torch.zeros_like(v) for k, v in network(vit.state_dict()).items()}
    return {
        "student": student,
        "teacher": network(vit.state_dict()),
        "epoch": 99,
        "args": argparse.Namespace(arch="vit_small"),
    }


def chunked(vit):
    """DINOv2's training runs: all in one dictionary, blocks in chunks."""

    def renamed(name):
        return name.replace("blocks.", "blocks.0.")

    weights = {f"student.backbone.{renamed(k)}": torch.zeros_like(v) for k, v in vit.state_dict().items()}
    weights |= {f"teacher.backbone.{renamed(k)}": v for k, v in vit.state_dict().items()}
    return {
        "model": weights | {"teacher.backbone.mask_token": torch.zeros(1, 32), "teacher.dino_head.w": torch.ones(2)}
    }


LAYOUTS = {
    "released": (released, {"init_values": 0.1}),
    "mae": (mae, {}),
    "dino": (dino, {}),
    "dinov2 run": (chunked, {"init_values": 1e-5}),
    "timm": (lambda vit: vit.state_dict() | {"head.weight": torch.ones(5, 32), "head.bias": torch.ones(5)}, {}),
    "torch.compile": (lambda vit: {"model": {f"_orig_mod.{k}": v for k, v in vit.state_dict().items()}}, {}),
    "half": (lambda vit: {k: v.bfloat16() for k, v in vit.state_dict().items()}, {}),
    "no class token": (lambda vit: vit.state_dict(), {"class_token": False, "global_pool": "avg", "fc_norm": False}),
    "registers": (lambda vit: vit.state_dict(), {"reg_tokens": 3, "no_embed_class": True}),
    "CLIP's norms": (lambda vit: vit.state_dict(), {"pre_norm": True, "qk_norm": True}),
    "fine-tuned": (lambda vit: vit.state_dict(), {"global_pool": "avg"}),
    "no bias": (lambda vit: vit.state_dict(), {"qkv_bias": False, "mlp_ratio": 2.7}),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_features(layout, tmp_path):
    write, options = LAYOUTS[layout]
    vit = vit_of(**options)
    torch.save(write(vit), tmp_path / "weights.tar")
    loaded = load_backbone(tmp_path / "weights.tar", num_heads=2).eval()
    assert type(loaded) is VisionTransformer and loaded.num_classes == 0
    if layout == "half":
        vit.load_state_dict({k: v.bfloat16().float() for k, v in vit.state_dict().items()})
    assert torch.equal(loaded.forward_features(images()), vit.forward_features(images()))
    assert torch.equal(loaded(images()), vit(images()))


def test_dinov2_with_registers(tmp_path):
    """As published: the class token has a position, registers have none."""
    vit = vit_of(patch=4, init_values=0.1, reg_tokens=4, no_embed_class=True)
    weights = vit.state_dict()
    position = torch.randn(1, 1, 32)
    weights["pos_embed"] = torch.cat([position, weights["pos_embed"]], dim=1)
    weights["cls_token"] = weights["cls_token"] - position
    weights["register_tokens"] = weights.pop("reg_token")
    torch.save(weights | {"mask_token": torch.zeros(1, 32)}, tmp_path / "dinov2.pth")
    loaded = load_backbone(tmp_path / "dinov2.pth", num_heads=2).eval()
    assert is_close(loaded.forward_features(images()), vit.forward_features(images()))
    start = vit_of(init_values=0.1, reg_tokens=4)  # a ViT whose registers have positions
    init_from(start, tmp_path / "dinov2.pth")
    assert is_close(start.forward_features(images()), vit.forward_features(images()))


def published_beit(positions):
    torch.manual_seed(0)
    beit = Beit(
        16, 4, num_classes=0, **TINY, init_values=0.1, use_abs_pos_emb=positions, use_rel_pos_bias=not positions,
        global_pool="token",
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in beit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    more = {"mask_token": torch.zeros(1, 1, 32), "lm_head.weight": torch.zeros(9, 32)}
    return beit, {"model": beit.state_dict() | more}


def test_beit_with_absolute_positions_is_the_same_function(tmp_path):
    beit, file = published_beit(positions=True)
    torch.save(file, tmp_path / "beit.pth")
    loaded = load_backbone(tmp_path / "beit.pth", num_heads=2).eval()
    assert is_close(loaded.forward_features(images()), beit.forward_features(images()))


def test_beit_with_relative_positions_is_refused_and_can_be_started_from(tmp_path, caplog):
    caplog.set_level(logging.INFO, "mapet")
    beit, file = published_beit(positions=False)
    torch.save(file, tmp_path / "beit.pth")
    with refused("beit.pth", "relative position bias", "--init-from"):
        load_backbone(tmp_path / "beit.pth", num_heads=2)
    vit = vit_of(init_values=0.1)
    positions = vit.pos_embed.clone()
    init_from(vit, tmp_path / "beit.pth")
    assert torch.equal(vit.blocks[1].mlp.fc1.weight, beit.blocks[1].mlp.fc1.weight)
    assert torch.equal(vit.blocks[0].ls1.gamma, beit.blocks[0].gamma_1) and torch.equal(vit.pos_embed, positions)
    assert "has relative position bias" in caplog.text and "positions are new" in caplog.text
    assert "no part of the encoder: lm_head, mask_token" in caplog.text


@pytest.mark.parametrize("kind", ["timm folder", "timm name", "transformers"])
def test_beit_as_others_keep_it_can_be_started_from(kind, tmp_path, monkeypatch, caplog):
    """Written by timm and transformers themselves: heads and normalization are known, relative positions have no place."""
    caplog.set_level(logging.INFO, "mapet")
    source, stats = str(tmp_path / "beit"), {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    if kind == "transformers":
        transformers = pytest.importorskip("transformers")
        beit = transformers.BeitModel(
            transformers.BeitConfig(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=16, patch_size=4,
                use_relative_position_bias=True, layer_norm_eps=1e-6,
            )
        )  # fmt: skip
        beit.save_pretrained(source)
        preprocessor = {"image_mean": stats["mean"], "image_std": stats["std"], "do_normalize": True}
        (tmp_path / "beit" / "preprocessor_config.json").write_text(json.dumps(preprocessor))
        weights = load_file(tmp_path / "beit" / "model.safetensors")  # modules are named otherwise in every version
        names = ("lambda_2", "intermediate.dense.weight", "attention.attention.key.weight")
        scale, linear, projection = (weights[f"encoder.layer.1.{name}"] for name in names)
        patches = beit.embeddings.patch_embeddings.projection
    else:
        beit = timm.create_model("beit_base_patch16_224", img_size=16, patch_size=4, num_classes=0, **TINY)
        beit.pretrained_cfg = beit.default_cfg = beit.pretrained_cfg | stats | {"input_size": (3, 16, 16)}
        with torch.no_grad():
            beit.blocks[1].gamma_2.normal_()
        if kind == "timm folder":
            timm.models.save_for_hf(beit, source, safe_serialization=True)
        else:
            source = "timm:beit_base_patch16_224"
            monkeypatch.setattr("mapet.models.backbone.create_timm_model", lambda *_: beit)
        block = beit.blocks[1]
        scale, linear, projection = block.gamma_2, block.mlp.fc1.weight, block.attn.qkv.weight[32:64]
        patches = beit.patch_embed.proj
    vit = vit_of(init_values=0.1)
    init_from(vit, source)
    assert torch.equal(vit.blocks[1].ls2.gamma, scale) and torch.equal(vit.blocks[1].mlp.fc1.weight, linear)
    assert torch.equal(vit.blocks[1].attn.qkv.weight[32:64], projection)
    assert not vit.blocks[1].attn.qkv.bias[32:64].any()  # keys have none
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in input_mean_std(3))
    pixels = images().sigmoid()
    assert is_close(vit.patch_embed((pixels - mean) / std), patches((pixels - 0.5) / 0.5).flatten(2).mT)
    assert "has relative position bias" in caplog.text
    with refused("--init-from"):
        load_backbone(source)


def save_timm_folder(vit, folder, mean, std):
    save_backbone(vit, folder)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= {"mean": mean, "std": std}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("pre_norm", [False, True])
def test_another_normalization_goes_into_the_patch_embedding(pre_norm, tmp_path):
    """Also where it has no bias: then into the positions."""
    vit = create_vit("vit_tiny_patch16_224", (16, 16), 4, model_args=TINY | {"pre_norm": pre_norm}).eval()
    mean, std = [0.5, 0.4, 0.3], [0.5, 0.6, 0.2]
    save_timm_folder(vit, tmp_path / "vit", mean, std)
    pixels = images().sigmoid()

    def normal(stats):
        return (pixels - torch.tensor(stats[0]).view(-1, 1, 1)) / torch.tensor(stats[1]).view(-1, 1, 1)

    loaded = load_backbone(tmp_path / "vit").eval()
    assert is_close(loaded.forward_features(normal(input_mean_std(3))), vit.forward_features(normal((mean, std))))


@pytest.mark.parametrize("stats", [([0.5, 0.4, 0.3], [0.5, 0.6, 0.2]), input_mean_std(3)])
def test_one_channel_equals_rgb_on_gray_images(stats, tmp_path):
    vit = create_vit("vit_tiny_patch16_224", (16, 16), 4, model_args=TINY).eval()
    save_timm_folder(vit, tmp_path / "vit", *map(list, stats))
    gray = images(channels=1).sigmoid()
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in stats)
    of_rgb = vit.forward_features((gray.expand(-1, 3, -1, -1) - mean) / std)
    for channels in (1, 6):  # six equal bands: three times the mean of two
        loaded = load_backbone(tmp_path / "vit", in_chans=channels).eval()
        assert is_close(loaded.forward_features((gray.expand(-1, channels, -1, -1) - 0.5) / 0.25), of_rgb)


@pytest.mark.parametrize(("size", "patch"), [((24, 40), 4), ((16, 16), 8), ((20, 30), 5)])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_other_grids_and_patches_as_timm_resamples_them(kind, size, patch, tmp_path):
    vit = create_vit("vit_tiny_patch16_224", (16, 16), 4, model_args=TINY)
    save_backbone(vit, tmp_path / "vit")
    source = tmp_path / "vit" / ("" if kind == "folder" else "model.safetensors")
    loaded = load_backbone(source, img_size=size, patch_size=patch, **({"num_heads": 2} if kind == "file" else {}))
    timms = timm.create_model(f"local-dir:{tmp_path / 'vit'}", pretrained=True, img_size=size, patch_size=patch)
    for name, tensor in timms.state_dict().items():
        assert torch.allclose(loaded.state_dict()[name], tensor, atol=1e-6), name
    by_hand = F.interpolate(
        vit.pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2),
        (size[0] // patch, size[1] // patch), mode="bicubic", antialias=True,
    )  # fmt: skip
    assert torch.allclose(loaded.pos_embed[:, 1:], by_hand.flatten(2).transpose(1, 2), atol=1e-6)


def test_positions_that_tell_no_grid(tmp_path):
    vit = vit_of(size=(12, 24))
    torch.save(vit.state_dict(), tmp_path / "wide.pth")
    with refused("wide.pth", 19, "img_size"):
        load_backbone(tmp_path / "wide.pth", num_heads=2, in_chans=3)
    loaded = load_backbone(tmp_path / "wide.pth", num_heads=2, img_size=(12, 24)).eval()
    assert torch.equal(loaded.forward_features(images((12, 24))), vit.forward_features(images((12, 24))))


def test_layer_scale_comes_and_goes_without_a_change(tmp_path, caplog):
    caplog.set_level(logging.INFO, "mapet")
    without, scaled = vit_of(), vit_of(init_values=0.3)
    for vit, other, warning in (
        (without, scaled, "LayerScale starts at 1"),
        (scaled, without, "multiplied into the layers"),
    ):
        torch.save(vit.state_dict(), tmp_path / "vit.pth")
        start = vit_of(init_values=0.1) if other is scaled else vit_of()
        init_from(start, tmp_path / "vit.pth")
        assert is_close(start.forward_features(images()), vit.forward_features(images()))
        assert warning in caplog.text


def test_tokens_come_and_go(tmp_path, caplog):
    caplog.set_level(logging.INFO, "mapet")
    vit = vit_of()
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    registers = vit_of(reg_tokens=2)
    own = registers.reg_token.clone()
    init_from(registers, tmp_path / "vit.pth")
    assert torch.equal(registers.reg_token, own) and "register tokens new" in caplog.text
    assert torch.equal(registers.pos_embed[:, 0], vit.pos_embed[:, 0])
    assert torch.equal(registers.pos_embed[:, 3:], vit.pos_embed[:, 1:])
    pooled = vit_of(class_token=False, global_pool="avg", fc_norm=False)
    init_from(pooled, tmp_path / "vit.pth")
    assert torch.equal(pooled.pos_embed, vit.pos_embed[:, 1:]) and "class token omitted" in caplog.text


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"embed_dim": 64}, ["width 32", "depth 2", "blocks.0."]),
        ({"depth": 3}, ["blocks.2.attn.proj.bias"]),
        ({"depth": 1}, ["blocks.1."]),
        ({"mlp_ratio": 2}, ["blocks.0.mlp.fc1"]),
    ],
)
def test_another_network(change, named, tmp_path):
    torch.save(vit_of().state_dict(), tmp_path / "vit.pth")
    with refused(*named):
        init_from(vit_of(**change), tmp_path / "vit.pth")


def test_heads_and_activation_are_compared_where_they_are_known(tmp_path):
    save_backbone(create_vit("vit_tiny_patch16_224", (16, 16), 4, model_args=TINY), tmp_path / "vit")
    with refused("attention heads", 2, 4):
        init_from(vit_of(num_heads=4), tmp_path / "vit")
    with refused("GELU", "ReLU"):
        init_from(vit_of(act_layer=torch.nn.ReLU), tmp_path / "vit")


def refused_reason(tmp_path, content, **options):
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(MapetError) as error:
        load_backbone(tmp_path / "file.pth", **options)
    assert "\n" not in str(error.value) and "file.pth" in str(error.value)
    return str(error.value)


def test_what_is_no_plain_vit(tmp_path):
    weights = vit_of().state_dict()
    assert "give it to `mapet export` as model_args num_heads=N" in refused_reason(tmp_path, weights)
    assert "not a ViT in a supported layout" in refused_reason(tmp_path, {"conv1.weight": torch.zeros(2, 3, 7, 7)})
    less = {name: tensor for name, tensor in weights.items() if "attn.proj" not in name}
    assert "missing: blocks.0.attn.proj.bias" in refused_reason(tmp_path, less, num_heads=2)
    q_alone = {name: tensor for name, tensor in split(weights, {"q": 1, "kv": 2}).items() if ".kv." not in name}
    assert "not the weights of a whole ViT: it has no blocks.0.attn.k." in refused_reason(
        tmp_path, q_alone, num_heads=2
    )
    assert "distillation token" in refused_reason(
        tmp_path, weights | {"dist_token": torch.zeros(1, 1, 32)}, num_heads=2
    )
    assert "gated MLP" in refused_reason(
        tmp_path, weights | {"blocks.0.mlp.w12.weight": torch.zeros(9, 32)}, num_heads=2
    )
    assert "rotary" in refused_reason(tmp_path, weights | {"rope_embed.periods": torch.zeros(9)}, num_heads=2)
    with refused("timm:NAME"):
        load_backbone(tmp_path)


def test_timm_names_offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with refused("vit_tiny_patch16_224.augreg_in21k"):
        load_backbone("timm:vit_tiny_patch16_224.augreg_in21k")
    for keyword, meant in (("num_clases", "num_classes"), ("width", "embed_dim")):
        with refused(f"'{keyword}'", f"'{meant}'"):
            load_backbone("timm:vit_tiny_patch16_224", pretrained=False, **{keyword: 7})
    for name, meant in (
        ("vit_tiny", "timm:vit_tiny_patch16_224"), ("mae", "timm:vit_base_patch16_224.mae"), ("dinov2", "timm:vit_base_patch14_dinov2"),
    ):  # fmt: skip
        with refused(name, f"'{meant}'"):
            load_backbone(name)
    with refused("nowhere/vit"):
        load_backbone("nowhere/vit")
    with refused("'vit_tinny_patch16_224'", "'vit_tiny_patch16_224'"):
        load_backbone("timm:vit_tinny_patch16_224")


def test_timm_names(monkeypatch):
    """With weights that timm finds: here in its own way of naming a local copy."""
    original = timm.create_model
    vit = original("test_vit", num_classes=0).eval()

    def create(name, pretrained=False, **options):
        overlay = {"state_dict": vit.state_dict()} if pretrained else None
        return original(name, pretrained=pretrained, pretrained_cfg_overlay=overlay, **options)

    monkeypatch.setattr(timm, "create_model", create)
    loaded = load_backbone("timm:test_vit").eval()
    mean, std = (torch.tensor(vit.pretrained_cfg[key]).view(-1, 1, 1) for key in ("mean", "std"))
    our_mean, our_std = (torch.tensor(values).view(-1, 1, 1) for values in input_mean_std(3))
    pixels = images((160, 160)).sigmoid()
    ours, timms = (pixels - our_mean) / our_std, (pixels - mean) / std
    assert is_close(loaded.forward_features(ours), vit.forward_features(timms))
    assert load_backbone("timm:test_vit", img_size=(64, 32)).patch_embed.grid_size == (4, 2)


@pytest.mark.parametrize("kind", ["vit", "classifier", "own names"])
def test_hugging_face_folders(kind, tmp_path):
    """Written by transformers itself."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=80,
        image_size=[16, 24],
        patch_size=8,
    )
    torch.manual_seed(0)
    model = (transformers.ViTForImageClassification if kind == "classifier" else transformers.ViTModel)(config).eval()
    model.save_pretrained(tmp_path / "vit")
    if kind == "own names":  # as torch.save(model.state_dict()) has them
        save_file({k: v.clone() for k, v in model.state_dict().items()}, tmp_path / "vit" / "model.safetensors")
    stats = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_normalize": True}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(stats))
    pixels = images((16, 24)).sigmoid()
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in input_mean_std(3))
    with torch.no_grad():
        base = model.vit if kind == "classifier" else model
        expected = base((pixels - 0.5) / 0.5).last_hidden_state
        assert is_close(load_backbone(tmp_path / "vit").eval().forward_features((pixels - mean) / std), expected)


def test_pretraining_starts_from_a_released_file(few_digits, tokenizer_dir, tokens_dir, tmp_path, caplog):
    """RGB at another grid, without LayerScale, into a run on gray digits."""
    from tests.conftest import PRETRAIN

    caplog.set_level(logging.INFO, "mapet")
    vit = vit_of(size=(12, 12), patch=4)
    torch.save(released(vit), tmp_path / "vit_standard_tiny.tar")
    mapet.pretrain(
        images=few_digits, tokenizer=tokenizer_dir, tokens=tokens_dir, out=tmp_path / "run", init_from=tmp_path / "vit_standard_tiny.tar",
        **(PRETRAIN | {"lr": 1e-12, "min_lr": 0.0, "weight_decay": 0.0, "epochs": 1}),
    )  # fmt: skip
    trained = load_backbone(tmp_path / "run").eval()
    expected = load_backbone(
        tmp_path / "vit_standard_tiny.tar", num_heads=2, img_size=(8, 8), patch_size=2, in_chans=1
    ).eval()
    assert is_close(trained.forward_features(images((8, 8), 1)), expected.forward_features(images((8, 8), 1)))
    for warning in ("adapted from 3 to 1 channels", "resampled from 4 x 4 to 2 x 2 px", "from 3 x 3 to 4 x 4 patches",
                  "LayerScale starts at 1", "no part of the encoder: head, mask_token"):  # fmt: skip
        assert warning in caplog.text


def test_eps_of_a_folder_is_kept_in_the_function(tmp_path):
    vit = vit_of(norm_layer=partial(torch.nn.LayerNorm, eps=1e-2))
    torch.save(vit.state_dict(), tmp_path / "pytorch_model.bin")
    config = {"model_type": "vit", "num_attention_heads": 2, "image_size": 16, "layer_norm_eps": 1e-2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(load_backbone(tmp_path).eval().forward_features(images()), vit.forward_features(images()))


def test_a_classifier_that_is_asked_for_is_fresh(tmp_path):
    """Also where the source has one of as many classes."""
    vit = create_vit("vit_tiny_patch16_224", (16, 16), 4, 3, {"embed_dim": 32, "depth": 1, "num_heads": 2})
    vit.reset_classifier(3)
    save_backbone(vit, tmp_path / "vit")
    assert torch.equal(load_backbone(tmp_path / "vit").head.weight, vit.head.weight)
    fresh = load_backbone(tmp_path / "vit", num_classes=3)
    assert not torch.equal(fresh.head.weight, vit.head.weight) and torch.equal(fresh.norm.weight, vit.norm.weight)
    assert load_backbone(tmp_path / "vit", num_classes=0).num_classes == 0


def test_commands_take_what_a_file_doesn_t_have(digits, tmp_path, capsys):
    """A width that no published ViT has: the number of heads is to be given."""
    file = tmp_path / "weights.pth"
    torch.save(vit_of((8, 8), channels=1).state_dict(), file)
    common = ["--images", str(digits / "test"), "--device", "cpu"]
    for command, *more in (
        ["finetune", "--labels-per-class", "2", "--epochs", "1"],
        ["evaluate", "--protocols", "knn"],
    ):
        argv = [command, "--backbone", str(file), *common, *more]
        fails(capsys, *argv, named=["`mapet export`", "--model-args num_heads=N"])
        folder = tmp_path / command
        assert main(["export", "--backbone", str(file), "--out", str(folder), "--model-args", "num_heads=2"]) == 0
        argv[2] = str(folder)
        assert main(argv) == 0
