"""Teachers, k-means and the codebook."""

import json

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from sklearn.cluster import KMeans

import mapet
from mapet.data.decode import read_image
from mapet.data.image_list import scan
from mapet.data.views import View, render
from mapet.errors import MapetError
from mapet.tokenizer.codebook import Health, load_tokenizer
from mapet.tokenizer.kmeans import assign, automatic_vocab_size, kmeans
from mapet.tokenizer.teacher import make_teacher


def blobs(seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(8, 5)) * 10
    return torch.tensor(centres.repeat(50, 0) + rng.normal(size=(400, 5)), dtype=torch.float32)


def test_assign_equals_all_distances():
    points, centroids = torch.randn(300, 7), torch.randn(20, 7)
    ids, distances = assign(points, centroids)
    table = torch.cdist(points.double(), centroids.double()).square()
    assert torch.equal(ids, table.argmin(1))
    assert torch.allclose(distances.double(), table.min(1).values, atol=1e-4)


def test_kmeans_is_as_good_as_scikit_learn():
    points = blobs()
    error = kmeans(points, 8, iterations=20, restarts=10).error
    reference = KMeans(8, n_init=10, random_state=0).fit(points.numpy()).inertia_ / len(points)
    assert error <= reference * 1.001


def test_kmeans_repeats_and_keeps_the_best_restart():
    points = blobs()
    first, again = (kmeans(points, 8, seed=3) for _ in range(2))
    assert torch.equal(first.centroids, again.centroids)
    assert kmeans(points, 8, restarts=5, seed=3).error <= first.error


def test_empty_clusters_are_seeded_again():
    points = torch.cat([torch.zeros(100, 2), torch.randn(30, 2)])  # starts fall on equal points: empty clusters
    centroids = kmeans(points, 16, iterations=20).centroids
    assert (torch.bincount(assign(points, centroids)[0], minlength=16) > 0).all()


def test_more_words_than_patches():
    with pytest.raises(MapetError, match=r"K = 500 .* but there are 400.*--vocab-size"):
        kmeans(blobs(), 500)


@pytest.mark.parametrize(
    ("patches", "words"), [(1, 1), (2, 2), (64, 2), (128, 2), (256, 4), (64 * 1000, 512), (10**9, 8192)]
)
def test_automatic_vocabulary(patches, words):
    assert automatic_vocab_size(patches) == words


def test_health_of_even_and_collapsed_codebooks():
    even = Health.measure(torch.full((8,), 10), error=0.5, variance=2.0)
    assert (even.used_codes, even.dead_codes) == (8, 0)
    assert even.perplexity == pytest.approx(8)
    assert even.commonest_share == pytest.approx(1 / 8)
    assert even.quantization_error == pytest.approx(0.25)
    collapsed = Health.measure(torch.tensor([100, 0, 0, 0]), error=1.0, variance=1.0)
    assert (collapsed.dead_codes, collapsed.perplexity, collapsed.commonest_share) == (3, pytest.approx(1), 1.0)


def test_pixels_are_the_patches_own_values():
    images = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8)
    features = make_teacher("pixels", (8, 12), 4)(images)
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
    teacher = make_teacher(name, (224, 224), 16, checkpoint=str(tmp_path / "weights.safetensors"), teacher_size=size)
    images = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8)
    found = teacher(images)
    assert found.shape == (1, features, 14, 14)
    data = timm.data.resolve_model_data_config(model)
    normal = (images.float() / 255 - torch.tensor(data["mean"]).view(3, 1, 1)) / torch.tensor(data["std"]).view(3, 1, 1)
    with torch.inference_mode():
        expected = model.forward_intermediates(normal, indices=1, intermediates_only=True)[0]
    if expected.shape[2:] != (14, 14):
        expected = torch.nn.functional.interpolate(expected, size=(14, 14), mode="bilinear", antialias=True)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.slow
def test_the_paper_s_teacher(tmp_path):
    """k-CLIP's encoder: RN50x64 at 448 px gives 14 x 14 x 4096 before its attention pool."""
    model = timm.create_model("resnet50x64_clip.openai", pretrained=False)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    teacher = make_teacher("resnet50x64_clip.openai", (224, 224), 16, checkpoint=str(tmp_path / "weights.safetensors"))
    assert teacher.image_size == (448, 448)
    assert teacher(torch.zeros(1, 3, 448, 448, dtype=torch.uint8)).shape == (1, 4096, 14, 14)


def test_saved_tokenizer_gives_the_same_ids(crops, tmp_path):
    fitted = mapet.fit_tokenizer(
        images=crops, out=tmp_path / "t", image_size=32, patch_size=8, vocab_size=10, workers=0
    )
    loaded = load_tokenizer(tmp_path / "t")
    images = torch.stack([render(read_image(path), View(0, 0, 48, 48, False), (32, 32)) for path in scan(crops)])
    assert torch.equal(fitted(images), loaded(images))
    description = json.loads((tmp_path / "t" / "tokenizer.json").read_text())
    assert description["grid"] == [4, 4] and description["vocab_size"] == 10
    assert description["health"]["used_codes"] == 10
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
        "teacher_size": 64,
        "vocab_size": 5,
        "workers": 0,
        "teacher": name,
    }
    mapet.fit_tokenizer(out=tmp_path / "t", teacher_checkpoint=str(tmp_path / "0.safetensors"), **options)
    load_tokenizer(tmp_path / "t")
    with pytest.raises(MapetError, match="has other weights"):
        load_tokenizer(tmp_path / "t", checkpoint=str(tmp_path / "1.safetensors"))


def test_flipped_pixels_are_other_words(crops, tmp_path):
    """Why a mirrored view is stored, not derived by mirroring the grid: the words are not the same."""
    tokenizer = mapet.fit_tokenizer(
        images=crops, out=tmp_path / "t", image_size=32, patch_size=8, vocab_size=32, workers=0
    )
    images = torch.stack([render(read_image(path), View(0, 0, 48, 48, False), (32, 32)) for path in scan(crops)])
    different = tokenizer(images.flip(-1)) != tokenizer(images).flip(-1)
    assert different.float().mean() > 0.05
