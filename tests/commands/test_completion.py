"""What shells offer after `mapet`."""

import os
import shutil
import subprocess

import pytest

from mapet.cli import main


def script(capsys, shell):
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


def offered(text, args):
    line = f"{text}\nCOMP_WORDS=({' '.join(args)}); COMP_CWORD={len(args) - 1}; COMPREPLY=(); _shtab_mapet; echo ${{COMPREPLY[@]}}"
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout.split()


def test_bash_offers_commands_and_their_options(capsys):
    text = script(capsys, "bash")
    assert offered(text, ["mapet", "fit"]) == ["fit-tokenizer"]
    assert offered(text, ["mapet", "pretrain", "--mask"]) == ["--mask-ratio"]
    assert offered(text, ["mapet", "run", "--pretrain.ep"]) == ["--pretrain.epochs"]
    assert offered(text, ["mapet", "pretrain", "--patch-order", "ras"]) == ["raster"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_take_their_script(shell, capsys, tmp_path):
    text = script(capsys, shell)
    assert "mask-ratio" in text and "blockwise" in text
    if shutil.which(shell):
        home = os.environ | {"HOME": str(tmp_path), "ZDOTDIR": str(tmp_path)}  # where zsh keeps what it has looked up
        subprocess.run([shell, "-c", text], check=True, capture_output=True, env=home)


def test_an_unknown_shell(capsys):
    assert main(["completion", "bassh"]) == 2
    assert "did you mean 'bash'?" in capsys.readouterr().err
