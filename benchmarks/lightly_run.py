"""Pre-train the ViT of benchmarks/comparison.py with lightly-train; runs in an environment of its own that has it.

    python lightly_run.py IMAGES.txt OUT METHOD EPOCHS SEED WIDTH DEPTH HEADS IMAGE PATCH

IMAGES.txt holds paths relative to its folder. Leaves a state dict in timm's names at OUT/exported_models/exported_last.pt.
"""

import os
import sys
from pathlib import Path

os.environ["LIGHTLY_TRAIN_EVENTS_DISABLED"] = "1"

import lightly_train
import timm
import torch


def main() -> None:
    images, out, method, *numbers = sys.argv[1:]
    epochs, seed, width, depth, heads, image, patch = map(int, numbers)
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=image, patch_size=patch, embed_dim=width, depth=depth, num_heads=heads, num_classes=0,
        dynamic_img_size=True,  # DINO's small views
    )  # fmt: skip
    transforms: dict = {"image_size": (image, image)}
    if method == "dino":  # 96 px of 224, in whole patches
        side = max(patch, round(image * 96 / 224 / patch) * patch)
        transforms["local_view"] = {"num_views": 6, "view_size": (side, side)}
    # As mapet does; lightly-train is faster with it: DINO by a third.
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    folder = Path(images).parent
    lightly_train.pretrain(
        out=out, data=[str(folder / name) for name in Path(images).read_text().split()], model=vit, method=method,
        epochs=epochs, batch_size=128, num_workers=0, devices=1, accelerator="cpu", seed=seed, transform_args=transforms,
        precision="bf16-mixed" if fast else "32-true",
    )  # fmt: skip


if __name__ == "__main__":
    main()
