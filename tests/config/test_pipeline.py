"""Folders that are splits, not classes."""

from pathlib import Path

import pytest

from mapet.config.base import build_config
from mapet.config.pipeline import RunConfig


def make(root: Path, *folders: str) -> Path:
    for folder in folders:
        (root / folder).mkdir(parents=True)
    return root


def resolve(root: Path, **options: object) -> tuple[str, str | None]:
    """Return images and test images of `run`, below the root."""
    config = build_config(RunConfig, {"images": root, "out": "out"} | options)
    below = [
        None if path is None else Path(path).relative_to(root).as_posix()
        for path in (config.images, config.test_images)
    ]
    return below[0], below[1]  # type: ignore[return-value]


LABELED = ("train/a", "train/b", "test/a", "test/b")


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (LABELED, ("train", "test")),
        ((*LABELED, "val/a", "val/b"), ("train", "test")),
        (("Training/a", "Training/b", "validation/a", "validation/b"), ("Training", "validation")),
        (("train", "test"), ("train", None)),  # no labels
        (("train/a", "train/b", "test/a", "test/c"), ("train", None)),  # other classes
        (("train", "plane"), (".", None)),  # classes, one of which is called train
        (("train",), (".", None)),
        (("val", "test"), (".", None)),
        (("a", "b"), (".", None)),
        (("train/a", "train/b", "test/a", "test/b", ".cache"), ("train", "test")),
    ],
)
def test_train_val_and_test_are_splits_of_which_train_alone_is_pretrained_on(folders, expected, tmp_path):
    assert resolve(make(tmp_path, *folders)) == expected


def test_given_test_images_stay_and_a_split_by_itself_is_taken_as_it_is(tmp_path):
    root = make(tmp_path, *LABELED, "val/a", "val/b")
    assert resolve(root, test_images=root / "val") == ("train", "val")
    config = build_config(RunConfig, {"images": root / "val", "out": "out"})  # so it is asked for
    assert (config.images, config.test_images) == (str(root / "val"), None)
