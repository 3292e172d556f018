"""What a file may cost: small files that claim much are refused at once; what takes too long is left behind."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mapet
from mapet.config.limits import Limits, use_limits
from mapet.data import loader
from mapet.data.dataset import ViewDataset, position_batches
from mapet.data.loader import load
from mapet.data.readers import read_each as reading
from mapet.data.readers.image import ImageDecodeError
from mapet.data.readers.open import open_image
from mapet.data.readers.read_each import read_each
from mapet.data.sources import list_images
from mapet.data.views import ViewSpec
from mapet.errors import Interrupted, MapetError
from mapet.signals import stop_signals
from mapet.weights import read_weights
from tests import hostile
from tests.refused import refused

SECONDS = 60
"""Far more than any of these files takes on a busy machine, and far less than before."""


@pytest.fixture(autouse=True)
def quickly():
    started = time.monotonic()
    yield
    assert time.monotonic() - started < SECONDS


@pytest.mark.parametrize("make", [hostile.dict_in_itself, hostile.dicts_in_dicts, hostile.modules_in_modules])
def test_weights_without_end_are_refused(make, tmp_path):
    file = make(tmp_path / "w.pth")
    assert file.stat().st_size < 8_000
    with refused("w.pth"):
        read_weights(file)


def test_compressed_weights_are_refused_before_they_are_unpacked(tmp_path):
    file = hostile.compressed_weights(tmp_path / "w.pth")
    assert file.stat().st_size < 1 << 20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with refused("compressed"):
        read_weights(file)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_weights_larger_than_allowed(tmp_path):
    torch.save({"w": torch.zeros(1000)}, tmp_path / "w.pth")
    torch.save({"w": torch.zeros(1).expand(10**12)}, tmp_path / "expanded.pth")
    with use_limits(Limits(archive_bytes=3000)), refused("3,000", "archive_bytes"):
        read_weights(tmp_path / "w.pth")
    with refused("4,000,000,000,000", "archive_bytes"):
        read_weights(tmp_path / "expanded.pth")


def test_a_webp_of_30_bytes_reserves_no_memory(tmp_path):
    file = hostile.one_color_webp(tmp_path / "a.webp")
    assert file.stat().st_size == 30
    with pytest.raises(ImageDecodeError, match="bytes to decode"):
        open_image(file)
    small = hostile.one_color_webp(tmp_path / "b.webp", 40)
    assert open_image(small).read().shape == (3, 40, 40)  # else it would be refused for what it is


def test_a_jpeg_of_many_scans_is_left_behind(tmp_path, monkeypatch):
    """Of a fast decoder, that no signal interrupts: the others of its batch are read, and it is unreadable."""
    hostile.scans_jpeg(tmp_path / "slow.jpg", 4000, 250)
    monkeypatch.setattr(reading, "POLL_S", 0.02)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "fast.png")
    images = list_images(tmp_path)
    dataset = ViewDataset(images, ViewSpec(image_size=(8, 8)), image_size=(8, 8))
    with use_limits(Limits(image_seconds=0.1)):
        batch = dataset.batch([(0, 1), (0, 0), (0, 1)])
    assert batch.image_index.tolist() == [0]
    assert [images.id(index) for index, _ in batch.unreadable] == ["slow.jpg", "slow.jpg"]
    assert "--limits.image-seconds" in batch.unreadable[0][1]


@pytest.mark.parametrize("make", [hostile.digits_tar, hostile.globals_tar])
def test_headers_of_tars_take_no_quadratic_time(make, tmp_path):
    with refused("a.tar"):
        list_images(make(tmp_path / "a.tar"))


def test_images_of_a_shard_and_bytes_of_arrays(tmp_path):
    np.savez(tmp_path / "a.npz", np.zeros((100, 100, 3), np.uint8))
    np.savez_compressed(tmp_path / "b.npz", np.zeros((100, 100, 3), np.uint8))
    assert open_image(tmp_path / "b.npz").read().shape == (3, 100, 100)
    for name in ("a.npz", "b.npz"):
        with use_limits(Limits(image_bytes=20_000)), pytest.raises(ImageDecodeError, match="20,000"):
            open_image(tmp_path / name)


def test_limits_are_options(crops, tmp_path):
    """Of the command line, of Python and of config files; a run keeps them in its config.yaml, and may be resumed with others."""
    with refused("unreadable"):
        mapet.fit_tokenizer(images=crops, out=tmp_path / "t", image_size=16, patch_size=4, limits={"image_pixels": 99})
    with refused("limits.image_pixels"):
        mapet.check(images=crops, limits={"image_pixels": 0})
    with use_limits(Limits(image_pixels=99)), refused("unreadable"):
        mapet.fit_tokenizer(images=crops, out=tmp_path / "u", image_size=16, patch_size=4)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EIO, errno.ESTALE])
def test_errors_of_the_system_are_not_the_images_fault(number, crops, tmp_path, monkeypatch):
    """A stand-in at `open`: images are neither marked nor skipped, and the command ends."""
    images = list_images(crops)

    def fail(*_, **__):
        raise OSError(number, os.strerror(number), "a.png")

    monkeypatch.setattr("builtins.open", fail)
    monkeypatch.setattr("io.open", fail)
    for read in (lambda: images.open(0, 3), lambda: images.data(0), lambda: open_image(images[0])):
        with pytest.raises(MapetError):
            read()


def test_too_many_open_files_in_a_worker(crops, monkeypatch):
    """For real: a process that may open no further file."""
    monkeypatch.setenv("MAPET_WORKERS", "1")
    images = list_images(crops)

    def read(positions):
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        return ViewDataset(images, ViewSpec(image_size=(8, 8)), image_size=(8, 8)).batch(positions)

    with refused("open files") as error:
        list(load(read, position_batches(range(4), 4)))
    assert "Traceback" not in str(error.value)


def test_a_share_that_gives_nothing_ends_the_command(monkeypatch):
    """A stand-in: a read that sleeps uses no processor time, as one of a share that is away."""
    monkeypatch.setattr(reading, "POLL_S", 0.05)
    with use_limits(Limits(read_timeout=0.3)), refused("'b'", field="limits.read_timeout"):
        read_each(lambda name: time.sleep(20 if name == "b" else 0), ["a", "b"])


def test_a_worker_that_can_do_nothing_more_is_found(monkeypatch):
    """Inside a decoder that does not let other threads run: a call of C that keeps Python's lock."""
    import ctypes

    monkeypatch.setenv("MAPET_WORKERS", "1")
    monkeypatch.setattr(loader, "GRACE_S", 0.5)
    with use_limits(Limits(read_timeout=0.5)), refused("MAPET_WORKERS", field="limits.read_timeout"):
        list(load(lambda _: ctypes.PyDLL(None).sleep(8), [0]))


def test_a_dead_worker_is_found(monkeypatch, crops, tmp_path):
    monkeypatch.setenv("MAPET_WORKERS", "1")
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        list(load(lambda _: os.kill(os.getpid(), signal.SIGKILL), [0, 1]))


def test_a_signal_ends_a_command_that_waits_for_images(monkeypatch):
    monkeypatch.setattr("mapet.signals.WAIT_GRACE_S", 0.2)
    for workers in "01":
        monkeypatch.setenv("MAPET_WORKERS", workers)
        with stop_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(Interrupted):
                list(load(lambda _: read_each(lambda _: time.sleep(9), [0]), [0]))


def test_a_signal_ends_a_process_that_is_stuck_in_other_code():
    """The handler cannot run: the main thread is in a call of C, as of a collective that waits for a rank that hangs."""
    code = """
import ctypes, signal, time
from mapet import signals
signals.STUCK_S = 0.5
with signals.stop_signals():
    print("ready", flush=True)
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):  # the second time waits for ever, whatever signals come
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGTERM and "SIGTERM" in error and "Traceback" not in error


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/proc/self/ns/mnt").exists(), reason="mounts a file system")
def test_a_small_dev_shm_ends_the_command(tmp_path):
    code = """
import os, torch
os.environ["MAPET_WORKERS"] = "1"
from mapet.data.loader import load
from mapet.errors import MapetError
try:
    list(load(lambda _: torch.zeros(4 << 20), [0, 1]))
except MapetError as error:
    print(error)
"""
    mount = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$0" -c "$1"'
    result = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, sys.executable, code], capture_output=True, text=True, timeout=60
    )
    if "unshare" in result.stderr or "mount" in result.stderr:
        pytest.skip("no permission to mount")
    assert "/dev/shm" in result.stdout and "Traceback" not in result.stderr, result.stderr
