"""Mistakes in options, recipes and folders give one line on the command line."""

import contextlib
import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file

import mapet
from mapet.cli import main
from mapet.commands import COMMANDS
from mapet.config.base import build_config
from mapet.config.evaluation import EvaluateConfig
from mapet.config.tokenizers import FitTokenizerConfig
from mapet.errors import shell_command
from mapet.files import translate_write_errors
from mapet.run_state import RunState
from tests.refused import fails, refused

TINY_FIT = ["--image-size", "16", "--patch-size", "4"]


def test_unknown_command_option_model_teacher_and_objective(capsys, crops, tmp_path, tokenizer_dir, few_digits):
    fails(capsys, "pretrian", named=["'pretrain'"])
    fails(capsys, "fit-tokenizer", "--images", crops, "--vocab-sise", "8", named=["'--vocab-sise'", "'--vocab-size'"])
    fails(capsys, "fit-tokenizer", "--kmeans-init", "random", named=["--kmeans-init", "`kmeans_init: VALUE`"])
    fails(capsys, "fit-tokenizer", "--hog.window", "9", named=["`hog: {window: VALUE}`"])
    fails(capsys, "run", "--fit-tokenizer.hog.window=9", named=["`fit_tokenizer: {hog: {window: VALUE}}`"])
    fails(capsys, "fit-tokenizer", "--hog.size", "9", named=["'--hog.size'"])
    fails(capsys, "fit-tokenizer", "--out", tmp_path / "x", named=["--images"])
    fails(
        capsys,
        "fit-tokenizer",
        "--images",
        crops,
        "--out",
        tmp_path / "x",
        "--teacher",
        "resnet50x64_clp",
        named=["'resnet50x64_clp'", "'resnet50x64_clip'"],
    )
    common = ["pretrain", "--images", few_digits, "--tokenizer", tokenizer_dir, "--out", tmp_path / "run"]
    fails(capsys, *common, "--model", "vit_tiny_patch16_22", named=["'vit_tiny_patch16_224'"])
    fails(capsys, *common, "--model", "resnet18", named=["'resnet18'", "vit_*"])
    fails(capsys, *common, "--model-args", "embeddim=8", named=["'embeddim'", "'embed_dim'"])
    fails(capsys, *common, "--model", "vit_tinny", named=["'vit_tiny_patch16_224'"])
    fails(capsys, *common, "--model-args", "depth=0", named=["--model-args depth=0"])
    fails(capsys, *common, "--model-args", "embed_dim=65", "num_heads=4", named=["embed_dim=65", "num_heads=4"])
    fails(capsys, *common, "--objective", "mapeet", named=["'mapeet'", "'mapet'"])
    fails(capsys, *common, "--mask-ratio", "1.5", named=["--mask-ratio 1.5"])
    fails(capsys, *common, "--model-args", "8", named=["--model-args", "KEY=VALUE", "'8'"])


def test_run_refuses_the_options_of_its_sections_by_their_names(capsys):
    """Options of sections are spelled as those of `check` and `fit-tokenizer`."""
    fails(capsys, "run", "--epoch", "3", named=["'--epoch'", "'--epochs'"])
    fails(
        capsys,
        "run",
        "--precision",
        "float32",
        named=["'--precision'", "'--fit-tokenizer.precision'", "'--pretrain.precision'"],
    )
    fails(
        capsys, "run", "--pretrain.views", "random-crop", named=["'--pretrain.views'", "'--tokenize.views'"]
    )  # the store's are used
    fails(capsys, "run", "--xyzzy", named=["'--xyzzy'", "`mapet run --help`"])
    fails(capsys, "xyzzy", named=["'xyzzy'", "fit-tokenizer"])
    fails(capsys, "completion", "nonsense", named=["'nonsense'", "bash"])


def test_a_mistake_does_not_block_the_folder_of_a_run(capsys, crops, tmp_path):
    """Contradicting options are refused before it is made; one that stopped it before its first file leaves it free."""
    out = tmp_path / "run"
    run = ["run", "--images", crops, "--out", out]
    wrong_size = ["--fit-tokenizer.image-size", "100"]
    fails(capsys, *run, *wrong_size, named=["--fit-tokenizer.image-size 96 96"], field="image_size", value=(100, 100))
    fails(capsys, *run, "--fit-tokenizer.teacher", "resnet50x64_clp", named=["'resnet50x64_clip'"])
    assert not out.exists()
    same = [*run, "--fit-tokenizer.vocab-size", "60000", "--time", "10000"]  # more codes than patches
    fails(capsys, *same)
    assert {file.name for file in out.iterdir()} == {"config.yaml", "run.json"}
    (out / "run.json").unlink()  # now it might be the user's own
    fails(capsys, *run, field="out")
    (out / "config.yaml").unlink()
    fails(capsys, *same)
    (out / "tokenizer").mkdir(exist_ok=True)
    (out / "tokenizer" / "damaged").touch()
    commands = [f"mapet run {out / 'config.yaml'} --resume", "a new --out"]  # pre-training has made nothing yet
    changed = "(fit_tokenizer.vocab_size: 60000 -> 512)"
    fails(capsys, *same, "--fit-tokenizer.vocab-size", "512", "--resume", named=[changed, *commands])
    fails(
        capsys,
        *same,
        "--pretrain.epochs",
        "4000",
        "--max-unreadable",
        "0.2",
        "--resume",
        named=[f"{out / 'tokenizer'}"],
    )
    retained = (out / "config.yaml").read_text()
    assert (
        "epochs: 4000" in retained and "max_unreadable: 0.2" in retained
    )  # what has made nothing yet may still change
    (out / "pretrain").mkdir(parents=True)
    (out / "pretrain" / "config.yaml").touch()
    for made, way in (  # a run that is not finished has no backbone, and what there is can be exported
        ("checkpoints", "a new --out"),
        (
            "checkpoints/step-00000001/trainer_state.json",
            f"`mapet export --backbone {out} --out NEW`, --pretrain.init-from NEW, and a new --out",
        ),
        ("backbone", f"--pretrain.init-from {out}, and a new --out"),
    ):
        (out / "pretrain" / made).mkdir(parents=True, exist_ok=True)
        changed = ["--pretrain.epochs", "3000", "--max-unreadable", "0.2", "--resume"]
        fails(capsys, *same, *changed, named=["(pretrain.epochs: 4000.0 -> 3000.0)", way])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--pretrain.objective", "mapt"], ["'mapt'", "'mapet'"]),
        (["--pretrain.model", "vit_tinyy_patch16_224"], ["'vit_tinyy_patch16_224'", "'vit_tiny_patch16_224'"]),
        (["--pretrain.model", "resnet50"], ["'resnet50'", "vit_*"]),
        (["--pretrain.init-from", "weights.txt"], ["weights.txt"]),
        (["--pretrain.probe-images", "CROPS"], ["CROPS"]),
        (["--test-images", "photoz"], ["photoz"]),
        (["--test-images", "CROPS"], ["CROPS"]),
    ],
)
def test_run_refuses_at_once_what_a_later_stage_would(options, named, capsys, crops, tmp_path):
    out = tmp_path / "run"
    options, named = ([str(crops) if text == "CROPS" else text for text in texts] for texts in (options, named))
    # a time that is long enough on a busy machine, too
    fails(capsys, "run", "--images", crops, "--out", out, "--time", "10000", *options, named=named)
    assert not out.exists()


def test_ctrl_c_before_anything_is_saved_says_how_to_restart(capsys, crops, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("mapet.tokenizers.fitting.make_teacher", interrupted)
    run = ["run", "--images", str(crops), "--out", str(tmp_path / "run"), "--time", "10000"]
    assert main(run) == 130
    assert f"mapet run {tmp_path}/run/config.yaml --resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "code", "message"),
    [  # the module sends the signal to itself, and swallows exceptions as import hooks do
        ("import swallows", 130, "mapet: interrupted"),
        ("RESUME_HINT[0] = 'mapet run x'; import swallows", 130, "mapet run x\n"),
        ("os.kill(os.getpid(), signal.SIGINT)", -2, "KeyboardInterrupt"),
        ("signal.signal(signal.SIGINT, signal.SIG_IGN); exit_on_sigint_during_import(); import swallows", 0, ""),
    ],
)
def test_ctrl_c_while_libraries_are_loaded_is_not_swallowed(program, code, message, tmp_path):
    (tmp_path / "swallows.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept BaseException:\n    pass\n"
    )
    begin = "import os, signal\nfrom mapet.signals import RESUME_HINT, exit_on_sigint_during_import\nexit_on_sigint_during_import()\n"
    ended = subprocess.run([sys.executable, "-c", begin + program], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == code and message in ended.stderr
    assert message or not ended.stderr


@pytest.mark.parametrize(("number", "hint"), [(errno.ENOSPC, "make room"), (errno.EACCES, "change its permissions")])
def test_errors_of_the_system(number, hint, capsys, monkeypatch):
    """The disk is full, or the folder is another user's: the file and what to do, whether Python met it or safetensors."""

    def fail(config):
        raise OSError(number, os.strerror(number), "some/file")

    fail.config_type = COMMANDS["demo"].config_type
    monkeypatch.setitem(COMMANDS, "demo", fail)
    fails(capsys, "demo", named=["some/file", os.strerror(number), hint])
    with refused("some/file", hint), translate_write_errors(Path("some/file")):
        raise SafetensorError(f"I/O error: {os.strerror(number)} (os error {number})")


def test_wrong_values(capsys, crops, tmp_path):
    common = ["fit-tokenizer", "--images", crops, "--out", tmp_path / "x"]
    fails(capsys, *common, "--vocab-size", "many", named=["--vocab-size", "'many'"])
    fails(capsys, *common, "--image-size", "30", named=["30 x 30", "16", "--image-size 32 32"])
    evaluate = ["evaluate", "--backbone", "x", "--images", crops, "--layers", "1.5"]
    fails(capsys, *evaluate, named=["--layers", "'1.5'"])
    fails(capsys, *common, *TINY_FIT, "--vocab-size", "100000", named=["--vocab-size", "100,000", "192"])
    fails(capsys, *common, "--device", "tpu7", named=["'tpu7'", "--device auto"])
    fails(capsys, *common, "--vocab-size", named=["--vocab-size"])
    fails(capsys, "check", "recipe.yaml", "extra", named=["'extra'"])


def test_a_folder_of_another_version_says_so(capsys, run_dir, tmp_path):
    """Its config.yaml has an option, here of a section, that this version does not know."""
    recipe = yaml.safe_load((run_dir / "config.yaml").read_text())
    state = RunState.read(run_dir)
    for versions, has_hint in (({"mapet": "0.0.3"}, True), ({}, False), (state.versions, False)):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(recipe | {"old_option": 1}))
        state.model_copy(update={"versions": versions}).write(tmp_path)
        line = fails(capsys, "pretrain", tmp_path / "config.yaml", "--resume", named=["'old_option'"])
        assert (f"mapet 0.0.3 wrote {tmp_path}" in line) == has_hint
    (tmp_path / "run.json").write_text("[]")
    assert "mapet 0.0.3" not in fails(capsys, "pretrain", tmp_path / "config.yaml", "--resume")


def test_scratch_file(capsys, crops, tmp_path, monkeypatch):
    """Too little disk space is an error before anything is written, and nothing is left of a scratch file after an error."""
    common = ["fit-tokenizer", "--images", crops, *TINY_FIT, "--memory-gb", "1e-6", "--out"]
    scratch = tmp_path / "x"
    fails(capsys, *common, scratch / "t", "--vocab-size", "100000", named=["100,000"])
    assert scratch.is_dir() and not list(scratch.iterdir())
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    fails(capsys, *common, scratch / "t", named=["192 feature vectors", "1.84e-05 GB", "1e-06 GB", "--out"])
    assert not list(scratch.iterdir())


def test_recipes(capsys, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("images: x\nout: y\nvocab_sise: 3\n")
    fails(capsys, "fit-tokenizer", recipe, named=[recipe, "'vocab_sise'", "'vocab_size'"])
    recipe.write_text("images: x\nout: y\nkmeans_iters: few\n")
    fails(capsys, "fit-tokenizer", recipe, named=[recipe, "'few'"])
    recipe.write_text("a: [1, 2")
    fails(capsys, "fit-tokenizer", recipe, named=[f"{recipe}"])
    recipe.write_text("- a\n- b\n")
    fails(capsys, "fit-tokenizer", recipe, named=[f"{recipe}", "`name: value`"])
    recipe.write_bytes(b"\xff\xfe\x00")
    fails(capsys, "fit-tokenizer", recipe, named=[f"{recipe}"])
    fails(capsys, "fit-tokenizer", tmp_path / "absent.yaml", named=["absent.yaml"])
    fails(capsys, "check", tmp_path, named=[f"--images {tmp_path}"])
    recipe.write_text("!!python/object/apply:os.system ['touch hacked']\n")
    fails(capsys, "fit-tokenizer", recipe, named=[f"{recipe}"])
    assert not Path("hacked").exists()


def test_nothing_is_overwritten(capsys, crops, tmp_path):
    out = tmp_path / "full"
    out.mkdir()
    (out / "precious").write_text("x")
    fails(capsys, "fit-tokenizer", "--images", crops, "--out", out, field="out")
    fails(capsys, "run", "--images", crops, "--out", out, field="out")
    assert (out / "precious").read_text() == "x"


def test_mismatched_tokens_name_both_sides(capsys, digits, few_digits, tokenizer_dir, tokens_dir, tmp_path):
    pretrain = ["pretrain", "--tokens", tokens_dir, "--out", tmp_path / "run"]
    other = ["--images", digits / "test", "--tokenizer", tokenizer_dir]
    fails(capsys, *pretrain, *other, named=[tokens_dir, digits / "test", "288 images", "360"])
    mapet.fit_tokenizer(images=few_digits, out=tmp_path / "tok", image_size=8, patch_size=2, channels=1, vocab_size=17)
    hashes = [
        json.loads((folder / "visual_tokenizer.json").read_text())["hash"][:12]
        for folder in (tokenizer_dir, tmp_path / "tok")
    ]
    fails(capsys, *pretrain, "--images", few_digits, "--tokenizer", tmp_path / "tok", named=[tokens_dir, *hashes])


def test_damaged_folders(capsys, few_digits, tokenizer_dir, tokens_dir, tmp_path):
    common = ["pretrain", "--images", few_digits, "--out", tmp_path / "run"]
    fails(capsys, *common, "--tokenizer", tmp_path, named=[f"{tmp_path}", "visual_tokenizer.json"])
    fails(capsys, *common, "--tokenizer", tokenizer_dir.parent, named=["visual_tokenizer.json", f"{tokenizer_dir}?"])
    for name in ("codebook.safetensors", "visual_tokenizer.json"):
        folder = tmp_path / f"damaged-{name}"
        folder.mkdir()
        for file in tokenizer_dir.iterdir():
            data = file.read_bytes()
            (folder / file.name).write_bytes(data[: len(data) // 2] if file.name == name else data)
        fails(capsys, *common, "--tokenizer", folder, named=[f"{folder}"])
    folder = tmp_path / "tokens"
    shutil.copytree(tokens_dir, folder)
    data = bytearray((tokens_dir / "shards" / "00000.npy").read_bytes())
    (folder / "shards" / "00000.npy").write_bytes(data[:-100])
    fails(capsys, *common, "--tokenizer", tokenizer_dir, "--tokens", folder, named=[f"{folder}"])
    data[-2:] = b"\xff\xff"
    (folder / "shards" / "00000.npy").write_bytes(data)
    fails(
        capsys,
        *common,
        "--tokenizer",
        tokenizer_dir,
        "--tokens",
        folder,
        "--epochs",
        "1",
        "--model-args",
        "embed_dim=8",
        "depth=1",
        "num_heads=1",
        named=[f"{folder}"],
    )


def encoder_with_nan(checkpoint):
    def encode(images):
        features = images[:, :, ::4, ::4].clone()
        features[-1, 0, 0, 0] = float("nan")
        return features

    return encode


def wrong_shape(checkpoint):
    return lambda images: images.flatten(1)


def good_encoder(checkpoint):
    return lambda images: images[:, :, ::4, ::4]


def pooled(checkpoint):
    return lambda images: images.mean((2, 3), keepdim=True)


def coarse(checkpoint):
    return lambda images: images[:, :, ::8, ::8]


def turned(checkpoint):
    return lambda images: images[:, :, ::4, ::4].transpose(2, 3)


def no_arguments():
    return None


def test_a_custom_teacher(capsys, crops, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    common = ["fit-tokenizer", "--images", crops, *TINY_FIT, "--vocab-size", "4", "--out", tmp_path / "x", "--teacher"]
    fails(capsys, *common, "tests.commands.test_mistakes:encoder_with_nan", named=["1 of 12 images", ".png"])
    fails(
        capsys,
        *common,
        "tests.commands.test_mistakes:wrong_shape",
        named=["(batch, features, rows, columns)", "(12, 768)"],
    )
    fails(capsys, *common, "absent_package:function", named=["absent_package"])
    fails(capsys, *common, "tests.commands.test_mistakes:good_encodr", named=["'good_encoder'"])
    fails(capsys, *common, "tests.commands.test_mistakes:no_arguments", named=["no_arguments"])
    assert main([*map(str, common), "tests.commands.test_mistakes:good_encoder"]) == 0
    tokenize = [
        "tokenize",
        "--images",
        crops,
        "--tokenizer",
        tmp_path / "x",
        "--out",
        tmp_path / "tokens",
    ]
    fails(
        capsys, *tokenize, named=["tests.commands.test_mistakes:good_encoder", "--trust-teacher"]
    )  # a codebook from elsewhere can't run a function it names
    assert main([*map(str, tokenize), "--trust-teacher", "tests.commands.test_mistakes:good_encoder"]) == 0
    assert "MAPET_TRUSTED_TEACHERS" not in os.environ


CODE = "import os, pathlib\npathlib.Path('RAN').touch()\ndef encoder(_):\n    return lambda images: images[:, :, ::4, ::4]\n"


def test_code_that_a_file_names_runs_only_if_its_caller_names_it_too(capsys, crops, tmp_path, monkeypatch):
    """A config, the folder of a run that is resumed, a tokenizer, a debug bundle, and the permission in such a file."""
    ran = tmp_path / "ran"
    (tmp_path / "hostile_code.py").write_text(CODE.replace("RAN", str(ran)))
    monkeypatch.syspath_prepend(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    fitting = {"image_size": 16, "patch_size": 4, "teacher": "hostile_code:encoder", "vocab_size": 4}
    recipe.write_text(json.dumps(fitting))
    fit = ["fit-tokenizer", recipe, "--images", crops, "--out", tmp_path / "t"]
    run_file = tmp_path / "run.yaml"
    sections = {
        "fit_tokenizer": fitting,
        "pretrain": {"model_args": {"embed_dim": 32, "depth": 1, "num_heads": 2}, "epochs": 1},
    }
    run_file.write_text(json.dumps(sections))
    run = ["run", run_file, "--images", crops, "--out", tmp_path / "run"]
    for argv in (fit, run, [*run, "--resume"], ["check", "--images", "os:system", *fit[1:2]]):
        fails(capsys, *argv)
        assert not ran.exists() and "hostile_code" not in sys.modules
    with refused("hostile_code:encoder", "MAPET_TRUSTED_TEACHERS", field="teacher"):
        mapet.fit_tokenizer(build_config(FitTokenizerConfig, fitting | {"images": crops, "out": tmp_path / "t"}))
    with monkeypatch.context() as patch:
        patch.setenv("MAPET_TRUSTED_TEACHERS", "other:code,hostile_code:encoder")
        assert main([*map(str, fit)]) == 0
    assert ran.exists()
    ran.unlink()
    for name in ("hostile_code",):
        del sys.modules[name]
    config = tmp_path / "tokenize.yaml"
    config.write_text("trust_teacher: hostile_code:encoder\n")
    tokenize = ["tokenize", config, "--tokenizer", tmp_path / "t", "--images", crops, "--out", tmp_path / "tokens"]
    fails(capsys, *tokenize)
    assert not ran.exists() and "hostile_code" not in sys.modules
    mapet.tokenize(
        tokenizer=tmp_path / "t", images=crops, out=tmp_path / "tokens", trust_teacher="hostile_code:encoder"
    )
    assert ran.exists()


def test_a_teacher_that_gives_another_grid(capsys, caplog, crops, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    common = ["fit-tokenizer", "--images", crops, "--patch-size", "4", "--vocab-size", "4", "--out"]
    common += [tmp_path / "x", "--image-size", "16", "--teacher"]
    fails(capsys, *common, "tests.commands.test_mistakes:pooled", named=["1 x 1", "16 x 16 px", "4 x 4"])
    wide = [*common[:-1], "32", "--teacher", "tests.commands.test_mistakes:turned"]
    fails(capsys, *wide, named=["8 x 4", "16 x 32 px"])
    assert main([*map(str, common), "tests.commands.test_mistakes:coarse"]) == 0
    assert all(text in caplog.text for text in ("2 x 2", "4 x 4", "--teacher-image-size 32 32"))
    assert json.loads((tmp_path / "x" / "visual_tokenizer.json").read_text())["teacher_grid"] == [2, 2]


def test_a_codebook_whose_teacher_is_gone(capsys, crops, tmp_path):
    """Its weights file was moved: the error names it and the fix; other weights are refused."""
    weights = {name: tmp_path / f"{name}.safetensors" for name in ("first", "second")}
    for path in weights.values():
        save_file(timm.create_model("resnet10t").state_dict(), path)
    teacher = ["--teacher", "resnet10t.c3_in1k", "--teacher-image-size", "64", "--teacher-checkpoint", weights["first"]]
    fit = ["fit-tokenizer", "--images", crops, *TINY_FIT, "--vocab-size", "4", "--out", tmp_path / "x", *teacher]
    assert main([*map(str, fit)]) == 0
    moved = weights["first"].rename(tmp_path / "moved.safetensors")
    tokenize = ["tokenize", "--images", crops, "--tokenizer", tmp_path / "x", "--out", tmp_path / "t"]
    fails(capsys, *tokenize, named=[weights["first"], tmp_path / "x"])
    here = tmp_path / "x" / "first.safetensors"
    here.symlink_to(weights["second"])
    fails(capsys, *tokenize, named=["'resnet10t.c3_in1k'", "sha256"])
    here.unlink()
    here.symlink_to(moved)
    assert main([*map(str, tokenize)]) == 0


def test_teacher_weights_that_cannot_be_had(capsys, crops, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # its retries without a network take a minute
    common = ["fit-tokenizer", "--images", crops, "--out", tmp_path / "x", "--teacher", "resnet10t.c3_in1k"]
    fails(capsys, *common, named=["--teacher-checkpoint"])
    fails(capsys, *common, "--teacher-checkpoint", tmp_path / "absent.safetensors", named=["absent.safetensors"])
    (tmp_path / "evil.pth").write_bytes(b"cos\nsystem\n(S'touch /tmp/mapet_was_hacked'\ntR.")
    fails(capsys, *common, "--teacher-checkpoint", tmp_path / "evil.pth", named=["evil.pth"])
    assert not Path("/tmp/mapet_was_hacked").exists()
    torch.save({"other": torch.zeros(3)}, tmp_path / "other.pth")
    fails(capsys, *common, "--teacher-checkpoint", tmp_path / "other.pth", named=[tmp_path / "other.pth"])


def test_a_run_of_another_recipe(capsys, run_dir, few_digits, tokenizer_dir, tokens_dir):
    named = ["lr: 0.001 -> 0.5", "--init-from"]
    fails(capsys, "pretrain", run_dir / "config.yaml", "--resume", "--lr", "0.5", named=named)


def test_a_run_that_is_not_finished(capsys, run_dir, digits, tmp_path):
    """It has no backbone: the error names both commands that make one, and they work."""
    run = tmp_path / "photos" / "pretrain"
    shutil.copytree(run_dir, run, ignore=shutil.ignore_patterns("backbone"))
    ways = [f"mapet pretrain {run / 'config.yaml'} --resume", f"mapet export --backbone {run} --out NEW"]
    evaluate = ["evaluate", "--protocols", "knn", "--images", digits / "train", "--backbone"]
    fails(capsys, *evaluate, run, named=ways)
    assert main(["export", "--backbone", str(run), "--out", str(tmp_path / "new")]) == 0
    RunState(command="run").write(run.parent)
    (run.parent / "config.yaml").touch()
    fails(capsys, *evaluate, run.parent, named=[f"mapet run {run.parent / 'config.yaml'} --resume"])


def test_labels_that_are_not_there(capsys, crops, run_dir, digits):
    fails(capsys, "evaluate", "--protocols", "knn", "--backbone", run_dir, "--images", crops, named=[f"{crops}"])
    for backbone, named in ((crops, [f"{crops}", "config.json"]), (crops / "nope", ["nope"])):
        argv = ["evaluate", "--protocols", "knn", "--backbone", backbone, "--images", digits / "train"]
        fails(capsys, *argv, named=named)
    fails(capsys, "report", crops / "nope", "--out", crops / "r.html", named=["nope", "`mapet run`"])
    fails(
        capsys,
        "finetune",
        "--backbone",
        run_dir,
        "--images",
        digits / "train",
        "--labels-per-class",
        "5000",
        named=["5,000"],
    )


FULL_DISK = """
import resource, sys
from mapet.cli import main
import mapet.training.trainer, mapet.tokenizers.tokenizer  # import before files are limited
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", ["fit-tokenizer", "tokenize", "pretrain"])
def test_full_disk(command, few_digits, tokenizer_dir, tokens_dir, tmp_path):
    """A limit on file size acts as a full disk: one line of error, no partial file under a final name."""
    out = tmp_path / "out"
    argv = [command, "--images", few_digits, "--out", out]
    if command == "fit-tokenizer":
        argv += ["--image-size", "8", "--patch-size", "2", "--channels", "1", "--vocab-size", "200"]
    else:
        argv += ["--tokenizer", tokenizer_dir]
    if command == "pretrain":
        argv += [
            "--tokens",
            tokens_dir,
            "--epochs",
            "1",
            "--probe-every",
            "0",
            "--model-args",
            "embed_dim=8",
            "depth=1",
            "num_heads=1",
        ]
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, *map(str, argv)],
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert f"mapet {command}: " in result.stderr and os.strerror(errno.EFBIG) in result.stderr
    assert not list(tmp_path.rglob("*.tmp"))
    assert not (out / "backbone").exists() and not (out / "codebook.safetensors").exists()


def test_out_among_the_images_is_refused(capsys, crops, monkeypatch):
    """Files that a run writes there would be listed as images by the next command."""
    for command, images, out in (("run", crops, crops / "run"), ("fit-tokenizer", crops, crops), ("run", ".", "run")):
        monkeypatch.chdir(crops)
        fails(capsys, command, "--images", images, "--out", out, named=[f"--out {out}", f"--images {images}"])
    assert not (crops / "run").exists()


def test_stages_of_run_name_options_as_run_has_them(capsys, crops, tmp_path):
    run = ["run", "--images", crops, "--out", tmp_path / "run", "--time", "10000"]  # enough on a busy machine, too
    small = ["--fit-tokenizer.image-size", "16", "--fit-tokenizer.patch-size", "16"]
    fails(capsys, *run, *small, "--fit-tokenizer.vocab-size", "5000", named=["--fit-tokenizer.vocab-size 5,000"])
    fails(capsys, *run, "--fit-tokenizer.vocab-size", "1", named=["--fit-tokenizer.vocab-size", "2"])
    fails(capsys, *run, "--pretrain.mask-ratio", "75", named=["--pretrain.mask-ratio 75"])


def test_what_is_no_config_of_this_command(run_dir, capsys, tmp_path):
    config = run_dir / "config.yaml"
    fails(capsys, "run", config, "--out", tmp_path / "x", named=[config, "`mapet pretrain`", "`mapet run`"])
    fails(capsys, "run", "photo.JPEG", named=["photo.JPEG", ".yaml"])
    fails(capsys, "embed", tmp_path, "--resume", named=[f"--out {tmp_path}"])
    fails(capsys, "run", "--epocs", "3", named=["'--epochs'"])


def test_one_of_several_needs_no_list(run_dir, capsys, tmp_path):
    """Single values become lists in Python as on the command line; positional arguments are refused."""
    config = build_config(
        EvaluateConfig, {"backbone": run_dir, "images": "a", "out": "b", "protocols": "knn", "few_shot": 5}
    )
    assert (config.backbone, config.protocols, config.few_shot) == ([str(run_dir)], ["knn"], (5,))
    with refused("run(images='photos'", kind=TypeError):
        mapet.run("photos")
    with refused("report()", "'run'", kind=TypeError):
        mapet.report(run_dir, run=run_dir)
    assert mapet.report(run_dir, out=tmp_path / "x.html", figures=False).exists()


def test_paths_with_spaces_can_be_pasted(run_dir, capsys, tmp_path):
    folder = tmp_path / "my photos ü"
    folder.mkdir()
    fails(capsys, "check", folder, named=[f"--images '{folder}'"])
    assert shell_command("run", folder, "--resume") == f"mapet run '{folder}' --resume"


def test_a_folder_instead_of_a_recipe_names_its_option(run_dir, tokenizer_dir, capsys, tmp_path):
    """The error names the option that takes the folder, or the config in it if this command wrote one."""
    for command, folder, way in (
        ("check", run_dir, f"--images {run_dir}"),
        ("tokenize", tokenizer_dir, f"--tokenizer {tokenizer_dir}"),
        *((command, run_dir, f"--backbone {run_dir}") for command in ("embed", "evaluate", "export", "finetune")),
        ("tokenize", run_dir, f"--images {run_dir}"),
        ("pretrain", run_dir, f"{run_dir / 'config.yaml'}?"),
        ("run", tmp_path, f"--images {tmp_path}"),
    ):
        fails(capsys, command, folder, named=[folder, way])


def test_a_run_resumes_only_in_the_folder_of_its_recipe(capsys, crops, tmp_path, monkeypatch, caplog):
    """A recipe with relative folders, given from another folder, would silently start another run there."""
    (tmp_path / "home" / "runs" / "a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "home")
    recipe = Path("runs/a/config.yaml")
    recipe.write_text(f"images: {crops}\nout: runs/a\nfit_tokenizer: {{teacher: resnet50x64_clp}}\n")
    RunState(command="run").write(recipe.parent)
    Path("runs/a/tokenizer").mkdir()
    Path("runs/a/tokenizer/damaged").touch()
    fails(capsys, "run", recipe, "--resume", named=["runs/a/tokenizer"])  # it is resumed
    monkeypatch.chdir(tmp_path)
    fails(capsys, "run", "home" / recipe, "--resume", named=[Path.cwd(), "--out is runs/a", "--out home/runs/a"])
    fails(capsys, "run", "home/runs/a", "--resume", named=["home/runs/a/config.yaml"])
    with caplog.at_level("WARNING", "mapet"):
        too_many = ["--fit-tokenizer.vocab-size", "60000", "--time", "10000"]  # more codes than patches
        fails(capsys, "run", "--images", crops, "--out", "typo", "--resume", *too_many)
    assert "no checkpoint in typo: starting a new run" in caplog.text


def test_why_there_are_no_labels(capsys, crops, tmp_path, tokenizer_dir):
    folder = tmp_path / "half"
    shutil.copytree(crops, folder / "a")
    probe = ["evaluate", "--protocols", "knn", "--backbone", "timm:vit_tiny_patch16_224", "--images", folder]
    fails(capsys, *probe, named=["1 class folder", "0 images"])
    shutil.copytree(crops, folder / "b")
    shutil.copy(crops / "crop000.png", folder / "stray.png")
    fails(capsys, *probe, named=["2 class folders", "1 image", "'stray.png'"])


@pytest.mark.parametrize("stream", ["full", "closed", "none"])
def test_a_stdout_that_takes_no_more_ends_no_command(stream, crops, tmp_path, monkeypatch):
    """A full disk of the log, `| head` and a process that is started without stdout and stderr."""
    logging.getLogger("mapet").handlers.clear()
    reader, writer = os.pipe()
    os.close(reader)
    opens = {
        "full": lambda: os.fdopen(os.open("/dev/full", os.O_WRONLY), "w"),
        "closed": lambda: os.fdopen(writer, "w"),
        "none": lambda: None,
    }
    stdout = opens[stream]()
    with monkeypatch.context() as patch:
        patch.setattr(logging.getLogger(), "handlers", [])  # pytest's, with which mapet has none of its own
        patch.setattr(sys, "stdout", stdout)
        if stream == "none":
            patch.setattr(sys, "stderr", None)
        argv = ["fit-tokenizer", "--images", str(crops), "--out", str(tmp_path / "t"), "--vocab-size", "8", *TINY_FIT]
        assert main(argv) == 0
        for each in [stdout] if stdout else [sys.stdout, sys.stderr]:
            with contextlib.suppress(OSError):
                each.close()
    if stream != "closed":
        os.close(writer)
    logging.getLogger("mapet").handlers.clear()
    assert (tmp_path / "t" / "codebook.safetensors").is_file() and RunState.read(tmp_path / "t").status == "finished"
