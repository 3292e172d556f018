"""Real images for every test: scikit-learn's handwritten digits, and crops of its two photographs."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

import mapet
from mapet.config.tokenizers import TeacherOptions
from mapet.data.dataset import Batch
from mapet.data.digits import write_digits
from mapet.data.token_store import TokenStore
from mapet.tokenizers.tokenizer import Teacher, make_teacher

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}
PRETRAIN: dict[str, Any] = {
    "model_args": TINY, "epochs": 2, "batch_size": 100, "lr": 1e-3, "probe_every": 0, "log_interval": 5, "device": "cpu",
    "precision": "float32",
}  # fmt: skip


signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a shell starts background jobs with SIGINT ignored, which children inherit
os.environ["MAPET_WORKERS"] = "0"  # images are loaded in the main process
torch.set_num_threads(2)  # for what is made once for all tests


def make_batch(images: torch.Tensor, targets: torch.Tensor, permutation: torch.Tensor) -> Batch:
    """Make a batch for a pre-training model."""
    return Batch(torch.arange(len(images)), images, targets=targets, permutation=permutation)


@pytest.fixture(autouse=True)
def two_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture
def one_thread(two_threads: None) -> None:
    """Compute on one thread: small matrix products are slower on two, and 50 times so on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def photos() -> list[np.ndarray]:
    """scikit-learn's sample photographs, (427, 640, 3) uint8."""
    return [np.asarray(image) for image in load_sample_images().images]


def save_crops(photos: list[np.ndarray], folder: Path, count: int, size: tuple[int, int] = (48, 64)) -> Path:
    """`count` different crops of the photographs as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        photo = photos[number % len(photos)]
        top, left = (int(rng.integers(photo.shape[axis] - size[axis])) for axis in (0, 1))
        Image.fromarray(photo[top : top + size[0], left : left + size[1]]).save(folder / f"crop{number:03d}.png")
    return folder


def all_rows(store: TokenStore) -> np.ndarray:
    """Return the tokens of a store, (images, views, patches)."""
    return np.stack([[store.read(row, view) for view in range(store.num_views)] for row in range(len(store))])


@pytest.fixture
def crops(photos: list[np.ndarray], tmp_path: Path) -> Path:
    """A folder of 12 photographs, 64 x 48 px."""
    return save_crops(photos, tmp_path / "photos", 12)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with train/ (1,437) and test/ (360) of handwritten digits in class folders."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder, 1437)
    return folder


@pytest.fixture(scope="session")
def few_digits(digits: Path) -> Path:
    """A text file of 300 digits."""
    paths = sorted((digits / "train").rglob("*.png"))[::5][:300]
    listing = digits / "train" / "few.txt"
    listing.write_text("".join(f"{path.relative_to(digits / 'train')}\n" for path in paths))
    return listing


@pytest.fixture(scope="session")
def tokenizer_dir(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fitted") / "tokenizer"
    mapet.fit_tokenizer(
        images=few_digits, out=out, image_size=8, patch_size=2, channels=1, vocab_size=16, kmeans_iters=5
    )
    return out


@pytest.fixture(scope="session")
def tokens_dir(few_digits: Path, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenized") / "tokens"
    mapet.tokenize(images=few_digits, tokenizer=tokenizer_dir, out=out)
    return out


@pytest.fixture(scope="session")
def run_dir(few_digits: Path, tokenizer_dir: Path, tokens_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished pre-training run of 6 steps, on two threads whichever test requests it first."""
    torch.set_num_threads(2)
    out = tmp_path_factory.mktemp("pretrained") / "run"
    mapet.pretrain(images=few_digits, tokenizer=tokenizer_dir, tokens=tokens_dir, out=out, **PRETRAIN)
    return out


def teacher_of(
    name: str | tuple[str, ...],
    image_size: tuple[int, int],
    patch_size: int,
    precision: str = "float32",
    **options: Any,
) -> Teacher:
    """Return the teacher of a name, for views of `image_size` in patches; `options` as `TeacherOptions` names them."""
    return make_teacher(
        TeacherOptions(teacher=name, image_size=image_size, patch_size=patch_size, **options), precision
    )
