"""Benchmarks run, and the tables of the docs are those of their results."""

import argparse
import importlib
import io
import json
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

from benchmarks import gpu_data, gpu_study, tables, variants
from benchmarks.__main__ import NAMES
from benchmarks.core import RESULTS, ROOT, run_info
from benchmarks.tables import Table
from mapet.models.backbone import create_vit
from mapet.training.tasks import pretraining
from tests.conftest import TINY

FIELDS = {"name", "command", "date", "commit", "source", "machine", "versions", "data", "seeds", "rows"}
MEASURED = {"performance", "results", "evaluation", "tokenizers", "scaling", "robustness"}


def smoke(name, folder):
    """Result of a benchmark's smallest setting."""
    module = importlib.import_module(f"benchmarks.{name}")
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return module.run(parser.parse_args([arg.format(scratch=folder) for arg in module.SMOKE]))


@pytest.mark.parametrize("name", ["flops", "tokenizer", "gpu_data"])
def test_runs(name, tmp_path):
    result = smoke(name, tmp_path)
    module = importlib.import_module(f"benchmarks.{name}")
    assert any(table.render(result.rows) for table in module.TABLES.values())
    assert set(json.loads(json.dumps(run_info(name, result)))) == FIELDS


@pytest.mark.parametrize("name", NAMES)
def test_options_of_the_smallest_setting_exist(name):
    module = importlib.import_module(f"benchmarks.{name}")
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    parser.parse_args(module.SMOKE)
    assert module.__doc__ and module.TABLES


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_results_say_where_they_come_from(path):
    result = json.loads(path.read_text())
    assert set(result) == FIELDS
    assert result["name"] == path.stem.partition("-")[0] in NAMES
    assert result["command"].startswith(f"python -m benchmarks {result['name']}")
    assert result["rows"] and result["date"] and result["machine"] and result["versions"]


def test_tables_of_the_docs_are_those_of_the_results():
    assert tables.update(check=True) == []


def test_every_result_is_shown():
    shown = {
        stem
        for page in tables.pages()
        for block in tables.BLOCK.findall(page.read_text())
        for stem in block[1].split("+")
    }
    assert shown == {path.stem for path in RESULTS.glob("*.json")}


@pytest.mark.parametrize("page", tables.pages(), ids=lambda path: path.stem)
def test_tables_of_measured_numbers_are_generated_or_say_why_not(page):
    """A table with a column of decimals lies in a block, or a comment says where its numbers are from."""
    text = tables.BLOCK.sub("", page.read_text())
    for actual in re.finditer(r"(?:^\|.*\n)+", text, flags=re.M):
        if page.stem in MEASURED and len(re.findall(r"\| \**\d+\.\d", actual[0])) > 2:
            before = text[: actual.start()].rstrip().rpartition("\n")[2]
            assert before.startswith("<!-- no benchmark: "), actual[0][:200]


# ---- on a GPU machine

BLOCKED = """
import runpy, sys
for name in ("sklearn", "scipy", "matplotlib", "tensorboard", "shtab", "datasets", "transformers"):
    sys.modules[name] = None
runpy.run_module("benchmarks", run_name="__main__")
"""


@pytest.mark.parametrize(("name", "rows"), [("gpu-study", 4), ("gpu", 4)])
def test_runs_with_what_a_gpu_machine_has(name, rows, tmp_path):
    """Without the packages that neither PyTorch and timm nor the file bring; it keeps its rows as it goes."""
    file = tmp_path / "result.json"
    command = [sys.executable, "-c", BLOCKED, name, "--smoke", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(file.read_text())["rows"]) >= rows and "| " in done.stdout


def test_ends_by_itself(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    gpu_study.add_arguments(parser)
    result = gpu_study.run(parser.parse_args([*gpu_study.SMOKE, "--seeds", "10000", "--minutes", "0"]))
    assert len(result.rows) < 4 and "stopped after 0 minutes" in capsys.readouterr().out


def test_images_of_the_file(tmp_path):
    """Each equals a JPEG of the image alone, unaffected by its neighbors. Order and labels are those of the archive."""

    def decoded(content):
        return Image.open(io.BytesIO(content)).convert("RGB")

    rng = np.random.default_rng(1)
    expected = {}
    with zipfile.ZipFile(tmp_path / "cifar10.zip", "w") as archive:
        for part, label, index in [(p, c, i) for p in ("test", "train") for c in ("cat", "dog") for i in range(5)]:
            content = gpu_data.jpeg(gpu_data.random_image(rng, (32, 32)), 95)
            archive.writestr(f"cifar10/{part}/{label}/{index}.jpg", content)
            alone = decoded(gpu_data.jpeg(decoded(content), 75))
            expected[part, label, index] = np.asarray(alone).transpose(2, 0, 1)
    gpu_data.write(tmp_path / "gpu.zip", gpu_data.cifar10_mosaics(tmp_path / "cifar10.zip"))
    for part in ("train", "test"):
        images, labels = gpu_data.load_cifar10(tmp_path / "gpu.zip", part)
        assert labels.tolist() == [0] * 5 + [1] * 5
        reference = np.stack([expected[part, label, index] for label in ("cat", "dog") for index in range(5)])
        assert np.array_equal(images, reference)
    images, labels = gpu_data.load_cifar10(tmp_path / "gpu.zip", "test", 2)
    assert labels.tolist() == [0, 0, 1, 1] and np.array_equal(images, reference[[0, 1, 5, 6]])


def test_probes_of_the_study():
    """Logistic regression is scikit-learn's, k-NN a loop over its definition."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 5, generator=generator), torch.arange(200) % 3
    x += torch.eye(3, 5)[y]
    for C in (0.01, 1.0):
        weight, bias = gpu_study.logistic(x, y, C)
        expected = LogisticRegression(C=C, tol=1e-8, max_iter=10000).fit(x.numpy(), y.numpy())
        assert np.allclose(weight.numpy(), expected.coef_, atol=2e-3)
        assert np.allclose(bias - bias.mean(), expected.intercept_ - expected.intercept_.mean(), atol=2e-3)
    queries = torch.randn(4, 5, generator=generator)
    votes = gpu_study.knn_votes(x, y, queries)
    for row, query in zip(votes, queries, strict=True):
        cosine = [float(query @ point / query.norm() / point.norm()) for point in x]
        nearest = sorted(range(200), key=lambda index: -cosine[index])[:20]
        counts = [sum(np.exp(cosine[i] / 0.07) for i in nearest if y[i] == label) for label in range(3)]
        assert row.tolist() == pytest.approx(counts, rel=1e-3)


def test_table():
    table = Table({"name": "{name}", "value": "{value:.1f}", "none": "{missing:.1f}"})
    rows = [{"name": "a", "value": 1.25}, {"name": "b", "value": None}]
    assert table.render(rows) == "| name | value |\n|---|---|\n| a | 1.2 |\n| b |  |\n"
    assert table.render([]) == ""


def test_first_weights_of_variants(few_digits):
    """Positions of two frequencies at least, products of attention near plus and minus the identity, patches without correlation."""
    every = (variants.mimetic_attention, variants.sine_cosine_positions, variants.whitened_patches)
    with variants.initialized(every, few_digits):
        torch.manual_seed(0)
        vit = pretraining.create_vit("vit_tiny_patch16_224", (8, 8), 2, 1, TINY, 0.0)
    assert pretraining.create_vit is create_vit and vit.pos_embed[0, 0].abs().max() == 0
    positions = vit.pos_embed[0, 1:].detach()
    torch.testing.assert_close(
        positions.square().sum(1), torch.full((16,), 16 * 0.3**2)
    )  # 16 pairs of a sine and a cosine
    attention, eye = vit.blocks[0].attn, torch.eye(32)
    query, key, value = attention.qkv.weight.detach().view(3, 2, 16, 32)
    products = query.transpose(1, 2) @ key  # of rank 16: the better half of 0.7 Z + 0.7 I
    assert torch.linalg.matrix_rank(products).tolist() == [16, 16] and (products * eye).sum((1, 2)).min() > 0.2 * 32
    noise = value.flatten(0, 1).T @ attention.proj.weight.detach().T + 0.4 * eye
    assert noise.std() == pytest.approx(0.4 / 32**0.5, rel=0.15) and abs(float(noise.diag().mean())) < 0.1
    with torch.no_grad():
        embedded = vit.patch_embed(variants.read_images(vit, few_digits)).flatten(0, 1)
    variances = torch.linalg.eigvalsh(torch.cov(embedded.T))[-4:]  # a patch has four pixels
    assert embedded.mean(0).abs().max() < 1e-3 and variances.min() > 0.8 * variances.max()
