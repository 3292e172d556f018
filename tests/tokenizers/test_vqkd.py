"""BEiT v2's tokenizer: published files, codes, and how it is trained."""

import argparse
import json
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer

import mapet
from mapet.config.tokenizers import TrainTokenizerConfig
from mapet.models.backbone import create_vit
from mapet.tokenizers import vqkd
from mapet.tokenizers.kmeans import KMeans
from mapet.tokenizers.vqkd import USAGE_PATCHES_PER_CODE, VQKD, VQKDForTraining, load_vqkd, nearest_code
from tests.refused import refused


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """One thread: several are slower for models this small."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def two_threads():
    """Return a fixed precision instead of a timing."""


def transformer(width, depth, patch, channels, side, device="cpu"):
    """Random weights under the released code's names."""

    def random(*shape):
        return torch.randn(*shape, device=device) * 0.2

    weights = {
        "cls_token": random(1, 1, width),
        "pos_embed": random(1, side * side + 1, width),
        "patch_embed.proj.weight": random(width, channels, patch, patch),
        "patch_embed.proj.bias": random(width),
        "fc_norm.weight": random(width) + 1,
        "fc_norm.bias": random(width),
    }
    for block in range(depth):
        of_block = {
            "norm1.weight": random(width) + 1,
            "norm1.bias": random(width),
            "attn.q_bias": random(width),
            "attn.v_bias": random(width),
            "attn.qkv.weight": random(3 * width, width),
            "attn.proj.weight": random(width, width),
            "attn.proj.bias": random(width),
            "norm2.weight": random(width) + 1,
            "norm2.bias": random(width),
            "mlp.fc1.weight": random(4 * width, width),
            "mlp.fc1.bias": random(4 * width),
            "mlp.fc2.weight": random(width, 4 * width),
            "mlp.fc2.bias": random(width),
        }
        weights |= {f"blocks.{block}.{name}": tensor for name, tensor in of_block.items()}
    return weights


def checkpoint(width=128, depth=2, patch=4, side=3, codes=20, dims=8, decoder_depth=1, features=12, device="cpu"):
    """A tokenizer in the published layout; two heads of 64 numbers."""
    torch.manual_seed(0)

    def task(out):
        linear = {"0.weight": (width, width), "0.bias": (width,), "2.weight": (out, width), "2.bias": (out,)}
        return {name: torch.randn(*shape, device=device) * 0.2 for name, shape in linear.items()}

    parts = {
        "encoder": transformer(width, depth, patch, 3, side, device),
        "decoder": transformer(width, decoder_depth, 1, dims, side, device),
        "encode_task_layer": task(dims),
        "decode_task_layer": task(features),
        "quantize": {
            "cluster_size": torch.ones(codes, device=device),
            "embedding.weight": F.normalize(torch.randn(codes, dims, device=device), dim=1),
            "embedding.cluster_size": torch.ones(codes, device=device),
            "embedding.embed_avg": torch.randn(codes, dims, device=device),
            "embedding.initted": torch.ones(1, device=device),
        },
    }
    return {f"{part}.{name}": tensor for part, weights in parts.items() for name, tensor in weights.items()}


def plainly(weights, images):
    """The encoder written out from the published names, with BEiT's attention; heads of 64 numbers."""
    w = {name: tensor.double() for name, tensor in weights.items()}

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return torch.einsum("...i,oi->...o", x, w[name + ".weight"]) + w[name + ".bias"]

    kernel = w["encoder.patch_embed.proj.weight"]
    patch = kernel.shape[-1]
    pixels = (images.double() * 255 / 127.5 - 1).unfold(2, patch, patch).unfold(3, patch, patch)
    x = torch.einsum("bcrspq,dcpq->brsd", pixels, kernel).flatten(1, 2) + w["encoder.patch_embed.proj.bias"]
    x = torch.cat([w["encoder.cls_token"].expand(len(x), -1, -1), x], 1) + w["encoder.pos_embed"]
    for block in range(sum(name.endswith("attn.q_bias") for name in w if name.startswith("encoder"))):
        name = f"encoder.blocks.{block}."
        q, k, v = torch.einsum(
            "bni,thoi->tbhno",
            norm(x, name + "norm1"),
            w[name + "attn.qkv.weight"].view(3, -1, 64, x.shape[-1]),
        )
        q = (q + w[name + "attn.q_bias"].view(-1, 1, 64)) / math.sqrt(64)
        v = v + w[name + "attn.v_bias"].view(-1, 1, 64)
        seen = torch.einsum("bhqk,bhko->bqho", torch.einsum("bhqo,bhko->bhqk", q, k).softmax(-1), v)
        x = x + linear(seen.flatten(2), name + "attn.proj")
        hidden = linear(norm(x, name + "norm2"), name + "mlp.fc1")
        x = x + linear(hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2, name + "mlp.fc2")
    x = norm(x[:, 1:], "encoder.fc_norm")
    x = linear(linear(x, "encode_task_layer.0").tanh(), "encode_task_layer.2")
    side = images.shape[2] // patch
    return (x / x.norm(dim=-1, keepdim=True)).movedim(-1, 1).unflatten(2, (side, side))


def test_encoder_equals_the_plain_computation():
    weights = checkpoint()
    images = torch.rand(2, 3, 12, 12)
    model = VQKD.from_beit2(weights).eval()
    expected = plainly(weights, images)
    assert torch.allclose(model.double()(images.double()), expected, atol=1e-12)
    assert torch.allclose(model.float()(images).double(), expected, atol=1e-5)


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_published_files_load(wrapped, suffix, tmp_path):
    """As written by the released training: options beside the model, the teacher within it, names of a wrapper."""
    weights = checkpoint()
    path = tmp_path / f"vqkd{suffix}"
    content = weights | {"teacher_model.visual.proj": torch.ones(3), "scaling_layer.shift": torch.ones(1, 3, 1, 1)}
    content = {("module." if wrapped else "") + name: tensor for name, tensor in content.items()}
    if suffix == ".safetensors":
        save_file(content, path)
    else:
        options = argparse.Namespace(model="vqkd", epochs=100, output_dir=None)
        torch.save({"model": content, "args": options, "epoch": 99} if wrapped else content, path)
    model = load_vqkd(path)
    assert model.image_size == (12, 12)
    assert model.codebook.shape == (20, 8)
    assert torch.allclose(model.codebook.norm(dim=1), torch.ones(20))
    images = torch.rand(2, 3, 12, 12)
    features = model(images)
    assert features.shape == (2, 8, 3, 3) and torch.allclose(features.norm(dim=1), torch.ones(2, 3, 3))
    assert torch.allclose(features.double(), plainly(weights, images), atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(images).dtype == torch.float32


def test_the_published_sizes():
    """vqkd_encoder_base_decoder_3x768x12_clip, without its numbers."""
    weights = checkpoint(768, 12, 16, 14, 8192, 32, decoder_depth=3, features=512, device="meta")
    model = VQKD.from_beit2(weights)
    assert model.image_size == (224, 224) and model.codebook.shape == (8192, 32)
    assert {block.attn.num_heads for block in model.encoder.blocks} == {12}
    tokens = model.encoder.forward_features(torch.empty(2, 3, 224, 224, device="meta"))
    assert model.encode_task_layer(tokens).shape == (2, 197, 32)
    assert sum(p.numel() for p in model.encoder.parameters()) == 85_798_656  # ViT-B/16 without a classifier


def test_what_training_saves_has_the_published_names_and_shapes():
    """Also those of training alone, so that the released code's strict loading takes it."""
    vit = create_vit("vit_tiny_patch16_224", (12, 12), 4, model_args={"embed_dim": 128, "depth": 2, "num_heads": 2})
    ours = VQKDForTraining(vit, 12, config(20)).beit2_state_dict()
    reference = checkpoint()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in reference.items()}


def change(**changes):
    def apply(weights):
        for name, value in changes.items():
            name = name.replace("__", ".")
            weights.pop(name) if value is None else weights.__setitem__(name, value)
        return weights

    return apply


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (change(encode_task_layer__0__bias=None), "encode_task_layer.0.bias"),
        (change(encoder__patch_embed__proj__weight=None), "'encoder.patch_embed.proj.weight'"),
        (change(encoder__blocks__0__gamma_1=torch.ones(128)), "encoder.blocks.0.gamma_1"),
        (change(encoder__norm__bias=torch.ones(128)), "encoder.norm.bias"),
        (change(encoder__pos_embed=torch.ones(1, 12, 128)), "encoder.pos_embed (1x12x128, expected 1x10x128)"),
        (change(encoder__pos_embed=torch.ones(3)), ""),
        (lambda weights: VisionTransformer(32, 16, embed_dim=64, depth=1, num_heads=1).state_dict(), "blocks."),
        (lambda weights: {}, ""),
    ],
)  # fmt: skip
def test_other_checkpoints_are_refused_in_one_line(make, named, tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"model": make(checkpoint())}, path)
    with refused(path, named) as error:
        load_vqkd(path)
    assert len(str(error.value)) < 400


class Harmful:
    def __reduce__(self):
        return print, ("code of a checkpoint ran",)


def test_damaged_and_harmful_files(tmp_path, capsys):
    with refused("No such file"):
        load_vqkd(tmp_path / "none.pth")
    with refused("teacher_checkpoint"):
        load_vqkd(None)
    torch.save({"model": checkpoint()}, tmp_path / "whole.pth")
    save_file(checkpoint(), tmp_path / "whole.safetensors")
    for name in ("whole.pth", "whole.safetensors"):
        content = (tmp_path / name).read_bytes()
        for length in (0, 7, len(content) // 2, len(content) - 9):
            short = tmp_path / f"short.{name}"
            short.write_bytes(content[:length])
            with refused("weights") as error:
                load_vqkd(short)
            assert "\n" not in str(error.value)
    torch.save({"model": checkpoint(), "hook": Harmful()}, tmp_path / "harmful.pth")
    (tmp_path / "harmful.pkl").write_bytes(pickle.dumps(Harmful(), protocol=2))
    for name in ("harmful.pth", "harmful.pkl"):
        with refused(tmp_path / name):
            load_vqkd(tmp_path / name)
    assert capsys.readouterr().out == ""


def test_another_image_size_is_refused():
    with refused("12 x 12", "16 x 12"):
        VQKD.from_beit2(checkpoint())(torch.rand(1, 3, 16, 12))


def test_look_up_is_by_cosine():
    torch.manual_seed(0)
    features, codebook = (F.normalize(torch.randn(n, 8), dim=1) for n in (5000, 30))
    cosines = F.cosine_similarity(features.double()[:, None], codebook.double()[None], dim=2)
    assert torch.equal(nearest_code(features, codebook), cosines.argmax(1))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_code(features, codebook), cosines.argmax(1))


def config(codes, **options):
    return TrainTokenizerConfig(images="x", out="y", vocab_size=codes, codebook_dim=8, **{"decoder_depth": 1} | options)


def training(codes=20, **options):
    torch.manual_seed(0)
    vit = create_vit("vit_tiny_patch16_224", (12, 12), 4, model_args={"embed_dim": 64, "depth": 1, "num_heads": 1})
    return VQKDForTraining(vit, 5, config(codes, **options))


def test_losses_and_straight_through_gradient(monkeypatch):
    """The encoder gets the decoder's gradient at the code, and the commitment's: both by their definition, in float64."""
    monkeypatch.setattr(vqkd, "COMMITMENT_WEIGHT", 0.7)
    model = training().double()
    images, targets = torch.rand(2, 3, 12, 12).double(), torch.randn(2, 5, 3, 3).double()
    result = model(images, targets)
    result.loss.backward()
    actual = model.tokenizer.encode_task_layer[2].weight.grad

    features = model.tokenizer(images)
    assert torch.equal(result.features, features.detach().permute(0, 2, 3, 1).reshape(2, -1, 8))
    codebook = model.tokenizer.codebook
    assert torch.equal(result.codes, (result.features @ codebook.T).argmax(2))
    codes = codebook[result.codes].view(2, 3, 3, 8).permute(0, 3, 1, 2)
    leaf = codes.clone().requires_grad_()
    prediction = model.decode(leaf)
    cosine = (prediction * targets).sum(1) / prediction.norm(dim=1) / targets.norm(dim=1)
    reconstruction = (1 - cosine).mean()
    commitment = (features - codes).square().mean()
    assert torch.allclose(result.reconstruction, reconstruction) and torch.allclose(result.commitment, commitment)
    assert torch.allclose(result.loss, reconstruction + 0.7 * commitment)
    (at_code,) = torch.autograd.grad(reconstruction, leaf)
    surrogate = (features * at_code).sum() + 0.7 * commitment
    (expected,) = torch.autograd.grad(surrogate, model.tokenizer.encode_task_layer[2].weight)
    assert expected.abs().max() > 0 and torch.allclose(actual, expected, rtol=1e-9, atol=1e-12)

    # and the decoder's gradient at a code is that of finite differences
    step = torch.zeros_like(codes)
    step[1, 3, 2, 0] = 1e-5
    with torch.no_grad():
        up, down = (1 - F.cosine_similarity(model.decode(codes + s), targets, dim=1).mean() for s in (step, -step))
    assert float((up - down) / 2e-5) == pytest.approx(float(at_code[1, 3, 2, 0]), rel=1e-5, abs=1e-10)


def test_codes_follow_by_the_moving_average():
    model = training(codes=3, ema_decay=0.9, dead_code_threshold=0.0)
    before = model.tokenizer.codebook.clone()
    features = F.normalize(torch.randn(100, 8), dim=1)
    codes = torch.tensor([0] * 70 + [2] * 30)
    assert model.ema_update_codebook(features, codes) == 0
    for code, rows in ((0, features[:70]), (2, features[70:])):
        mean = rows.mean(0) / rows.mean(0).norm()
        expected = 0.9 * before[code] + 0.1 * mean
        assert torch.allclose(model.tokenizer.codebook[code], expected / expected.norm(), atol=1e-6)
    assert torch.equal(model.tokenizer.codebook[1], before[1])
    shares = torch.tensor([0.7, 0.0, 0.3])
    assert torch.allclose(model.usage, 1 / 3 + (shares - 1 / 3) / 10)


def test_dead_codes_come_back():
    """A dead code becomes a current feature with the average usage, and is used afterwards."""
    model = training(codes=30)
    features = F.normalize(torch.randn(200, 8) + 3 * torch.randn(8), dim=1)
    model.tokenizer.codebook[10:] = -features.mean(0) / features.mean(0).norm()  # on the far side
    model.tokenizer.codebook[:10] = features[:10]
    replaced = []
    for _ in range(100):
        replaced.append(int(model.ema_update_codebook(features, nearest_code(features, model.tokenizer.codebook))))
    patience = int(math.log(0.05) / math.log(1 - 1 / max(10, USAGE_PATCHES_PER_CODE * 30 / 200))) + 1
    assert sum(replaced[: patience - 1]) == 0 and replaced[patience - 1] == 20
    assert torch.bincount(nearest_code(features, model.tokenizer.codebook), minlength=30).count_nonzero() >= 29
    assert torch.allclose(model.tokenizer.codebook.norm(dim=1), torch.ones(30))

    never = training(codes=30, dead_code_threshold=0.0)
    assert sum(int(never.ema_update_codebook(features, torch.zeros(200, dtype=torch.int64))) for _ in range(100)) == 0


def test_the_codebook_starts_with_k_means():
    model = training(codes=4)
    features = F.normalize(torch.randn(200, 8), dim=1)
    model.init_codebook_kmeans(features, seed=3)
    actual = KMeans(4, max_iter=10, seed=3).fit(features)
    assert torch.equal(model.tokenizer.codebook, actual.centroids / actual.centroids.norm(dim=1, keepdim=True))
    assert torch.equal(model.usage, actual.counts / 200)
    with refused("vocab_size"):
        model.init_codebook_kmeans(features[:3])


@pytest.mark.parametrize(
    ("name", "arguments", "named"),
    [
        ("vit_tiny_patch16_224", {"embed_dim": 64, "num_heads": 2}, "num_heads=1"),
        ("vit_tiny_patch16_224", {"class_token": False}, "class token"),
        ("vit_tiny_patch16_224", {"init_values": 0.1}, "encoder.blocks.0.ls1.gamma"),
        ("vit_base_patch16_clip_quickgelu_224", {"pre_norm": False, "embed_dim": 64, "num_heads": 1}, "GELU"),
    ],
)
def test_encoders_that_the_layout_has_no_names_for(name, arguments, named):
    vit = create_vit(name, (12, 12), 4, model_args={"depth": 1, **arguments})
    with refused(named):
        VQKDForTraining(vit, 5, config(10, decoder_depth=3))


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """`train-tokenizer` on 200 crops of the photographs, with the teacher `pixels`."""
    folder = tmp_path_factory.mktemp("vqkd")
    rng = np.random.default_rng(0)
    (folder / "crops").mkdir()
    for number in range(200):
        photo = photos[number % 2]
        top, left = (int(rng.integers(photo.shape[axis] - 64)) for axis in (0, 1))
        Image.fromarray(photo[top : top + 64, left : left + 64]).resize((16, 16)).save(
            folder / "crops" / f"{number}.png"
        )
    file = mapet.train_tokenizer(
        images=folder / "crops", out=folder / "run", image_size=16, patch_size=4, vocab_size=32, codebook_dim=8, epochs=20,
        batch_size=50, lr=2e-3, decoder_depth=1, model_args={"embed_dim": 64, "depth": 1, "num_heads": 1},
        device="cpu", precision="float32", log_interval=8,
    )  # fmt: skip
    return folder, file


def test_training_lowers_the_loss_and_uses_the_codes(trained):
    folder, _ = trained
    metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    description = json.loads((folder / "run" / "vqkd" / "vqkd.json").read_text())
    assert len(metrics) == 20 and description["vocab_size"] == 32
    assert metrics[-1]["reconstruction_loss"] < 0.6 * metrics[0]["reconstruction_loss"]
    assert metrics[-1]["code_usage"] > 0.8
    assert (
        description["codebook_stats"]["num_used_codes"] > 0.8 * 32 and description["codebook_stats"]["perplexity"] > 10
    )
    assert description["codebook_stats"]["num_patches"] == 200 * 16
    assert description["reconstruction_loss"] < 0.6 * metrics[0]["reconstruction_loss"]


def test_what_was_trained_is_a_teacher(trained, tmp_path):
    """Of the published kind: read by the same function, from any file format, as the encoder of a tokenizer."""
    folder, file = trained
    model = load_vqkd(file)
    assert model.image_size == (16, 16) and model.codebook.shape == (32, 8)
    torch.save({"model": load_file(file)}, tmp_path / "vqkd.pth")
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(load_vqkd(tmp_path / "vqkd.pth")(images), model(images))
    tokenizer = mapet.fit_tokenizer(
        images=folder / "crops", out=tmp_path / "t", teacher="vqkd", teacher_checkpoint=str(file),
        image_size=16, patch_size=4,
    )  # fmt: skip
    assert torch.equal(tokenizer.quantizer.centroids, model.codebook)
    about = json.loads((tmp_path / "t" / "visual_tokenizer.json").read_text())["teacher_metadata"]
    assert about["prefix_tokens_dropped"] == 1 and about["mean"] == [0.5, 0.5, 0.5]
    assert about["learned_from"]["teacher"]["teacher"] == "pixels" and about["learned_from"]["num_images"] == 200
    assert load_vqkd(tmp_path / "vqkd.pth").metadata["learned_from"] is None  # of a published file nothing is known
