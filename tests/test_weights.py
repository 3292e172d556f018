"""Published weights files: what they hold, and that nothing of them is run."""

import argparse
import io
import os
import pathlib
import pickle
import zipfile
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mapet.errors import MapetError
from mapet.weights import read_weights
from tests.refused import refused


@pytest.fixture(params=["zip", "legacy"])
def zipped(request):
    return request.param == "zip"


def save(content, path, zipped=True):
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def tensors():
    torch.manual_seed(0)
    shared = torch.randn(4, 6)
    return {
        "stem.weight": torch.randn(5, 3, 2),
        "stem.bias": torch.randn(5).half(),
        "transposed": shared.t(),
        "part": shared[1:3, ::2],
        "count": torch.tensor(7),
        "none": torch.empty(0, 3),
        "mask": torch.tensor([True, False]),
        "brain": torch.randn(3).bfloat16(),
    }


def assert_same(result, expected):
    assert set(result) == set(expected)
    for name, tensor in expected.items():
        assert type(result[name]) is torch.Tensor and not result[name].requires_grad, name
        assert result[name].dtype == tensor.dtype and torch.equal(result[name], tensor), name


def test_safetensors_by_content_not_by_name(tmp_path):
    expected = {name: tensor.contiguous() for name, tensor in tensors().items() if name != "part"}
    save_file(expected, tmp_path / "weights.pt")
    assert_same(read_weights(tmp_path / "weights.pt"), expected)
    assert_same(read_weights(str(tmp_path / "weights.pt")), expected)


def test_state_dicts(zipped, tmp_path):
    assert_same(read_weights(save(OrderedDict(tensors()), tmp_path / "w.bin", zipped)), tensors())


class Preference:  # of a training run, unknown to whoever reads its checkpoint
    def __init__(self):
        self.color = "red"


def beside():
    """What training runs leave in a checkpoint."""
    return {
        "args": argparse.Namespace(lr=np.float64(0.1), size=(1, 2), root=pathlib.Path("data"), kind=torch.float16),
        "loss": np.float32(0.5),
        "history": defaultdict(list, {"loss": [1.0]}),
        "array": np.arange(3),
        "shape": torch.Size([1, 2]),
        "device": torch.device("cpu"),
        "seen": {1, 2},
        "raw": b"\x00\xff",
        "preference": Preference(),
        "epoch": 3,
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}},
    }


@pytest.mark.parametrize("key", ["state_dict", "model", "module", "ema", "params", "teacher"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_nested(key, prefix, zipped, tmp_path):
    nested = {f"{prefix}{name}": tensor for name, tensor in tensors().items()}
    assert_same(read_weights(save({**beside(), key: nested}, tmp_path / "w.pth", zipped)), tensors())
    assert_same(read_weights(save({"step": torch.tensor(1), key: nested}, tmp_path / "w.pth", zipped)), tensors())


def test_which_of_several(tmp_path):
    content = {"ema": {"w": torch.ones(1)}, "model": {"w": torch.zeros(1)}, "state_dict": {}, "params": "w"}
    assert read_weights(save(content, tmp_path / "w.pth")) == {"w": torch.zeros(1)}
    twice = {"state_dict": {"model": {"w": torch.ones(1)}}}
    assert read_weights(save(twice, tmp_path / "w.pth")) == {"w": torch.ones(1)}


def test_a_prefix_that_not_all_share_stays(tmp_path):
    content = {"module.w": torch.zeros(1), "w": torch.ones(1)}
    assert_same(read_weights(save(content, tmp_path / "w.pth")), content)


class Encoder(nn.Module):
    """A module with everything that a state dict omits."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), act=nn.ReLU()))
        self.model = nn.Linear(4, 2, bias=False)  # not a nested state dict
        self.tied = self.model.weight
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("grid", torch.ones(3), persistent=False)
        self.device, self.kind, self.plain = torch.device("cpu"), torch.float32, torch.zeros(2)

    def __setstate__(self, state):
        raise AssertionError("the class of a file was run")


@pytest.mark.parametrize("nest", [lambda model: model, lambda model: {"epoch": 1, "model": model}])
def test_pickled_modules(nest, zipped, tmp_path, monkeypatch):
    model = Encoder()
    path = save(nest(model), tmp_path / "encoder.pkl", zipped)
    monkeypatch.delitem(globals(), "Encoder")  # an importing reader would fail
    assert_same(read_weights(path), model.state_dict())


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.randn(6, 2))
        self.ln_1 = nn.LayerNorm(2)

    def forward(self, x):
        return self.ln_1(x) @ self.in_proj_weight.t()


class Clip(nn.Module):
    """CLIP's layout: parts in lists, halves, sizes as buffers, lists of integers."""

    def __init__(self):
        super().__init__()
        self.visual = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).half()
        self.resblocks = nn.ModuleList([Attention(), Attention()])
        self.logit_scale = nn.Parameter(torch.ones([]))
        self.register_buffer("input_resolution", torch.tensor(224))
        self.sizes = [1, 2]

    def forward(self, x):
        for block in self.resblocks:
            x = block(x)
        return self.logit_scale * x


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_as_clip_is_published(tmp_path):
    """Read from the tensors' pickle alone: also where the archive's code is none."""
    model = Clip()
    torch.jit.save(torch.jit.script(model), tmp_path / "RN50.pt")
    with zipfile.ZipFile(tmp_path / "RN50.pt") as archive, zipfile.ZipFile(tmp_path / "codeless.pt", "w") as codeless:
        for name in archive.namelist():
            codeless.writestr(name, b"not code" if "/code/" in name else archive.read(name))
    for path in ("RN50.pt", "codeless.pt"):
        assert_same(read_weights(tmp_path / path), model.state_dict())


class Payload:
    """Pickled, it is a call of `function`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


MALICIOUS = {
    f"{os.system.__module__}.system": lambda mark: Payload(os.system, f"touch {mark}"),
    "builtins.eval": lambda mark: Payload(eval, f"open({str(mark)!r}, 'w')"),
    "builtins.getattr": lambda mark: Payload(getattr, pathlib.Path(mark), "touch"),
    "io.open": lambda mark: Payload(open, str(mark), "w"),
    "builtins.print": lambda mark: Payload(print, "hello"),
}


@pytest.mark.parametrize("name", MALICIOUS)
@pytest.mark.parametrize("nest", ["alone", "state_dict", "module", "beside"])
def test_nothing_is_run(name, nest, zipped, tmp_path, capfd):
    mark = tmp_path / "ran"
    payload = MALICIOUS[name](mark)
    module = nn.Linear(2, 2)
    module.extra = payload
    content = {
        "alone": payload,
        "state_dict": {"state_dict": payload},
        "module": {"model": module},
        "beside": {"w": torch.ones(1), "args": argparse.Namespace(x=payload)},
    }[nest]
    path = save(content, tmp_path / "weights.pth", zipped)
    with refused(path, f" {name},", "safetensors"):
        read_weights(path)
    assert not mark.exists() and not capfd.readouterr().out


def test_nothing_is_run_in_torchscript_or_newer_pickles(tmp_path):
    payload = Payload(os.system, f"touch {tmp_path / 'ran'}")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("script/constants.pkl", pickle.dumps(payload, 2))
        archive.writestr("script/data.pkl", pickle.dumps(payload, 2))
    torch.save({"w": torch.ones(1), "x": payload}, tmp_path / "newer.pt", pickle_protocol=4)
    for name in ("script.pt", "newer.pt"):
        with refused(tmp_path / name, f"{os.system.__module__}.system", "safetensors"):
            read_weights(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    torch.save(Encoder(), tmp_path / "harmless.pt", pickle_protocol=4)
    assert "model.weight" in read_weights(tmp_path / "harmless.pt")


def test_a_pickle_can_t_alter_the_reader(tmp_path):
    """BUILD on a global: with a state for the class itself."""
    for target in (b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n", b"cos\nsystem\n"):
        path = tmp_path / "built.pth"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("built/data.pkl", b"\x80\x02" + target + b"(N}X\x01\x00\x00\x00aK\x01stb.")
        with refused("weights"):
            read_weights(path)
    assert not hasattr(OrderedDict, "a")


def test_tensors_beyond_their_storage(tmp_path):
    """Sizes that a pickle claims are checked against what the file holds."""
    stored = save(nn.Linear(3, 3), tmp_path / "w.pth")
    with zipfile.ZipFile(stored) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in parts if name.endswith("data.pkl"))
    for part, change in [
        (b"K\x09tq", b"K\x7ftq"),  # a storage's elements
        (b"K\x03K\x03\x86", b"K\x09K\x09\x86"),  # a tensor's shape
    ]:
        assert part in parts[pickled]
        with zipfile.ZipFile(tmp_path / "changed.pth", "w") as archive:
            for name, data in parts.items():
                archive.writestr(name, data.replace(part, change) if name == pickled else data)
        with pytest.raises(MapetError, match=r"36 bytes\) does not match .*508 bytes|out of bounds"):
            read_weights(tmp_path / "changed.pth")


def to_bytes(write):
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def other_archive(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("xl/workbook.xml", "")


def safetensors_bytes(tmp_path):
    save_file({"w": torch.ones(9)}, tmp_path / "whole")
    return (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (lambda _: b"", ""),
        (lambda _: b"version https of a pointer, or an error page", ""),
        (lambda _: b"\x89PNG\r\n\x1a\n", ""),
        (lambda _: pickle.dumps({"w": [1, 2]}), ""),
        (lambda _: to_bytes(other_archive), ""),
        (lambda _: to_bytes(lambda file: torch.save(tensors(), file))[:-400], ""),
        (lambda tmp_path: safetensors_bytes(tmp_path)[:-5], ""),
        (lambda _: to_bytes(lambda file: torch.save([torch.ones(1)], file)), "safetensors"),
        (
            lambda _: to_bytes(lambda file: torch.save({"student": {"w": torch.ones(1)}, "epoch": 1}, file)),
            "student, epoch",
        ),
    ],
)
def test_other_files(content, named, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(content(tmp_path))
    with refused(path, named):
        read_weights(path)


@pytest.mark.parametrize("name", ["digits.onnx", "digits.pt2"])
def test_a_graph_for_inference_is_named_as_such(name, tmp_path):
    (tmp_path / name).write_bytes(b"\x08\x08\x12\x07pytorch")
    with refused(tmp_path / name):
        read_weights(tmp_path / name)


@pytest.mark.parametrize("cut", [5, 300, 1000, -300, -10, -1])
@pytest.mark.parametrize("make", [tensors, Encoder])
def test_cut_off(make, cut, zipped, tmp_path):
    content = make()
    if isinstance(content, dict):
        del content["none"]  # of no bytes: where it comes last in a legacy file, a cut may lose nothing
    path = save(content, tmp_path / "weights.pth", zipped)
    path.write_bytes(path.read_bytes()[:cut])
    with refused("weights"):
        read_weights(path)


def test_damaged_bytes_are_noticed(tmp_path):
    path = save(Encoder(), tmp_path / "weights.pth")
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        entry = next(entry for entry in archive.infolist() if entry.filename.endswith("data/0"))
        name, extra = np.frombuffer(data, "<u2", 2, entry.header_offset + 26)
    data[entry.header_offset + 30 + name + extra] ^= 1
    path.write_bytes(data)
    with refused("CRC-32"):
        read_weights(path)


def test_no_such_file(tmp_path):
    with refused("missing.pt"):
        read_weights(tmp_path / "missing.pt")
    with refused("folder"):
        read_weights(tmp_path)
