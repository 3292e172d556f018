"""OpenAI's dVAE encoder: its numbers, and the files it is loaded from."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from mapet.tokenizers.teachers import dalle
from mapet.tokenizers.teachers.dalle import DalleEncoder, build
from tests.conftest import teacher_of
from tests.refused import refused


def numbers(shape, number):
    """Exactly the same on every machine, in [-0.5, 0.5)."""
    index = torch.arange(torch.Size(shape).numel())
    return ((index * (index + number) % 1009).double() / 1009 - 0.5).view(shape)


def test_against_the_library_of_origin():
    """Logits of dall-e 0.1 (PyPI), Encoder(n_hid=64, vocab_size=512), in float32 with torch 2.15 on a CPU."""
    encoder = DalleEncoder(64, 512)
    for number, tensor in enumerate(encoder.state_dict().values()):
        values = numbers(tensor.shape, number)
        tensor.copy_(values * (24 / tensor[0].numel()) ** 0.5 if tensor.ndim == 4 else values)
    with torch.no_grad():
        logits = encoder((numbers((1, 3, 16, 24), 7) + 0.5).float())[0]
    assert logits.shape == (512, 2, 3)
    assert logits.argmax(0).tolist() == [[24, 492, 306], [333, 333, 492]]
    expected = [-1.8819215, 4.1879473, -0.9979610, 4.9306540, 4.0893674, 1.8941408]
    assert logits[::100, 1, 2].tolist() == pytest.approx(expected, abs=1e-4)
    expected = [-1.2199963, 0.0626940, -0.6504501, 1.0026155, 2.1018577, 1.1818879, -0.8022491, -0.6594214, -1.1572862]
    assert logits[[0, 255, 511], 0].flatten().tolist() == pytest.approx(expected, abs=1e-4)
    assert (float(logits.std()), float(logits.mean())) == pytest.approx((2.6336, 0.7184), abs=1e-3)


def small(width=8, vocab_size=12):
    torch.manual_seed(0)
    encoder = DalleEncoder(width, vocab_size)
    for weight in encoder.parameters():
        nn.init.normal_(weight, std=0.2)
    return encoder


def plain(weights, images):
    """The same written down from its names."""

    def conv(name, x):
        weight = weights[f"{name}.w"].to(x.dtype)
        return F.conv2d(x, weight, weights[f"{name}.b"].to(x.dtype), padding=weight.shape[-1] // 2)

    x = conv("blocks.input", 0.8 * images + 0.1)
    for group in (1, 2, 3, 4):
        for block in (1, 2):
            name = f"blocks.group_{group}.block_{block}"
            inner = x
            for layer in (1, 2, 3, 4):
                inner = conv(f"{name}.res_path.conv_{layer}", F.relu(inner))
            x = (conv(f"{name}.id_path", x) if f"{name}.id_path.w" in weights else x) + inner / 64
        x = F.max_pool2d(x, 2) if group < 4 else x
    return conv("blocks.output.conv", F.relu(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_written_down(dtype):
    encoder = small()
    images = torch.rand(2, 3, 24, 16, dtype=dtype)
    with torch.no_grad():
        result = encoder(images)
    assert result.dtype == dtype and result.shape == (2, 12, 3, 2)
    exact = plain(encoder.state_dict(), images.double())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    assert (result - exact).abs().max() < tolerance * exact.abs().max()


def thin(encoder):
    """A value for each output channel, so that files of the full size are small."""
    torch.manual_seed(0)
    for module in encoder.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            column = torch.randn(len(weight), *[1] * (weight.ndim - 1)) / weight[0].numel() ** 0.5
            setattr(module, name, nn.Parameter(column.expand(weight.shape), requires_grad=False))
    return encoder


@pytest.mark.filterwarnings("ignore:Couldn.t retrieve source code:UserWarning")
@pytest.mark.parametrize("zipped", [True, False])
def test_the_published_pickle(zipped, tmp_path, monkeypatch):
    """A whole module of package dall_e, at its full size, read where there is no such package."""
    encoder = thin(DalleEncoder())
    expected = encoder.state_dict()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "dall_e", ModuleType("dall_e"))
        for own, home, name in [
            (dalle.DalleEncoder, "dall_e.encoder", "Encoder"),
            (dalle._Block, "dall_e.encoder", "EncoderBlock"),
            (dalle._Conv, "dall_e.utils", "Conv2d"),
        ]:
            if home not in sys.modules:
                patch.setitem(sys.modules, home, ModuleType(home))
            kind = type(name, (nn.Module,), {"__module__": home})
            setattr(sys.modules[home], name, kind)
            for module in encoder.modules():
                if type(module) is own:
                    module.__class__ = kind
                    module.device, module.requires_grad, module.n_hid = torch.device("cpu"), False, 256
        torch.save(encoder, tmp_path / "encoder.pkl", _use_new_zipfile_serialization=zipped)
    assert b"dall_e.encoder" in (tmp_path / "encoder.pkl").read_bytes() and "dall_e" not in sys.modules
    loaded = build(str(tmp_path / "encoder.pkl"), None, (1, 2))
    assert loaded.num_logits == 8192
    assert sum(weight.numel() for weight in loaded.parameters()) == 53_786_240
    images = torch.rand(1, 3, 8, 16)
    with torch.no_grad():
        result = loaded(images)
    assert result.shape == (1, 8192, 1, 2)
    assert torch.allclose(result, plain(expected, images), atol=1e-5)


@pytest.fixture
def smaller(monkeypatch):
    monkeypatch.setattr(dalle, "DalleEncoder", lambda: DalleEncoder(8, 12))


@pytest.mark.parametrize("save", [save_file, torch.save, lambda weights, path: torch.save({"model": weights}, path)])
def test_plain_weights(save, smaller, tmp_path):
    encoder = small()
    save(encoder.state_dict(), tmp_path / "weights")
    loaded = build(str(tmp_path / "weights"), None, (1, 1)).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in encoder.state_dict().items())


def test_as_a_teacher(smaller, tmp_path):
    torch.save(small().state_dict(), tmp_path / "encoder.pkl")
    teacher = teacher_of("dalle", (224, 224), 16, teacher_checkpoint=str(tmp_path / "encoder.pkl"))
    assert teacher.image_size == (112, 112)
    assert teacher.builtin_quantizer is not None and teacher.builtin_quantizer.vocab_size == 12
    images = torch.randint(0, 256, (1, 3, 112, 112), dtype=torch.uint8)
    assert torch.allclose(teacher(images), plain(small().state_dict(), images.float() / 255), atol=1e-4)


def test_without_a_checkpoint():
    with refused("teacher_checkpoint encoder.pkl"):
        build(None, None, (1, 1))


def test_other_weights(smaller, tmp_path):
    path = str(tmp_path / "other.safetensors")
    weights = small().state_dict()
    for name in list(weights)[:4]:
        weights[f"other.{name}"] = weights.pop(name)
    weights["blocks.output.conv.w"] = torch.ones(13, 64, 1, 1)
    save_file(weights, path)
    missing = "blocks.input.w, blocks.input.b, blocks.group_1.block_1.res_path.conv_1.w"
    with refused(path, missing, "other.blocks.input.b", "blocks.output.conv.w (13x64x1x1, expected 12x64x1x1)"):
        build(path, None, (1, 1))
    (tmp_path / "other.safetensors").write_bytes(b"")
    with refused("empty"):
        build(path, None, (1, 1))
