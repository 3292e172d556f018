"""The augmentations of the released fine-tuning recipe: timm's, seeded by image and epoch."""

# ruff: noqa: NPY002 (timm draws from the global generators)

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from scipy.stats import ks_2samp
from timm.data.auto_augment import rand_augment_transform
from torchvision.transforms import RandomResizedCrop

import mapet
from mapet.data.dataset import ViewDataset, position_batches
from mapet.data.loader import load
from mapet.data.readers.open import open_image
from mapet.data.sources import list_images
from mapet.data.views import ViewSpec, fork_rng, rand_augment, sample_view
from mapet.models.backbone import create_vit, load_backbone, save_backbone
from tests.refused import refused

POLICY = "rand-m9-mstd0.5"
RELEASED = {"rand_augment": POLICY, "mixup": 0.8, "cutmix": 1.0, "random_erasing": 0.25, "layer_decay": 0.65}


def test_seeded_leaves_the_generators_as_they_were():
    np.random.seed(3)
    expected = np.random.rand(2)
    np.random.seed(3)
    first = np.random.rand()
    with fork_rng(1, 2):
        a = np.random.rand()
    with fork_rng(1, 2):
        assert np.random.rand() == a
    assert [first, np.random.rand()] == expected.tolist()


@pytest.mark.parametrize(
    ("size", "min_scale"), [((150, 150), 0.08), ((120, 190), 0.3), ((199, 110), 0.2), ((400, 100), 0.08)]
)
def test_random_crops_are_distributed_as_torchvisions(size, min_scale):
    """By torchvision's own draws: fraction of the image's area, aspect, place, for images of several aspects."""
    spec = ViewSpec(kind="random-crop", image_size=(100, 100), min_scale=min_scale)
    torch.manual_seed(0)
    image = torch.empty(1, *size)
    expected = [RandomResizedCrop.get_params(image, (min_scale, 1), (3 / 4, 4 / 3)) for _ in range(4000)]
    views = [sample_view(spec, size, key, 0) for key in range(4000)]
    ours, reference = np.array([view[:4] for view in views]), np.array(expected)
    area, aspect = ours[:, 2] * ours[:, 3] / np.prod(size), ours[:, 3] / ours[:, 2]
    assert 0.98 * min_scale < area.min() and aspect.min() > 0.73 and aspect.max() < 1.37
    for values in (
        lambda box: box[:, 2] * box[:, 3],
        lambda box: box[:, 3] / box[:, 2],
        lambda box: box[:, 0],
        lambda box: box[:, 1],
    ):
        assert ks_2samp(values(ours), values(reference)).pvalue > 1e-3
    assert 0.45 < np.mean([view.flip for view in views]) < 0.55


@pytest.mark.parametrize("size", [(20, 500), (500, 20), (100, 134)])
def test_a_random_crop_that_never_fits_is_torchvisions_centered_one(size):
    spec = ViewSpec(kind="random-crop", image_size=(100, 100), min_scale=1.0)
    expected = RandomResizedCrop.get_params(torch.empty(1, *size), (1, 1), (3 / 4, 4 / 3))
    assert sample_view(spec, size, 0, 0)[:4] == expected


def test_aspects_of_random_crops_are_relative_to_the_input():
    spec = ViewSpec(kind="random-crop", image_size=(40, 160))
    aspect = [view.width / view.height / 4 for view in (sample_view(spec, (200, 300), key, 0) for key in range(500))]
    assert 0.73 < min(aspect) < 0.8 and 1.25 < max(aspect) < 1.37


def test_augmented_samples_depend_on_seed_image_and_epoch_alone(crops, monkeypatch):
    augment = rand_augment(POLICY, (32, 32), 3)
    dataset = ViewDataset(list_images(crops), ViewSpec(image_size=(32, 32)), image_size=(32, 32), augment=augment)
    batches = []
    for epoch, workers in ((0, "0"), (0, "2"), (1, "0")):
        monkeypatch.setenv("MAPET_WORKERS", workers)
        batches.append(
            torch.cat([batch.images for batch in load(dataset.batch, position_batches(range(12), 5, view_index=epoch))])
        )
    plain = ViewDataset(list_images(crops), dataset.spec, image_size=(32, 32)).batch([(0, i) for i in range(12)]).images
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2]) and not torch.equal(batches[0], plain)
    assert batches[0].dtype == torch.uint8 and batches[0].shape == plain.shape


def test_unknown_policies_and_other_channels_are_refused():
    with refused("timm", field="rand_augment", value="random"):
        rand_augment("random", (32, 32), 3)
    with refused("4 ", field="rand_augment", value=POLICY):
        rand_augment(POLICY, (32, 32), 4)


@pytest.mark.parametrize(("channels", "fill"), [(3, (124, 116, 104)), (1, (128, 128, 128))])  # of ImageNet, of 0.5
def test_rand_augment_is_timms_and_treats_gray_as_rgb_of_equal_channels(crops, channels, fill):
    image = open_image(list_images(crops)[0]).read()
    image = image if channels == 3 else image[:1]
    augment = rand_augment(POLICY, (48, 64), channels)
    timms = rand_augment_transform(POLICY, {"translate_const": int(0.45 * 48), "img_mean": fill})
    for seed in range(40):
        with fork_rng(seed):
            augmented = augment(image)
        with fork_rng(seed):
            expected = np.asarray(timms(Image.fromarray(np.moveaxis(image.expand(3, -1, -1).numpy(), 0, -1))))
        assert augmented.shape == image.shape
        assert np.array_equal(np.moveaxis(augmented.expand(3, -1, -1).numpy(), 0, -1), expected)


def test_the_recipes_have_the_released_policy():
    recipes = sorted((Path(__file__).parents[2] / "recipes").glob("finetune_*.yaml"))
    assert [yaml.safe_load(path.read_text())["rand_augment"] for path in recipes] == ["rand-m9-mstd0.5"] * 3


def test_the_released_augmentations_train_and_repeat(crops, tmp_path):
    """Odd batches too, of which Mixup takes pairs."""
    for number, path in enumerate(sorted(crops.iterdir())):
        (tmp_path / "labeled" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "labeled" / "ab"[number % 2])
    save_backbone(
        create_vit("vit_tiny_patch16_224", (32, 32), 8, 3, {"embed_dim": 16, "depth": 2, "num_heads": 2}),
        tmp_path / "vit",
    )
    options = {
        "backbone": tmp_path / "vit",
        "images": tmp_path / "labeled",
        "epochs": 2,
        "batch_size": 5,
    }
    for out, more in {"a": RELEASED, "b": RELEASED, "c": RELEASED | {"mixup": 0.0}, "d": {}}.items():
        mapet.finetune(out=tmp_path / out, warmup_epochs=0.5, min_lr=1e-5, **options, **more)
    a, b, c, d = (load_backbone(tmp_path / out / "model").state_dict() for out in "abcd")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["head.weight"], c["head.weight"]) and not torch.equal(a["head.weight"], d["head.weight"])


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_images_of_other_channels_are_augmented(tmp_path, channels):
    """All but RandAugment, which has no changes for more than three."""
    for number in range(8):
        path = tmp_path / "labeled" / "ab"[number % 2] / f"{number}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.random.default_rng(number).integers(0, 256, (8, 8, channels), dtype=np.uint8))
    vit = create_vit("vit_tiny_patch16_224", (8, 8), 4, channels, {"embed_dim": 16, "depth": 1, "num_heads": 2})
    save_backbone(vit, tmp_path / "vit")
    options = {"backbone": tmp_path / "vit", "images": tmp_path / "labeled", "epochs": 1, "batch_size": 4}
    options |= RELEASED | {"random_erasing": 1.0, "color_jitter": 0.4, "views": "random-crop"}
    if channels > 1:
        with refused(channels, field="rand_augment", value=POLICY):
            mapet.finetune(**options, out=tmp_path / "refused")
        options["rand_augment"] = None
    mapet.finetune(**options, out=tmp_path / "out")
    assert (tmp_path / "out" / "model").exists()
