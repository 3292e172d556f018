"""Mistakes in options, recipes and folders end in one clear line, through the command line."""

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
from tests.refused import refused

TINY_FIT = ["--image-size", "16", "--patch-size", "4"]


def fails(capsys, *argv, code: int = 2) -> str:
    """Run the command; return its one line of error."""
    assert main([str(arg) for arg in argv]) == code
    error = capsys.readouterr().err.strip()
    lines = [line for line in error.splitlines() if line.startswith("mapet ")]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    return lines[0]


def test_unknown_stage_option_model_teacher_and_objective(capsys, crops, tmp_path, tokenizer_dir, few_digits):
    assert "did you mean 'pretrain'" in fails(capsys, "pretrian")
    assert "did you mean '--vocab-size'?" in fails(capsys, "fit-tokenizer", "--images", crops, "--vocab-sise", "8")
    assert "a line `kmeans_init: VALUE`" in fails(capsys, "fit-tokenizer", "--kmeans-init", "random")
    assert "a line `hog: {window: VALUE}`" in fails(capsys, "fit-tokenizer", "--hog.window", "9")
    assert "a line `fit_tokenizer: {hog: {window: VALUE}}`" in fails(capsys, "run", "--fit-tokenizer.hog.window=9")
    assert "unknown option '--hog.size'" in fails(capsys, "fit-tokenizer", "--hog.size", "9")
    assert "--images is required: Folder" in fails(capsys, "fit-tokenizer", "--out", tmp_path / "x")
    assert "did you mean 'resnet50x64_clip" in fails(
        capsys, "fit-tokenizer", "--images", crops, "--out", tmp_path / "x", "--teacher", "resnet50x64_clp"
    )
    common = ["pretrain", "--images", few_digits, "--tokenizer", tokenizer_dir, "--out", tmp_path / "run"]
    assert "did you mean 'vit_tiny_patch16_224'" in fails(capsys, *common, "--model", "vit_tiny_patch16_22")
    assert "choose one of timm's vit_*" in fails(capsys, *common, "--model", "resnet18")
    assert "did you mean 'embed_dim'" in fails(capsys, *common, "--model-args", "embeddim=8")
    assert "did you mean 'vit_tiny_patch16_224'" in fails(capsys, *common, "--model", "vit_tinny")
    assert "--model-args depth=0" in fails(capsys, *common, "--model-args", "depth=0")
    line = fails(capsys, *common, "--model-args", "embed_dim=65", "num_heads=4")
    assert "'num_heads': 4" in line and "choose one" not in line
    assert "did you mean 'mapet'" in fails(capsys, *common, "--objective", "mapeet")
    assert "--mask-ratio 1.5: " in fails(capsys, *common, "--mask-ratio", "1.5")
    assert "KEY=VALUE" in fails(capsys, *common, "--model-args", "8")


def test_run_refuses_the_options_of_its_sections_by_their_names(capsys):
    """As `check` and `fit-tokenizer` spell them."""
    assert "unknown option '--epoch'; did you mean '--epochs'" in fails(capsys, "run", "--epoch", "3")
    assert "'--fit-tokenizer.precision' or '--pretrain.precision'" in fails(capsys, "run", "--precision", "float32")
    assert "did you mean '--tokenize.views'?" in fails(
        capsys, "run", "--pretrain.views", "random-crop"
    )  # the store's are used
    assert "unknown option '--xyzzy'. See" in fails(capsys, "run", "--xyzzy")
    assert "unknown command 'xyzzy'. Commands:" in fails(capsys, "xyzzy")
    assert "no completion for 'nonsense'. Shells:" in fails(capsys, "completion", "nonsense")


def test_a_mistake_does_not_block_the_folder_of_a_run(capsys, crops, tmp_path):
    """Contradicting options are refused before it is made; one that stopped it before its first file leaves it free."""
    out = tmp_path / "run"
    run = ["run", "--images", crops, "--out", out]
    line = fails(capsys, *run, "--fit-tokenizer.image-size", "100")
    assert (
        "image size 100 x 100 is not divisible" in line
        and "--fit-tokenizer.image-size 96 96" in line
        and not out.exists()
    )
    assert "did you mean" in fails(capsys, *run, "--fit-tokenizer.teacher", "resnet50x64_clp") and not out.exists()
    same = [*run, "--fit-tokenizer.vocab-size", "60000", "--time", "10000"]  # more codes than patches
    fails(capsys, *same)
    assert {file.name for file in out.iterdir()} == {"config.yaml", "run.json"}
    (out / "run.json").unlink()  # now it might be the user's own
    assert "nothing is overwritten" in fails(capsys, *run)
    (out / "config.yaml").unlink()
    fails(capsys, *same)
    (out / "tokenizer").mkdir(exist_ok=True)
    (out / "tokenizer" / "damaged").touch()
    line = fails(capsys, *same, "--fit-tokenizer.vocab-size", "512", "--resume")
    assert "(fit_tokenizer.vocab_size: 60000 -> 512)" in line  # pre-training has made nothing yet
    assert f"mapet run {out / 'config.yaml'} --resume; to start with new options: a new --out" in line
    assert "is not a tokenizer" in fails(
        capsys, *same, "--pretrain.epochs", "4000", "--max-unreadable", "0.2", "--resume"
    )
    retained = (out / "config.yaml").read_text()
    assert (
        "epochs: 4000" in retained and "max_unreadable: 0.2" in retained
    )  # what has made nothing yet may still change
    (out / "pretrain").mkdir(parents=True)
    (out / "pretrain" / "config.yaml").touch()
    for made, way in (  # a run that is not finished has no backbone, and what there is can be exported
        ("checkpoints", "with new options: a new --out"),
        (
            "checkpoints/step-00000001/trainer_state.json",
            f"`mapet export --backbone {out} --out NEW`, --pretrain.init-from NEW, and a new --out",
        ),
        ("backbone", f"from its weights with new options: --pretrain.init-from {out}, and a new --out"),
    ):
        (out / "pretrain" / made).mkdir(parents=True, exist_ok=True)
        line = fails(capsys, *same, "--pretrain.epochs", "3000", "--max-unreadable", "0.2", "--resume")
        assert "(pretrain.epochs: 4000.0 -> 3000.0)" in line and way in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pretrain.objective", "mapt"], "did you mean 'mapet'"),
        (["--pretrain.model", "vit_tinyy_patch16_224"], "did you mean 'vit_tiny_patch16_224'"),
        (["--pretrain.model", "resnet50"], "choose one of timm's vit_* or deit_* models"),
        (["--pretrain.init-from", "weights.txt"], "weights.txt"),
        (["--pretrain.probe-images", "CROPS"], "has no labels"),
        (["--test-images", "photoz"], "photoz"),
        (["--test-images", "CROPS"], "has no labels"),
    ],
)
def test_run_refuses_at_once_what_a_later_stage_would(options, message, capsys, crops, tmp_path):
    out = tmp_path / "run"
    options = [str(crops) if arg == "CROPS" else arg for arg in options]
    line = fails(
        capsys, "run", "--images", crops, "--out", out, "--time", "10000", *options
    )  # enough if it is busy, too
    assert message in line
    assert not out.exists()


def test_ctrl_c_before_anything_is_saved_says_how_to_restart(capsys, crops, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("mapet.tokenizers.stages.make_teacher", interrupted)
    run = ["run", "--images", str(crops), "--out", str(tmp_path / "run"), "--time", "10000"]
    assert main(run) == 130
    assert (
        f"mapet run: interrupted. Resume with: mapet run {tmp_path}/run/config.yaml --resume" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("program", "code", "message"),
    [  # the module sends the signal to itself, and passes over exceptions as callbacks of the import system do
        ("import swallows", 130, "mapet: interrupted while loading libraries\n"),
        (
            "RESUME_HINT[0] = 'mapet run x'; import swallows",
            130,
            "interrupted while loading libraries. Resume with: mapet run x\n",
        ),
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
    line = fails(capsys, "demo")
    assert f"some/file ({os.strerror(number)})" in line and hint in line
    with (
        pytest.raises(mapet.MapetError, match=f"cannot write some/file: .*: .*{hint}"),
        translate_write_errors(Path("some/file")),
    ):
        raise SafetensorError(f"I/O error: {os.strerror(number)} (os error {number})")


def test_wrong_values(capsys, crops, tmp_path):
    common = ["fit-tokenizer", "--images", crops, "--out", tmp_path / "x"]
    assert "--vocab-size: must be a whole number, got 'many'" in fails(capsys, *common, "--vocab-size", "many")
    assert "not divisible by the patch size 16; the nearest that is: --image-size 32 32" in fails(
        capsys, *common, "--image-size", "30"
    )
    evaluate = ["evaluate", "--backbone", "x", "--images", crops, "--layers", "1.5"]
    assert fails(capsys, *evaluate).endswith("--layers: must be a whole number, got '1.5'")
    line = fails(capsys, *common, *TINY_FIT, "--vocab-size", "100000")
    assert "100,000" in line and "192" in line and "--vocab-size" in line
    assert "not available" in fails(capsys, *common, "--device", "tpu7")
    assert "expected one argument" in fails(capsys, *common, "--vocab-size")
    assert "unexpected argument 'extra'" in fails(capsys, "check", "recipe.yaml", "extra")


def test_a_folder_of_another_version_says_so(capsys, run_dir, tmp_path):
    """Its config.yaml has an option, here of a section, that this version does not know."""
    recipe = yaml.safe_load((run_dir / "config.yaml").read_text())
    state = RunState.read(run_dir)
    for versions, has_hint in (({"mapet": "0.0.3"}, True), ({}, False), (state.versions, False)):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(recipe | {"old_option": 1}))
        state.model_copy(update={"versions": versions}).write(tmp_path)
        line = fails(capsys, "pretrain", tmp_path / "config.yaml", "--resume")
        assert "unknown option 'old_option'" in line
        assert (f"mapet 0.0.3 wrote {tmp_path}" in line and "resume it with that version" in line) == has_hint
    (tmp_path / "run.json").write_text("[]")
    assert "mapet 0.0.3" not in fails(capsys, "pretrain", tmp_path / "config.yaml", "--resume")


def test_scratch_file(capsys, crops, tmp_path, monkeypatch):
    """Too little disk space is an error before anything is written, and nothing is left of a scratch file after an error."""
    common = ["fit-tokenizer", "--images", crops, *TINY_FIT, "--memory-gb", "1e-6", "--out"]
    scratch = tmp_path / "x"
    line = fails(capsys, *common, scratch / "t", "--vocab-size", "100000")
    assert "100,000" in line and scratch.is_dir() and not list(scratch.iterdir())
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    line = fails(capsys, *common, scratch / "t")
    assert (
        "192 feature vectors take 1.84e-05 GB" in line
        and "1e-06 GB free" in line
        and "give --out on another disk" in line
    )
    assert not list(scratch.iterdir())


def test_recipes(capsys, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("images: x\nout: y\nvocab_sise: 3\n")
    assert f"unknown option 'vocab_sise' (in {recipe}); did you mean 'vocab_size'?" in fails(
        capsys, "fit-tokenizer", recipe
    )
    recipe.write_text("images: x\nout: y\nkmeans_iters: few\n")
    assert f"got 'few' (in {recipe})" in fails(capsys, "fit-tokenizer", recipe)
    recipe.write_text("a: [1, 2")
    assert "not valid YAML" in fails(capsys, "fit-tokenizer", recipe)
    recipe.write_text("- a\n- b\n")
    assert "`name: value`" in fails(capsys, "fit-tokenizer", recipe)
    recipe.write_bytes(b"\xff\xfe\x00")
    assert "not valid YAML" in fails(capsys, "fit-tokenizer", recipe)
    assert "cannot read the config" in fails(capsys, "fit-tokenizer", tmp_path / "absent.yaml")
    assert f"is a folder, not a config: give it as --images {tmp_path}" in fails(capsys, "check", tmp_path)
    recipe.write_text("!!python/object/apply:os.system ['touch hacked']\n")
    assert "not valid YAML" in fails(capsys, "fit-tokenizer", recipe)
    assert not Path("hacked").exists()


def test_nothing_is_overwritten(capsys, crops, tmp_path):
    out = tmp_path / "full"
    out.mkdir()
    (out / "precious").write_text("x")
    assert "nothing is overwritten" in fails(capsys, "fit-tokenizer", "--images", crops, "--out", out)
    assert "nothing is overwritten" in fails(capsys, "run", "--images", crops, "--out", out)
    assert (out / "precious").read_text() == "x"


def test_mismatched_tokens_name_both_sides(capsys, digits, few_digits, tokenizer_dir, tokens_dir, tmp_path):
    line = fails(
        capsys,
        "pretrain",
        "--images",
        digits / "test",
        "--tokenizer",
        tokenizer_dir,
        "--tokens",
        tokens_dir,
        "--out",
        tmp_path / "a",
    )
    assert "does not match" in line and "288 images" in line and "360" in line
    mapet.fit_tokenizer(images=few_digits, out=tmp_path / "tok", image_size=8, patch_size=2, channels=1, vocab_size=17)
    line = fails(
        capsys,
        "pretrain",
        "--images",
        few_digits,
        "--tokenizer",
        tmp_path / "tok",
        "--tokens",
        tokens_dir,
        "--out",
        tmp_path / "b",
    )
    assert "another codebook" in line


def test_damaged_folders(capsys, few_digits, tokenizer_dir, tokens_dir, tmp_path):
    common = ["pretrain", "--images", few_digits, "--out", tmp_path / "run"]
    assert "is not a tokenizer: it has no visual_tokenizer.json" in fails(capsys, *common, "--tokenizer", tmp_path)
    line = fails(capsys, *common, "--tokenizer", tokenizer_dir.parent)
    assert f"it has no visual_tokenizer.json; did you mean {tokenizer_dir}?" in line
    for name in ("codebook.safetensors", "visual_tokenizer.json"):
        folder = tmp_path / f"damaged-{name}"
        folder.mkdir()
        for file in tokenizer_dir.iterdir():
            data = file.read_bytes()
            (folder / file.name).write_bytes(data[: len(data) // 2] if file.name == name else data)
        assert "tokenizer" in fails(capsys, *common, "--tokenizer", folder)
    folder = tmp_path / "tokens"
    shutil.copytree(tokens_dir, folder)
    data = bytearray((tokens_dir / "shards" / "00000.npy").read_bytes())
    (folder / "shards" / "00000.npy").write_bytes(data[:-100])
    assert "damaged token store" in fails(capsys, *common, "--tokenizer", tokenizer_dir, "--tokens", folder)
    data[-2:] = b"\xff\xff"
    (folder / "shards" / "00000.npy").write_bytes(data)
    assert "damaged" in fails(
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
    line = fails(capsys, *common, "tests.commands.test_mistakes:encoder_with_nan")
    assert "NaN or infinite features for 1 of 12 images" in line and ".png" in line
    assert "must return a tensor (batch, features, rows, columns), got (12, 768)" in fails(
        capsys, *common, "tests.commands.test_mistakes:wrong_shape"
    )
    assert "cannot import absent_package" in fails(capsys, *common, "absent_package:function")
    assert "did you mean 'good_encoder'" in fails(capsys, *common, "tests.commands.test_mistakes:good_encodr")
    assert "one argument" in fails(capsys, *common, "tests.commands.test_mistakes:no_arguments")
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
    assert "if you trust it" in fails(capsys, *tokenize)  # a codebook from elsewhere can't run a function it names
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
    assert "a grid of 1 x 1 for views of 16 x 16 px and 4 x 4 patches" in fails(
        capsys, *common, "tests.commands.test_mistakes:pooled"
    )
    wide = [*common[:-1], "32", "--teacher", "tests.commands.test_mistakes:turned"]
    line = fails(capsys, *wide)
    assert "a grid of 8 x 4 for views of 16 x 32 px" in line
    assert main([*map(str, common), "tests.commands.test_mistakes:coarse"]) == 0
    assert "grid of 2 x 2 is interpolated to the student's 4 x 4: --teacher-image-size 32 32 would" in caplog.text
    assert json.loads((tmp_path / "x" / "visual_tokenizer.json").read_text())["teacher_grid"] == [2, 2]


def test_a_codebook_whose_teacher_is_gone(capsys, crops, tmp_path):
    """Its weights file was moved: named, with the way out; other weights are not taken for it."""
    weights = {name: tmp_path / f"{name}.safetensors" for name in ("first", "second")}
    for path in weights.values():
        save_file(timm.create_model("resnet10t").state_dict(), path)
    teacher = ["--teacher", "resnet10t.c3_in1k", "--teacher-image-size", "64", "--teacher-checkpoint", weights["first"]]
    fit = ["fit-tokenizer", "--images", crops, *TINY_FIT, "--vocab-size", "4", "--out", tmp_path / "x", *teacher]
    assert main([*map(str, fit)]) == 0
    moved = weights["first"].rename(tmp_path / "moved.safetensors")
    tokenize = ["tokenize", "--images", crops, "--tokenizer", tmp_path / "x", "--out", tmp_path / "t"]
    line = fails(capsys, *tokenize)
    assert f"{weights['first']} does not exist: put the file, or a link to it, into {tmp_path / 'x'}" in line
    here = tmp_path / "x" / "first.safetensors"
    here.symlink_to(weights["second"])
    assert "has other weights" in fails(capsys, *tokenize)
    here.unlink()
    here.symlink_to(moved)
    assert main([*map(str, tokenize)]) == 0


def test_teacher_weights_that_cannot_be_had(capsys, crops, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_OFFLINE", True
    )  # its patience with a bad network takes a minute
    common = ["fit-tokenizer", "--images", crops, "--out", tmp_path / "x", "--teacher", "resnet10t.c3_in1k"]
    assert "--teacher-checkpoint" in fails(capsys, *common)
    assert "No such file" in fails(capsys, *common, "--teacher-checkpoint", tmp_path / "absent.safetensors")
    (tmp_path / "evil.pth").write_bytes(b"cos\nsystem\n(S'touch /tmp/mapet_was_hacked'\ntR.")
    assert "neither a safetensors nor a torch file" in fails(
        capsys, *common, "--teacher-checkpoint", tmp_path / "evil.pth"
    )
    assert not Path("/tmp/mapet_was_hacked").exists()
    torch.save({"other": torch.zeros(3)}, tmp_path / "other.pth")
    line = fails(capsys, *common, "--teacher-checkpoint", tmp_path / "other.pth")
    assert f"is {tmp_path / 'other.pth'} a checkpoint of it?" in line


def test_a_run_of_another_recipe(capsys, run_dir, few_digits, tokenizer_dir, tokens_dir):
    line = fails(capsys, "pretrain", run_dir / "config.yaml", "--resume", "--lr", "0.5")
    assert "lr: 0.001 -> 0.5" in line and "--init-from" in line


def test_a_run_that_is_not_finished(capsys, run_dir, digits, tmp_path):
    """It has no backbone: both ways to one are named, and are ways to one."""
    run = tmp_path / "photos" / "pretrain"
    shutil.copytree(run_dir, run, ignore=shutil.ignore_patterns("backbone"))
    line = fails(capsys, "evaluate", "--protocols", "knn", "--backbone", run, "--images", digits / "train")
    assert f"Resume with: mapet pretrain {run / 'config.yaml'} --resume; or take its newest checkpoint" in line
    assert f"mapet export --backbone {run} --out NEW" in line
    assert main(["export", "--backbone", str(run), "--out", str(tmp_path / "new")]) == 0
    RunState(command="run").write(run.parent)
    (run.parent / "config.yaml").touch()
    line = fails(capsys, "evaluate", "--protocols", "knn", "--backbone", run.parent, "--images", digits / "train")
    assert f"mapet run {run.parent / 'config.yaml'} --resume" in line


def test_labels_that_are_not_there(capsys, crops, run_dir, digits):
    assert "no labels" in fails(capsys, "evaluate", "--protocols", "knn", "--backbone", run_dir, "--images", crops)
    assert "no backbone" in fails(
        capsys, "evaluate", "--protocols", "knn", "--backbone", crops, "--images", digits / "train"
    )
    assert "nope does not exist: expected a run" in fails(
        capsys, "evaluate", "--protocols", "knn", "--backbone", crops / "nope", "--images", digits / "train"
    )
    assert "nope does not exist: give a folder of `mapet run`" in fails(
        capsys, "report", crops / "nope", "--out", crops / "r.html"
    )
    assert "fewer than the 5,000" in fails(
        capsys, "finetune", "--backbone", run_dir, "--images", digits / "train", "--labels-per-class", "5000"
    )


FULL_DISK = """
import resource, sys
from mapet.cli import main
import mapet.training.trainer, mapet.tokenizers.tokenizer  # import before files are limited
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("stage", ["fit-tokenizer", "tokenize", "pretrain"])
def test_full_disk(stage, few_digits, tokenizer_dir, tokens_dir, tmp_path):
    """A limit on file size gives the error that a full disk would: a line, nothing half-written under a final name."""
    out = tmp_path / "out"
    argv = [stage, "--images", few_digits, "--out", out]
    if stage == "fit-tokenizer":
        argv += ["--image-size", "8", "--patch-size", "2", "--channels", "1", "--vocab-size", "200"]
    else:
        argv += ["--tokenizer", tokenizer_dir]
    if stage == "pretrain":
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
    assert f"mapet {stage}: " in result.stderr and "File too large" in result.stderr
    assert not list(tmp_path.rglob("*.tmp"))
    assert not (out / "backbone").exists() and not (out / "codebook.safetensors").exists()


def test_out_among_the_images_is_refused(capsys, crops, monkeypatch):
    """What a run writes there would be images to the next stage."""
    for stage, images, out in (("run", crops, crops / "run"), ("fit-tokenizer", crops, crops), ("run", ".", "run")):
        monkeypatch.chdir(crops)
        line = fails(capsys, stage, "--images", images, "--out", out)
        assert f"--out {out} must not be inside --images {images}" in line
    assert not (crops / "run").exists()


def test_a_stage_of_run_names_options_as_run_has_them(capsys, crops, tmp_path):
    run = ["run", "--images", crops, "--out", tmp_path / "run", "--time", "10000"]  # enough on a busy machine, too
    small = ["--fit-tokenizer.image-size", "16", "--fit-tokenizer.patch-size", "16"]
    line = fails(capsys, *run, *small, "--fit-tokenizer.vocab-size", "5000")
    assert "--fit-tokenizer.vocab-size 5,000" in line
    line = fails(capsys, *run, "--fit-tokenizer.vocab-size", "1")
    assert "vocab-size" in line.replace("_", "-") and "2" in line
    assert "--pretrain.mask-ratio 75: " in fails(capsys, *run, "--pretrain.mask-ratio", "75")


def test_what_is_no_recipe_of_this_stage(run_dir, capsys, tmp_path):
    line = fails(capsys, "run", run_dir / "config.yaml", "--out", tmp_path / "x")
    assert line.endswith(f"{run_dir / 'config.yaml'} is a config of `mapet pretrain`, not of `mapet run`")
    assert "photo.JPEG is not a config (.yaml): options are written --name value" in fails(capsys, "run", "photo.JPEG")
    assert f"give it as --out {tmp_path}" in fails(capsys, "embed", tmp_path, "--resume")
    assert "did you mean '--epochs'" in fails(capsys, "run", "--epocs", "3")


def test_one_of_several_needs_no_list(run_dir, capsys, tmp_path):
    """In Python as on the command line; and what takes keywords alone says so."""
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
    assert f"give it as --images '{folder}'" in fails(capsys, "check", folder)
    assert shell_command("run", folder, "--resume") == f"mapet run '{folder}' --resume"


def test_a_folder_instead_of_a_recipe_names_its_option(run_dir, tokenizer_dir, capsys, tmp_path):
    """The option that this stage takes it by, or the recipe in it if this stage wrote one."""
    for stage, folder, way in (
        ("check", run_dir, f"give it as --images {run_dir}"),
        ("tokenize", tokenizer_dir, f"give it as --tokenizer {tokenizer_dir}"),
        *(
            (stage, run_dir, f"give it as --backbone {run_dir}")
            for stage in ("embed", "evaluate", "export", "finetune")
        ),
        ("tokenize", run_dir, f"give it as --images {run_dir}"),
        ("pretrain", run_dir, f"did you mean {run_dir / 'config.yaml'}?"),
        ("run", tmp_path, f"give it as --images {tmp_path}"),
    ):
        assert f"{folder} is a folder, not a config: {way}" in fails(capsys, stage, folder)


def test_a_run_resumes_only_in_the_folder_of_its_recipe(capsys, crops, tmp_path, monkeypatch, caplog):
    """A recipe with relative folders, given from another folder, would silently start another run there."""
    (tmp_path / "home" / "runs" / "a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "home")
    recipe = Path("runs/a/config.yaml")
    recipe.write_text(f"images: {crops}\nout: runs/a\nfit_tokenizer: {{teacher: resnet50x64_clp}}\n")
    RunState(command="run").write(recipe.parent)
    Path("runs/a/tokenizer").mkdir()
    Path("runs/a/tokenizer/damaged").touch()
    assert "is not a tokenizer" in fails(capsys, "run", recipe, "--resume")  # it is gone on with
    monkeypatch.chdir(tmp_path)
    line = fails(capsys, "run", "home" / recipe, "--resume")
    assert "--out is runs/a, relative to" in line and "if the run was moved, give --out home/runs/a" in line
    assert "did you mean home/runs/a/config.yaml?" in fails(capsys, "run", "home/runs/a", "--resume")
    with caplog.at_level("WARNING", "mapet"):
        too_many = ["--fit-tokenizer.vocab-size", "60000", "--time", "10000"]  # more codes than patches
        fails(capsys, "run", "--images", crops, "--out", "typo", "--resume", *too_many)
    assert "no checkpoint in typo: starting a new run" in caplog.text


def test_why_there_are_no_labels(capsys, crops, tmp_path, tokenizer_dir):
    folder = tmp_path / "half"
    shutil.copytree(crops, folder / "a")
    probe = ["evaluate", "--protocols", "knn", "--backbone", "timm:vit_tiny_patch16_224", "--images", folder]
    assert "1 class folder, and 0 images outside of them" in fails(capsys, *probe)
    shutil.copytree(crops, folder / "b")
    shutil.copy(crops / "crop000.png", folder / "stray.png")
    assert "found 2 class folders, and 1 image outside of them ('stray.png')" in fails(capsys, *probe)


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
