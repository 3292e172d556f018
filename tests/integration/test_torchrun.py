"""Every command under `torchrun --nproc-per-node 2`: exit code 0, the result of one process, and not much more of its time."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mapet
from mapet.commands import COMMANDS

TINY_MODEL = "--model-args embed_dim=16 depth=1 num_heads=1"
TINY_IMAGES = "--image-size 8 --patch-size 2 --channels 1"
ARGUMENTS = {
    "demo": "",
    "run": "--images FEW --fit-tokenizer.image-size 8 --fit-tokenizer.patch-size 2 --fit-tokenizer.channels 1 "
    "--fit-tokenizer.vocab-size 16 --pretrain.epochs 1 --pretrain.model-args embed_dim=16 depth=1 num_heads=1",
    "check": "--images FEW --image-size 8 --patch-size 2 --fit-tokenizer.channels 1",
    "prepare": "--images FEW --channels 1",
    "train-tokenizer": f"FLOAT32 --images FEW {TINY_IMAGES} --epochs 1 --vocab-size 8 --batch-size 100 "
    "--model-args embed_dim=64 depth=1 num_heads=1 --decoder-depth 1",
    "fit-tokenizer": f"--images FEW {TINY_IMAGES} --vocab-size 16 --teacher hog whitened",
    "tokenize": "--images FEW --tokenizer TOKENIZER",
    "pretrain": f"--images FEW --tokenizer TOKENIZER --tokens TOKENS --epochs 1 --probe-every 0 {TINY_MODEL}",
    "evaluate": "--images LABELED --backbone RUN --protocols logistic knn cluster few-shot",
    "finetune": "FLOAT32 --images LABELED --backbone RUN --labels-per-class 2 --epochs 1 --batch-size 100",
    "inspect-tokenizer": "TOKENIZER --images FEW",
    "report": "RUN --no-figures",
    "embed": "--images FEW --backbone RUN",
    "predict": "--images FEW --backbone TUNED",
    "search": "--images FEW --backbone RUN",
    "export": "--backbone RUN",
    "study": "--images LABELED --test-images TEST --tokenizers 'pixels={image_size: 8, patch_size: 2, channels: 1, vocab_size: 16}' "
    f"--grid 'objective=[mim]' --seeds 0 --labels-per-class 2 --pretrain.epochs 1 --pretrain.{TINY_MODEL[2:]} --finetune.epochs 1",
}
QUICK = ("check", "tokenize")
NOT_COMPARED = frozenset({"seconds", "images_per_second", "out"})
"""Results that differ between two runs."""


@pytest.fixture
def run_command(digits, few_digits, tokenizer_dir, tokens_dir, run_dir, tmp_path):
    """Run a command on some ranks and return the path of what it wrote, and its time in seconds."""
    settings = tmp_path / "float32.yaml"
    settings.write_text("precision: float32")
    paths = {
        "FEW": few_digits, "LABELED": digits / "train", "TEST": digits / "test", "TOKENIZER": tokenizer_dir, "TOKENS": tokens_dir, "RUN": run_dir,
        "FLOAT32": settings,
    }  # fmt: skip

    def call(name: str, ranks: int) -> tuple[Path, float]:
        if "TUNED" in ARGUMENTS[name] and "TUNED" not in paths:
            paths["TUNED"] = tmp_path / "tuned"
            mapet.finetune(backbone=run_dir, images=digits / "train", out=paths["TUNED"], labels_per_class=2, epochs=1)
        out = tmp_path / (str(ranks) + {"report": ".html", "predict": ".csv"}.get(name, ""))
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        args = [str(paths.get(arg, arg)) for arg in shlex.split(ARGUMENTS[name])]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        start = time.monotonic()
        result = subprocess.run(
            [sys.executable, *launch, "-m", "mapet", name, *args, "--out", str(out)], capture_output=True, text=True,
            timeout=900, env=environment,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        return out, time.monotonic() - start

    return call


def numbers(value: object) -> dict[str, object]:
    """Flatten the numbers, texts and sizes of lists in JSON, without times and paths."""
    if not isinstance(value, (dict, list)):
        return {"": value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {
        f"/{key}{inner}": part for key, one in items if key not in NOT_COMPARED for inner, part in numbers(one).items()
    }


def parameters():
    return [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in ARGUMENTS]


@pytest.mark.parametrize("name", parameters())
def test_two_ranks_do_what_one_process_does(name, run_command):
    (one, alone), (two, together) = run_command(name, 1), run_command(name, 2)
    assert together < 2 * alone + 30
    if name == "check":  # it writes nothing
        assert not one.exists() and not two.exists()
        return
    if one.is_file():
        assert two.read_text() == one.read_text()
        return
    files = [{path.relative_to(out) for path in out.rglob("*") if "tfevents" not in path.name} for out in (one, two)]
    states = [json.loads((out / "run.json").read_text()) for out in (one, two)]
    assert states[1]["status"] == "finished" and files[0] - files[1] == set()
    results = [numbers([state["counts"], state["results"]]) for state in states]
    assert results[1].keys() == results[0].keys()
    for name, value in results[0].items():
        assert results[1][name] == (pytest.approx(value, rel=1e-3, abs=1e-3) if isinstance(value, float) else value), (
            name
        )


def test_every_command_is_tried():
    assert set(ARGUMENTS) >= set(COMMANDS) - {"debug-step"}
