"""Every command under `torchrun --nproc-per-node 2`: exit code 0, and the result of one process."""

import os
import subprocess
import sys

import pytest

from mapet.commands import COMMANDS

TINY_MODEL = "--model-args embed_dim=16 depth=1 num_heads=1"
TINY_IMAGES = "--image-size 8 --patch-size 2 --channels 1"
LOADING = "--batch-size 100"
ARGUMENTS = {
    "demo": None,  # it is `run` and `finetune`, for minutes
    "run": "--images FEW --fit-tokenizer.image-size 8 --fit-tokenizer.patch-size 2 --fit-tokenizer.channels 1 "
    "--fit-tokenizer.vocab-size 16 --pretrain.epochs 1 --pretrain.model-args embed_dim=16 depth=1 num_heads=1",
    "check": f"--images FEW {TINY_IMAGES} --no-benchmark",
    "prepare": "--images FEW --channels 1",
    "train-tokenizer": f"--images FEW --image-size 8 --patch-size 2 --channels 1 --epochs 1 --vocab-size 8 {LOADING} "
    "--model-args embed_dim=64 depth=1 num_heads=1 --decoder-depth 1",
    "fit-tokenizer": f"--images FEW {TINY_IMAGES} --vocab-size 16",
    "tokenize": "--images FEW --tokenizer TOKENIZER",
    "pretrain": f"--images FEW --tokenizer TOKENIZER --tokens TOKENS --epochs 1 --probe-every 0 {TINY_MODEL}",
    "evaluate": "--images LABELED --backbone RUN --protocols logistic knn cluster few-shot",
    "finetune": f"--images LABELED --backbone RUN --labels-per-class 2 --epochs 1 {LOADING}",
    "inspect-tokenizer": "TOKENIZER --images FEW",
    "report": "RUN --no-figures",
    "embed": "--images FEW --backbone RUN",
    "export": "--backbone RUN",
    "study": None,  # each trial is a process of its own
}
QUICK = ("check", "tokenize")


@pytest.fixture
def torchrun(digits, few_digits, tokenizer_dir, tokens_dir, run_dir, tmp_path):
    """Run a command on two ranks and return its result."""
    paths = {
        "FEW": few_digits, "LABELED": digits / "train", "TOKENIZER": tokenizer_dir, "TOKENS": tokens_dir, "RUN": run_dir,
    }  # fmt: skip

    def call(name: str, *more: str) -> subprocess.CompletedProcess:
        words = [str(paths.get(word, word)) for word in ARGUMENTS[name].split()]
        argv = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "mapet",
        ]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [*argv, name, *words, *more], capture_output=True, text=True, timeout=120, env=environment
        )

    return call


def parameters():
    return [
        pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])
        for name, words in ARGUMENTS.items()
        if words
    ]


@pytest.mark.parametrize("name", parameters())
def test_a_command_on_two_ranks(name, torchrun, tmp_path):
    out = tmp_path / {"report": "out.html", "check": "out.txt"}.get(name, "out")
    result = torchrun(name, "--out", str(out))
    assert result.returncode == 0, result.stderr
    assert out.exists()


def test_every_command_is_tried():
    assert set(ARGUMENTS) >= set(COMMANDS) - {"debug-step"}
