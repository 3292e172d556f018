"""Small files that once cost much: made here, as tests need them."""

import io
import struct
import tarfile
import zipfile
from pathlib import Path

import torch


def _torch_archive(path: Path, pickle: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {"data.pkl": pickle, "version": b"3\n", "byteorder": b"little"}.items():
            archive.writestr(f"a/{name}", content)
    return path


def dict_in_itself(path: Path) -> Path:
    """Weights: a dict that six of its keys lead back to."""
    keys = [b"state_dict", b"model", b"module", b"ema", b"params", b"teacher"]
    items = b"".join(b"X" + struct.pack("<I", len(key)) + key + b"h\0" for key in keys)
    return _torch_archive(path, b"\x80\x02}q\0(" + items + b"u.")


def dicts_in_dicts(path: Path) -> Path:
    """Weights: 60 dicts, each the three entries of the next: 3^60 ways."""
    nested: dict = {}
    for _ in range(60):
        nested = dict.fromkeys(("state_dict", "model", "module"), nested)
    torch.save(nested, path)
    return path


def modules_in_modules(path: Path) -> Path:
    """Weights: a module, 60 deep, each the three submodules of the next."""

    def text(value: bytes) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value

    inner = b"cx\nM\n)\x81}b"  # a stub without attributes
    for number in range(60):
        memo = struct.pack("<B", number)
        children = b"".join(text(name) + b"h" + memo for name in (b"a", b"b", b"c"))
        state = b"}(" + text(b"_parameters") + b"}" + text(b"_buffers") + b"}" + text(b"_modules")
        inner += b"q" + memo + b"0cx\nM\n)\x81" + state + b"}(" + children + b"u" + b"ub"
    return _torch_archive(path, b"\x80\x02" + inner + b".")


def compressed_weights(path: Path, values: int = 1 << 25) -> Path:
    """Weights: zeros, deflated by 1000."""
    stored = io.BytesIO()
    torch.save({"w": torch.zeros(values)}, stored)
    with zipfile.ZipFile(stored) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return path


def one_color_webp(path: Path, side: int = 16383) -> Path:
    """WebP: 30 bytes for 268 million pixels."""
    bits = [side - 1 >> i & 1 for i in range(14)] * 2 + [0] * 7
    bits += [1, 0, 0, 0] * 3 + [1, 0, 1, *[1] * 8] + [1, 0, 0, 0]
    bits += [0] * (-len(bits) % 8)
    data = bytes(sum(bit << j for j, bit in enumerate(bits[i : i + 8])) for i in range(0, len(bits), 8))
    chunk = b"VP8L" + struct.pack("<I", 1 + len(data)) + b"\x2f" + data
    chunk += b"\0" * (len(chunk) % 2)
    path.write_bytes(b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk)
    return path


def scans_jpeg(path: Path, side: int, scans: int = 120) -> Path:
    """Progressive JPEG: scans that say nothing, each a pass over all pixels."""

    def segment(marker: int, data: bytes) -> bytes:
        return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data

    def to_bytes(bits: str) -> bytes:
        bits += "1" * (-len(bits) % 8)
        return int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")

    blocks = (-(-side // 8)) ** 2
    head = segment(0xDB, b"\0" + b"\1" * 64) + segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + b"\1\x11\0")
    tables = segment(0xC4, b"\0\1" + bytes(15) + b"\0") + segment(0xC4, b"\x10\1" + bytes(15) + b"\xe0")
    first = segment(0xDA, b"\1\1\0\0\0\0") + to_bytes("0" * blocks)
    # Each code is a run of up to 2^15 - 1 blocks without anything.
    other = segment(0xDA, b"\1\1\0\1\x3f\0") + to_bytes(("0" + "1" * 14) * -(-blocks // (2**15 - 1)))
    path.write_bytes(b"\xff\xd8" + head + tables + first + other * (scans - 1) + b"\xff\xd9")
    return path


def _pax(kind: bytes, data: bytes) -> bytes:
    info = tarfile.TarInfo("header")
    info.type, info.size = kind, len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)


def _members(count: int) -> bytes:
    return b"".join(tarfile.TarInfo(f"{number}.jpg").tobuf(tarfile.USTAR_FORMAT) for number in range(count)) + bytes(
        10240
    )


def digits_tar(path: Path) -> Path:
    """Tar: an extended header that is a number of 120,000 digits."""
    path.write_bytes(_pax(tarfile.XHDTYPE, b"1" * 120_000) + _members(1))
    return path


def globals_tar(path: Path, entries: int = 8_000, members: int = 2_000) -> Path:
    """Tar: a global header of many entries, which apply to each of many members."""
    fixed = []
    for number in range(entries):
        text = f" K{number}=\n"
        length = len(text) + len(str(len(text)))
        length = len(text) + len(str(length))
        fixed.append(f"{length}{text}")
    path.write_bytes(_pax(tarfile.XGLTYPE, "".join(fixed).encode()) + _members(members))
    return path
