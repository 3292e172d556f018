"""Lists, views, batches and the token store."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tvf
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from mapet.data.dataset import EpochBatchSampler, ViewDataset, position_batches
from mapet.data.image_list import ImageFiles
from mapet.data.loader import load
from mapet.data.readers.image import Box, DecodedImage
from mapet.data.readers.jpeg import LazyJpeg
from mapet.data.readers.open import open_image
from mapet.data.sources import list_images
from mapet.data.token_store import TokenStore
from mapet.data.views import (
    View,
    ViewSpec,
    color_jitter,
    render_view,
    sample_blocks,
    sample_jitter,
    sample_permutation,
    sample_view,
)
from tests.conftest import all_rows
from tests.refused import refused


def test_list_of_paths_and_folder_agree(crops):
    listing = crops / "list.txt"
    names = [path.name for path in sorted(crops.glob("*.png"))]
    listing.write_text("\n".join(names) + "\n\n")
    from_list, from_folder = list_images(listing), list_images(crops)
    assert [from_list.id(i) for i in range(12)] == names
    assert from_list.hash == from_folder.hash
    assert from_folder.ignored == 1
    (crops / names[0]).write_bytes(b"replaced")
    assert list_images(crops).hash != from_folder.hash


def test_missing_entry_of_a_list_is_named(crops):
    (crops / "list.txt").write_text("crop000.png\nabsent.png\n")
    with refused("entry 2", "absent.png"):
        list_images(crops / "list.txt")


def test_class_folders(digits, crops):
    names, labels = list_images(digits / "test").classes()
    assert names == list("0123456789")
    assert len(labels) == 360
    assert list_images(crops).classes() is None


def test_key_depends_on_the_id_alone(crops):
    images = list_images(crops)
    assert images.subset([7]).key(0) == images.key(7)
    assert len({images.key(i) for i in range(12)}) == 12


sides = st.integers(1, 300)


@given(
    st.sampled_from(["center", "center-flip", "random-crop"]),
    sides,
    sides,
    sides,
    sides,
    st.integers(0, 2**60),
    st.integers(0, 100),
)
def test_views_lie_inside_and_repeat(kind, height, width, target_height, target_width, key, number):
    spec = ViewSpec(kind=kind, image_size=(target_height, target_width), min_scale=0.1)
    view = sample_view(spec, (height, width), key, number)
    assert 0 <= view.top <= view.top + view.height <= height
    assert 0 <= view.left <= view.left + view.width <= width
    assert view.height >= 1 and view.width >= 1
    assert view == sample_view(spec, (height, width), key, number)


def test_two_flip_views_are_an_image_and_its_mirror():
    spec = ViewSpec(kind="center-flip", image_size=(8, 8))
    for key in range(4):
        assert {sample_view(spec, (8, 8), key, number).flip for number in (0, 1)} == {False, True}


def test_a_view_of_its_own_size_is_untouched_and_mirrored():
    pixels = torch.randint(0, 256, (3, 10, 12), dtype=torch.uint8)
    image = DecodedImage(pixels.permute(1, 2, 0).numpy(), "test")
    assert torch.equal(render_view(image, View(2, 1, 8, 8, False), (8, 8)), pixels[:, 2:10, 1:9])
    assert torch.equal(render_view(image, View(2, 1, 8, 8, True), (8, 8)), pixels[:, 2:10, 1:9].flip(-1))
    assert render_view(image, View(0, 0, 10, 12, False), (5, 6)).shape == (3, 5, 6)


@given(
    st.sampled_from(["center", "center-flip", "random-crop"]),
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.integers(0, 2**60),
)
def test_edges_of_large_views_suit_the_reduction(kind, height, width, key):
    """Where a box is r times the student's size its edges are multiples of r, and it is smaller by under a student's pixel."""
    spec = ViewSpec(kind=kind, image_size=(64, 32), min_scale=0.1)
    view = sample_view(spec, (height, width), key, 0)
    unit = next((r for r in (8, 4, 2) if r <= min(view.height // 64, view.width // 32)), 1)
    assert all(edge % unit == 0 for edge in view[:4])
    if kind == "center":
        scale = min(height / 64, width / 32)
        assert abs(view.height - 64 * scale) < max(unit, 1.01) and abs(view.width - 32 * scale) < max(unit, 1.01)


def orient(array, orientation):
    """What EXIF's definition makes of stored pixels; written with Pillow's transpositions."""
    names = ["FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"]
    image = Image.fromarray(array)
    return np.asarray(image if orientation == 1 else image.transpose(getattr(Image.Transpose, names[orientation - 2])))


def save_jpeg(photo, path, size, orientation=1, **options):
    """A photograph of (height, width) `size` as JPEG; returns its decoded upright pixels, as Pillow has them."""
    image = Image.fromarray(photo).resize(size[::-1], Image.Resampling.BICUBIC)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(path, exif=exif, quality=90, **options)
    with Image.open(path) as file:
        return orient(np.asarray(file.convert("RGB")), orientation)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(427, 640), (333, 501), (1024, 768), (9, 7), (1, 1)])
def test_jpegs_equal_pillows_to_the_byte(photos, tmp_path, size, orientation):
    upright = save_jpeg(photos[0], tmp_path / "a.jpg", size, orientation)
    image = open_image(tmp_path / "a.jpg")
    assert isinstance(image, LazyJpeg) and image.size == upright.shape[:2]
    assert np.array_equal(image.read().permute(1, 2, 0), upright)
    rng = np.random.default_rng(orientation)
    for _ in range(5):
        height, width = (int(rng.integers(side)) + 1 for side in image.size)
        top, left = (int(rng.integers(a - b + 1)) for a, b in zip(image.size, (height, width), strict=True))
        part = image.read(Box(top, left, height, width), min_size=(height, width))
        assert np.array_equal(part.permute(1, 2, 0), upright[top : top + height, left : left + width])


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("size", [(427, 640), (854, 1281), (1000, 750)])
def test_reduced_decoding_shows_the_same_view(photos, tmp_path, size, orientation):
    """Student and teacher, at their own sizes, show the full decode's box: 2.5 of 255 gray levels apart
    on average at most, and less than for a box that is off by one pixel of the result."""
    upright = DecodedImage(save_jpeg(photos[1], tmp_path / "a.jpg", size, orientation, subsampling=0), "test")
    image = open_image(tmp_path / "a.jpg")
    for kind, number in (("center", 0), ("random-crop", 0), ("random-crop", 1)):
        view = sample_view(ViewSpec(kind=kind, image_size=(64, 64)), image.size, 11, number)
        for side in (32, 64, 96):
            seen, expected = (render_view(p, view, (side, side)).float() for p in (image, upright))
            assert (seen - expected).abs().mean() < 2.5
            inner = seen[:, 1:-1, 1:-1]
            errors = {
                (y, x): float((inner - expected[:, 1 + y : side - 1 + y, 1 + x : side - 1 + x]).square().mean())
                for y in (-1, 0, 1)
                for x in (-1, 0, 1)
            }
            assert min(errors, key=errors.__getitem__) == (0, 0)


def test_a_rendering_does_not_depend_on_what_else_was_rendered(photos, tmp_path):
    save_jpeg(photos[0], tmp_path / "a.jpg", (1000, 1500))
    view = sample_view(ViewSpec(kind="random-crop", image_size=(64, 64)), (1000, 1500), 5, 1)
    shared = open_image(tmp_path / "a.jpg")
    for size in ((64, 64), (448, 448), (100, 100)):
        assert torch.equal(render_view(shared, view, size), render_view(open_image(tmp_path / "a.jpg"), view, size))


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_jitter_changes_colors_only(channels):
    images = torch.randint(0, 256, (2, channels, 8, 8)).float()
    assert torch.allclose(color_jitter(images.clone(), torch.ones(2, 3)), images, atol=1e-4)
    jittered = color_jitter(images.clone(), torch.tensor([[1.3, 0.7, 0.6], [1.0, 1.0, 1.0]]))
    assert jittered.min() >= 0 and jittered.max() <= 255
    assert not torch.allclose(jittered[0], images[0]) and torch.allclose(jittered[1], images[1], atol=1e-4)
    assert np.array_equal(*(sample_jitter(0.4, np.random.default_rng(3)) for _ in range(2)))


@given(st.permutations(["brightness", "contrast", "saturation"]), st.integers(0, 1000))
def test_jitter_is_torchvisions_in_any_order(order, seed):
    """Where nothing has to be clamped on the way."""
    images = 0.4 + 0.2 * torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    factors = dict(
        zip(("brightness", "contrast", "saturation"), sample_jitter(0.2, np.random.default_rng(seed)), strict=True)
    )
    expected = images
    for name in order:
        expected = getattr(tvf, f"adjust_{name}")(expected, float(factors[name]))
    fused = color_jitter(images * 255, torch.tensor([list(factors.values())])) / 255
    assert torch.allclose(fused, expected, atol=2e-4)  # torchvision rounds the weights of gray


@pytest.mark.parametrize(("epochs", "num_steps"), [(2.5, 8), (2.4, 7), (2.34, 7), (0.7, 2), (0.01, 1), (2.0, 6)])
def test_last_epoch_ends_early_after_the_nearest_step(epochs, num_steps):
    """The steps of a partial epoch are the first ones of the full epoch, at least one."""
    whole = list(EpochBatchSampler(np.arange(25), 10, 3, seed=4))  # 3 steps per epoch
    sampler = EpochBatchSampler(np.arange(25), 10, epochs, seed=4)
    assert list(sampler) == whole[:num_steps] and len(sampler) == num_steps
    sampler.first_step = num_steps - 1
    assert list(sampler) == whole[num_steps - 1 : num_steps] and len(sampler) == 1


@given(st.integers(1, 50), st.integers(1, 20), st.integers(1, 4), st.integers(0, 5))
def test_every_image_comes_once_an_epoch_in_even_batches(count, batch_size, epochs, seed):
    sampler = EpochBatchSampler(np.arange(count), batch_size, epochs, seed)
    batches = list(sampler)
    assert len(batches) == len(sampler) == epochs * sampler.steps_per_epoch
    for epoch in range(epochs):
        part = batches[epoch * sampler.steps_per_epoch : (epoch + 1) * sampler.steps_per_epoch]
        assert sorted(index for batch in part for _, index in batch) == list(range(count))
        assert {number for batch in part for number, _ in batch} == {epoch}
        assert max(map(len, part)) <= batch_size and max(map(len, part)) - min(map(len, part)) <= 1
    middle = len(batches) // 2
    assert list(EpochBatchSampler(np.arange(count), batch_size, epochs, seed, first_step=middle)) == batches[middle:]
    per_rank = [list(EpochBatchSampler(np.arange(count), batch_size, epochs, seed, 0, rank, 3)) for rank in range(3)]
    for whole, *parts in zip(batches, *per_rank, strict=True):  # split image by image
        merged = [part[i] for i in range(len(parts[0])) for part in parts if i < len(part)]
        assert merged == whole


def test_batches_do_not_depend_on_workers(crops, monkeypatch):
    dataset = ViewDataset(
        list_images(crops),
        ViewSpec(kind="random-crop", image_size=(16, 16)),
        image_size=(16, 16),
        teacher_size=(32, 32),
        grid=(4, 4),
        jitter=0.4,
        seed=5,
    )
    results = []
    for workers in "02":
        monkeypatch.setenv("MAPET_WORKERS", workers)
        results.append(list(load(dataset.batch, position_batches(range(12), 5, view_index=3))))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.teacher_images, b.teacher_images)
        assert torch.equal(a.permutation, b.permutation) and torch.equal(a.image_index, b.image_index)
        assert torch.equal(a.jitter, b.jitter) and a.jitter.shape == (len(a.images), 3)


def test_teacher_and_student_get_the_same_view(crops):
    """At the same size both renderings are one image: crop and mirror agree."""
    dataset = ViewDataset(
        list_images(crops),
        ViewSpec(kind="random-crop", image_size=(16, 16)),
        image_size=(16, 16),
        teacher_size=(16, 16),
    )
    for number in range(10):
        sample = dataset.batch([(number, number)])
        assert torch.equal(sample.images, sample.teacher_images)


def store_of(folder, images, views=2, vocab=100):
    folder.mkdir()
    store = TokenStore.create(folder, images, "codebook", vocab, (2, 3), ViewSpec(image_size=(8, 12)), views)
    ids = np.random.default_rng(0).integers(vocab, size=(len(images), views, 6))
    return store, ids


def finish(store, ids, unreadable=None):
    """Write these rows, and the unreadable ones among them, into the first shard."""
    store.shards[0].write(ids, unreadable or {})
    store.shards[0].save_progress()


def test_shards_are_written_in_any_order(crops, tmp_path, monkeypatch):
    """Shards are written by any process, interrupted within any."""
    monkeypatch.setattr("mapet.data.token_store.SHARD_SIZE", 5)
    images = list_images(crops)
    store, ids = store_of(tmp_path / "s", images)
    assert [(part.first, part.count) for part in store.shards] == [(0, 5), (5, 5), (10, 2)]
    for number, count in ((2, 2), (0, 3)):
        part = store.shards[number]
        part.write(ids[part.first : part.first + count], {part.first: "broken"})
        part.save_progress()
    store = TokenStore.open(tmp_path / "s", images, writable=True)
    assert [part.num_done for part in store.shards] == [3, 0, 2] and store.unreadable == {0: "broken", 10: "broken"}
    store.shards[0].write(ids[3:5], {})
    store.shards[1].write(ids[5:10], {})
    for part in store.shards[:2]:
        part.save_progress()
    assert np.array_equal(all_rows(TokenStore.open(tmp_path / "s", images)), ids)
    data = bytearray((tmp_path / "s" / "shards" / "00001.npy").read_bytes())
    data[-3] ^= 1  # a valid token still
    (tmp_path / "s" / "shards" / "00001.npy").write_bytes(data)
    with refused("00001.npy"):
        TokenStore.open(tmp_path / "s", images)


@pytest.mark.parametrize(("vocab", "dtype"), [(65536, np.uint16), (65537, np.uint32)])
def test_store_round_trip(crops, tmp_path, vocab, dtype):
    images = list_images(crops)
    store, ids = store_of(tmp_path / "s", images, vocab=vocab)
    finish(store, ids, {3: "broken"})
    again = TokenStore.open(tmp_path / "s", images, "codebook")
    assert again.dtype == dtype
    assert np.array_equal(all_rows(again), ids)
    assert again.unreadable == {3: "broken"} and again.num_done == len(again)
    assert np.array_equal(again.read(5, 1), ids[5, 1])


def test_unfinished_store_is_refused_and_resumes(crops, tmp_path):
    images = list_images(crops)
    store, ids = store_of(tmp_path / "s", images)
    finish(store, ids[:5])
    with refused("unfinished", "5 of 12"):
        TokenStore.open(tmp_path / "s", images)
    store = TokenStore.open(tmp_path / "s", images, writable=True)
    store.shards[0].write(ids[5:], {})
    store.shards[0].save_progress()
    assert np.array_equal(all_rows(TokenStore.open(tmp_path / "s", images)), ids)


def test_store_of_other_images_or_codebook_names_both_sides(crops, tmp_path):
    images = list_images(crops)
    store, ids = store_of(tmp_path / "s", images)
    finish(store, ids)
    reordered = images.subset(range(11, -1, -1))
    with refused(images.hash[:12], reordered.hash[:12]):
        TokenStore.open(tmp_path / "s", reordered)
    with refused("other"):
        TokenStore.open(tmp_path / "s", images, "other")


def test_out_of_range_token_is_noticed(crops, tmp_path):
    images = list_images(crops)
    store, ids = store_of(tmp_path / "s", images)
    ids[4, 0, 0] = 100
    finish(store, ids)
    with refused("row 4", "token 100"):
        store.read(4, 0)


def test_a_million_paths_stay_compact():
    """Paths are in one block of bytes: about 40 bytes per path, not a Python string each."""
    ids = [b"folder%03d/image_%07d.jpg" % (i % 1000, i) for i in range(100_000)]
    images = ImageFiles(scan_root := __import__("pathlib").Path("/data"), ids, [1] * len(ids))
    size = len(images.ids.block) + images.ids.ends.nbytes + images.file_sizes.nbytes
    assert size / len(ids) < 45
    assert images[99_999] == scan_root / "folder999/image_0099999.jpg"


def test_images_are_read_as_files_have_them(crops, photos):
    image = open_image(list_images(crops)[0]).read()
    assert image.shape == (3, 48, 64) and image.dtype == torch.uint8


@given(st.sampled_from(["random", "raster", "blockwise"]), st.integers(1, 15), st.integers(1, 15), st.data())
def test_every_patch_comes_once_in_a_permutation(kind, rows, columns, data):
    seed, num_context = data.draw(st.integers(0, 9)), data.draw(st.integers(0, rows * columns))
    order = sample_permutation(kind, (rows, columns), num_context, np.random.default_rng(seed))
    assert sorted(order) == list(range(rows * columns))
    again = sample_permutation(kind, (rows, columns), num_context, np.random.default_rng(seed))
    assert np.array_equal(order, again)


def beit_mask(rng, size=14, num_masked=75, min_area=16, min_aspect=0.3):
    """Return BEiT's mask and its blocks as (top, left, height, width), by a plain loop over algorithm 1 of arXiv 2106.08254.

    As in BEiT's code, a block is drawn up to 10 times, and the mask is left incomplete if none of the draws fits.
    """
    masked, blocks = set(), []
    while len(masked) < num_masked:
        missing = num_masked - len(masked)
        for _ in range(10):
            area = min_area + (missing - min_area) * rng.random()
            aspect = min_aspect ** (1 - 2 * rng.random())
            height, width = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if height >= size or width >= size:
                continue
            top, left = int(rng.random() * (size - height + 1)), int(rng.random() * (size - width + 1))
            block = {(y, x) for y in range(top, top + height) for x in range(left, left + width)}
            if 0 < len(block - masked) <= missing:
                masked |= block
                blocks.append((top, left, height, width))
                break
        else:
            break
    return masked, blocks


def test_blockwise_masks_are_those_of_beit():
    """Exactly p patches are masked, in as many connected components, and in a first block of such sizes, as BEiT's."""
    rng, num_draws = np.random.default_rng(0), 1000
    expected = [beit_mask(rng) for _ in range(num_draws)]
    expected_components, components, first_area = [], [], []
    for masked, _ in expected:
        image = np.zeros((14, 14))
        image[tuple(zip(*masked, strict=True))] = 1
        expected_components.append(ndimage.label(image)[1])  # 4-connected
    for _ in range(num_draws):
        order = sample_permutation("blockwise", (14, 14), 196 - 75, rng)
        image = np.zeros(196)
        image[order[-75:]] = 1
        assert image.sum() == 75
        components.append(ndimage.label(image.reshape(14, 14))[1])
        first_area.append(len(sample_blocks((14, 14), 75, rng)[0]))
    # BEiT leaves half a patch an image out, which here a further small block adds.
    assert 1.35 < np.mean(expected_components) < 1.55
    assert np.mean(components) == pytest.approx(np.mean(expected_components), abs=0.15)
    expected_area = [blocks[0][2] * blocks[0][3] for _, blocks in expected]
    assert np.mean(first_area) == pytest.approx(np.mean(expected_area), abs=2.5)


def test_last_patches_of_a_blockwise_order_are_the_first_block():
    for seed in range(50):
        order = sample_permutation("blockwise", (14, 14), 49, np.random.default_rng(seed))
        first = min(  # the smallest number of last patches, 16 at least or nearly so, that is a rectangle
            (p for p in range(12, 148) if np.prod(np.ptp(np.divmod(order[-p:], 14), axis=1) + 1) == p), default=None
        )
        assert first is not None


def test_grid_that_no_block_fits_has_a_random_mask():
    assert sample_blocks((1, 9), 4, np.random.default_rng(0)) == []
    assert sample_blocks((14, 14), 0, np.random.default_rng(0)) == []
