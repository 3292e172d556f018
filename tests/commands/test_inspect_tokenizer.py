"""`inspect-tokenizer`: metrics, figures and warnings of a tokenizer and of its token store."""

import json
import shutil

import numpy as np

import mapet
from mapet.cli import main
from mapet.files import file_hash, read_checksummed_json, write_checksummed_json
from tests.refused import fails

FIGURES = {"code_usage.png", "token_maps.png", "patches_by_code.png", "nearest_codes.png"}


def test_metrics_of_digits(digits, tokenizer_dir, tmp_path, capsys, caplog, monkeypatch):
    """Metrics of labeled images from the command line, reproducible at any batch size."""
    caplog.set_level("INFO", "mapet")
    argv = [
        "inspect-tokenizer",
        "--tokenizer",
        tokenizer_dir,
        "--images",
        digits / "train",
        "--sample",
        300,
    ]
    assert main([str(arg) for arg in [*argv, "--out", tmp_path / "a"]]) == 0
    assert {path.name for path in (tmp_path / "a").iterdir()} == FIGURES | {
        "tokenizer_metrics.json",
        "tokenizer_report.md",
        "run.json",
    }
    assert all((tmp_path / "a" / name).stat().st_size > 5000 for name in FIGURES)
    record = json.loads((tmp_path / "a" / "tokenizer_metrics.json").read_text())
    metrics = record["metrics"]
    assert record["warnings"] == [] and "no warnings" in caplog.text
    assert metrics["images"] == 300 and metrics["usage"]["patches"] == 4800
    assert metrics["stability"]["shift"]["fraction"] == 1
    assert 0.03 < metrics["label"]["bits"] < 0.3
    assert metrics["bag_of_tokens"]["accuracy"] > 0.25 > 2 * metrics["bag_of_tokens"]["chance"]
    page = (tmp_path / "a" / "tokenizer_report.md").read_text()
    assert "No warnings" in page and "| bag-of-tokens probe |" in page
    monkeypatch.setattr("mapet.evaluation.inspection.inference_batch_size", lambda _: 7)
    assert main([str(arg) for arg in [*argv, "--out", tmp_path / "b"]]) == 0
    assert (tmp_path / "b" / "tokenizer_metrics.json").read_text() == (
        tmp_path / "a" / "tokenizer_metrics.json"
    ).read_text()


def test_without_labels_and_with_few_of_each_class(crops, digits, tokenizer_dir, tmp_path, caplog):
    mapet.fit_tokenizer(images=crops, out=tmp_path / "t", image_size=32, patch_size=8, vocab_size=32)
    paths = mapet.inspect_tokenizer(tokenizer=tmp_path / "t", images=crops, out=tmp_path / "a")
    assert {path.name for path in paths} == FIGURES | {"tokenizer_metrics.json", "tokenizer_report.md"}
    metrics = json.loads((tmp_path / "a" / "tokenizer_metrics.json").read_text())["metrics"]
    assert metrics["label"] is None and metrics["bag_of_tokens"] is None and metrics["neighbor"] is not None
    with caplog.at_level("INFO", "mapet"):
        mapet.inspect_tokenizer(tokenizer=tokenizer_dir, images=digits / "train", out=tmp_path / "b", sample=20)
    assert "too few to compare tokens with classes; sample=50 would do" in caplog.text


def test_a_store_of_the_wrong_images_is_found(few_digits, tokenizer_dir, tokens_dir, tmp_path, caplog):
    """Tokens paired with the wrong images: hashes agree, only the tokens differ."""
    options = {"tokenizer": tokenizer_dir, "images": few_digits, "sample": 100}
    mapet.inspect_tokenizer(**options, tokens=tokens_dir, out=tmp_path / "a")
    record = json.loads((tmp_path / "a" / "tokenizer_metrics.json").read_text())
    assert record["metrics"]["stability"]["stored"]["fraction"] == 1
    shutil.copytree(tokens_dir, tmp_path / "tokens")
    file = tmp_path / "tokens" / "shards" / "00000.npy"
    np.save(file, np.roll(np.load(file), 1, axis=0))
    progress = read_checksummed_json(file.with_suffix(".json"), "token store")
    write_checksummed_json(file.with_suffix(".json"), progress | {"sha256": file_hash(file)})
    mapet.inspect_tokenizer(**options, tokens=tmp_path / "tokens", out=tmp_path / "b")
    assert "the store belongs to other images" in caplog.text


def test_tokens_without_centroids_have_no_nearest_codes(few_digits, tmp_path):
    mapet.fit_tokenizer(
        images=few_digits, out=tmp_path / "t", image_size=28, patch_size=7, vocab_size=16, quantizer="lfq"
    )
    paths = mapet.inspect_tokenizer(tokenizer=tmp_path / "t", images=few_digits, out=tmp_path / "a", sample=100)
    assert {path.name for path in paths} == FIGURES - {"nearest_codes.png"} | {
        "tokenizer_metrics.json",
        "tokenizer_report.md",
    }


def test_poor_tokens_are_warned_of(digits, tmp_path, caplog, capsys):
    """Two codes, of which one takes nearly all patches of white digits on black: a warning, not an error."""
    mapet.fit_tokenizer(images=digits / "train", out=tmp_path / "t", image_size=28, patch_size=7, vocab_size=2)
    mapet.inspect_tokenizer(tokenizer=tmp_path / "t", images=digits / "train", out=tmp_path / "a", sample=300)
    warned = json.loads((tmp_path / "a" / "tokenizer_metrics.json").read_text())["warnings"]
    assert warned and all(line in caplog.text for line in warned)
    assert "**Warning:**" in (tmp_path / "a" / "tokenizer_report.md").read_text()


def test_bad_options(digits, tokenizer_dir, run_dir, tmp_path, capsys):
    for args, named in [
        ([], ["--tokenizer"]),
        (["--tokenizer", tokenizer_dir], ["--images"]),
        (["--tokenizer", digits, "--images", digits / "train"], [digits, "visual_tokenizer.json"]),
        (["--tokenizer", tokenizer_dir, "--images", tmp_path / "none"], [tmp_path / "none"]),
    ]:
        fails(capsys, "inspect-tokenizer", *args, "--out", tmp_path / "o", named=named)
        assert not (tmp_path / "o").exists()
