"""`export` and `embed`: the files that other libraries load give what the backbone gives."""

import hashlib
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import mapet
import mapet.models.export_formats
from mapet.cli import main
from mapet.config.evaluation import ExportConfig
from mapet.data.views import normalize
from mapet.errors import MapetError
from mapet.models.backbone import create_vit, load_backbone, save_backbone
from mapet.models.export_formats import FORMATS, ExportWrapper, compute_outputs
from mapet.run_state import RunState
from tests.conftest import TINY
from tests.models.test_checkpoint_conversion import is_close, released, vit_of
from tests.refused import refused

FINETUNE = {
    "labels_per_class": 2, "epochs": 1, "batch_size": 10, "device": "cpu", "precision": "float32",
}  # fmt: skip


def save_vit(folder, size=(32, 32), channels=3, classes=0, **more):
    torch.manual_seed(3)
    vit = create_vit("vit_tiny_patch16_224", size, 8, channels, TINY | {"init_values": 0.1} | more)
    if classes:
        vit.reset_classifier(classes)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_backbone(vit, folder)
    return vit.eval()


def front_matter(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_a_run_for_timm(run_dir, few_digits, tmp_path, capsys):
    assert (
        main(["export", "--backbone", str(run_dir), "--out", str(tmp_path / "digits"), "--license", "apache-2.0"]) == 0
    )
    vit = load_backbone(run_dir).eval()
    config = json.loads((tmp_path / "digits" / "config.json").read_text())
    weights = tmp_path / "digits" / "model.safetensors"
    made = timm.create_model(config["architecture"], checkpoint_path=str(weights), **config["model_args"]).eval()
    pixels = torch.randn(2, 1, 8, 8)
    assert torch.equal(made.forward_features(pixels), vit.forward_features(pixels))
    assert (
        "license" not in config["pretrained_cfg"] and "tag" not in config["pretrained_cfg"]
    )  # of timm's weights, not these
    card = (tmp_path / "digits" / "README.md").read_text()
    assert front_matter(card) == {
        "license": "apache-2.0", "library_name": "timm", "pipeline_tag": "image-feature-extraction",
        "tags": ["mapet", "vision", "vit", "timm"],
    }  # fmt: skip
    assert "# digits\n" in card and "288 images without labels" in card and "8 images of few.txt" in card
    assert (
        "no labels and no pre-trained network" in card
        and "| pre-training | loss, nats if tokens are predicted (mean of the last epoch) |" in card
    )
    assert "turned gray" in card and "three times" not in card
    assert hashlib.sha256(weights.read_bytes()).hexdigest() in card
    assert str(few_digits.parent) not in card and str(run_dir.parent) not in card
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card, flags=re.S)[1])
    assert recipe["objective"] == "mapet" and recipe["images"] == "few.txt"


def test_released_weights_for_timm(crops, tmp_path):
    """Run the command that converts the authors' files."""
    vit = vit_of(init_values=0.1)
    torch.save(released(vit), tmp_path / "vit_standard_tiny_patch16_224.tar")
    argv = ["--backbone", str(tmp_path / "vit_standard_tiny_patch16_224.tar"), "--out", str(tmp_path / "timm")]
    assert main(["export", *argv, "--model-args", "num_heads=2", "--images", str(crops)]) == 0
    made = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    pixels = torch.randn(2, 3, 16, 16)
    assert torch.equal(made.forward_features(pixels), vit.forward_features(pixels))
    card = (tmp_path / "timm" / "README.md").read_text()
    assert "converted from `vit_standard_tiny_patch16_224.tar`" in card and "label-free" not in card
    assert "Gray images have their one channel three times." in card


@pytest.mark.parametrize(
    ("size", "channels", "out_size"),
    [((32, 32), 3, None), ((24, 40), 3, None), ((32, 32), 3, (40, 24)), ((32, 32), 1, None)],
)
def test_transformers(size, channels, out_size, crops, tmp_path):
    transformers = pytest.importorskip("transformers")
    save_vit(tmp_path / "vit", size, channels)
    out = mapet.export(
        backbone=tmp_path / "vit", out=tmp_path / "out", format=["transformers"], images=crops, image_size=out_size
    )
    size = out_size or size
    vit = load_backbone(tmp_path / "vit", img_size=size).eval()
    model = transformers.AutoModel.from_pretrained(out / "transformers").eval()
    assert type(model) is transformers.ViTModel
    processor = transformers.AutoImageProcessor.from_pretrained(out / "transformers")
    mode = "RGB" if channels == 3 else "L"
    originals = [Image.open(path).convert(mode).resize(size[::-1]) for path in sorted(crops.iterdir())[:3]]
    arrays = np.stack([np.asarray(image).reshape(*size, channels) for image in originals])
    with torch.no_grad():
        given = model(processor(originals, return_tensors="pt")["pixel_values"])
        expected = vit.forward_features(normalize(torch.from_numpy(arrays).movedim(-1, 1), channels))
    assert is_close(given.last_hidden_state, expected) and is_close(given.pooler_output, expected[:, 0])
    if size[0] == size[1]:  # a full photograph: equal crop and resize up to rounding
        whole = Image.open(next(crops.iterdir())).convert(mode)
        mapets = mapet_view(whole, size, tmp_path)
        reference = processor(whole, return_tensors="pt")["pixel_values"][0]
        gray_levels = 255 * (0.25 if channels == 1 else 0.226)
        assert (reference - normalize(mapets[None], channels)[0]).abs().mean() * gray_levels < 3
    card = (out / "transformers" / "README.md").read_text()
    assert front_matter(card)["library_name"] == "transformers" and "transformers, image processor" in card
    assert ("squeezes the whole image" in card) == (size[0] != size[1])


def mapet_view(image, size, tmp_path):
    from mapet.data.dataset import ViewDataset
    from mapet.data.sources import list_images
    from mapet.data.views import ViewSpec

    (tmp_path / "one").mkdir()
    image.save(tmp_path / "one" / "one.png")
    channels = 1 if image.mode == "L" else 3
    dataset = ViewDataset(list_images(tmp_path / "one"), ViewSpec(image_size=size), channels, image_size=size)
    return dataset.batch([(0, 0)]).images[0]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"no_embed_class": True}, "ViTForImageClassification"),
        ({"global_pool": "avg", "fc_norm": False}, "Dinov2ForImageClassification"),
        ({"global_pool": "avg", "fc_norm": False, "init_values": None}, "Dinov2ForImageClassification"),
    ],
)
def test_classifiers_for_transformers(options, name, crops, tmp_path):
    """Export classifiers of the class token and of the mean of the patches, as `finetune` trains them; and import them."""
    transformers = pytest.importorskip("transformers")
    vit = save_vit(tmp_path / "vit", classes=3, **options)
    out = mapet.export(backbone=tmp_path / "vit", out=tmp_path / "out", format=["transformers"], images=crops)
    model = transformers.AutoModelForImageClassification.from_pretrained(out / "transformers").eval()
    assert type(model).__name__ == name
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert is_close(model(pixels).logits, vit(pixels))
        assert is_close(
            load_backbone(out / "transformers").eval().forward_features(pixels), vit.forward_features(pixels)
        )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"reg_tokens": 2}, "register tokens"),
        ({"class_token": False}, "no class token"),
        ({"qk_norm": True}, "another attention"),
        ({"pre_norm": True}, "a norm before its blocks"),
        (
            {"classes": 2, "size": (24, 32), "global_pool": "avg", "fc_norm": False},
            "a classifier of the mean of the patches",
        ),
        ({"classes": 2, "global_pool": "avg"}, "its last norm after the pooling"),
    ],
)
def test_what_transformers_can_t_be(options, reason, crops, tmp_path):
    pytest.importorskip("transformers")
    save_vit(tmp_path / "vit", **options)
    with pytest.raises(MapetError, match=rf"transformers has no ViT with {reason}.*other formats"):
        mapet.export(backbone=tmp_path / "vit", out=tmp_path / "out", format=["transformers"], images=crops)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_onnx(crops, tmp_path):
    """Run ONNX with other batch sizes and image sizes."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    save_vit(tmp_path / "vit", classes=3, reg_tokens=1)
    out = mapet.export(
        backbone=tmp_path / "vit", out=tmp_path / "out", format=["onnx"], images=crops, image_size=(24, 40)
    )
    vit = load_backbone(tmp_path / "vit", img_size=(24, 40)).eval()
    session = onnxruntime.InferenceSession(out / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["features", "logits"]
    for count in (1, 7):
        pixels = torch.randn(count, 3, 24, 40)
        features, logits = session.run(None, {"pixel_values": pixels.numpy()})
        with torch.no_grad():
            assert is_close(torch.from_numpy(features), vit.forward_features(pixels), 1e-4)
            assert is_close(torch.from_numpy(logits), vit(pixels), 1e-4)


def test_torch_export(crops, tmp_path):
    save_vit(tmp_path / "vit", channels=5, pre_norm=True)
    for number in range(2):
        np.save(tmp_path / f"{number}.npy", np.random.default_rng(number).integers(0, 255, (40, 50, 5), dtype=np.uint8))
    (tmp_path / "bands.txt").write_text("0.npy\n1.npy\n")
    out = mapet.export(
        backbone=tmp_path / "vit", out=tmp_path / "out", format=["torch-export"], images=tmp_path / "bands.txt"
    )
    program = torch.export.load(out / "torch-export" / "model.pt2").module()
    vit = load_backbone(tmp_path / "vit").eval()
    for count in (1, 5):
        pixels = torch.randn(count, 5, 32, 32)
        with torch.no_grad():
            assert is_close(program(pixels)[0], vit.forward_features(pixels))


def test_other_patches_and_channels(crops, tmp_path):
    save_vit(tmp_path / "vit")
    out = mapet.export(
        backbone=tmp_path / "vit", out=tmp_path / "out", image_size=(20, 30), patch_size=5, channels=1, images=crops
    )
    made = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert made.patch_embed.grid_size == (4, 6) and made.in_chans == 1
    expected = load_backbone(tmp_path / "vit", img_size=(20, 30), patch_size=5, in_chans=1)
    assert torch.equal(made.pos_embed, expected.pos_embed)


def test_a_finetuned_model(digits, run_dir, tmp_path, caplog):
    caplog.set_level("INFO", "mapet")
    common = {
        "images": digits / "test",
        "epochs": 1,
        "batch_size": 64,
        "device": "cpu",
        "precision": "float32",
    }
    mapet.finetune(backbone=run_dir, out=tmp_path / "tuned", labels_per_class=5, **common)
    out = mapet.export(backbone=tmp_path / "tuned", out=tmp_path / "out", format=["torch-export"])
    assert "checked on 8 images of test" in caplog.text
    assert json.loads((out / "config.json").read_text())["label_names"] == list("0123456789")
    card = (out / "README.md").read_text()
    assert front_matter(card)["pipeline_tag"] == "image-classification" and "| fine-tuning | accuracy |" in card
    pixels = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        logits = torch.export.load(out / "torch-export" / "model.pt2").module()(pixels)[1]
        assert is_close(logits, load_backbone(tmp_path / "tuned").eval()(pixels))
    # Where it comes from: the run that it was fine-tuned from, whose tokenizer counts here too.
    assert "converted from" not in card and "8 images of test" in card and str(run_dir.parent) not in card
    assert "288 images without labels" in card and "hash of the tokenizer" in card
    assert "no labels and no pre-trained network" in card and "| pre-training" in card
    assert "From the backbone `run`, on 50 labeled images of 10 classes" in card and "trained on labels" in card
    recipes = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", card, flags=re.S)]
    assert recipes[0]["labels_per_class"] == 5 and recipes[0]["lr"] > 0 and recipes[1]["objective"] == "mapet"


def test_a_finetuning_is_repeated_by_its_recipe(digits, run_dir, tmp_path):
    options = FINETUNE | {"batch_size": None, "color_jitter": 0.4}
    mapet.finetune(backbone=run_dir, out=tmp_path / "tuned", images=digits / "test", **options)
    assert main(["finetune", str(tmp_path / "tuned" / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    first, second = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("tuned", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    recipe = yaml.safe_load((tmp_path / "tuned" / "config.yaml").read_text())
    assert recipe["batch_size"] and recipe["lr"] and recipe["warmup_epochs"] == 0.1
    for options in ({"out": "report.html"}, {"figures_dir": "figures"}, {"serve": True}):
        with refused("mapet finetune"):
            mapet.report(run=tmp_path / "tuned", **options)


def test_the_past_of_a_finetuned_model_is_inherited(digits, run_dir, tmp_path):
    """The card names a pre-trained teacher through two fine-tunings with the run deleted, and external weights."""

    def card_of(name):
        mapet.export(backbone=tmp_path / name / "model", out=tmp_path / f"{name}-out")
        return (tmp_path / f"{name}-out" / "README.md").read_text()

    save_vit(tmp_path / "vit", (8, 8), 1)
    for name, backbone, scratch in (("a", run_dir, False), ("b", tmp_path / "vit", False), ("c", run_dir, True)):
        mapet.finetune(backbone=backbone, out=tmp_path / name, from_scratch=scratch, images=digits / "test", **FINETUNE)
    state = RunState.read(tmp_path / "a")
    tokenizer = state.results["provenance"]["tokenizer"]
    tokenizer["teacher"]["teacher"], tokenizer["label_free"] = "resnet50x64_clip.openai", False
    state.write(tmp_path / "a")
    mapet.finetune(backbone=tmp_path / "a", out=tmp_path / "d", images=digits / "test", **FINETUNE)
    for name in "ad":
        card = card_of(name)
        assert "`resnet50x64_clip.openai`" in card and "**The teacher is a pre-trained network**" in card
        assert card.count("## Fine-tuning") == 1 + (name == "d") and "no pre-trained network" not in card
    card = card_of("b")
    assert "weights of the backbone `vit` were not trained by a run that mapet knows" in card
    card = card_of("c")
    assert "From random weights of the architecture of `run`" in card and "started from random weights" in card
    assert "without labels" not in card and "visual tokens" not in card


def test_the_teacher_of_a_vqkd_teacher_is_in_the_card(run_dir, tmp_path):
    from mapet.reports.model_card import Provenance, render_model_card

    def card(*teachers):
        about = {}
        for teacher in reversed(teachers[1:]):
            about = {"learned_from": {"teacher": {"teacher": teacher}, "teacher_metadata": about}}
        tokenizer = {
            "label_free": teachers[-1] == "pixels",
            "teacher": {"teacher": teachers[0]},
            "teacher_metadata": about,
            "vocab_size": 8,
            "grid": [2, 2],
            "hash": "a",
        }
        origin = Provenance(tokenizer=tokenizer)
        config = ExportConfig(backbone="run", out="a")
        return render_model_card(config, {"timm": tmp_path}, load_backbone(run_dir), origin, {}, "nothing", 1e-4)

    assert "no labels and no pre-trained network" in card("vqkd", "pixels")
    assert "itself trained by mapet with the teacher `vit_clip`" in card(
        "vqkd", "vit_clip"
    ) and "is a pre-trained network" in card("vqkd", "vit_clip")
    assert "is a pre-trained network" in card("vqkd")  # a published file: nothing is known


@pytest.mark.parametrize("change", [1e-3, float("nan")])
def test_a_wrong_export_is_not_left(change, run_dir, tmp_path, monkeypatch):
    def damaged(vit, folder, classes):
        original(vit, folder, classes)
        weights = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
        weights["norm.weight"] *= 1 + change
        mapet.models.export_formats.write_tensors(folder / "model.safetensors", weights)

    original = FORMATS["timm"].write
    monkeypatch.setitem(FORMATS, "timm", FORMATS["timm"]._replace(write=damaged))
    with refused("timm", "1e-04"):
        mapet.export(backbone=run_dir, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_card_s_features_are_those_of_the_options(tmp_path):
    vit = save_vit(tmp_path / "vit")
    out = mapet.export(backbone=tmp_path / "vit", out=tmp_path / "out", pool="2x2", layers=(0, -1))
    card = (out / "README.md").read_text()
    (line,) = [line for line in card.splitlines() if line.startswith("features = ")]
    pixels = torch.randn(2, 3, 32, 32)
    names = {"mapet": mapet, "model": load_backbone(out), "pixels": pixels}
    exec(line, names)
    expected = torch.cat(
        [vit.forward_intermediates(pixels, [i], norm=True, intermediates_only=True)[0] for i in (0, 1)], 1
    )
    torch.testing.assert_close(
        names["features"], expected.unflatten(2, (2, 2)).unflatten(4, (2, 2)).mean((3, 5)).flatten(1)
    )
    with refused(2, field="layers", value=2):
        mapet.export(backbone=tmp_path / "vit", out=tmp_path / "other", layers=(2,))
    assert not (tmp_path / "other").exists()


def test_export_refuses_what_it_can_t_do(run_dir, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with refused(field="out"):
        mapet.export(backbone=run_dir, out=tmp_path / "full")
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with refused("onnx", "[export]"):
        mapet.export(backbone=run_dir, out=tmp_path / "out", format=["onnx"])
    with refused("9 x 9", "patch size 2"):
        mapet.export(backbone=run_dir, out=tmp_path / "out", image_size=9)
    assert not (tmp_path / "out").exists()


def test_without_images_it_says_so(tmp_path, caplog):
    save_vit(tmp_path / "vit")
    out = mapet.export(backbone=tmp_path / "vit", out=tmp_path / "out")
    assert "checked on 8 generated images" in caplog.text
    assert "8 generated images" in (out / "README.md").read_text()
    with refused("missing"):
        mapet.export(backbone=tmp_path / "vit", out=tmp_path / "other", images=tmp_path / "missing")


def test_a_pretrained_teacher_is_named_in_the_card(run_dir, tmp_path):
    """A card names the pre-trained network that visual_tokenizer.json names."""
    from mapet.reports.model_card import read_provenance

    tokenizer = {"teacher": {"teacher": "resnet50x64_clip.openai"}, "quantizer": {"kind": "kmeans"}, "vocab_size": 8192,
                 "grid": [14, 14], "hash": "abc", "weights_hash": "def"}  # fmt: skip
    origin = replace(read_provenance(run_dir), tokenizer=tokenizer)
    from mapet.reports.model_card import render_model_card

    config = ExportConfig(backbone=str(run_dir), out="name")
    card = render_model_card(config, {"timm": tmp_path}, load_backbone(run_dir), origin, {}, "nothing", 1e-4)
    assert "`resnet50x64_clip.openai`" in card and "**The teacher is a pre-trained network**" in card
    assert "no pre-trained network" not in card


def test_outputs_are_those_of_timm(tmp_path):
    vit = save_vit(tmp_path / "vit", classes=4)
    pixels = torch.randn(2, 3, 32, 32)
    given = compute_outputs(ExportWrapper(vit), pixels)
    with torch.no_grad():
        assert torch.equal(given["logits"], vit(pixels)) and torch.equal(
            given["features"], vit.forward_features(pixels)
        )
