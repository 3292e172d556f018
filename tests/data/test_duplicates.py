"""What `check` says of folders as users have them: duplicates, thumbnails, a single class folder, classes of one image."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from mapet.data.dataset_stats import DatasetStats, compute_dataset_stats
from mapet.data.duplicates import find_near_duplicates
from mapet.data.sources import list_images


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty smooth random images, as photographs are at a small size."""
    root, rng = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0)
    for index in range(30):
        noise = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((160, 120), Image.Resampling.BICUBIC)
        noise.filter(ImageFilter.GaussianBlur(2)).save(root / f"{index:02d}.png")
    return root


def stats_of(folder: Path) -> DatasetStats:
    return compute_dataset_stats(list_images(folder), 3, 2)


def test_copies_are_found_and_nothing_else(scenes, tmp_path):
    for path in scenes.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    image = Image.open(scenes / "00.png")
    image.save(tmp_path / "00-recompressed.jpg", quality=70)
    Image.open(scenes / "01.png").resize((80, 60)).save(tmp_path / "01-half.png")
    (tmp_path / "02-copy.png").write_bytes((scenes / "02.png").read_bytes())
    stats = stats_of(tmp_path)
    names = stats.images.id
    assert [[names(i) for i in group] for group in stats.equal] == [["02-copy.png", "02.png"]]
    assert stats.alike is not None
    assert {tuple(sorted(map(names, pair))) for pair in stats.alike} == {
        ("00-recompressed.jpg", "00.png"),
        ("01-half.png", "01.png"),
    }
    text = "\n".join(stats.lines())
    assert all(name in text for name in ("02-copy.png", "00-recompressed.jpg", "01-half.png"))


def test_images_of_one_level_are_no_near_duplicates(tmp_path):
    thumbnails = [np.full(256, level, np.uint8) for level in (0, 0, 7, 255)]
    assert find_near_duplicates(thumbnails).tolist() == []


def test_folders_as_users_have_them_are_named(scenes, tmp_path):
    image = Image.open(scenes / "00.png")
    (tmp_path / "cats").mkdir()
    for index, path in enumerate(scenes.iterdir()):
        (tmp_path / "cats" / f"{index}.png").write_bytes(path.read_bytes())
    warned = "\n".join(stats_of(tmp_path).warnings((32, 32), 0.05))
    assert "'cats'" in warned and "thumbnail" not in warned
    image.resize((24, 18)).save(tmp_path / "cats" / "tiny.png")
    (tmp_path / "dogs").mkdir()
    image.save(tmp_path / "dogs" / "only.png")
    warned = "\n".join(stats_of(tmp_path).warnings((32, 32), 0.05))
    assert "'cats/tiny.png'" in warned and "one image" in warned and "dogs" in warned and "alone" not in warned
