"""Stage: the main job on real images that scikit-learn brings along."""

import logging
import time
from typing import Any

from mapet.commands.command import command
from mapet.commands.finetune import finetune
from mapet.commands.run import run
from mapet.config.pipeline import DemoConfig
from mapet.errors import Interrupted, option, shell_command

log = logging.getLogger("mapet")
TRAIN = 1437
"""The first 1,437 of the 1,797 digits; the others were written by other people."""
RECIPE: dict[str, Any] = {
    "fit_tokenizer": {"image_size": 8, "patch_size": 2, "channels": 1, "vocab_size": 64},
    "pretrain": {
        "model_args": {"embed_dim": 64, "depth": 4, "num_heads": 4},
        "epochs": 50,
        "batch_size": 64,
        "lr": 2e-3,
        "drop_path": 0.0,
        "layer_scale_init": None,
        "color_jitter": 0.0,
    },
}


@command(DemoConfig)
def demo(config: DemoConfig) -> dict[str, dict[str, float]]:
    """Pre-train a small ViT on 1,437 real handwritten digits in about 2 minutes and test what it learned on 360 others.

    Example:
      mapet demo
      mapet demo --out /tmp/digits --seed 1
    """
    from mapet.data.digits import write_digits
    from mapet.files import new_folder
    from mapet.run_state import RunState, record

    if not (config.resume and config.out.exists()):
        new_folder(config.out, resume_hint=f", or go on with {option('resume', True)}")
    started = time.monotonic()
    train, test = write_digits(config.out / "digits", TRAIN)
    try:
        backbone = run(
            images=train, test_images=test, out=config.out / "run", seed=config.seed, resume=config.resume, **RECIPE
        )
    except Interrupted as error:
        raise Interrupted(error.what, shell_command("demo", "--out", config.out, "--resume")) from None
    results = RunState.read(config.out / "run").results["evaluation"]
    log.info("--- finetune, 10 labels a class")
    for name in ("untrained", "pretrained"):
        results[name]["finetune"] = finetune(
            backbone=backbone, images=train, test_images=test, from_scratch=name == "untrained", labels_per_class=10, views="center",
            epochs=100, batch_size=32, lr=2e-3, drop_path=0.0, seed=config.seed,
        )  # fmt: skip
    record(config.out, results=results)
    for line in table(results):
        log.info("%s", line)
    log.info("figures in %s; %.0f s in all", config.out / "run" / "figures", time.monotonic() - started)
    return {name: results[name] for name in ("untrained", "pretrained")}


def table(results: dict[str, Any]) -> list[str]:
    """The figures side by side."""
    measures = {"logistic": "linear probe", "knn": "k-NN", "finetune": "fine-tuned, 10 labels a class"}
    lines = ["", f"{'accuracy on 360 unseen digits':<32}{'untrained':>10}{'pretrained':>12}"]
    lines += [
        f"{title:<32}{results['untrained'][key]:>10.3f}{results['pretrained'][key]:>12.3f}"
        for key, title in measures.items()
    ]
    return [*lines, f"{'(always guessing one digit)':<32}{results['data']['majority_accuracy']:>10.3f}", ""]
