"""One process a folder, and nothing of others overwritten: locks, their holders, and what may be an output folder."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import mapet
from mapet import lock
from mapet.config.base import Config
from mapet.files import LOCK_FILE, remove_temporaries
from mapet.lock import Holder, folder_lock
from mapet.run_state import RunState, run_state
from tests.refused import refused


class Options(Config):
    out: Path
    resume: bool = False
    take_over: bool = False


def write_lock(folder, age=0.0, **fields):
    """The lock of another process, renewed `age` seconds ago."""
    holder = Holder.from_this_process()._replace(**fields)
    (folder / LOCK_FILE).write_text(json.dumps(holder))
    os.utime(folder / LOCK_FILE, (time.time() - age,) * 2)
    return holder


def parent():
    """A process that is alive, of this host: pytest's own parent."""
    return {"pid": os.getppid(), "started": lock._process_start(os.getppid())}


def gone():
    process = subprocess.Popen(["true"])
    started = lock._process_start(process.pid)
    process.wait()
    return {"pid": process.pid, "started": started}


def test_a_lock_is_made_and_removed(tmp_path):
    with folder_lock(tmp_path):
        holder = Holder(*json.loads((tmp_path / LOCK_FILE).read_bytes()))
        assert holder.pid == os.getpid() and holder.host == socket.gethostname() and not holder.is_gone(1e9)
        with refused(os.getpid(), socket.gethostname(), "take_over"), folder_lock(tmp_path):
            pass
        assert (tmp_path / LOCK_FILE).exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("age", "fields", "stale"),
    [
        (0, parent, False),
        (5000, parent, False),  # alive, but stopped for an hour: still alive
        (0, gone, True),
        (0, lambda: parent() | {"started": "another boot 7"}, True),  # its number is used again
        (500, lambda: {"host": "elsewhere", "pid": 2**22 + 1}, False),
        (700, lambda: {"host": "elsewhere", "pid": 1}, True),
        (0, lambda: {"namespace": "pid:[7]", "pid": 2**22 + 1}, False),  # another container of this host's name
        (700, lambda: {"namespace": "pid:[7]", "pid": 1}, True),
        (0, lambda: {"started": "", "pid": 2**22 + 1}, True),
    ],
)  # fmt: skip
def test_who_is_gone(age, fields, stale, tmp_path):
    holder = write_lock(tmp_path, age, **fields())
    if stale:
        with folder_lock(tmp_path):
            assert json.loads((tmp_path / LOCK_FILE).read_bytes())[2] == os.getpid()
        return
    with refused(holder.pid, holder.host, f"{age} s", "take_over", field="out"), folder_lock(tmp_path):
        pass
    with folder_lock(tmp_path, take_over=True):
        inner = tmp_path / "inner"
        inner.mkdir()
        write_lock(inner, age, **fields())  # the same holder's, of a folder within: taken with the first
        with folder_lock(inner):
            pass
    lock._previous_holders.clear()


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"host": 1}'])
def test_a_lock_that_was_cut_off_is_not_forever(content, tmp_path):
    (tmp_path / LOCK_FILE).write_text(content)
    started = time.monotonic()
    with folder_lock(tmp_path):
        assert time.monotonic() - started < 10


def test_of_many_processes_one_gets_a_stale_lock(tmp_path):
    """As threads, each a holder of its own."""
    write_lock(tmp_path, **gone())
    inside, most, errors = 0, 0, []
    gate = threading.Barrier(8)

    def take():
        nonlocal inside, most
        gate.wait()
        try:
            with folder_lock(tmp_path):
                inside += 1
                most = max(most, inside)
                time.sleep(0.3)
                inside -= 1
        except mapet.MapetError as error:
            errors.append(error)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and len(errors) == 7


def test_a_lock_is_renewed_and_one_that_was_taken_over_ends_its_process(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "RENEW_S", 0.02)
    ended = threading.Event()
    monkeypatch.setattr(lock.os, "_exit", lambda code: ended.set())
    with folder_lock(tmp_path):
        os.utime(tmp_path / LOCK_FILE, (0, 0))
        time.sleep(0.5)
        assert time.time() - (tmp_path / LOCK_FILE).stat().st_mtime < 60 and not ended.is_set()
        write_lock(tmp_path, **parent())
        assert ended.wait(5)
    assert json.loads((tmp_path / LOCK_FILE).read_bytes())[2] == os.getppid()  # it stays the other's


# ---- output folders


def test_places_that_cannot_be_replaced(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path / "real")
    places = [tmp_path / "link", tmp_path / "dangling", Path("."), tmp_path / "real", Path("/dev"), tmp_path / "file"]
    for out in places:
        with refused(out, field="out"), run_state(out, "pretrain", Options(out=out)):
            raise AssertionError("work has begun")
    assert not list((tmp_path / "real").iterdir()) and not (tmp_path / "nothing").exists()


def test_read_only_and_full_disks(tmp_path, monkeypatch):
    """A fake at the system call: root may write everywhere, and a disk cannot be filled here."""
    opened = os.open
    for number, text in ((30, "Read-only file system"), (28, "No space left on device"), (13, "Permission denied")):

        def fail(path, flags, *args, number=number, text=text, **more):
            if flags & os.O_CREAT:
                raise OSError(number, text, str(path))
            return opened(path, flags, *args, **more)

        out = tmp_path / "new"
        with monkeypatch.context() as patch:
            patch.setattr(lock.os, "open", fail)
            with refused(out, text, field="out"), run_state(out, "pretrain", Options(out=out)):
                raise AssertionError("work has begun")
        assert not out.exists()


def test_folders_of_others_are_not_resumed(tmp_path):
    """Without a run.json of the same command the files in a folder are the user's."""
    (tmp_path / "features.npy").write_bytes(b"mine")
    options = Options(out=tmp_path, resume=True)
    with refused(tmp_path, "run.json", field="out"), run_state(tmp_path, "embed", options):
        raise AssertionError("work has begun")
    RunState(command="evaluate").write(tmp_path)
    with refused("mapet evaluate", "mapet embed", field="out"), run_state(tmp_path, "embed", options):
        raise AssertionError("work has begun")
    (tmp_path / "run.json").write_text("{")
    with refused("run.json"), run_state(tmp_path, "embed", options):
        raise AssertionError("work has begun")
    assert (tmp_path / "features.npy").read_bytes() == b"mine" and not (tmp_path / LOCK_FILE).exists()


def test_a_study_leaves_the_users_own_config(tmp_path, crops):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "config.yaml").write_text("# my study\n")
    with refused(tmp_path / "s", field="out"):
        mapet.study(images=crops, test_images=crops, out=tmp_path / "s", tokenizers={"a": {}}, grid={"lr": [1]})
    assert (tmp_path / "s" / "config.yaml").read_text() == "# my study\n"


def test_files_of_others_are_not_replaced(tmp_path, crops):
    (tmp_path / "list.txt").write_text("mine")
    with refused(tmp_path / "list.txt", field="out"):
        mapet.report(run=tmp_path / "run", out=tmp_path / "list.txt")
    with refused(tmp_path / "list.txt", field="out"):
        mapet.evaluate(backbone="random:vit_tiny_patch16_224", images=crops, out=tmp_path / "list.txt")
    assert (tmp_path / "list.txt").read_text() == "mine"


def test_temporaries_of_dead_jobs_are_removed(tmp_path):
    out = tmp_path / "out"
    for path in (
        ".out.123.tmp",
        "out/.a.json.7.tmp",
        "out/deep/.b.7.tmp/x",
        "out/locked/.lock",
        "out/locked/.c.7.tmp",
        "out/.d.tmp",
        ".e.7.tmp",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    remove_temporaries(out)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == [".e.7.tmp", "out/.d.tmp", "out/locked/.c.7.tmp", "out/locked/.lock"]


def test_the_second_of_two_processes_is_refused(tmp_path, few_digits):
    """The first one waits for its images, a pipe; the folder's lock names it."""
    code = """if True:
        import sys, time
        from pathlib import Path
        from mapet.config.base import Config
        from mapet.run_state import run_state
        with run_state(Path(sys.argv[1]), "fit-tokenizer", Config()):
            print("inside", flush=True)
            time.sleep(60)
    """
    out = tmp_path / "t"
    with subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "inside\n"
        with refused(first.pid, "take_over", field="out"):
            mapet.fit_tokenizer(
                images=few_digits, out=out, image_size=8, patch_size=2, channels=1, vocab_size=8, resume=True
            )
        first.kill()
    mapet.fit_tokenizer(images=few_digits, out=out, image_size=8, patch_size=2, channels=1, vocab_size=8, resume=True)
    assert sorted(path.name for path in out.iterdir()) == ["codebook.safetensors", "run.json", "visual_tokenizer.json"]
