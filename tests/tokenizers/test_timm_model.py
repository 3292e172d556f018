"""CLIP checkpoints in the formats they are published in, against open_clip, with random weights."""

import open_clip
import pytest
import torch
from open_clip.modified_resnet import ModifiedResNet
from safetensors.torch import save_file
from torch import nn

from mapet.config.tokenizers import TeacherOptions
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
        ("vit_base_patch16_clip_quickgelu_224.openai", "open_clip"),
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
        theirs = model.visual.forward_intermediates(
            normal, indices=[last], intermediates_only=True, normalize_intermediates=False
        )
    theirs = theirs["image_intermediates"][0]
    assert ours.shape == theirs.shape
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max())


def test_weights_of_another_model_are_refused(tmp_path):
    state = open_clip.create_model("RN50", pretrained=None).state_dict()
    path = save(state, "safetensors", tmp_path)
    with refused("open_clip_model.safetensors"):
        teacher_of("vit_base_patch16_clip_224.openai", (224, 224), 16, teacher_checkpoint=str(path))


def test_k_clip_stands_for_the_options_of_the_paper():
    """Those given beside the name hold; the config records the timm model."""
    preset = TeacherOptions(teacher="k-clip")
    assert (preset.teacher, preset.teacher_image_size) == ("resnet50x64_clip.openai", (448, 448))
    assert (preset.teacher_layer, preset.teacher_final_norm) == (-1, False)
    assert TeacherOptions(**preset.model_dump(mode="json")) == preset
    other = TeacherOptions(teacher="k-clip", teacher_image_size=224, teacher_layer=2)
    assert (other.teacher, other.teacher_image_size, other.teacher_layer) == (preset.teacher, (224, 224), 2)


@pytest.mark.slow
def test_k_clip_is_the_last_stage_of_rn50x64_before_the_attention_pool(tmp_path):
    """The stages run one after the other here, at the widths and depths of the published model, with random weights."""
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
