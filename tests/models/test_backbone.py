"""`mapet.load`: a model, and a transform that takes images of any kind as the commands do."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import mapet
from tests.commands.test_export import save_vit
from tests.refused import refused

SIZE = (40, 60)
"""Height and width of the images."""


def images_of_every_kind(photos):
    """Name -> (an image of Pillow, its right pixels as RGB, 0 to 255), of every mode that Pillow's users meet."""
    rgb = Image.fromarray(photos[0][100:140, 200:260])
    gray, values = rgb.convert("L"), np.arange(40 * 60, dtype=np.uint16).reshape(SIZE) * 27
    alpha = Image.fromarray(np.linspace(0, 255, 2400).astype(np.uint8).reshape(SIZE))
    rgba, palette = rgb.copy(), rgb.quantize(16)
    rgba.putalpha(alpha)
    share = np.asarray(alpha)[..., None] / 255
    on_white = np.asarray(rgb) * share + 255 * (1 - share)
    deep = np.repeat((values >> 8).astype(np.uint8)[..., None], 3, 2)
    turned = rgb.copy()
    turned.getexif()[0x0112] = 3  # upside down
    return {
        "RGB": (rgb, np.asarray(rgb)),
        "gray": (gray, np.repeat(np.asarray(gray)[..., None], 3, 2)),
        "1 bit": (gray.convert("1"), np.repeat(np.asarray(gray.convert("1"))[..., None] * np.uint8(255), 3, 2)),
        "RGBA": (rgba, on_white),
        "palette": (palette, np.asarray(palette.convert("RGB"))),
        "CMYK": (rgb.convert("CMYK"), np.asarray(rgb.convert("CMYK").convert("RGB"))),
        "16 bits": (Image.fromarray(values), deep),
        "32 bits": (Image.fromarray(values.astype(np.int32)), deep),
        "EXIF": (turned, np.asarray(rgb)[::-1, ::-1]),
    }


@pytest.fixture(scope="module")
def sources(photos):
    return images_of_every_kind(photos)


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone") / "vit"
    save_vit(folder)
    return folder


def test_the_transform_takes_any_image_of_pillow_and_is_timms(sources, vit_folder):
    """Against timm's own transform of the right RGB pixels: largest centered square, bicubic, normalized; one or a batch.

    timm resizes before it crops, so that its outer columns also hold what lies beside the square: they are not compared.
    """
    model, transform = mapet.load(vit_folder)
    assert not model.training
    timms = create_transform(**resolve_model_data_config(timm.create_model(f"local-dir:{vit_folder}")))
    for name, (image, right) in sources.items():
        pixels = transform(image)
        expected = timms(Image.fromarray(np.asarray(right).round().astype(np.uint8)))
        assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.float32
        assert float((pixels - expected)[:, :, 2:-2].abs().max()) < 3 / 255 / 0.22, name  # rounding
    images = [image for image, _ in sources.values()]
    batch = transform(images)
    assert batch.shape == (9, 3, 32, 32) and torch.equal(batch[4], transform(images[4]))
    with torch.inference_mode():
        assert model.forward_features(batch).isfinite().all()


def test_files_give_what_their_images_give_and_what_embed_reads(sources, vit_folder, tmp_path):
    (tmp_path / "images" / "a").mkdir(parents=True)
    paths = {}
    for name, (image, _) in sources.items():
        paths[name] = tmp_path / "images" / "a" / f"{name}.{'tif' if name in ('CMYK', 'EXIF') else 'png'}"
        image.save(paths[name], exif=image.getexif())
    model, transform = mapet.load(vit_folder)
    sources["32 bits"][0].save(tmp_path / "deep.tif")
    with refused("deep.tif", "int32", "value-range"):  # a PNG of the same image has 16 bits
        transform(tmp_path / "deep.tif")
    batch = transform(list(paths.values()))
    for name, pixels in zip(paths, batch, strict=True):
        with Image.open(paths[name]) as image:
            assert torch.equal(pixels, transform(image)), name
        assert torch.equal(pixels, transform(sources[name][0])), name
        assert torch.equal(pixels, transform(str(paths[name])))
    out = mapet.embed(
        backbone=vit_folder, images=tmp_path / "images", out=tmp_path / "out", device="cpu", precision="float32"
    )
    with torch.inference_mode():
        features = mapet.pooled_features(model, transform(sorted(paths.values())))
    assert np.allclose(np.load(out / "features.npy"), features.numpy(), atol=1e-5)
    loader = DataLoader(ImageFolder(tmp_path / "images", transform, loader=Image.open), batch_size=9)
    assert torch.equal(next(iter(loader))[0], transform(sorted(paths.values())))


def test_gray_models_arrays_and_refusals(sources, tmp_path):
    save_vit(tmp_path / "gray", channels=1)
    save_vit(tmp_path / "bands", channels=5)
    rgb, right = sources["RGB"]
    _, transform = mapet.load(tmp_path / "gray", img_size=SIZE, patch_size=4)
    assert torch.allclose(transform(rgb)[0] * 0.25 + 0.5, torch.from_numpy(np.asarray(rgb.convert("L")) / 255).float())
    bands = np.concatenate([right, right[..., :2]], 2)
    np.save(tmp_path / "bands.npy", bands)
    _, transform = mapet.load(tmp_path / "bands", img_size=SIZE, patch_size=4)
    assert torch.allclose(
        transform(tmp_path / "bands.npy") * 0.25 + 0.5, torch.from_numpy(bands / 255).float().movedim(-1, 0)
    )
    for wrong, named in ((rgb, ["3 bands", "5 channels"]), (tmp_path / "none.png", ["none.png"])):
        with refused(*named):
            transform([wrong])
    (tmp_path / "broken.png").write_bytes(b"no image")
    with refused("broken.png", "not an image"):
        mapet.load(tmp_path / "gray")[1](tmp_path / "broken.png")
