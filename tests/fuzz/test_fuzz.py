"""Random and mutated files: a clear error or the right content, never a crash, a hang or a silent misread.

The default run tries some hundred mutations, `pytest -m slow -s tests/fuzz` some thousand, and prints the figures.
"""

import io
import json
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import mapet
from mapet.cli import main
from mapet.config.base import build_config, read_config
from mapet.config.pretraining import PretrainConfig
from mapet.data.readers.image import ImageDecodeError
from mapet.data.sources import list_images
from mapet.data.tar_shards import read_headers
from mapet.data.token_store import TokenStore
from mapet.errors import MapetError
from mapet.evaluation.datasets import read_instances
from mapet.models.backbone import load_backbone
from mapet.reports.page import RunView, render_page
from mapet.reports.run import RunFiles
from mapet.tokenizers.kmeans import KMeansState, load_state, save_state
from mapet.tokenizers.tokenizer import load_tokenizer
from mapet.training.checkpoint import checkpoint_tensors, load_checkpoint, save_checkpoint
from mapet.training.step import create_optimizer
from mapet.weights import read_weights
from tests.conftest import all_rows
from tests.fuzz.mutate import mutations
from tests.refused import refused

ROOT = Path(__file__).parents[2]
SECONDS = 20
"""A hang: far more than any of these files takes on a machine that is busy."""


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise AssertionError(f"still at it after {seconds} s")

    old = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


class Target(NamedTuple):
    """Something that is read from a folder.

    Attributes:
        make: write it into a new folder; returns what `read` needs to know.
        read: its content, as something that can be compared.
        strict: content that differs is a misread: only errors and the very same are right.
    """

    make: Callable[[Path], Any]
    read: Callable[[Path, Any], Any]
    strict: bool = True


def is_same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor | np.ndarray):
        return a.shape == b.shape and bool((a == b).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(is_same, a, b))
    return bool(a == b)


def make_recipe(folder: Path) -> None:
    text = "images: photos\nout: run\ntokenizer: t\nmodel_args: {embed_dim: 32}\nepochs: 3\nlr: 0.001\nmask_ratio: [0.4, 0.8]\n"
    (folder / "recipe.yaml").write_text(text)


def read_recipe(folder: Path, _: Any) -> str:
    file = folder / "recipe.yaml"
    return build_config(PretrainConfig, read_config(file), file).model_dump_json()


def make_list(folder: Path) -> None:
    for number in range(12):
        (folder / f"{number}.png").write_bytes(b"x" * number)
    (folder / "list.txt").write_text("".join(f"{number}.png\n" for number in range(12)))


def read_list(folder: Path, _: Any) -> list[bytes]:
    images = list_images(folder / "list.txt")
    assert len({images.key(i) for i in range(len(images))}) <= len(images) and len(images.hash) == 64
    return [images.ids[i] for i in range(len(images))]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)


def make_checkpoints(folder: Path) -> None:
    for step in (1, 2):
        torch.manual_seed(step)
        net = Net()
        optimizer = create_optimizer(net, "adamw", 0.1, 0.1)
        net.layer(torch.ones(2, 5)).sum().backward()
        optimizer.step()
        save_checkpoint(folder, step, checkpoint_tensors(net, optimizer), {"epochs": 3}, keep=2)


def read_checkpoints(folder: Path, _: Any) -> Any:
    net = Net()
    optimizer = create_optimizer(net, "adamw", 0.1, 0.1)
    state = load_checkpoint(folder, net, optimizer)
    return state["step"], dict(net.state_dict()), checkpoint_tensors(net, optimizer)["optimizer"]


def make_zip(folder: Path) -> None:
    torch.save({"state_dict": Net().state_dict(), "epoch": 3}, folder / "weights.pth")


def make_legacy(folder: Path) -> None:
    torch.save(Net().state_dict(), folder / "weights.pth", _use_new_zipfile_serialization=False)


def read_named(folder: Path, _: Any) -> list[str]:
    return sorted(read_weights(folder / "weights.pth"))


CALL = {"vocab_size": 4, "seed": 0}


def some_state() -> KMeansState:
    return KMeansState(3, 0.5, 0.4, torch.rand(4, 6), torch.rand(4, 6), torch.arange(4), torch.arange(4))


def make_state(folder: Path) -> None:
    save_state(folder / "k.safetensors", CALL, some_state())


def read_state(folder: Path, _: Any) -> list[str]:
    return [str(load_state(folder / "k.safetensors", CALL, some_state()).centroids.shape)]


def make_tar(folder: Path) -> None:
    with tarfile.open(folder / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(4):
            for name, data in (
                (f"{number}.jpg", b"x" * 700),
                (f"{number}.cls", b"cat"),
                ("n" * 120 + f"{number}.png", b"y"),
            ):
                info = tarfile.TarInfo(name)
                info.size, info.mtime = len(data), 1.5 + number
                tar.addfile(info, io.BytesIO(data))


def read_tar(folder: Path, _: Any) -> list[bytes]:
    with (folder / "a.tar").open("rb") as file:
        return read_headers(file, "a.tar").names.tobytes().split(b"\0")


def make_annotations(folder: Path) -> None:
    for number in range(3):
        Image.new("RGB", (8, 6)).save(folder / f"{number}.png")
    images = [{"id": number, "file_name": f"{number}.png", "width": 8, "height": 6} for number in range(3)]
    boxes = [
        {"id": n, "image_id": n % 3, "category_id": 1 + n % 2, "bbox": [1, 1, 4.5, 3], "area": 13.5, "iscrowd": 0}
        for n in range(5)
    ]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    (folder / "instances.json").write_text(
        json.dumps({"images": images, "annotations": boxes, "categories": categories})
    )


def read_annotations(folder: Path, _: Any) -> Any:
    found = read_instances(folder / "instances.json", folder)
    return found.classes, [box.tolist() for box in found.boxes], found.image_labels.tolist()


@pytest.fixture(scope="module")
def targets(few_digits, tokenizer_dir, tokens_dir, run_dir, tmp_path_factory) -> dict[str, Target]:
    images = list_images(few_digits)
    prepared = tmp_path_factory.mktemp("made") / "prepared"
    subset = few_digits.parent / "dozen.txt"
    subset.write_text("\n".join(few_digits.read_text().splitlines()[:12]) + "\n")
    mapet.prepare(images=subset, out=prepared, short_side=8)

    def copy_from(source: Path) -> Callable[[Path], None]:
        return lambda folder: shutil.copytree(source, folder, dirs_exist_ok=True) and None

    def codebook(folder: Path, _: Any) -> Any:
        tokenizer = load_tokenizer(folder)
        return tokenizer.description, dict(tokenizer.quantizer.state_dict())

    def ids_and_sizes(folder: Path, _: Any) -> Any:
        actual = list_images(folder)
        return [actual.ids[i] for i in range(len(actual))], [actual.open(i, 1).size for i in range(len(actual))]

    def run(folder: Path, _: Any) -> int:
        return len(render_page([RunView.from_files(RunFiles.open(folder))])) and 0

    def run_files(folder: Path) -> None:
        for name in ("config.yaml", "run.json", "metrics.jsonl"):
            shutil.copy(run_dir / name, folder)

    def backbone(folder: Path, _: Any) -> list[str]:
        return sorted(load_backbone(folder).state_dict())

    return {
        "recipe": Target(make_recipe, read_recipe, strict=False),
        "image list": Target(make_list, read_list, strict=False),
        "checkpoint": Target(make_checkpoints, read_checkpoints, strict=False),
        "weights (zip)": Target(make_zip, read_named, strict=False),
        "weights (legacy)": Target(make_legacy, read_named, strict=False),
        "k-means state": Target(make_state, read_state, strict=False),
        "codebook": Target(copy_from(tokenizer_dir), codebook),
        "token store": Target(
            copy_from(tokens_dir), lambda folder, _: all_rows(TokenStore.open(folder, images)) if folder else None
        ),
        "prepared": Target(copy_from(prepared), ids_and_sizes, strict=False),
        "backbone": Target(copy_from(run_dir / "backbone"), backbone, strict=False),
        "tar": Target(make_tar, read_tar, strict=False),
        "annotations": Target(make_annotations, read_annotations, strict=False),
        "run folder": Target(run_files, run, strict=False),
    }


NAMES = [
    "recipe", "image list", "checkpoint", "weights (zip)", "weights (legacy)", "k-means state", "codebook", "token store",
    "prepared", "backbone", "tar", "annotations", "run folder",
]  # fmt: skip
TALLY: dict[str, Counter[str]] = {}


def attack(name: str, target: Target, folder: Path, count: int) -> None:
    """Mutate the files in turn; each time the answer is an error, the same content or, if not strict, some content."""
    folder.mkdir()
    known = target.make(folder)
    with at_most(SECONDS):
        right = target.read(folder, known)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".png")
    tally = TALLY.setdefault(name, Counter())
    for number, file in enumerate(files):
        data = file.read_bytes()
        for changed in mutations(data, -(-count // len(files)), seed=number):
            file.write_bytes(changed)
            try:
                with at_most(SECONDS):
                    content = target.read(folder, known)
            except (MapetError, ImageDecodeError) as error:
                assert str(error) and len(str(error)) < 3000
                tally["error"] += 1
            else:
                tally["same" if is_same(content, right) else "other"] += 1
                assert not target.strict or is_same(content, right), f"{file.name} was misread"
        file.write_bytes(data)


@pytest.mark.parametrize("name", NAMES)
def test_mutations(name, targets, tmp_path):
    attack(name, targets[name], tmp_path / "a", 40)


def test_a_damaged_checkpoint_is_never_another_one(targets, tmp_path):
    """Whatever happens to the newest, what is loaded is it or the one before, bit-exact."""
    folder = tmp_path / "c"
    folder.mkdir()
    make_checkpoints(folder)
    newest = read_checkpoints(folder, None)
    for file in sorted((folder / "step-00000002").iterdir()):
        data = file.read_bytes()
        for changed in mutations(data, 25, seed=len(file.name)):
            file.write_bytes(changed)
            actual = read_checkpoints(folder, None)
            assert is_same(actual, newest) or actual[0] == 1
        file.write_bytes(data)


@pytest.mark.slow
def test_some_thousand_mutations(targets, tmp_path):
    for name in NAMES:
        attack(name, targets[name], tmp_path / name, 600)
    print()
    for name, tally in TALLY.items():
        print(f"| {name} | {sum(tally.values()):,} | {tally['error']:,} | {tally['same']:,} | {tally['other']:,} |")


@pytest.mark.parametrize("count", [12, pytest.param(300, marks=pytest.mark.slow)])
def test_decoders(count, tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.decoding", str(count), str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=580,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    actual = json.loads(result.stdout.splitlines()[-1])
    assert all(sum(tally.values()) == count for tally in actual["outcomes"].values())
    assert actual["slowest"] < SECONDS and actual["peak"] < 5 << 30  # 179 million pixels, a few times over
    print(f"\n{actual}")


def test_a_pickle_may_not_number_its_memo_beyond_its_length(tmp_path):
    """C's unpickler would take the memory for all numbers up to the one in the file: 32 GB for these five bytes."""
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
    (tmp_path / "weights.pth").write_bytes(magic + b"\x80\x02K\x01r\x00\x00\x00\x80.")
    with at_most(SECONDS), refused("weights"):
        read_weights(tmp_path / "weights.pth")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
options = st.dictionaries(st.sampled_from(sorted(PretrainConfig.model_fields)), json_values, max_size=5)


@given(options)
@settings(max_examples=150, deadline=None)
def test_any_value_of_any_option(values):
    """A config, or an error that names the option."""
    try:
        build_config(PretrainConfig, {"images": "a", "out": "b", "tokenizer": "c"} | values)
    except MapetError as error:
        assert any(name.replace("_", "-") in str(error) or name in str(error) for name in values)


@given(
    st.lists(st.text(max_size=12) | st.sampled_from(["--images", "--epochs", "--out", "-1", "a.yaml", "--model-args"]))
)
@settings(max_examples=60, deadline=None)
def test_any_arguments(args):
    """Exit code 2 and a line, or help; nothing runs without images."""
    try:
        assert main(["pretrain", *args]) == 2
    except SystemExit as stop:
        assert stop.code == 0


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(12)),
        "[" * 5000,
        "images: " + "[" * 900 + "]" * 900,
        "images: !!python/object/apply:os.system [echo]",
        "images: &x {y: *x}",
        "images: a\nimages: b\n",
        "epochs: " + "9" * 5000,
        "epochs: .nan\nimages: a",
        "images: a\nout: b\ntokenizer: c\nepochs: .inf",
        "? {a: b}\n: c",
        "\ufeffimages: a",
        "images: a\nout: b\ntokenizer: c\nlr: 1e400",
    ],
    ids=range(12),
)
def test_hostile_recipes(text, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    with at_most(SECONDS):
        assert main(["pretrain", str(tmp_path / "r.yaml")]) == 2
    assert "Traceback" not in capsys.readouterr().err
