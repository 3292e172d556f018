"""`mapet evaluate`: backbones side by side on real images and file formats."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

import mapet
from mapet.cli import main
from mapet.device import ComputeContext
from mapet.errors import Interrupted
from mapet.evaluation import probes, protocols
from mapet.evaluation.datasets import load_train_test
from mapet.evaluation.features import BackboneWrapper, CacheConfig, FeatureCache
from mapet.evaluation.logistic_regression import fit_logistic
from mapet.models.backbone import load_backbone
from mapet.run_state import RunState
from tests.conftest import save_crops
from tests.refused import fails, refused

QUICK = {"device": "cpu", "precision": "float32", "linear_epochs": 15, "num_seeds": 2, "controls": "none"}


@pytest.fixture(autouse=True)
def quick(two_threads, monkeypatch):
    """One thread, as in test_protocols, and one epoch of the attentive probe."""
    torch.set_num_threads(1)
    monkeypatch.setattr(probes, "ATTENTIVE_EPOCHS", 1)


def results_of(out):
    return RunState.read(out).results["backbones"]


@pytest.fixture(scope="module")
def small(digits, tmp_path_factory):
    """20 training and 10 test digits of each class."""
    folder = tmp_path_factory.mktemp("small")
    for part, count in (("train", 20), ("test", 10)):
        for kind in sorted((digits / part).iterdir()):
            if kind.is_dir():
                (folder / part / kind.name).mkdir(parents=True)
                for path in sorted(kind.iterdir())[:count]:
                    (folder / part / kind.name / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    from mapet.models.backbone import create_vit, save_backbone
    from tests.conftest import TINY

    folder = tmp_path_factory.mktemp("untrained") / "vit"
    save_backbone(create_vit("vit_tiny_patch16_224", (8, 8), 2, 1, TINY), folder)
    return folder


def test_pool_and_layers_hold_for_every_probe(run_dir, small, tmp_path):
    sets, features = {"images": small / "train", "test_images": small / "test"}, {"pool": "2x2", "layers": (0, -1)}
    protocols = ["logistic", "knn", "linear-sgd", "feature-rank"]
    (result,) = mapet.evaluate(
        backbone=[str(run_dir)], out=tmp_path / "out", **sets, **features, **QUICK | {"protocols": protocols}
    ).values()
    backbone = BackboneWrapper.from_vit(load_backbone(run_dir), ComputeContext.from_options("cpu", "float32"))
    caches = [
        FeatureCache.extract(backbone, part, CacheConfig(), **features) for part in load_train_test(*sets.values())
    ]
    assert probes.probe_accuracy(*caches) == {name: result[name] for name in ("logistic", "knn")}
    assert result["dimensions"] == 2 * 4 * 32 and result["alignment"] > 0
    by_layer = results_of(tmp_path / "out")[str(run_dir)]["linear-sgd"]["details"]["linear_sgd"][
        "val_accuracy_by_layer"
    ]
    assert set(by_layer) == {"0", "1", "0+1"}
    assert "pool 2x2, layers 0 -1" in (tmp_path / "out" / "evaluation.md").read_text()


def test_layers_are_checked_before_anything_is_computed(run_dir, small, tmp_path, caplog):
    with refused(2, field="layers", value=2):
        mapet.evaluate(backbone=[str(run_dir)], images=small / "train", layers=(0, 2), **QUICK)
    assert "nearest" not in caplog.text and "knn" not in caplog.text


def test_backbones_in_one_table(run_dir, untrained, small, tmp_path, caplog):
    caplog.set_level("INFO", "mapet")
    out = tmp_path / "out"
    result = mapet.evaluate(
        backbone=[str(run_dir), str(untrained), f"random:{run_dir}"],
        images=small / "train",
        test_images=small / "test",
        out=out,
        **QUICK,
    )
    assert set(result) == {str(run_dir), str(untrained), f"random:{run_dir}"}
    figures = result[str(run_dir)]
    data = load_train_test(small / "train", small / "test")
    backbone = BackboneWrapper.from_vit(load_backbone(run_dir), ComputeContext.from_options("cpu", "float32"))
    alone = probes.probe_accuracy(*(FeatureCache.extract(backbone, part, CacheConfig()) for part in data))
    assert alone == {name: figures[name] for name in ("logistic", "knn")}  # what `run` and studies measure
    assert max(figures["linear_sgd"], figures["linear_sgd_bn"]) >= 0.17  # after 6 steps; chance is 0.1
    assert 1 <= figures["rankme"] <= 32
    assert not any(" " in name for name in figures)
    columns = f"{run_dir} | {untrained} | random:{run_dir} (control)"
    assert f"| metric | over | {columns} |" in caplog.text and "images, higher is better | " in caplog.text
    record = results_of(out)[str(run_dir)]
    accuracy = record["knn"]["metrics"]["knn"]
    assert accuracy["ci_low"] < accuracy["value"] == figures["knn"] < accuracy["ci_high"]
    assert set(record["linear-sgd"]["details"]["linear_sgd"]["val_accuracy_by_layer"]) == {"1"}
    page = (out / "evaluation.md").read_text()
    row, selected = [line for line in page.splitlines() if line.startswith("| knn | 100 images |")]
    assert row.count(" to ") == 3 and selected.count("k 20") == 3
    with (out / "per_class.csv").open() as file:
        rows = [
            row for row in csv.DictReader(file) if row["backbone"] == str(run_dir) and row["metric"] == "linear_sgd"
        ]
    assert [row["class"] for row in rows] == list("0123456789") and all(row["of"] == "10" for row in rows)
    assert sum(int(row["correct"]) for row in rows) / 100 == pytest.approx(figures["linear_sgd"])
    assert (out / "figures" / "nearest-neighbors-1.png").stat().st_size > 5000
    with refused(field="out"):
        mapet.evaluate(backbone=[str(run_dir)], images=small / "train", out=out, **QUICK)


@pytest.mark.parametrize("prepared", [False, True])
def test_unlabeled_images_get_what_needs_no_labels(prepared, photos, tmp_path):
    crops = save_crops(photos, tmp_path / "photos", 20, size=(32, 32))
    if prepared:  # images that are no files of their own
        crops = mapet.prepare(images=crops, out=tmp_path / "prepared")
    from mapet.models.backbone import create_vit, save_backbone
    from tests.conftest import TINY

    save_backbone(create_vit("vit_tiny_patch16_224", (32, 32), 8, 3, TINY), tmp_path / "vit")
    result = mapet.evaluate(backbone=[str(tmp_path / "vit")], images=crops, out=tmp_path / "out", **QUICK)
    figures = result[str(tmp_path / "vit")]
    assert "rankme" in figures and "alignment" in figures and "knn" not in figures
    assert (tmp_path / "out" / "figures" / "nearest-neighbors-1.png").exists()


@pytest.mark.parametrize(
    ("args", "named", "field", "value"),
    [
        (["--protocols", "knnn"], ["'knnn'", "'knn'"], "protocols", "knnn"),
        (["--few-shot", "2.5"], ["--few-shot", "2.5"], "few_shot", "2.5"),
        (["--few-shot", "30", "--protocols", "few-shot"], ["--few-shot", "16 training images"], "few_shot", (30,)),
        (["--protocols", "ood"], ["'ood'", "--ood-images"], "protocols", "ood"),
        (["--backbone", "vit_tiny_patch16_224.augreg_in21k"], ["'timm:vit_tiny_patch16_224.augreg_in21k'"], None, None),
        (["--backbone", "runs/typo"], ["runs/typo"], None, None),
        (["--backbone", "random:vit_tinny_patch16_224"], ["'vit_tiny_patch16_224'"], None, None),
    ],
)
def test_errors_name_the_option(args, named, field, value, untrained, small, tmp_path, capsys):
    argv = [
        "evaluate",
        "--backbone",
        untrained,
        "--images",
        small / "train",
        "--out",
        tmp_path / "out",
        "--device",
        "cpu",
    ]
    fails(capsys, *argv, *args, named=named, field=field, value=value)


INSTANCES, MASKS = "instances.json", "masks"


@pytest.fixture(scope="module")
def annotated(tmp_path_factory):
    """Two images beside annotations in COCO's format and masks; the same as ADE20K lays it out, and in class folders."""
    root = tmp_path_factory.mktemp("annotated")
    (root / "images").mkdir(), (root / MASKS).mkdir()
    listed = []
    for number in range(2):
        Image.fromarray(np.full((8, 8), 99 * number, np.uint8)).save(root / "images" / f"{number}.png")
        Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 2).save(root / MASKS / f"{number}.png")
        listed.append({"id": number, "file_name": f"{number}.png", "height": 8, "width": 8})
    for part in ("training", "validation"):
        for kind, source in (("images", "images"), ("annotations", MASKS)):
            shutil.copytree(root / source, root / "ade" / kind / part)
    for name in "01":
        (root / "classes" / name).mkdir(parents=True)
        shutil.copy(root / "images" / f"{name}.png", root / "classes" / name)
    record = {"images": listed, "annotations": [], "categories": [{"id": 1, "name": "x"}]}
    (root / INSTANCES).write_text(json.dumps(record))
    return root


def command(backbone, out, args):
    return [
        "evaluate",
        "--backbone",
        str(backbone),
        "--out",
        str(out),
        "--device",
        "cpu",
        *args.split(),
    ]


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ("--images {0}/images --test-images {0}/images --annotations {0}/instances.json", "--test-annotations"),
        ("--images {0}/images --test-images {0}/images --seg-masks {0}/masks", "--test-seg-masks"),
        ("--images {0} --test-images {0}", "--test-seg-masks"),  # masks that are found there
        ("--images {0}/images --test-annotations {0}/instances.json", "--test-annotations"),
        ("--images {0}/images --test-seg-masks {0}/masks", "--ignore-labels"),
        ("--images {0}/images --ignore-labels 0", "--ignore-labels"),
        ("--images {0}/images --annotations {0}/instances.json --ignore-labels 0", "--annotations"),
        ("--images {0}/images --annotations {0}/instances.json --seg-masks {0}/masks", "--annotations"),
        ("--images {0}/images --annotations {0}/instances.json --test-seg-masks {0}/masks", "--annotations"),
        ("--images {0}/ade --test-images {0}/images", "ADE20K"),
        ("--images {0}/ade --test-seg-masks {0}/masks", "ADE20K"),
        ("--images {0}/classes --seg-masks {0}/masks --ood-images a={0}", "--ood-images"),
        ("--images {0}/images --ood-images a={0}", "--ood-images"),
        ("--images {0}/images --annotations {0}/instances.json --ood-images a={0}", "--ood-images"),
        ("--images {0}/images --seg-masks {0}/masks --ood-images a={0}", "--ood-images"),
    ],
)  # fmt: skip
def test_options_that_would_do_nothing_are_refused(args, named, untrained, annotated, tmp_path, capsys):
    fails(capsys, *command(untrained, tmp_path / "out", args.format(annotated)), named=[named])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "args",
    [
        "--test-images {0}/images --annotations {0}/instances.json --test-annotations {0}/instances.json",
        "--annotations {0}/instances.json --test-annotations {0}/instances.json",
        "--test-images {0}/images --seg-masks {0}/masks --test-seg-masks {0}/masks --ignore-labels 9",
    ],
)
def test_options_that_belong_together_are_taken(args, untrained, annotated, tmp_path):
    args = f"--images {annotated}/images {args.format(annotated)} --protocols feature-rank"
    assert main(command(untrained, tmp_path / "out", args)) == 0


@pytest.fixture(scope="module")
def uneven(small, tmp_path_factory):
    """Two classes of 15 images, and one of 3."""
    folder = tmp_path_factory.mktemp("uneven")
    for name, count in (("0", 15), ("1", 15), ("2", 3)):
        (folder / name).mkdir()
        for path in sorted((small / "train" / name).iterdir())[:count]:
            (folder / name / path.name).symlink_to(path.resolve())
    return folder


def test_default_few_shot_splits_skip_those_a_class_is_too_small_for(uneven, small, untrained, tmp_path, caplog):
    """A default of 5 images per class is skipped; requested, it is an error before anything is computed."""
    test = tmp_path / "test"
    test.mkdir()
    for name in "012":
        (test / name).symlink_to(small / "test" / name)
    options = {"backbone": [str(untrained)], "images": uneven, "test_images": test, **QUICK}
    result = mapet.evaluate(out=tmp_path / "out", **options)[str(untrained)]
    assert {name for name in result if name.startswith("few_shot")} == {"few_shot_1pct", "few_shot_10pct"}
    assert "too few for 5 per class: skipped" in caplog.text
    assert "knn" in result and "cluster_nmi" in result  # the rest is there
    for requested in (
        {"few_shot": (5,)},
        {"protocols": ["few-shot"]},
        {"few_shot": (0.1, 4), "protocols": ["few-shot"]},
    ):
        with refused(3):
            mapet.evaluate(out=tmp_path / "no", **options, **requested)
    assert not (tmp_path / "no").exists()
    result = mapet.evaluate(out=tmp_path / "three", **options, few_shot=(3,), protocols=["few-shot"])[str(untrained)]
    assert list(result) == ["few_shot_3"]


def test_a_backbone_that_fails_leaves_the_table_of_those_before(untrained, small, tmp_path, monkeypatch):
    """Keep the table of the backbones before, as Ctrl-C in a long evaluation does, with the protocols finished so far."""
    from mapet.evaluation.protocols import PROTOCOLS, Protocol

    def fails_later(context):
        if context.backbone.name.startswith("random:"):
            raise KeyboardInterrupt
        return PROTOCOLS["feature-rank"].run(context)

    monkeypatch.setitem(PROTOCOLS, "knn", Protocol(fails_later, "images"))
    with refused(tmp_path / "out", kind=Interrupted):
        mapet.evaluate(
            backbone=[str(untrained), f"random:{untrained}"], images=small / "train", out=tmp_path / "out",
            protocols=["cluster", "knn"], **QUICK,
        )  # fmt: skip
    assert "rankme" in (tmp_path / "out" / "evaluation.md").read_text()
    retained = results_of(tmp_path / "out")
    assert [[*protocols] for protocols in retained.values()] == [["cluster", "knn"], ["cluster"]]


def test_labels_are_asked_for(untrained, crops, tmp_path, capsys):
    argv = [
        "evaluate",
        "--backbone",
        untrained,
        "--images",
        crops,
        "--out",
        tmp_path / "out",
        "--protocols",
        "logistic",
    ]
    fails(capsys, *argv, named=[crops, "CLASS/image.jpg"])


def test_other_images_corruptions_and_sizes(run_dir, untrained, small, tmp_path, monkeypatch):
    """The second folder has three of the ten classes and one unknown in training."""
    for name in "137":
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / name).symlink_to(small / "test" / name)
    (tmp_path / "other" / "x").symlink_to(small / "test" / "5")
    out, two = tmp_path / "out", ("contrast", "jpeg_compression")
    monkeypatch.setattr(protocols, "CORRUPTIONS", {name: protocols.CORRUPTIONS[name] for name in two})
    monkeypatch.setattr(protocols, "SEVERITIES", (1, 5))
    result = mapet.evaluate(
        backbone=[str(run_dir), str(untrained)], images=small / "train", test_images=small / "test", out=out, **QUICK,
        protocols=["ood", "corruptions", "resolution"], ood_images={"elsewhere": tmp_path / "other"}, eval_image_sizes=[8, 12],
    )  # fmt: skip
    record = results_of(out)
    assert record[str(run_dir)]["ood"]["details"]["elsewhere"] == {"classes": 3, "images": 30}
    with (out / "per_class.csv").open() as file:
        rows = [r for r in csv.DictReader(file) if (r["backbone"], r["metric"]) == (str(run_dir), "ood_elsewhere_knn")]
    assert [row["of"] for row in rows if row["class"] in "0137"] == ["0", "10", "10", "10"]
    for source, figures in result.items():
        details = record[source]["corruptions"]["details"]
        mean = 1 - sum(sum(row) for row in details["errors"].values()) / 4
        assert figures["corruption_mean"] == pytest.approx(mean)
        assert figures["resolution_8"] == figures["corruption_clean"]
        assert 0 <= figures["resolution_12"] <= 1
    assert result[str(run_dir)]["mce"] == pytest.approx(1)
    assert "| contrast |" in (out / "evaluation.md").read_text()


def test_balanced_accuracy_and_auroc_lead_on_imbalanced_test_images(untrained, small, tmp_path, monkeypatch, caplog):
    """Beside every top-1 accuracy; the values are scikit-learn's on the probe's own logits. Training images may be imbalanced."""
    caplog.set_level("INFO", "mapet")
    for part, sizes in {"train": (20, 10, 10), "test": (10, 4, 3), "other": (8, 1)}.items():
        for name, count in enumerate(sizes):
            (tmp_path / part / str(name)).mkdir(parents=True)
            paths = sorted((small / ("train" if part == "train" else "test") / str(name)).iterdir())[-count:]
            for path in paths:
                (tmp_path / part / str(name) / path.name).symlink_to(path.resolve())
    monkeypatch.setattr(protocols, "CORRUPTIONS", {"contrast": protocols.CORRUPTIONS["contrast"]})
    monkeypatch.setattr(protocols, "SEVERITIES", (1,))
    sets = {"images": tmp_path / "train", "test_images": tmp_path / "test"}
    names = ["logistic", "knn", "linear-sgd", "attentive", "few-shot", "ood", "corruptions", "resolution"]
    options = {"protocols": names, "ood_images": {"b": tmp_path / "other"}, "eval_image_sizes": [8], "few_shot": (2,)}
    (result,) = mapet.evaluate(backbone=[str(untrained)], **sets, out=tmp_path / "out", **options, **QUICK).values()
    accuracies = [
        "logistic", "knn", "linear_sgd", "linear_sgd_bn", "attentive", "few_shot_2", "ood_b_logistic", "ood_b_knn", "corruption_clean",
        "corruption_mean", "resolution_8",
    ]  # fmt: skip
    expected = [row for name in accuracies for row in (f"{name}_balanced_accuracy", f"{name}_auroc", name)]
    expected.remove("corruption_mean_auroc")
    assert [row for row in result if row != "mce"] == expected
    backbone = BackboneWrapper.from_vit(load_backbone(untrained), ComputeContext.from_options("cpu", "float32"))
    train, test = (FeatureCache.extract(backbone, part, CacheConfig()) for part in load_train_test(*sets.values()))
    x, labels = test.layer_features(), test.labels.numpy()
    logits = fit_logistic(train.layer_features(), train.labels, 3)(x)
    assert result["logistic_auroc"] == pytest.approx(roc_auc_score(labels, logits.softmax(1), multi_class="ovr"))
    assert result["logistic_balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, logits.argmax(1)))
    assert result["logistic"] == pytest.approx(float((logits.argmax(1).numpy() == labels).mean()))
    page = (tmp_path / "out" / "evaluation.md").read_text()
    assert page.count("| knn_auroc | 17 images | ") == 2 and "imbalanced" in page and "few_shot_2_auroc " in caplog.text
    with (tmp_path / "out" / "per_class.csv").open() as file:
        assert {row["metric"] for row in csv.DictReader(file)} < {*accuracies}


def test_a_fine_tuned_model_is_evaluated_by_its_own_classifier(run_dir, small, tmp_path, caplog):
    caplog.set_level("INFO", "mapet")
    accuracy = mapet.finetune(
        backbone=run_dir, images=small / "train", test_images=small / "test", out=tmp_path / "tuned", epochs=12, lr=3e-3,
        device="cpu", precision="float32", ema_decay=0.5,
    )  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "tuned" / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "loss" in row]
    assert [row["epoch"] for row in trained] == list(range(1, 13)) and trained[-1]["loss"] < trained[0]["loss"]
    assert rows[-1] == {"step": 120, "epoch": 12, "accuracy": accuracy}
    assert (tmp_path / "tuned" / "learning_curve.png").stat().st_size > 5000
    assert ", 12 epochs" in caplog.text and f"epoch 6: loss {trained[5]['loss']:.3f}, " in caplog.text
    assert f"model in {tmp_path / 'tuned' / 'model'}" in caplog.text
    state = RunState.read(tmp_path / "tuned")
    assert state.results["ci95_low"] < accuracy < state.results["ci95_high"] and state.counts["test_images"] == 100
    result = mapet.evaluate(
        backbone=[str(tmp_path / "tuned")], images=small / "train", test_images=small / "test", out=tmp_path / "out",
        protocols=["resolution"], eval_image_sizes=[8], **QUICK,
    )  # fmt: skip
    assert result[str(tmp_path / "tuned")]["resolution_8"] == pytest.approx(accuracy)
