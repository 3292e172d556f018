"""CIFAR-10: does MaPeT pre-training beat an untrained ViT, and supervised training from scratch?

    python benchmarks/cifar10.py --data cifar10.zip --out runs/cifar10

For each teacher: `mapet run recipes/cifar10.yaml`, then linear probe and k-NN on frozen features with 1, 10 and 100 % of
the labels, against the same ViT untrained and against supervised training from scratch with as many labels. What is
done already is not done again. Writes results.json and results.md. The stand-in teacher needs the packages that
benchmarks/stand_in.py names; its results lean on ImageNet's labels.
"""

import argparse
import json
import logging
import sys
import time
from pathlib import Path

import torch
from cifar10_data import unpack

import mapet
from mapet.config.base import read_recipe
from mapet.device import Compute
from mapet.evaluation.classifiers import linear_accuracy
from mapet.evaluation.features import extract_features, train_and_test
from mapet.evaluation.splits import few_labels
from mapet.files import write_json
from mapet.models.backbone import load_backbone, prepare_for_device
from mapet.run_state import RunState

HERE = Path(__file__).parent
TEACHERS = {"stand_in": {"teacher": "stand_in:efficientnet_lite0", "teacher_image_size": 128}, "pixels": {}}
SHARES = (0.01, 0.1, 1.0)
log = logging.getLogger("mapet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="cifar10.zip, or its folder with train/ and test/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--teachers", nargs="+", choices=TEACHERS, default=list(TEACHERS))
    parser.add_argument("--epochs", type=int, help="of pre-training; default: the recipe's")
    parser.add_argument(
        "--scratch-epochs", type=int, nargs=3, default=[60, 12, 2], help="with 1, 10 and 100 %% of the labels"
    )
    options = parser.parse_args()
    sys.path.insert(0, str(HERE))
    data = unpack(options.data, options.out)

    backbones = {name: pretrain(name, data, options) for name in options.teachers}
    result_file = options.out / "results.json"
    results = json.loads(result_file.read_text()) if result_file.exists() else {}
    for name in ["untrained", *options.teachers]:
        if name not in results:
            results[name] = probes(name, options.out / (options.teachers[0] if name == "untrained" else name), data)
            write_json(result_file, results)
    scratch = results.setdefault("scratch", {})
    for share, epochs in zip(SHARES, options.scratch_epochs, strict=True):
        if f"{share}" not in scratch:
            started = time.monotonic()
            scratch[f"{share}"] = mapet.finetune(
                backbone=next(iter(backbones.values())), from_scratch=True, images=data / "train", test_images=data / "test",
                label_fraction=share, epochs=epochs, views="random-crop", min_crop_scale=0.5, lr=1e-3, batch_size=64 if share < 0.1 else 128,
            )  # fmt: skip
            log.info("from scratch on %g of the labels: %.0f s", share, time.monotonic() - started)
            write_json(result_file, results)
    report = table(results, options.teachers)
    (options.out / "results.md").write_text(report)
    print(report)


def pretrain(name: str, data: Path, options: argparse.Namespace) -> Path:
    recipe = read_recipe(HERE.parent / "recipes" / "cifar10.yaml")
    recipe["fit_tokenizer"] |= TEACHERS[name]
    if options.epochs:
        recipe["pretrain"]["epochs"] = options.epochs
    out = options.out / name
    return mapet.run(
        images=data / "train", test_images=data / "test", out=out, resume=(out / "config.yaml").exists(), **recipe
    )


def probes(name: str, run: Path, data: Path) -> dict[str, float]:
    """What `mapet run` measured with all labels, and linear probes with a share of them."""
    measured = RunState.read(run).results["probe"]["untrained" if name == "untrained" else "pretrained"]
    found = {"knn": measured["knn"], "linear 1.0": measured["linear"]}
    compute = Compute.choose()
    torch.manual_seed(0)
    vit = prepare_for_device(load_backbone(run, pretrained=name != "untrained"), compute)
    train, test = train_and_test(data / "train", data / "test")
    check = extract_features(vit, test, compute)
    for share in SHARES[:-1]:
        found[f"linear {share}"] = linear_accuracy(
            *extract_features(vit, train.subset(few_labels(train, share, 0)), compute), *check
        )
    log.info("%s: %s", name, found)
    return found


def table(results: dict, teachers: list[str]) -> str:
    lines = ["| features | k-NN | linear, 1 % of labels | 10 % | 100 % |", "|---|---|---|---|---|"]
    for name in ["untrained", *teachers]:
        row = [results[name][key] for key in ("knn", *(f"linear {share}" for share in SHARES))]
        lines.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in row) + " |")
    scratch = " | ".join(f"{results['scratch'][str(share)]:.3f}" for share in SHARES)
    return "\n".join([*lines, f"| supervised from scratch (whole ViT) | - | {scratch} |", ""])


if __name__ == "__main__":
    main()
