"""Weights files of every published format; none of them runs anything."""

import argparse
import os
import pickle
import sys
import types

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mapet.errors import MapetError
from mapet.tokenizer.checkpoint import read_weights

WEIGHTS = {"a.weight": torch.randn(3, 4), "a.bias": torch.randn(3).half(), "steps": torch.tensor(7)}


def same(found):
    assert found.keys() == WEIGHTS.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in WEIGHTS.items())


def test_safetensors(tmp_path):
    save_file(WEIGHTS, tmp_path / "w.safetensors")
    same(read_weights(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_state_dicts(legacy, wrapper, prefix, tmp_path):
    content = {prefix + name: value for name, value in WEIGHTS.items()}
    if wrapper:
        more = {
            "epoch": 3,
            "args": argparse.Namespace(lr=1e-3, name="x"),
            "optimizer": {"state": {}, "param_groups": [{}]},
        }
        content = {wrapper: content} | more
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    same(read_weights(tmp_path / "w.pth"))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 3)
        self.blocks = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.BatchNorm2d(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_torchscript(tmp_path):
    net = Net().half()
    torch.jit.save(torch.jit.script(net), tmp_path / "w.pt")
    found = read_weights(tmp_path / "w.pt")
    expected = net.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_whole_pickled_module_of_a_package_that_is_not_there(tmp_path, monkeypatch):
    package = types.ModuleType("dall_e.encoder")
    net = type("Encoder", (Net,), {"__module__": "dall_e.encoder"})()
    package.Encoder = type(net)
    monkeypatch.setitem(sys.modules, "dall_e", types.ModuleType("dall_e"))
    monkeypatch.setitem(sys.modules, "dall_e.encoder", package)
    torch.save(net, tmp_path / "encoder.pkl")
    monkeypatch.undo()
    found = read_weights(tmp_path / "encoder.pkl")
    assert found.keys() == net.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in net.state_dict().items())


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_code_is_refused_and_not_run(legacy, nested, tmp_path):
    content = {"state_dict": {**WEIGHTS, "x": Evil(tmp_path / "ran")}} if nested else Evil(tmp_path / "ran")
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(MapetError, match=r"w\.pth"):
        read_weights(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()
    if not legacy:
        with pytest.raises(MapetError, match=r"mkdir, which is code, not weights: it was not run"):
            read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("module", ["builtins", "torch.nn.modules.module", "numpy.f2py", "torch.hub"])
def test_no_global_of_a_file_is_imported_or_called(module, tmp_path):
    """Even where a name is one of a module whose classes are replaced."""
    names = {"builtins": "eval", "torch.hub": "load"}
    pickled = b"\x80\x02c" + f"{module}\n{names.get(module, 'exec')}\n".encode() + b"X\x04\x00\x00\x001/0 \x85R."
    import zipfile

    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3")
    with pytest.raises(MapetError, match=r"which is code|holds no weights"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize(
    "kind", ["empty", "text", "truncated zip", "truncated legacy", "truncated safetensors", "zip", "list"]
)
def test_other_files(kind, tmp_path):
    path = tmp_path / "w.pth"
    if kind == "truncated safetensors":
        save_file(WEIGHTS, path)
    elif kind == "list":
        torch.save([1, 2], path)
    else:
        torch.save(WEIGHTS, path, _use_new_zipfile_serialization="legacy" not in kind)
    data = path.read_bytes()
    data = {"empty": b"", "text": b"not weights at all", "zip": b"PK\x05\x06" + bytes(18), "list": data}.get(
        kind, data[:-60]
    )
    path.write_bytes(data)
    with pytest.raises(MapetError, match=r"w\.pth: "):
        read_weights(path)


def test_missing_file(tmp_path):
    with pytest.raises(MapetError, match="does not exist"):
        read_weights(tmp_path / "w.pth")


def test_plain_pickles_are_refused(tmp_path):
    (tmp_path / "w.pth").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(MapetError):
        read_weights(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()
