"""Teachers, k-means and the codebook."""

import json
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from sklearn.cluster import KMeans as PlainKMeans

import mapet
from mapet.data.readers.open import open_image
from mapet.data.sources import list_images
from mapet.data.views import View, render_view
from mapet.tokenizers.feature_store import FeatureStore
from mapet.tokenizers.kmeans import KMeans, assign, default_vocab_size
from mapet.tokenizers.tokenizer import CodebookStats, load_tokenizer
from tests.conftest import teacher_of
from tests.refused import refused


def blobs(seed=0):
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(8, 5)) * 10
    return torch.tensor(centers.repeat(50, 0) + rng.normal(size=(400, 5)), dtype=torch.float32)


def test_assign_equals_all_distances():
    points, centroids = torch.randn(300, 7), torch.randn(20, 7)
    ids, distances = assign(points, centroids)
    table = torch.cdist(points.double(), centroids.double()).square()
    assert torch.equal(ids, table.argmin(1))
    assert torch.allclose(distances.double(), table.min(1).values, atol=1e-4)


def test_kmeans_is_as_good_as_scikit_learn():
    points = blobs()
    error = KMeans(8, max_iter=20, n_init=10).fit(points).mean_sq_dist
    reference = PlainKMeans(8, n_init=10, random_state=0).fit(points.numpy()).inertia_ / len(points)
    assert error <= reference * 1.001


def test_kmeans_repeats_and_keeps_the_best_restart():
    points = blobs()
    first, again = (KMeans(8, seed=3).fit(points) for _ in range(2))
    assert torch.equal(first.centroids, again.centroids)
    assert KMeans(8, n_init=5, seed=3).fit(points).mean_sq_dist <= first.mean_sq_dist


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory", [0, 1 << 20])
def test_empty_clusters_are_seeded_again(dtype, memory, tmp_path):
    points = torch.cat([torch.zeros(100, 2), torch.randn(30, 2)])  # starts fall on equal points: empty clusters
    with FeatureStore(len(points), memory, tmp_path) as store:
        store.append(points)
        result = KMeans(16, max_iter=20, dtype=dtype).fit(store)
    assert (result.counts > 0).all() and result.counts.sum() == 130
    assert torch.equal(result.counts, torch.bincount(assign(points.half(), result.centroids)[0], minlength=16))


def test_bfloat16_k_means_is_as_good_as_float32(photos):
    """Real patches, their contrast normalized: flat ones would start as empty clusters, re-seeded at random."""
    pixels = torch.tensor(np.stack(photos)).permute(0, 3, 1, 2)[..., :424, :640].float() / 255
    points = torch.nn.functional.pixel_unshuffle(pixels, 8).permute(0, 2, 3, 1).flatten(0, 2)
    points = torch.nn.functional.layer_norm(points, points.shape[1:])
    exact, fast = (KMeans(512, max_iter=10, dtype=dtype).fit(points) for dtype in (torch.float32, torch.bfloat16))
    assert fast.mean_sq_dist <= exact.mean_sq_dist * 1.001
    assert (
        fast.total_variance == exact.total_variance == pytest.approx(float(points.var(0, correction=0).sum()), rel=1e-3)
    )
    assert fast.mean_sq_dist == pytest.approx(float(assign(points, fast.centroids)[1].mean()), rel=1e-3)
    assert fast.counts.sum() == len(points)


@pytest.mark.parametrize("batch", [1, 3, 16, 100])
def test_ids_do_not_depend_on_the_batch(batch):
    """Also for points halfway between two centroids, and for centroids that are there twice: the lower id."""
    torch.manual_seed(0)
    centroids = torch.randn(300, 33) + 5
    points = torch.cat([(centroids[:100] + centroids[100:200]) / 2, centroids[:50], torch.randn(150, 33) + 5])
    centroids = torch.cat([centroids, centroids[:10]])
    whole = assign(points, centroids)[0]
    assert torch.equal(torch.cat([assign(part, centroids)[0] for part in points.split(batch)]), whole)
    assert torch.equal(whole[100:150], torch.arange(50))


@pytest.mark.parametrize("restarts", [1, 3])
def test_the_place_of_the_features_changes_nothing(restarts, tmp_path):
    torch.manual_seed(0)
    points = torch.randn(5000, 12) * 3 + 7
    result = []
    for memory in (1 << 20, 0):
        with FeatureStore(6000, memory, tmp_path) as store:
            for part in points.split(999):
                store.append(part)
            assert (store.scratch_file is None) == (memory > 0)
            assert not list(tmp_path.iterdir())  # the scratch file has no name
            result.append(KMeans(100, 5, restarts, dtype=torch.bfloat16).fit(store))
    assert torch.equal(result[0].centroids, result[1].centroids) and torch.equal(result[0].counts, result[1].counts)
    assert result[0][2:] == result[1][2:]
    assert result[0].mean_sq_dist == pytest.approx(float(assign(points, result[0].centroids)[1].mean()), rel=1e-3)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_streaming_needs_memory_for_a_block_only(tmp_path):
    """240 MB of features; in its own process, as peak memory never decreases."""
    script = """if True:
        import sys, torch
        from pathlib import Path
        from mapet.tokenizers.feature_store import FeatureStore
        from mapet.tokenizers.kmeans import KMeans
        def peak():  # not getrusage's, which is also that of the process that started this one
            return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
        KMeans(20, 1).fit(torch.randn(5000, 64))
        before = peak()
        with FeatureStore(60_000, 10_000_000, Path(sys.argv[1])) as store:
            for _ in range(60):
                store.append(torch.randn(1000, 2000))
            assert KMeans(20, 1, 2).fit(store).counts.sum() == 60_000
        print(peak() - before)
    """
    child = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    assert 1e6 < int(child.stdout) * 1024 < 120e6


@pytest.mark.parametrize("size", [1e-6, 1, 1e6])
def test_features_of_any_size_fit_float16(size):
    points = blobs() * size
    result = KMeans(8, max_iter=20, n_init=5).fit(points)
    assert result.mean_sq_dist == pytest.approx(float(assign(points, result.centroids)[1].mean()), rel=1e-2)
    assert result.centroids.isfinite().all()


def test_features_too_uneven_for_float16():
    store = FeatureStore(20, 1 << 20, None)
    store.append(torch.ones(5, 3))
    with refused("64"):
        store.append(torch.full((5, 3), 1e4))


def test_more_codes_than_patches():
    with refused(500, 400, "vocab_size"):
        KMeans(500).fit(blobs())


@pytest.mark.parametrize(
    ("patches", "vocab_size"), [(1, 1), (2, 2), (64, 2), (128, 2), (256, 4), (64 * 1000, 512), (10**9, 8192)]
)
def test_default_vocabulary(patches, vocab_size):
    assert default_vocab_size(patches) == vocab_size


def test_stats_of_even_and_collapsed_codebooks():
    even = CodebookStats.from_counts(torch.full((8,), 10), quantization_error=0.25)
    assert (even.num_used_codes, even.num_dead_codes) == (8, 0)
    assert even.perplexity == pytest.approx(8)
    assert even.top_code_fraction == pytest.approx(1 / 8)
    assert even.quantization_error == pytest.approx(0.25)
    collapsed = CodebookStats.from_counts(torch.tensor([100, 0, 0, 0]))
    assert (collapsed.num_dead_codes, collapsed.perplexity, collapsed.top_code_fraction) == (3, pytest.approx(1), 1.0)


def test_pixels_are_the_patches_own_values():
    images = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8)
    features = teacher_of("pixels", (8, 12), 4)(images)
    assert features.shape == (2, 48, 2, 3)
    patch = images[1, :, 4:8, 8:12].float() / 255
    assert torch.allclose(features[1, :, 1, 2], patch.flatten())


@pytest.mark.parametrize(
    ("name", "size", "features"),
    [
        ("resnet50_clip.openai", (224, 224), 2048),  # 7 x 7, interpolated to 14 x 14
        ("vit_base_patch16_clip_224.openai", (224, 224), 768),
        ("vit_small_patch14_dinov2.lvd142m", (196, 196), 384),
        ("convnext_atto.d2_in1k", (448, 448), 320),  # 14 x 14, no interpolation
    ],
)
def test_timm_teachers_from_a_local_file(name, size, features, tmp_path):
    """The real architectures under random weights, through a checkpoint in timm's own format."""
    torch.manual_seed(0)
    resized = {"img_size": size} if name.startswith("vit_small") else {}
    model = timm.create_model(name, pretrained=False, **resized).eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    teacher = teacher_of(
        name, (224, 224), 16, teacher_checkpoint=str(tmp_path / "weights.safetensors"), teacher_image_size=size
    )
    images = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8)
    result = teacher(images)
    assert result.shape == (1, features, 14, 14)
    data = timm.data.resolve_model_data_config(model)
    normal = (images.float() / 255 - torch.tensor(data["mean"]).view(3, 1, 1)) / torch.tensor(data["std"]).view(3, 1, 1)
    with torch.inference_mode():
        expected = model.forward_intermediates(normal, indices=1, intermediates_only=True)[0]
    if expected.shape[2:] != (14, 14):
        expected = torch.nn.functional.interpolate(expected, size=(14, 14), mode="bilinear", antialias=True)
    assert torch.allclose(result, expected, atol=1e-5)


def small_teacher(folder, name="test_vit.r160_in1k"):
    """A small model of timm's with random weights, far from its special first values, and the file that holds them."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_file(model.state_dict(), folder / "weights.safetensors")
    return model, str(folder / "weights.safetensors")


@pytest.mark.parametrize("output", ["block", "norm", "projection"])
@pytest.mark.parametrize(("layer", "block"), [(0, 0), (3, 3), (-1, 5), (-2, 4)])
def test_layer_and_output_of_a_teacher(layer, block, output, tmp_path):
    """Blocks are run one after the other here; class and register tokens are dropped."""
    model, path = small_teacher(tmp_path)
    teacher = teacher_of(
        "test_vit.r160_in1k",
        (160, 160),
        16,
        teacher_checkpoint=path,
        teacher_layer=layer,
        teacher_output=output,
        channels=3,
    )
    images = torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        x = model.norm_pre(model._pos_embed(model.patch_embed((images / 255 - mean) / std)))
        for one in model.blocks[: block + 1]:
            x = one(x)
        x = x[:, model.num_prefix_tokens :]
        expected = {
            "block": x,
            "norm": model.norm(x),
            "projection": model.norm(x) @ model.head.weight.T + model.head.bias,
        }[output]
    result = teacher(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("test_resnet.r160_in1k", "norm"),  # no norm after its last stage
        ("test_vit.r160_in1k", "projection"),  # created without its head
        ("test_vit.r160_in1k", "norm"),  # pooled first, then normalized
    ],
)
def test_an_output_that_a_teacher_lacks_is_refused(name, output, tmp_path):
    """As of DINOv2, which has no head, and of BEiT, which normalizes the mean of its tokens."""
    without = {"num_classes": 0} if output == "projection" else {"global_pool": "avg"}
    timm.models.save_for_hf(timm.create_model(name, **without), str(tmp_path / "model"), model_args=without)
    with refused("teacher_output", field="teacher_output", value=output):
        teacher_of(f"local-dir:{tmp_path / 'model'}", (160, 160), 16, teacher_output=output)


@pytest.mark.parametrize("layer", [1, 3])
def test_layer_of_a_network_of_stages(layer, tmp_path):
    model, path = small_teacher(tmp_path, "test_resnet.r160_in1k")
    teacher = teacher_of("test_resnet.r160_in1k", (160, 160), 16, teacher_checkpoint=path, teacher_layer=layer)
    images = torch.randint(0, 256, (1, 3, 160, 160), dtype=torch.uint8)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        expected = model.forward_intermediates((images / 255 - mean) / std, intermediates_only=True)[layer]
    expected = torch.nn.functional.interpolate(expected, size=(10, 10), mode="bilinear", antialias=True)
    torch.testing.assert_close(teacher(images), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", ["test_vit.r160_in1k", "test_resnet.r160_in1k"])
def test_a_teacher_of_other_channels(name, channels, tmp_path):
    """timm sums the filters of RGB for gray images, and repeats them for more channels, scaled by 3/4 for four."""
    model, path = small_teacher(tmp_path, name)
    teacher = teacher_of(name, (160, 160), 16, teacher_checkpoint=path, channels=channels)
    images = torch.randint(0, 256, (2, channels, 160, 160), dtype=torch.uint8)
    mean, std = (sum(model.pretrained_cfg[key]) / 3 for key in ("mean", "std"))
    normal = (images / 255 - mean) / std
    of_rgb = {1: [[1], [1], [1]], 4: [[0.75, 0, 0, 0.75], [0, 0.75, 0, 0], [0, 0, 0.75, 0]]}
    rgb = torch.einsum("rc,bchw->brhw", torch.tensor(of_rgb[channels]).float(), normal)
    with torch.inference_mode():
        expected = model.forward_intermediates(rgb, indices=1, intermediates_only=True)[0]
    if expected.shape[2:] != (10, 10):
        expected = torch.nn.functional.interpolate(expected, size=(10, 10), mode="bilinear", antialias=True)
    torch.testing.assert_close(teacher(images), expected, atol=1e-4, rtol=1e-4)


def test_options_of_the_teacher_reach_it(crops, tmp_path):
    """From the command, on gray images."""
    _, path = small_teacher(tmp_path)
    tokenizer = mapet.fit_tokenizer(
        images=crops, out=tmp_path / "t", image_size=160, patch_size=16, vocab_size=8, kmeans_iters=1,
        teacher="test_vit.r160_in1k", teacher_checkpoint=path, teacher_layer=2, teacher_output="projection", channels=1, precision="float32",
    )  # fmt: skip
    expected = teacher_of(
        "test_vit.r160_in1k",
        (160, 160),
        16,
        channels=1,
        teacher_checkpoint=path,
        teacher_layer=2,
        teacher_output="projection",
    )
    images = torch.randint(0, 256, (1, 1, 160, 160), dtype=torch.uint8)
    assert torch.equal(tokenizer.teacher(images), expected(images))


def test_saved_tokenizer_gives_the_same_ids(crops, tmp_path):
    fitted = mapet.fit_tokenizer(images=crops, out=tmp_path / "t", image_size=32, patch_size=8, vocab_size=10)
    loaded = load_tokenizer(tmp_path / "t")
    images = torch.stack(
        [render_view(open_image(path), View(0, 0, 48, 48, False), (32, 32)) for path in list_images(crops)]
    )
    assert torch.equal(fitted(images), loaded(images))
    description = json.loads((tmp_path / "t" / "visual_tokenizer.json").read_text())
    assert description["grid"] == [4, 4] and description["vocab_size"] == 10
    assert description["codebook_stats"]["num_used_codes"] == 10
    assert loaded.hash == fitted.hash


def test_other_teacher_weights_are_refused(crops, tmp_path):
    name = "resnet10t.c3_in1k"
    for seed in (0, 1):
        torch.manual_seed(seed)
        save_file(timm.create_model(name).state_dict(), tmp_path / f"{seed}.safetensors")
    options = {
        "images": crops,
        "image_size": 64,
        "patch_size": 16,
        "teacher_image_size": 64,
        "vocab_size": 5,
        "teacher": name,
    }
    mapet.fit_tokenizer(out=tmp_path / "t", teacher_checkpoint=str(tmp_path / "0.safetensors"), **options)
    load_tokenizer(tmp_path / "t")
    (tmp_path / "1.safetensors").replace(tmp_path / "0.safetensors")
    with refused("weights"):
        load_tokenizer(tmp_path / "t")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_precision_is_part_of_the_tokenizer(precision, crops, tmp_path):
    """Tokens are computed in the precision of the codebook, by any command and batch size."""
    name = "resnet10t.c3_in1k"
    torch.manual_seed(0)
    save_file(timm.create_model(name).state_dict(), tmp_path / "weights.safetensors")
    fitted = mapet.fit_tokenizer(
        images=crops, out=tmp_path / "t", image_size=64, patch_size=16, teacher_image_size=64, vocab_size=20, teacher=name,
        teacher_checkpoint=str(tmp_path / "weights.safetensors"), precision=precision,
    )  # fmt: skip
    description = json.loads((tmp_path / "t" / "visual_tokenizer.json").read_text())
    assert description["teacher"]["precision"] == precision
    assert description["interpolation"] == "bilinear, antialiased"
    about = description["teacher_metadata"]
    assert about["mean"] == pytest.approx([0.485, 0.456, 0.406]) and about["prefix_tokens_dropped"] == 0
    loaded = load_tokenizer(tmp_path / "t")
    images = torch.stack(
        [render_view(open_image(path), View(0, 0, 48, 48, False), (64, 64)) for path in list_images(crops)]
    )
    ids = fitted(images)
    assert torch.equal(torch.cat([loaded(image[None]) for image in images]), ids)
    with torch.autocast("cpu", torch.bfloat16):  # as in a training loop
        assert torch.equal(loaded(images), ids)
        exact = loaded.teacher(images)
    loaded.teacher.settings["precision"] = "float32"
    assert torch.equal(loaded.teacher(images), exact) == (precision == "float32")


def test_precision_changes_the_tokenizer_s_hash(crops, tmp_path):
    options = {"images": crops, "image_size": 32, "patch_size": 8, "vocab_size": 10, "kmeans_iters": 1}
    hashes = {
        precision: mapet.fit_tokenizer(out=tmp_path / precision, precision=precision, **options).hash
        for precision in ("float32", "bfloat16")
    }
    assert hashes["float32"] != hashes["bfloat16"]


def test_flipped_pixels_are_other_tokens(crops, tmp_path):
    """Why a mirrored view is stored, not derived by mirroring the grid: the tokens are not the same."""
    tokenizer = mapet.fit_tokenizer(images=crops, out=tmp_path / "t", image_size=32, patch_size=8, vocab_size=32)
    images = torch.stack(
        [render_view(open_image(path), View(0, 0, 48, 48, False), (32, 32)) for path in list_images(crops)]
    )
    different = tokenizer(images.flip(-1)) != tokenizer(images).flip(-1)
    assert different.float().mean() > 0.05


@pytest.fixture
def saved_vit(tmp_path):
    """A timm folder of a ViT for 32 x 32 px in 12 blocks."""
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, num_heads=2, num_classes=0
    )
    timm.models.save_for_hf(model, str(tmp_path / "vit"), safe_serialization=True)
    return f"local-dir:{tmp_path / 'vit'}", model.eval()


def test_layers_are_counted_from_either_end(saved_vit):
    name, model = saved_vit
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    first, also_first = (
        teacher_of(name, (32, 32), 8, teacher_layer=layer, teacher_image_size=(32, 32)) for layer in (0, -12)
    )
    assert torch.equal(first(images), also_first(images))
    for layer in (12, 99, -13, -14):
        with refused(layer, "-12 to 11"):
            teacher_of(name, (32, 32), 8, teacher_layer=layer)


def test_a_folder_s_vit_at_another_size(saved_vit):
    name, model = saved_vit
    teacher = teacher_of(name, (48, 32), 8, teacher_image_size=(48, 32))
    images = torch.randint(0, 256, (2, 3, 48, 32), dtype=torch.uint8)
    result = teacher(images)
    model.set_input_size(img_size=(48, 32))
    with torch.inference_mode():
        assert torch.allclose(
            result,
            model.forward_intermediates(images / 127.5 - 1, indices=1, intermediates_only=True, norm=False)[0],
            atol=1e-5,
        )


def test_views_that_timm_refuses(monkeypatch, saved_vit):
    teacher = teacher_of(saved_vit[0], (32, 32), 8)
    with refused("40 x 40", "teacher_image_size"):
        teacher.encoders[0](torch.zeros(1, 3, 40, 40))


def test_every_batch_s_grid_is_looked_at(monkeypatch):
    """Every batch is checked, not only the first."""
    teacher = teacher_of("pixels", (16, 16), 4)
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    teacher(images)
    monkeypatch.setattr(teacher.encoders[0], "forward", lambda images: images.mean((2, 3), keepdim=True))
    with refused("1 x 1", "16 x 16"):
        teacher(images)
