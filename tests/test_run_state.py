"""run.json: what it says of a command, from start to end, killed and resumed."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest

from mapet.commands.command import command
from mapet.config.base import Config
from mapet.errors import Interrupted, MapetError, NewerFormatError
from mapet.files import atomic_write, create_output_dir
from mapet.run_state import RunState, find_config, parent_run, pretrain_folder, read_command, record, run_state
from tests.refused import refused


class Options(Config):
    """Of a command."""

    out: Path
    epochs: int = 3
    resume: bool = False


def read(folder):
    return RunState.read(folder)


def begin(out, error):
    with run_state(out, "pretrain", Options(out=out)):
        (out / "checkpoints").mkdir()
        record(out, counts={"images": 7, "steps": 2})
        raise error


def test_a_command_that_ends_well(tmp_path):
    out = tmp_path / "a" / "run"
    with run_state(out, "pretrain", Options(out=out)):
        state = read(out)
        assert (state.status, state.command, state.pid, state.config["epochs"]) == (
            "running",
            "pretrain",
            os.getpid(),
            3,
        )
        record(out, config=Options(out=out, epochs=5), counts={"images": 7}, hashes={"images": "ab"})
        record(out, counts={"steps": 2}, results={"accuracy": 0.5})
        logging.getLogger("mapet").warning("odd %s", "images")
    state = read(out)
    assert (state.status, state.reason, state.config["epochs"]) == ("finished", "", 5)
    assert state.counts == {"images": 7, "steps": 2, "warnings": 1} and state.warnings == ["odd images"]
    assert state.hashes == {"images": "ab"} and state.results == {"accuracy": 0.5}
    assert state.ended is not None and state.ended >= state.started and state.seconds >= 0
    assert set(state.versions) >= {"mapet", "torch", "timm", "python"}
    content = json.loads((out / "run.json").read_text())
    assert content["schema_version"] == 1 and content["started"].endswith("Z")


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (Interrupted("stopped by SIGTERM"), "stopped", "stopped by SIGTERM"),
        (KeyboardInterrupt(), "stopped", "interrupted"),
        (MapetError("no such\nmodel"), "failed", "no such model"),
        (ValueError("odd"), "failed", "ValueError: odd"),
    ],
)
def test_a_command_that_ends_early(tmp_path, error, status, reason):
    out = tmp_path / "run"
    with pytest.raises(type(error)):
        begin(out, error)
    assert (read(out).status, read(out).reason) == (status, reason)


def test_what_wrote_nothing_leaves_no_folder(tmp_path):
    with pytest.raises(MapetError), run_state(tmp_path / "run", "pretrain", Options(out=tmp_path / "run")):
        raise MapetError("no such images")
    assert not (tmp_path / "run").exists()
    with pytest.raises(MapetError), run_state(tmp_path, "pretrain", Options(out=tmp_path)):  # a folder that was there
        raise MapetError("no such images")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_command_keeps_its_options_and_may_restart(tmp_path):
    """A study compares them with its own: k-means had made nothing yet but a checkpoint beside the folder."""
    out = tmp_path / "tokenizer"
    with pytest.raises(KeyboardInterrupt), run_state(out, "fit-tokenizer", Options(out=out)):
        raise KeyboardInterrupt
    assert (read(out).status, read(out).config["epochs"]) == ("stopped", 3)
    with run_state(out, "fit-tokenizer", Options(out=out, epochs=5)):
        pass
    assert (read(out).status, read(out).config["epochs"]) == ("finished", 5)


def test_a_folder_that_is_not_to_be_resumed_stays_as_it_is(tmp_path):
    with run_state(tmp_path, "pretrain", Options(out=tmp_path)):
        (tmp_path / "backbone").mkdir()
    before = (tmp_path / "run.json").read_bytes()
    with refused(field="out"), run_state(tmp_path, "pretrain", Options(out=tmp_path)):
        create_output_dir(tmp_path)
    assert (tmp_path / "run.json").read_bytes() == before


def test_resumed_runs_keep_what_is_known(tmp_path):
    with pytest.raises(Interrupted):
        begin(tmp_path, Interrupted("stopped by SIGTERM"))
    first = read(tmp_path)
    with run_state(tmp_path, "pretrain", Options(out=tmp_path, resume=True)):
        assert read(tmp_path).status == "running" and read(tmp_path).ended is None
        record(tmp_path, counts={"steps": 4})
    state = read(tmp_path)
    assert (state.status, state.reason, state.resumes, state.started) == ("finished", "", 1, first.started)
    assert state.counts == {"images": 7, "steps": 4} and state.seconds >= first.seconds
    with pytest.raises(MapetError), run_state(tmp_path, "pretrain", Options(out=tmp_path, resume=True)):
        raise MapetError("started with other options")
    assert read(tmp_path).status == "finished"  # what was asked for in vain changes nothing


def test_a_process_that_is_gone_reads_as_interrupted(tmp_path):
    code = """if True:
        import os, sys
        from pathlib import Path
        from mapet.config.base import Config
        from mapet.run_state import run_state
        with run_state(Path(sys.argv[1]), "pretrain", Config()):
            os._exit(9)
    """
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 9
    assert read(tmp_path).status == "interrupted"
    content = json.loads((tmp_path / "run.json").read_text())
    assert content["status"] == "running"
    (tmp_path / "run.json").write_text(json.dumps(content | {"host": "elsewhere"}))
    assert read(tmp_path).status == "running"  # which can't be known


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with run_state(tmp_path / "run", "pretrain", Options(out=tmp_path / "run")):
        record(tmp_path / "run", counts={"images": 7})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": "1"}', '{"schema_version": 1, "command": 3}'])
def test_damaged_and_missing_ones(tmp_path, text):
    with pytest.raises(MapetError):
        read(tmp_path)
    (tmp_path / "run.json").write_text(text)
    with refused("run.json"):
        read(tmp_path)
    assert read_command(tmp_path) == ""


def test_newer_ones(tmp_path):
    (tmp_path / "run.json").write_text('{"schema_version": 99, "command": "run"}')
    with pytest.raises(NewerFormatError):
        read(tmp_path)


def test_which_folder_is_what(tmp_path):
    for folder, name in ((".", "demo"), ("run", "run"), ("run/pretrain", "pretrain")):
        RunState(command=name).write(tmp_path / folder)
    inner = tmp_path / "run" / "pretrain"
    assert pretrain_folder(tmp_path) == pretrain_folder(tmp_path / "run") == pretrain_folder(inner) == inner
    assert find_config(tmp_path, ("run", "pretrain")) is None  # without its options nothing is resumed
    (inner / "config.yaml").touch()
    assert find_config(tmp_path, ("run", "pretrain")) == ("pretrain", inner / "config.yaml")
    assert parent_run(inner) == tmp_path / "run" and parent_run(tmp_path / "run") is None


# ---- around commands


@command(Options)
def make_folder(config: Options) -> None:
    """Writes its folder at its end, as many commands do."""
    create_output_dir(config.out, create=False)
    with atomic_write(config.out) as folder:
        folder.mkdir()
        (folder / "product").touch()
        assert read(config.out).status == "running"
    record(config.out, counts={"epochs": config.epochs})


class FileOptions(Options):
    out_is_file: ClassVar[bool] = True


@command(FileOptions)
def make_file(config: FileOptions) -> None:
    config.out.touch()


def test_commands_have_one_and_do_not_write_it(tmp_path):
    make_folder(out=tmp_path / "out")
    state = read(tmp_path / "out")
    assert (state.command, state.status, state.counts) == ("make-folder", "finished", {"epochs": 3})
    with refused(field="out"):
        make_folder(out=tmp_path / "out", epochs=4)
    assert read(tmp_path / "out") == state
    make_file(out=tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]
