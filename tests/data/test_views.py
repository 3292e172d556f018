"""The augmentations of the released fine-tuning recipe: timm's, seeded by image and epoch."""

# ruff: noqa: NPY002 (timm draws from the global generators)

import shutil

import numpy as np
import torch

import mapet
from mapet.data.dataset import ViewDataset, create_loader, position_batches
from mapet.data.readers import open_image
from mapet.data.sources import list_images
from mapet.data.views import ViewSpec, fork_rng, rand_augment
from mapet.models.backbone import create_vit, save_backbone
from tests.refused import refused

POLICY = "rand-m9-mstd0.5-inc1"
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


def test_augmented_samples_depend_on_seed_image_and_epoch_alone(crops, monkeypatch):
    augment = rand_augment(POLICY, (32, 32), (0.5, 0.5, 0.5))
    dataset = ViewDataset(list_images(crops), ViewSpec(image_size=(32, 32)), image_size=(32, 32), augment=augment)
    batches = []
    for epoch, workers in ((0, "0"), (0, "2"), (1, "0")):
        monkeypatch.setenv("MAPET_WORKERS", workers)
        batches.append(
            torch.cat(
                [batch.images for batch in create_loader(dataset, position_batches(range(12), 5, view_index=epoch))]
            )
        )
    plain = ViewDataset(list_images(crops), dataset.spec, image_size=(32, 32)).batch([(0, i) for i in range(12)]).images
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2]) and not torch.equal(batches[0], plain)
    assert batches[0].dtype == torch.uint8 and batches[0].shape == plain.shape


def test_unknown_policy_is_refused(crops):
    with refused("'random'", "timm"):
        rand_augment("random", (32, 32), (0.5, 0.5, 0.5))
    assert rand_augment(POLICY, (48, 64), (0.5, 0.5, 0.5))(open_image(list_images(crops)[0]).read()).shape == (
        3,
        48,
        64,
    )


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
    a, b, c, d = (mapet.load_backbone(tmp_path / out / "model").state_dict() for out in "abcd")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["head.weight"], c["head.weight"]) and not torch.equal(a["head.weight"], d["head.weight"])


def test_rand_augment_needs_rgb(digits, run_dir):
    with refused("RGB", 1):
        mapet.finetune(backbone=run_dir, images=digits / "train", rand_augment=POLICY)
