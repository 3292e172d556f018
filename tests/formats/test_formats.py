"""Files of every released version are read for ever, and those of a newer one are refused in a sentence (docs/formats.md)."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import mapet
from mapet.data.prepared import PreparedDataset
from mapet.data.sources import list_images
from mapet.data.token_store import TokenStore
from mapet.errors import NewerFormatError
from mapet.evaluation.embeddings import read_embeddings
from mapet.files import check_format, read_checksummed_json, write_checksummed_json, write_json
from mapet.run_state import RunState
from mapet.tokenizers.tokenizer import load_tokenizer
from mapet.tokenizers.vqkd import load_vqkd
from mapet.training.checkpoint import load_checkpoint
from tests.formats import write
from tests.refused import refused

HERE = Path(__file__).parent
VERSIONS = sorted(path.name for path in HERE.glob("*.*.*"))


@pytest.fixture
def files(tmp_path, monkeypatch, request):
    """A copy of a version's files, which are the working folder."""
    shutil.copytree(HERE / getattr(request, "param", VERSIONS[-1]), tmp_path / "files")
    monkeypatch.chdir(tmp_path / "files")
    return tmp_path / "files"


@pytest.mark.parametrize("files", VERSIONS, indirect=True)
def test_all_is_read_as_it_was(files):
    expected, result = json.loads((files / "expected.json").read_text()), write.measure()
    for name in ("tokenizer_hash", "images_hash", "tokens", "prepared"):
        assert result[name] == expected[name], name
    for name in ("features", "logits", "vqkd"):
        torch.testing.assert_close(torch.tensor(result[name]), torch.tensor(expected[name]), rtol=1e-4, atol=1e-5)
    images, tokenizer = list_images("images"), load_tokenizer(Path("tokenizer"))
    store = TokenStore.open(Path("tokens"), images, tokenizer.hash)
    pixels = torch.stack([images.open(row, 1).read() for row in range(len(images))])
    assert tokenizer(pixels).flatten(1).tolist() == [store.read(row, 0).tolist() for row in range(len(store))]


@pytest.mark.parametrize("files", VERSIONS, indirect=True)
def test_a_run_resumes(files):
    expected = json.loads((files / "expected.json").read_text())["losses"]
    mapet.pretrain(**write.PRETRAIN, resume=True)
    losses = [json.loads(line)["loss"] for line in (files / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses == pytest.approx(expected, rel=1e-4) and len(losses) == 4
    mapet.tokenize(images="images", tokenizer="tokenizer", out="tokens", resume=True)
    mapet.embed(backbone="backbone", images="images", out="features", **write.SMALL, resume=True)


def test_this_version_has_files_or_is_not_released():
    """`tests/formats/write.py` is part of a release."""
    assert mapet.__version__ in VERSIONS


# ---- of a newer version


def raise_format(path):
    sealed = "checksum" in json.loads(path.read_text())
    key = "schema_version" if path.name == "run.json" else "format_version"
    content = read_checksummed_json(path, "file") if sealed else json.loads(path.read_text())
    (write_checksummed_json if sealed else write_json)(path, content | {key: 99})


OPEN = {
    "tokenizer/visual_tokenizer.json": lambda: load_tokenizer(Path("tokenizer"), with_teacher=False),
    "tokens/manifest.json": lambda: TokenStore.open(Path("tokens"), list_images("images")),
    "prepared/manifest.json": lambda: PreparedDataset(Path("prepared")),
    "vqkd/vqkd.json": lambda: load_vqkd("vqkd/vqkd.safetensors"),
    "features/manifest.json": lambda: read_embeddings(Path("features")),
    "run/run.json": lambda: RunState.read(Path("run")),
    "run/checkpoints/step-00000002/trainer_state.json": lambda: load_checkpoint(
        Path("run/checkpoints"), torch.nn.Linear(1, 1)
    ),
}


@pytest.mark.parametrize("file", OPEN)
def test_newer_ones_are_refused(file, files):
    raise_format(files / file)
    with refused("99", f"mapet {mapet.__version__}", kind=NewerFormatError):
        OPEN[file]()


def test_a_newer_checkpoint_is_not_passed_over_for_an_older_one(files):
    """A newer checkpoint is not skipped: its steps would be lost."""
    last = files / "run" / "checkpoints" / "step-00000003"
    shutil.copytree(last.with_name("step-00000002"), last)
    write_checksummed_json(
        last / "trainer_state.json",
        read_checksummed_json(last / "trainer_state.json", "checkpoint") | {"step": 3, "format_version": 2},
    )
    with refused("newer mapet"):
        mapet.pretrain(**write.PRETRAIN, resume=True)


def test_newer_bundles_of_steps(tmp_path):
    from mapet.training.checkpoint import BUNDLE, load_debug_bundle

    write_checksummed_json(tmp_path / BUNDLE, {"format_version": 2})
    with refused("format 2", kind=NewerFormatError):
        load_debug_bundle(tmp_path, None, None)


@pytest.mark.parametrize("number", [None, "1", True, 0, 1.5])
def test_what_is_no_number_of_a_format(number):
    with pytest.raises(ValueError, match=str(number)):
        check_format(number, 1, "thing", Path("place"))


def test_the_page_names_every_format():
    """docs/formats.md gives the numbers that the code writes."""
    from mapet import run_state
    from mapet.data import prepared, tar_shards, token_store
    from mapet.evaluation import embeddings
    from mapet.tokenizers import tokenizer, vqkd
    from mapet.training import checkpoint

    page = (HERE.parents[1] / "docs" / "formats.md").read_text()
    table = dict(re.findall(r"^\| [^|]*?`((?:[^`]*/)?[\w*.-]+)`[^|]*\| (\d+) \|", page, flags=re.M))
    assert {name: int(number) for name, number in table.items()} == {
        "FOLDER/run.json": run_state.SCHEMA_VERSION, "TOKENIZER/visual_tokenizer.json": tokenizer.FORMAT,
        "TOKENS/manifest.json": token_store.FORMAT, "PREPARED/manifest.json": prepared.FORMAT,
        "FEATURES/manifest.json": embeddings.FORMAT, "VQKD/vqkd.json": vqkd.FORMAT,
        "RUN/checkpoints/step-*/trainer_state.json": checkpoint.FORMAT, "RUN/debug/step-*/bundle.json": checkpoint.BUNDLE_FORMAT,
        "~/.cache/mapet/shards/*.safetensors": tar_shards.FORMAT,
    }  # fmt: skip
