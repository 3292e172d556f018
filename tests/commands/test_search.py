"""`search`: neighbors, duplicates and outliers against scikit-learn and against images that are copies by construction."""

import csv
import html
import os
import re
import shutil
import signal

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.distance import cdist
from sklearn.neighbors import NearestNeighbors

import mapet
from mapet.cli import main
from mapet.errors import Interrupted
from mapet.evaluation import embeddings, similarity
from mapet.evaluation.embeddings import read_embeddings
from mapet.run_state import RunState
from tests.commands.test_export import save_vit
from tests.conftest import save_crops
from tests.refused import refused

CPU = {"device": "cpu", "precision": "float32"}


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone") / "vit"
    save_vit(folder)
    return folder


@pytest.fixture(scope="module")
def images(photos, tmp_path_factory):
    """60 crops; three equal files, two near copies of crop007 (saved as JPEG), one of them in a folder, noise, and a broken file."""
    folder = save_crops(photos, tmp_path_factory.mktemp("search") / "images", 60, (96, 96))
    for name in ("=copy.png", "z.png"):
        shutil.copy(folder / "crop003.png", folder / name)
    (folder / "more").mkdir()
    for name, quality in (("near.jpg", 90), ("more/near.jpg", 80)):
        Image.open(folder / "crop007.png").save(folder / name, quality=quality)
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "noise.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def result(vit_folder, images, tmp_path_factory):
    out = tmp_path_factory.mktemp("result") / "out"
    return mapet.search(backbone=vit_folder, images=images, out=out, num_neighbors=4, **CPU)


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_neighbors_are_scikit_learn_s(result):
    ids, features = read_embeddings(result / "features")
    distances, nearest = NearestNeighbors(n_neighbors=5, metric="cosine").fit(features.astype(np.float64)).kneighbors()
    rows = {(row["id"].removeprefix("'"), int(row["rank"])): row for row in rows_of(result / "neighbors.csv")}
    assert len(rows) == 4 * 65 == 4 * len(ids)
    for i, name in enumerate(ids):
        for rank in range(1, 5):
            row = rows[name, rank]
            assert float(row["similarity"]) == pytest.approx(1 - distances[i, rank - 1], abs=2e-6)
            if distances[i, rank] - distances[i, rank - 1] > 1e-5 and (
                rank == 1 or distances[i, rank - 1] - distances[i, rank - 2] > 1e-5
            ):
                assert row["neighbor"].removeprefix("'") == ids[nearest[i, rank - 1]]


def test_duplicates_are_the_copies(result, images):
    rows = rows_of(result / "duplicates.csv")
    pairs = {(row["group"], row["kind"], *sorted((row["id"], row["duplicate"]))) for row in rows}
    exact = {
        ("1", "exact", *pair)
        for pair in (("'=copy.png", "crop003.png"), ("'=copy.png", "z.png"), ("crop003.png", "z.png"))
    }
    assert {pair for pair in pairs if pair[1] == "exact"} == exact
    near = {pair[2:] for pair in pairs if pair[1] == "near"}
    assert {("crop007.png", "near.jpg"), ("crop007.png", "more/near.jpg"), ("more/near.jpg", "near.jpg")} <= near
    assert len(near) < 20  # some crops show nothing but sky

    def small(name):
        return np.asarray(Image.open(images / name.removeprefix("'")).resize((16, 16), Image.Resampling.BICUBIC), float)

    assert all(np.sqrt(np.square(small(a) - small(b)).mean()) < 4.5 for a, b in near)
    results = RunState.read(result).results
    assert results["exact_duplicates"] == 3 and results["near_duplicates"] == len(
        {name for pair in near for name in pair}
    )
    assert min(float(row["similarity"]) for row in rows) >= results["min_similarity"] - 1e-6


def test_outliers_by_their_distance(result):
    ids, features = read_embeddings(result / "features")
    distances = np.sort(cdist(features, features, "cosine"), axis=1)[:, 1:5].mean(1)  # without itself
    rows = rows_of(result / "outliers.csv")
    assert rows[0]["id"] == ids[distances.argmax()]
    assert np.allclose([float(row["distance"]) for row in rows], np.sort(distances)[::-1], atol=2e-6)


def test_the_page_has_thumbnails_and_escapes_names(result):
    page = (result / "search.html").read_text()
    sections = dict(zip(re.findall("<h2>(.*?)</h2>", page), re.split("<h2>.*?</h2>", page)[1:], strict=True))
    assert [text.count("<img") for text in sections.values()][1:] == [48, 24 * 5]
    (title, duplicates), *_ = sections.items()
    assert (
        "3 images have exact duplicates" in title
        and "crop003.png" in duplicates
        and "noise.png" in next(text for name, text in sections.items() if "Outliers" in name)
    )
    assert page.count("data:image/webp") >= 174 and len(page) < 2e6 and "<script" not in page
    assert html.escape("exact =copy.png") in page


def test_a_query_reuses_the_features(result, vit_folder, images, tmp_path, monkeypatch):
    """Of an image, of another folder, of a file alone; no feature of the images is computed again."""
    monkeypatch.setattr(embeddings, "_write", lambda *_: pytest.fail("features are computed again"))
    options = {"backbone": vit_folder, "images": images, "features": result / "features", "num_neighbors": 3, **CPU}
    out = mapet.search(query=images / "crop005.png", out=tmp_path / "one", **options)
    all_rows = [row for row in rows_of(result / "neighbors.csv") if row["id"] == "crop005.png"]
    rows = rows_of(out / "neighbors.csv")
    assert [row["neighbor"] for row in rows] == ["crop005.png", *(row["neighbor"] for row in all_rows[:2])]
    assert float(rows[0]["similarity"]) == pytest.approx(1) and not (out / "duplicates.csv").exists()
    out = mapet.search(query=images / "more", out=tmp_path / "folder", **options)
    (*_, row) = rows_of(out / "neighbors.csv")
    assert row["id"] == "near.jpg" and row["rank"] == "3"
    save_vit(tmp_path / "other", depth=1)
    with refused("backbone"):
        mapet.search(out=tmp_path / "x", **options | {"backbone": tmp_path / "other"})


def test_interrupted_and_resumed_and_by_small_blocks(result, vit_folder, images, tmp_path, monkeypatch):
    monkeypatch.setattr(similarity, "BLOCK_ROWS", 17)
    monkeypatch.setattr(embeddings, "inference_batch_size", lambda _: 10)
    options = [
        "--backbone",
        str(vit_folder),
        "--images",
        str(images),
        "--num-neighbors",
        "4",
        "--device",
        "cpu",
        "--precision",
        "float32",
    ]
    compute, calls = embeddings._compute_features, []

    def stop(*arguments):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return compute(*arguments)

    monkeypatch.setattr(embeddings, "_compute_features", stop)
    assert main(["search", *options, "--out", str(tmp_path / "out")]) == Interrupted("").exit_code
    assert main(["search", *options, "--out", str(tmp_path / "out"), "--resume"]) == 0
    for name, columns, number in (
        ("neighbors", ("id", "rank"), "similarity"),
        ("duplicates", ("id", "duplicate", "kind"), "similarity"),
    ):
        actual, expected = (rows_of(folder / f"{name}.csv") for folder in (tmp_path / "out", result))
        assert [[row[key] for key in columns] for row in actual] == [
            [row[key] for key in columns] for row in expected
        ], name
        assert np.allclose([float(row[number]) for row in actual], [float(row[number]) for row in expected], atol=2e-6)
    assert rows_of(tmp_path / "out" / "outliers.csv")[0]["id"] == rows_of(result / "outliers.csv")[0]["id"]


def test_more_copies_than_neighbors_and_two_images(vit_folder, photos, tmp_path, caplog):
    folder = save_crops(photos, tmp_path / "images", 1)
    for number in range(5):
        shutil.copy(folder / "crop000.png", folder / f"{number}.png")
    out = mapet.search(backbone=vit_folder, images=folder, out=tmp_path / "out", num_neighbors=2, **CPU)
    rows = rows_of(out / "neighbors.csv")
    assert len(rows) == 12 and not [row for row in rows if row["id"] == row["neighbor"]]
    duplicates = rows_of(out / "duplicates.csv")
    assert {row["kind"] for row in duplicates} == {"exact"} and {row["group"] for row in duplicates} == {"1"}
    save_crops(photos, tmp_path / "two", 2)
    out = mapet.search(
        backbone=vit_folder, images=tmp_path / "two", out=tmp_path / "small", min_similarity=-0.99, **CPU
    )
    assert len(rows_of(out / "neighbors.csv")) == 2 and len(rows_of(out / "duplicates.csv")) == 1
    assert "min_similarity" in caplog.text
