"""CAE: what each difference from the released code changes.

    python -m benchmarks cae --data cifar10.zip --out runs/cae

A ViT 96 wide of 4 blocks learns CAE's objective on the first images of each class of CIFAR-10, at each seed: as `mapet pretrain` does
it, and with one more thing as in the release (docs/objectives.md lists them). Then linear probe and k-NN of the frozen patch means.
"""

import argparse
import functools
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mapet
from benchmarks.core import Result, Row, cached
from benchmarks.data import add_data, cifar10, first_of_each_class
from benchmarks.tables import Table
from mapet.models.context_autoencoder import ContextAutoencoder
from mapet.training.tasks import pretraining

SIZES = {"image_size": 32, "patch_size": 8, "vocab_size": 256}
PRETRAIN = {
    "objective": "cae", "mask_ratio": 0.5, "patch_order": "blockwise", "model_args": {"embed_dim": 96, "depth": 4, "num_heads": 3},
    "batch_size": 64, "lr": 1.5e-3, "probe_every": 0,
}  # fmt: skip


class FirstWeights(ContextAutoencoder):
    """The encoder's matrices are Xavier-uniform, its class token and the mask token normal and truncated at one deviation."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for module in self.vit.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        for token in (self.vit.cls_token, self.mask_token):
            nn.init.trunc_normal_(token, std=0.02, a=-0.02, b=0.02)


class FixedPositions(ContextAutoencoder):
    """The encoder's positions are sine-cosine, 0 for the class token, and stay so: they have no gradient and no weight decay."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        with torch.no_grad():
            self.vit.pos_embed.copy_(nn.functional.pad(self.positions, (0, 0, 1, 0)))
        self.vit.pos_embed.register_hook(torch.zeros_like)


class DecayedTokens(ContextAutoencoder):
    """Class and mask token have weight decay."""

    def no_weight_decay(self) -> set[str]:
        return {"vit.pos_embed"}


VARIANTS: dict[str, type[ContextAutoencoder]] = {
    "none": ContextAutoencoder,
    "first weights of the encoder and tokens": FirstWeights,
    "fixed sine-cosine positions of the encoder": FixedPositions,
    "weight decay of class and mask token": DecayedTokens,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser)
    parser.add_argument(
        "--per-class", type=int, default=200, help="training images of each class, and as many test images"
    )
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)


def run(args: argparse.Namespace) -> Result:
    data = cifar10(args.data, args.out)
    images, test = (first_of_each_class(data / part, args.per_class) for part in ("train", "test"))
    tokenizer, tokens = args.out / "tokenizer", args.out / "tokens"
    if not (tokens / "manifest.json").exists():
        mapet.fit_tokenizer(images=images, **SIZES, out=tokenizer)
        mapet.tokenize(images=images, tokenizer=tokenizer, out=tokens, views="center-flip")
    options = PRETRAIN | {"images": images, "tokenizer": tokenizer, "tokens": tokens, "epochs": args.epochs}
    measured: dict[str, list[Row]] = {name: [] for name in ["untrained ViT", *VARIANTS]}
    for seed in range(args.seeds):
        for name, kind in VARIANTS.items():
            folder = args.out / f"{kind.__name__}-{seed}"
            pretrain = functools.partial(learn, kind, options | {"seed": seed, "out": folder})
            loss = cached(folder.with_name(f"{folder.name}.loss.json"), pretrain)
            measured[name].append(loss | probe(str(folder), images, test, folder.with_name(f"{folder.name}-probe")))
        source, out = f"random:{args.out / ContextAutoencoder.__name__}-{seed}", args.out / f"untrained-{seed}-probe"
        measured["untrained ViT"].append(probe(source, images, test, out, seed))
    rows = [{"name": name, **summary(results)} for name, results in measured.items()]
    shown = f"{args.data or 'digits of 32 px'}, {args.per_class} images of each class, {args.epochs} epochs"
    return Result(rows, shown, list(range(args.seeds)))


def learn(kind: type[ContextAutoencoder], options: Row) -> Row:
    """Pre-train a variant; its last losses."""
    vars(pretraining)[ContextAutoencoder.__name__] = kind
    try:
        mapet.pretrain(**options, resume=(options["out"] / "config.yaml").exists())
    finally:
        vars(pretraining)[ContextAutoencoder.__name__] = ContextAutoencoder
    lines = (options["out"] / "metrics.jsonl").read_text().splitlines()
    return {"loss": json.loads(lines[-1])["loss"]}


def probe(source: str, images: Path, test: Path, out: Path, seed: int = 0) -> Row:
    """Linear probe and k-NN of frozen features."""

    def work() -> Row:
        options = {"protocols": ["logistic", "knn"], "images": images, "test_images": test, "out": out, "seed": seed}
        options["controls"] = ["none"]
        (metrics,) = mapet.evaluate(backbone=[source], **options).values()
        return {name: metrics[name] for name in ("logistic", "knn")}

    return cached(out.with_suffix(".json"), work)


def summary(results: list[Row]) -> Row:
    """Mean of each metric over seeds, and its standard deviation."""
    row: Row = {}
    for metric in results[0]:
        values = [result[metric] for result in results]
        row[metric] = statistics.mean(values)
        row[f"{metric}_sd"] = statistics.stdev(values) if len(values) > 1 else None
    return row


SMOKE = ["--out", "{scratch}", "--per-class", "20", "--epochs", "1", "--seeds", "1"]
TABLES = {
    "main": Table({
        "one more thing as released": "{name}", "loss": "{loss:.3f}", "linear probe": "{logistic:.3f} ± {logistic_sd:.3f}",
        "k-NN": "{knn:.3f} ± {knn_sd:.3f}",
    }),
}  # fmt: skip
