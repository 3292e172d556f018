"""Write a file of every format, tiny, with what reading it must give: `python tests/formats/write.py` at each release.

They go to tests/formats/VERSION and are never written again: `test_formats.py` reads those of all versions for ever.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits

import mapet
from mapet.data.sources import list_images
from mapet.data.token_store import TokenStore
from mapet.models.backbone import load_backbone
from mapet.run_state import RunState
from mapet.tokenizers.vqkd import load_vqkd
from mapet.training import trainer

HERE = Path(__file__).parent
SMALL: dict[str, Any] = {"device": "cpu", "precision": "float32"}
TINY = {"embed_dim": 16, "depth": 1, "num_heads": 1}
PRETRAIN: dict[str, Any] = {
    "images": "images", "tokenizer": "tokenizer", "tokens": "tokens", "out": "run", "model_args": TINY, "epochs": 4, "batch_size": 12,
    "lr": 1e-3, "log_interval": 1, "probe_every": 0, "compile": False, **SMALL,
}  # fmt: skip
STEP = 2
"""Of the checkpoint, of 4."""


def main() -> None:
    folder = HERE / mapet.__version__
    folder.mkdir()  # never written again
    os.chdir(folder)
    write_images()
    mapet.fit_tokenizer(
        images="images", out="tokenizer", image_size=8, patch_size=2, channels=1, vocab_size=8, kmeans_iters=5, **SMALL
    )
    mapet.tokenize(images="images", tokenizer="tokenizer", out="tokens")
    mapet.prepare(images="images", out="prepared", short_side=4, channels=1)
    trainer.KEEP_CHECKPOINTS = 4
    mapet.pretrain(**PRETRAIN | {"checkpoint_interval_min": 1e-9})
    mapet.embed(backbone="run", images="images", out="features", **SMALL)
    mapet.train_tokenizer(
        images="images", out="training", image_size=8, patch_size=2, channels=1, model_args=TINY, decoder_depth=1, vocab_size=8,
        codebook_dim=4, epochs=1, batch_size=12, lr=1e-3, **SMALL,
    )  # fmt: skip
    Path("training/vqkd").rename("vqkd")
    shutil.rmtree("training")
    Path("expected.json").write_text(json.dumps(measure(), indent=1) + "\n")
    Path("run/backbone").rename("backbone")
    shutil.rmtree("run/tensorboard")
    for name in ("train.log", "report.html"):
        Path("run", name).unlink(missing_ok=True)
    for file in Path().rglob("run.json"):  # what tells of one machine
        state = RunState.read(file.parent)
        versions = {name: version for name, version in state.versions.items() if name != "platform"}
        state.model_copy(update={"host": "host", "argv": [], "versions": versions}).write(file.parent)
    for checkpoint in Path("run/checkpoints").iterdir():
        if checkpoint.name != f"step-{STEP:08d}":
            shutil.rmtree(checkpoint)


def write_images() -> None:
    Path("images").mkdir()
    for number, digit in enumerate(load_digits().images[:12]):
        Image.fromarray((digit * 15).astype(np.uint8)).save(f"images/{number:02d}.png")


def measure() -> dict[str, Any]:
    """What the files in the working folder give."""
    images = list_images("images")
    store = TokenStore.open(Path("tokens"), images)
    losses = [json.loads(line)["loss"] for line in Path("run/metrics.jsonl").read_text().splitlines()]
    backbone = next(path for path in (Path("backbone"), Path("run/backbone")) if path.exists())
    return {
        "tokenizer_hash": json.loads(Path("tokenizer/visual_tokenizer.json").read_text())["hash"],
        "images_hash": images.hash,
        "tokens": [store.read(row, 0).tolist() for row in range(len(store))],
        "prepared": [images_of("prepared", row) for row in range(3)],
        "features": np.load("features/features.npy")[0].tolist(),
        "logits": logits(backbone, Path(f"run/checkpoints/step-{STEP:08d}/model.safetensors")),
        "vqkd": load_vqkd("vqkd/vqkd.safetensors")(fixed_image().clamp(0, 1)).detach().flatten().tolist(),
        "losses": losses,
    }


def fixed_image() -> torch.Tensor:
    """(1, 1, 8, 8)."""
    return torch.linspace(-1, 1, 64).view(1, 1, 8, 8)


def images_of(source: str, row: int) -> list[int]:
    return list_images(source).open(row, 1).read().flatten().tolist()


@torch.no_grad()
def logits(backbone: Path, checkpoint: Path) -> list[float]:
    """Token logits of the first patch, by the backbone and the checkpoint's head."""
    weights = load_file(checkpoint)
    patches = load_backbone(backbone).eval().forward_features(fixed_image())[0, 1:]
    return (patches[0] @ weights["head.weight"].T + weights["head.bias"]).tolist()


if __name__ == "__main__":
    main()
