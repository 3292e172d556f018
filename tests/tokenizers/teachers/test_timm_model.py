"""CLIP checkpoints in the formats they are published in, against open_clip, with random weights."""

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from safetensors.torch import save_file
from torch import nn

import mapet
from mapet.config.tokenizers import FitTokenizerConfig, TeacherOptions, TrainTokenizerConfig
from tests.conftest import teacher_of
from tests.refused import refused

MODELS = {
    "vit_base_patch16_clip_224.openai": "ViT-B-16",
    "vit_base_patch16_clip_quickgelu_224.openai": "ViT-B-16-quickgelu",
    "resnet50_clip.openai": "RN50",
}


class Archive(nn.Module):
    """A module whose parameters have given dotted names: what OpenAI's TorchScript files look like from outside."""

    def __init__(self, state):
        super().__init__()
        for name, tensor in state.items():
            *path, last = name.split(".")
            place = self
            for part in path:
                if part not in place._modules:
                    place.add_module(part, Holder())
                place = place._modules[part]
            place.register_buffer(last, tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Holder(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def save(state, kind, folder):
    if kind == "openai":
        path = folder / "clip.pt"
        sizes = {
            "input_resolution": torch.tensor(224),
            "context_length": torch.tensor(77),
            "vocab_size": torch.tensor(49408),
        }
        torch.jit.save(torch.jit.script(Archive(state | sizes)), path)
    elif kind == "open_clip":
        path = folder / "epoch_32.pt"
        wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
        torch.save({"epoch": 32, "name": "run", "state_dict": wrapped, "optimizer": {"param_groups": []}}, path)
    else:
        path = folder / "open_clip_model.safetensors"
        save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, path)
    return path


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("vit_base_patch16_clip_quickgelu_224.openai", "openai"),
        ("vit_base_patch16_clip_224.openai", "safetensors"),
        ("resnet50_clip.openai", "openai"),
        ("resnet50_clip.openai", "safetensors"),
    ],
)
def test_features_are_those_of_open_clip(name, kind, tmp_path):
    torch.manual_seed(0)
    model = open_clip.create_model(MODELS[name], pretrained=None).eval()
    path = save(model.state_dict(), kind, tmp_path)
    images = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    grid = (14, 14) if name.startswith("vit") else (7, 7)
    ours = teacher_of(name, (224, 224), 224 // grid[0], teacher_checkpoint=str(path))(images)
    mean, std = (
        torch.tensor(values).view(-1, 1, 1) for values in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    with torch.inference_mode():
        normal = (images / 255 - mean) / std
        last = 11 if name.startswith("vit") else 4
        reference = model.visual.forward_intermediates(
            normal, indices=[last], intermediates_only=True, normalize_intermediates=False
        )
    reference = reference["image_intermediates"][0]
    assert ours.shape == reference.shape
    assert torch.allclose(ours, reference, rtol=1e-4, atol=1e-4 * reference.abs().max())


def test_weights_of_another_model_are_refused(tmp_path):
    state = open_clip.create_model("RN50", pretrained=None).state_dict()
    path = save(state, "safetensors", tmp_path)
    with refused("open_clip_model.safetensors"):
        teacher_of("vit_base_patch16_clip_224.openai", (224, 224), 16, teacher_checkpoint=str(path))


def test_k_clip_stands_for_the_options_of_the_paper():
    """Explicit options override those of the name; the config records the timm model."""
    preset = TeacherOptions(teacher="k-clip")
    assert (preset.teacher, preset.teacher_image_size) == (("resnet50x64_clip.openai",), (448, 448))
    assert (preset.teacher_layer, preset.teacher_output) == (-1, "block")
    assert TeacherOptions(**preset.model_dump(mode="json")) == preset
    other = TeacherOptions(teacher="k-clip", teacher_image_size=224, teacher_layer=2)
    assert (other.teacher, other.teacher_image_size, other.teacher_layer) == (preset.teacher, (224, 224), 2)


def test_vqkd_clip_is_the_teacher_of_train_tokenizer_s_example():
    """The CLIP with QuickGELU, as OpenAI trained it, after its visual projection; fit-tokenizer takes the same name."""
    assert "--teacher vqkd-clip" in (mapet.train_tokenizer.__doc__ or "")
    for config in (TrainTokenizerConfig, FitTokenizerConfig):
        preset = config(images="x", out="y", teacher="vqkd-clip")
        assert preset.teacher == ("vit_base_patch16_clip_quickgelu_224.openai",)
        assert (preset.teacher_image_size, preset.teacher_layer) == ((224, 224), -1)
        assert preset.teacher_output == "projection"


def beit2_targets(weights, images):
    """What BEiT v2's tokenizer regresses (arXiv 2208.06366; `get_regress_target`), by OpenAI's weights of a ViT-B/16, in their dtype.

    Args:
        weights: of the visual tower, by OpenAI's names.
        images: (B, 3, 224, 224), normalized.

    Returns:
        (B, 196, 512): the patch tokens of the last block after ln_post and the visual projection.
    """

    def norm(x, name):
        return F.layer_norm(x, (768,), weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-5)

    def linear(x, name, separator="."):
        return F.linear(x, weights[f"{name}{separator}weight"], weights[f"{name}{separator}bias"])

    x = F.conv2d(images, weights["conv1.weight"], stride=16).flatten(2).transpose(1, 2)
    x = torch.cat([weights["class_embedding"].expand(len(x), 1, -1), x], dim=1) + weights["positional_embedding"]
    x = norm(x, "ln_pre")
    for block in (f"transformer.resblocks.{number}" for number in range(12)):
        qkv = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.in_proj", "_")
        q, k, v = (part.unflatten(2, (12, 64)).transpose(1, 2) for part in qkv.chunk(3, dim=2))
        attention = (q @ k.transpose(2, 3) / 64**0.5).softmax(dim=3)
        x = x + linear((attention @ v).transpose(1, 2).flatten(2), f"{block}.attn.out_proj")
        hidden = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        x = x + linear(hidden * torch.sigmoid(1.702 * hidden), f"{block}.mlp.c_proj")  # QuickGELU
    return norm(x, "ln_post")[:, 1:] @ weights["proj"]


def test_vqkd_clip_gives_the_targets_of_beit_v2(tmp_path):
    """The published architecture with random weights, far from its special first values; the loss then compares directions, by cosine."""
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-16-quickgelu", pretrained=None)
    with torch.no_grad():
        for parameter in model.visual.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    path = save(model.state_dict(), "open_clip", tmp_path)
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    mean, std = (
        torch.tensor(values).double().view(-1, 1, 1)
        for values in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    weights = {name: tensor.double() for name, tensor in model.visual.state_dict().items()}
    with torch.inference_mode():
        expected = beit2_targets(weights, (images / 255 - mean) / std)
    teacher = teacher_of("vqkd-clip", (224, 224), 16, teacher_checkpoint=str(path))
    result = teacher(images)
    assert result.shape == (2, 512, 14, 14) and teacher.native_grid == (14, 14)
    error = result.flatten(2).transpose(1, 2) - expected
    assert error.abs().max() < 1e-4 * expected.abs().max()
    assert teacher.settings["output"] == "projection"


@pytest.mark.slow
def test_k_clip_is_the_last_stage_of_rn50x64_before_the_attention_pool(tmp_path):
    """Run the stages one after the other, at the widths and depths of the published model, with random weights."""
    torch.manual_seed(0)
    visual = ModifiedResNet(layers=[3, 15, 36, 10], output_dim=1024, heads=64, image_size=448, width=128).eval()
    path = save({f"visual.{name}": tensor for name, tensor in visual.state_dict().items()}, "safetensors", tmp_path)
    teacher = teacher_of("k-clip", (224, 224), 16, teacher_checkpoint=str(path))
    assert teacher.image_size == (448, 448)
    images = torch.randint(0, 256, (1, 3, 448, 448), dtype=torch.uint8)
    mean, std = (
        torch.tensor(values).view(-1, 1, 1) for values in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    with torch.inference_mode():
        x = visual.stem((images / 255 - mean) / std)
        for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
            x = stage(x)
        ours = teacher(images)
    assert ours.shape == x.shape == (1, 4096, 14, 14)
    assert torch.allclose(ours, x, rtol=1e-4, atol=1e-4 * float(x.abs().max()))
