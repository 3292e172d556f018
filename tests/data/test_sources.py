"""Where images come from: the same images give the same ids, pixels, tokens and weights, whatever holds them."""

import io
import multiprocessing
import os
import pickle
import signal
import sys
import tarfile
import warnings
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import mapet
from mapet.config.base import build_config
from mapet.config.data import PrepareConfig
from mapet.config.limits import limits
from mapet.data import hugging_face, prepared, tar_shards
from mapet.data.dataset import ViewDataset, position_batches
from mapet.data.hugging_face import locate_file
from mapet.data.loader import load
from mapet.data.readers.image import ImageDecodeError
from mapet.data.sources import list_images
from mapet.data.token_store import TokenStore
from mapet.data.views import ViewSpec, sample_view
from mapet.errors import Interrupted
from mapet.files import read_checksummed_json
from mapet.training import trainer
from tests.conftest import PRETRAIN, all_rows, save_crops
from tests.refused import refused


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Keep the indices of shards in a temporary folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mapet" / "shards"


@pytest.fixture
def folder(photos, tmp_path):
    """a/crop000.png ... b/crop005.png and a text file."""
    for name in "ab":
        save_crops(photos if name == "a" else photos[::-1], tmp_path / "photos" / name, 6)
    (tmp_path / "photos" / "readme.txt").write_text("ignored")
    return tmp_path / "photos"


@pytest.fixture
def shards(folder, tmp_path):
    """The folder in three shards, 000.tar to 002.tar."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    (tmp_path / "shards").mkdir()
    for number in range(3):
        with tarfile.open(tmp_path / "shards" / f"{number:03d}.tar", "w") as tar:
            for path in files[number * 5 : number * 5 + 5]:
                tar.add(path, f"./{path.relative_to(folder)}")
    return tmp_path / "shards"


def write_tar(path: Path, members: dict[str, bytes], **options) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def png(value: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(buffer, "png")
    return buffer.getvalue()


def assert_same(images, others) -> None:
    """Ids, classes, views and pixels."""
    assert [images.id(i) for i in range(len(images))] == [others.id(i) for i in range(len(others))]
    assert images.hash == others.hash and np.array_equal(images.keys(), others.keys())
    assert images.classes()[0] == others.classes()[0] and np.array_equal(images.classes()[1], others.classes()[1])
    spec = ViewSpec(kind="random-crop", image_size=(16, 16))
    for i in range(len(images)):
        image, other = images.open(i, 3), others.open(i, 3)
        assert torch.equal(image.read(), other.read()) and images.data(i) == others.data(i)
        assert sample_view(spec, image.size, images.key(i), 3) == sample_view(spec, other.size, others.key(i), 3)


@pytest.mark.parametrize("spelling", ["{000..002}.tar", "*.tar", ""])
def test_shards_are_the_folder_they_were_packed_from(spelling, folder, shards):
    images, packed = list_images(folder), list_images(shards / spelling)
    assert_same(images, packed)
    assert packed.ignored == images.ignored == 1
    with pytest.raises(TypeError):
        packed[0]
    part = pickle.loads(pickle.dumps(packed.subset([7, 2, 11]).subset([2, 1])))
    assert [part.data(i) for i in range(2)] == [images.data(11), images.data(2)]
    assert part.classes()[0] == ["a", "b"] and part.classes()[1].tolist() == [1, 0]


def batches_of(dataset, monkeypatch, workers):
    monkeypatch.setenv("MAPET_WORKERS", str(workers))
    return [batch.images for batch in load(dataset.batch, position_batches(range(12), 4))]


def test_shards_by_url(folder, shards, monkeypatch):
    memory = fsspec.filesystem("memory")
    for path in sorted(shards.iterdir()):
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    try:
        for url in ("memory://bucket/{000..002}.tar", "memory://bucket/*.tar", "simplecache::memory://bucket/*.tar"):
            packed = list_images(url)
            assert_same(list_images(folder), packed)
        dataset = ViewDataset(list_images("memory://bucket/*.tar"), ViewSpec(image_size=(16, 16)), image_size=(16, 16))
        alone, forked = (batches_of(dataset, monkeypatch, workers) for workers in (0, 2))
        assert all(torch.equal(a, b) for a, b in zip(alone, forked, strict=True))
        images = list_images("memory://bucket/*.tar")
        memory.rm("/bucket/000.tar")
        with refused("/bucket/000.tar"):  # no ImageDecodeError, which would exclude the image for good
            images.open(0, 3)
    finally:
        memory.store.clear()


def _pixels(images, queue):
    queue.put([images.open(i, 3).read().numpy() for i in range(len(images))])


@pytest.mark.slow
def test_spawned_workers_read_shards(shards):
    images = list_images(shards)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_pixels, args=(images, queue))
    process.start()
    read = queue.get(timeout=60)
    process.join()
    assert all(np.array_equal(read[i], images.open(i, 3).read().numpy()) for i in range(len(images)))


def test_tokens_and_resumed_weights_are_those_of_the_folder(digits, tmp_path, monkeypatch):
    """100 digits: tokenized and trained on as files; as shards, stopped after a step and resumed."""
    files = sorted((digits / "train").rglob("*.png"))[::14][:100]
    (tmp_path / "digits").mkdir()
    (tmp_path / "shards").mkdir()
    for path in files:
        copy = tmp_path / "digits" / path.relative_to(digits / "train")
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    for number in range(2):
        members = {str(p.relative_to(digits / "train")): p.read_bytes() for p in files[50 * number : 50 * number + 50]}
        write_tar(tmp_path / "shards" / f"{number}.tar", members)
    sources = {"files": str(tmp_path / "digits"), "shards": str(tmp_path / "shards" / "{0..1}.tar")}
    mapet.fit_tokenizer(
        images=sources["shards"], out=tmp_path / "t", image_size=8, patch_size=2, channels=1, vocab_size=8
    )
    stores = {
        name: mapet.tokenize(
            images=source, tokenizer=tmp_path / "t", out=tmp_path / f"{name}_tokens", views="center-flip"
        )
        for name, source in sources.items()
    }
    assert np.array_equal(all_rows(stores["files"]), all_rows(stores["shards"]))
    TokenStore.open(tmp_path / "files_tokens", list_images(sources["shards"]))  # one stands for the other

    options = PRETRAIN | {"batch_size": 50, "epochs": 1, "tokenizer": tmp_path / "t"}
    mapet.pretrain(images=sources["files"], tokens=tmp_path / "files_tokens", out=tmp_path / "whole", **options)
    parts = options | {"images": sources["shards"], "tokens": tmp_path / "shards_tokens", "out": tmp_path / "parts"}
    seed = trainer.step_seed

    def stop_after_one(value, number):
        if number == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return seed(value, number)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "step_seed", stop_after_one)
        with refused("step 1 of 2", kind=Interrupted):
            mapet.pretrain(**parts)
    mapet.pretrain(**parts, resume=True)
    a, b = (load_file(tmp_path / run / "backbone" / "model.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_prepared_from_shards_keeps_ids_and_labels(tmp_path):
    members = {
        f"{n}.{kind}": png(n) if kind == "png" else b"%d\n" % (n % 3 * 5) for n in range(6) for kind in ("png", "cls")
    }
    images = list_images(write_tar(tmp_path / "x.tar", members))
    assert images.classes()[0] == ["0", "5", "10"] and images.classes()[1].tolist() == [0, 1, 2, 0, 1, 2]
    made = list_images(mapet.prepare(images=tmp_path / "x.tar", out=tmp_path / "made", short_side=8))
    assert_same(images, made)
    part = made.subset([4, 2])
    assert part.classes()[1].tolist() == [1, 2]


def test_names_that_come_in_several_shards_get_its_name_as_suffix(tmp_path):
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", {"a/0.png": png(number), "b/1.png": png(9)})
    images = list_images(tmp_path / "*.tar")
    assert [images.id(i) for i in range(4)] == ["a/0.png@0.tar", "b/1.png@0.tar", "a/0.png@1.tar", "b/1.png@1.tar"]
    assert images.classes()[0] == ["a", "b"]
    assert list_images(tmp_path / "1.tar").id(0) == "a/0.png"


def test_headers_are_read_once_and_again_when_a_shard_changes(shards, cache, monkeypatch):
    read, count = tar_shards.read_headers, []
    monkeypatch.setattr(tar_shards, "read_headers", lambda *args: count.append(1) or read(*args))
    first = list_images(shards)
    assert len(count) == 3 == len(list(cache.iterdir()))
    assert_same(first, list_images(shards))
    assert len(count) == 3
    write_tar(shards / "001.tar", {"a/new.png": png()})
    assert len(list_images(shards)) == len(first) - 5 + 1 and len(count) == 4
    for path in cache.iterdir():
        path.write_bytes(path.read_bytes()[:-40])  # damaged
    assert len(list_images(shards)) == len(first) - 4 and len(count) == 7
    with refused("changed"):
        first.data(9)


def header(name: str, **fields) -> bytes:
    """A header with a valid checksum and any content: its size is in base 256."""
    info = tarfile.TarInfo(name)
    size = fields.pop("size", 0)
    for key, value in fields.items():
        setattr(info, key, value)
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = (size % 256**12 if size < 0 else 128 * 256**11 + size).to_bytes(12, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


END = bytes(1024)
GOOD = header("good.png", size=len(png())) + png() + bytes(-len(png()) % 512)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "bad.tar"),
        (b"not a tar file " * 100, "bad.tar"),
        (GOOD, "bad.tar"),
        (GOOD + header("cut.png", size=5000) + bytes(100), "bad.tar"),
        (GOOD + b"\xff" * 512 + END, "byte 1,024"),
        (GOOD + END + GOOD + END, "byte"),
        (GOOD + header("minus.png", size=-1024) + END, "-1,024"),
        (GOOD + header("x", size=-512, type=b"x") + END, "-512 bytes"),
        (GOOD + header("x", size=1 << 40, type=b"x") + END, "1,099,511,627,776 bytes"),
        (GOOD + header("x", size=1 << 33, type=b"L") + END, "8,589,934,592 bytes"),
        (GOOD + header("huge.png", size=1 << 40) + END, "bad.tar"),
        (GOOD + GOOD + END, "good.png"),
    ],
)  # fmt: skip
def test_hostile_shards_are_refused_by_name(data, why, tmp_path):
    (tmp_path / "bad.tar").write_bytes(data)
    with refused("bad.tar", why):
        list_images(tmp_path / "bad.tar")


def test_members_are_only_names(tmp_path):
    """Paths out of the shard are ids, links and devices are omitted; nothing is written but the index."""
    inside = tmp_path / "inside"
    inside.mkdir()
    odd = ["../../escape.png", str(tmp_path / "absolute.png"), "ünïcødé 图.png", "a" * 300 + ".png", "new\nline.png"]
    write_tar(inside / "x.tar", {name: png() for name in [*odd, "._mac.png", "d/.hidden.png", "note.json"]})
    with tarfile.open(inside / "x.tar", "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            link = tarfile.TarInfo(f"kind{kind.decode()}.png")
            link.type, link.linkname = kind, "/etc/passwd"
            tar.addfile(link)
    images = list_images(inside / "x.tar")
    assert [images.id(i) for i in range(len(images))] == odd and images.ignored == 7
    assert all(images.open(i, 3).size == (8, 8) for i in range(len(images)))
    mapet.prepare(images=inside / "x.tar", out=tmp_path / "made", short_side=8)
    assert {path.name for path in tmp_path.iterdir()} == {"inside", "cache", "made"}
    assert {path.name for path in (tmp_path / "made").iterdir()} == {
        "manifest.json",
        "ids.bin",
        "images-00000.bin",
        "nbytes-00000.npy",
        "run.json",
    }


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.tar.zst"])
def test_compressed_shards_are_refused_with_a_hint(name, tmp_path):
    write_tar(tmp_path / name, {"0.png": png()})
    with refused("gunzip"):
        list_images(tmp_path / name)


def test_sources_that_are_not_there(tmp_path):
    write_tar(tmp_path / "0.tar", {"0.txt": b"x"})
    for source, why in {
        tmp_path / "{0..1}.tar": "1.tar",
        tmp_path / "none*.tar": "none*.tar",
        tmp_path / "0.tar": "1 other members",
        "memory://bucket/photos": "bucket/photos",
        "nosuch://bucket/0.tar": "nosuch",
        "hf:": "hf:NAME",
    }.items():
        with refused(why):
            list_images(source)


def bomb(side: int) -> bytes:
    """A PNG of side x side black pixels: a thousandth of that in bytes."""
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, "png", compress_level=1)
    return buffer.getvalue()


def test_bombs_and_giants_are_unreadable_wherever_they_are(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    bad = {"bomb.png": bomb(14_000), "array.npy": b""}
    with io.BytesIO() as buffer:
        np.lib.format.write_array_header_1_0(
            buffer, {"descr": "|u1", "fortran_order": False, "shape": (10**6, 10**6, 3)}
        )
        bad["array.npy"] = buffer.getvalue()
    for name, data in bad.items():
        (tmp_path / "photos" / name).write_bytes(data)
    write_tar(tmp_path / "x.tar", bad)
    for source in (tmp_path / "photos", tmp_path / "x.tar"):
        images = list_images(source)
        for i in range(len(images)):
            with pytest.raises(ImageDecodeError):
                images.open(i, 3)
    with open(tmp_path / "photos" / "giant.jpg", "wb") as file:
        file.write(b"\xff\xd8")
        file.truncate(limits().image_bytes + 1)  # a hole: no bytes on disk
    with refused(f"{limits().image_bytes:,}", kind=ImageDecodeError):
        list_images(tmp_path / "photos").open(2, 3)


def test_links_are_followed_out_of_the_folder_and_end(folder, tmp_path):
    """The target of links is listed once: under its own name, or that of the first link."""
    root = tmp_path / "root"
    (root / "own").mkdir(parents=True)
    (root / "own" / "0.png").write_bytes(png())
    (root / "a_link").symlink_to(root / "own")
    (root / "z_out").symlink_to(folder)
    (root / "y_out").symlink_to(folder)
    (root / "file.png").symlink_to(folder / "b" / "crop005.png")
    (folder / "back").symlink_to(root)
    os.mkfifo(root / "pipe.png")  # to open it is to wait
    images = list_images(root)
    ids = [images.id(i) for i in range(len(images))]
    expected = [f"y_out/{name}/crop{number:03d}.png" for name in "ab" for number in range(6)]
    assert ids == sorted(["own/0.png", "file.png", *expected])
    assert images.ignored == 2 and all(images.open(i, 3) for i in range(len(images)))


def test_urls_keep_their_slashes_and_paths_are_tidied():
    for given, retained in {
        "s3://bucket//a/../x.tar": "s3://bucket//a/../x.tar",
        "hf:user/name:train": "hf:user/name:train",
        "photos/": "photos",
        Path("a") / "b": "a/b",
    }.items():
        assert build_config(PrepareConfig, {"images": given, "out": "out"}).images == retained
    with refused(field="images", value=3):
        build_config(PrepareConfig, {"images": 3, "out": "out"})


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """The library, with its cache in a temporary folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(library.config, "HF_HUB_OFFLINE", True)
    library.disable_progress_bars()
    return library


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_folder_parquet_and_saved(datasets, folder, tmp_path, monkeypatch):
    (folder / "readme.txt").unlink()
    images = list_images(folder)
    listed = list_images(f"hf:{folder}:train")
    assert_same(images, listed)  # ids are the paths below the folder
    table = datasets.load_dataset(str(folder), split="train")
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "saved"))
    with refused("'val'", "train, test"):
        list_images(f"hf:{tmp_path}/saved:val")
    loaded = datasets.load_from_disk(str(tmp_path / "saved"))["train"]
    loaded.to_parquet(str(tmp_path / "x.parquet"))
    loaded.rename_column("image", "photo").to_parquet(str(tmp_path / "other.parquet"))
    for source in (f"hf:{tmp_path}/saved:test", f"hf:{tmp_path}/x.parquet", f"hf:{tmp_path}/other.parquet:train"):
        rows = list_images(source)
        assert rows.id(11) == "000000011"  # its rows know the names alone, and those come twice
        assert np.array_equal(rows.classes()[1], images.classes()[1]) and rows.classes()[0] == ["a", "b"]
        assert all(torch.equal(rows.open(i, 3).read(), images.open(i, 3).read()) for i in range(12))
    part = pickle.loads(pickle.dumps(rows.subset([9, 1])))
    assert part.data(0) == rows.data(9) and part.classes()[1].tolist() == [1, 0]
    assert [list_images(f"hf:{folder}:train[6:8]").id(i) for i in range(2)] == ["b/crop000.png", "b/crop001.png"]
    made = list_images(mapet.prepare(images=f"hf:{tmp_path}/x.parquet", out=tmp_path / "made", short_side=48))
    assert made.classes()[0] == ["a", "b"] and np.array_equal(
        made.keys(), list_images(f"hf:{tmp_path}/x.parquet").keys()
    )
    dataset = ViewDataset(rows, ViewSpec(image_size=(16, 16)), image_size=(16, 16))
    alone, forked = (batches_of(dataset, monkeypatch, workers) for workers in (0, 2))
    assert all(torch.equal(a, b) for a, b in zip(alone, forked, strict=True))


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_mistakes_and_hostile_rows(datasets, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "secret.png").write_bytes(png())
    features = datasets.Features({"image": datasets.Image(decode=False), "n": datasets.Value("int32")})

    def save(name: str, **row) -> str:
        rows = [{"image": {"bytes": png(), "path": "same.png"}, "n": 0}, row | {"n": 1}]
        pq.write_table(pa.Table.from_pylist(rows, schema=features.arrow_schema), tmp_path / name)
        return f"hf:{tmp_path / name}"

    outside = {"bytes": None, "path": str(tmp_path / "secret.png")}
    sneaky = {"bytes": None, "path": f"{tmp_path}/hf/../secret.png"}
    for name, image in {"out.parquet": outside, "up.parquet": sneaky}.items():
        with refused("row 1", "secret.png"):
            list_images(save(name, image=image))
    for name, image in (
        ("none.parquet", None),
        ("lost.parquet", {"bytes": None, "path": "gone.png"}),
        ("bomb.parquet", {"bytes": bomb(14_000), "path": None}),
    ):
        images = list_images(save(name, image=image))
        assert images.open(0, 3).size == (8, 8)
        with pytest.raises(ImageDecodeError):
            images.open(1, 3)
    (tmp_path / "both").mkdir()
    for name in ("numbers", "both/train", "both/test"):
        pq.write_table(pa.table({"n": [1, 2]}), tmp_path / f"{name}.parquet")
    for source, why in {
        f"hf:{tmp_path}/numbers.parquet": "n (Value)",
        f"hf:{tmp_path}/both": "train, test",
        f"hf:{tmp_path}/both:val": '"val"',
        f"hf:{tmp_path}/nowhere": "nowhere",
    }.items():
        with refused(why):
            list_images(source)


@pytest.fixture
def streams(datasets, folder, tmp_path, monkeypatch):
    """The same 12 images as a folder and as three parquet files with images within; 5 a shard."""
    monkeypatch.setattr(prepared, "SHARD_SIZE", 5)
    (folder / "readme.txt").unlink()
    datasets.load_dataset(str(folder), split="train").save_to_disk(str(tmp_path / "saved"))  # which puts images within
    table = datasets.load_from_disk(str(tmp_path / "saved"))
    (tmp_path / "parquet").mkdir()
    for part in range(3):
        rows = table.select(range(4 * part, 4 * part + 4))
        rows.to_parquet(str(tmp_path / "parquet" / f"train-{part:05d}-of-00003.parquet"))
    return f"hf:{folder}:train", f"hf:{tmp_path}/parquet:train"


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name not in ("manifest.json", "run.json")}


@pytest.mark.filterwarnings("ignore")
def test_what_was_streamed_is_what_was_downloaded(streams, tmp_path):
    for number, source in enumerate(streams):
        downloaded = list_images(mapet.prepare(images=source, out=tmp_path / f"downloaded{number}", short_side=48))
        streamed = list_images(
            mapet.prepare(images=source, out=tmp_path / f"streamed{number}", short_side=48, streaming=True)
        )
        assert_same(downloaded, streamed)
        assert files_of(downloaded.root) == files_of(streamed.root)
        whole, manifest = (read_checksummed_json(made.root / "manifest.json", "") for made in (downloaded, streamed))
        assert manifest.pop("streamed") == source
        assert manifest == whole
        assert streamed.classes()[0] == ["a", "b"]


@pytest.mark.filterwarnings("ignore")
def test_an_interrupted_stream_resumes(streams, tmp_path, monkeypatch, caplog):
    for number, source in enumerate(streams):
        whole = mapet.prepare(images=source, out=tmp_path / f"whole{number}", short_side=48, streaming=True)
        taken = []
        take = hugging_face.StreamedImage.take

        def breaks(row, taken=taken, take=take):
            taken.append(row)
            if len(taken) == 8:
                raise KeyboardInterrupt
            return take(row)

        monkeypatch.setattr(hugging_face.StreamedImage, "take", breaks)
        out = tmp_path / f"made{number}"
        with refused("resume=True", kind=Interrupted):
            mapet.prepare(images=source, out=out, short_side=48, streaming=True)
        with refused("5 of", "--resume"):
            list_images(out)
        with refused("short_side", 48, 32):
            mapet.prepare(images=source, out=out, short_side=32, streaming=True, resume=True)
        mapet.prepare(images=source, out=out, short_side=48, streaming=True, resume=True)
        assert len(taken) <= 10 + 7  # the first five were not read again
        assert files_of(whole) == files_of(out)
        mapet.prepare(images=source, out=out, short_side=48, streaming=True, resume=True)  # nothing to do
        monkeypatch.undo()
        monkeypatch.setattr(prepared, "SHARD_SIZE", 5)


@pytest.mark.filterwarnings("ignore")
def test_streams_that_fail_or_lie(datasets, folder, tmp_path, monkeypatch, caplog):
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = datasets.Features({"image": datasets.Image(decode=False)}).arrow_schema

    def save(name: str, *images: dict | None) -> str:
        rows = [{"image": image} for image in [{"bytes": png(), "path": None}, *images]]
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / name)
        return f"hf:{tmp_path / name}"

    bad = [None, {"bytes": None, "path": "gone.png"}, {"bytes": bomb(14_000), "path": None}]
    made = list_images(
        mapet.prepare(images=save("bad.parquet", *bad), out=tmp_path / "bad", streaming=True, max_unreadable=1)
    )
    assert made.id(3) == "000000003" and made.open(0, 3).size == (8, 8)
    for row in (1, 2, 3):
        assert f"unreadable image 'row {row}': " in caplog.text
        with pytest.raises(ImageDecodeError):
            made.open(row, 3)
    (tmp_path / "secret.png").write_bytes(png())
    for path in (str(tmp_path / "secret.png"), "http://127.0.0.1/secret.png", "hf://datasets/other/name@main/x.png"):
        with refused("row 1"):
            mapet.prepare(
                images=save("out.parquet", {"bytes": None, "path": path}),
                out=tmp_path / "out",
                streaming=True,
                resume=True,
            )
        assert not any((tmp_path / "out").glob("*.bin"))
    with refused("streaming=True", "hf:NAME"):
        mapet.prepare(images=folder, out=tmp_path / "no", streaming=True)
    table = datasets.load_dataset(str(folder), split="train")
    table.save_to_disk(str(tmp_path / "saved"))
    with refused("streaming=True"):
        mapet.prepare(images=f"hf:{tmp_path}/saved", out=tmp_path / "no", streaming=True, resume=True)


def test_files_of_the_hub_keep_their_names_from_revision_to_revision():
    inside = ["/cache/hub/", "hf://datasets/u/n/", "hf://datasets/u/n@"]
    for file in (
        "/cache/hub/datasets--u--n/snapshots/0a1b/train/a/1.png",
        "hf://datasets/u/n@0a1b/train/a/1.png",
        "hf://datasets/u/n/train/a/1.png",
    ):
        assert locate_file(file, inside, "row 0") == (file, "train/a/1.png")


def test_hugging_face_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with refused("[datasets]"):
        list_images("hf:any")


def test_patterns_match_files_and_folders(tmp_path):
    for name in ("north/cat/1.png", "north/dog/2.png", "south/cat/1.png", "east/cat/9.png", "north/notes.txt"):
        path = tmp_path / "sites" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(path, "png")
    sites = tmp_path / "sites"
    files = list_images(f"{sites}/*/cat/*.png")
    assert list(files.ids) == [b"east/cat/9.png", b"north/cat/1.png", b"south/cat/1.png"] and files[0].is_file()
    folders = list_images(f"{sites}/*th")
    assert list(folders.ids) == [b"north/cat/1.png", b"north/dog/2.png", b"south/cat/1.png"]
    names, labels = folders.classes()
    assert names == ["cat", "dog"] and labels.tolist() == [0, 1, 0]
    assert len(list_images(f"{sites}/**/1.png")) == 2 and len(list_images(f"{sites}/**")) == 4
    with refused("west*"):
        list_images(f"{sites}/west*")
    (tmp_path / "a [1]").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "a [1]" / "x.png")
    assert list(list_images(tmp_path / "a [1]").ids) == [b"x.png"]  # a name, not a pattern
