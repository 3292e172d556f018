"""Bytes as disks, networks and people garble them."""

import random
from collections.abc import Iterator

VALUES = [
    b"\x00", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80", b"-1", b"1e999", b"NaN", b"Infinity", b"null", b"true",
    b"9" * 30, b"{", b"}", b"[" * 200, b'"', b"'", b",", b":", b"\n", b"\r\n", b"\t", b"../../", b"/etc/passwd", b"\xed\xa0\x80",
    b"&a", b"*a", b"<<: *a", b"!!python/object/apply:os.system", b"%s%n", b"\\u0000",
]  # fmt: skip


def mutations(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """`count` variants of `data`, each with one to four changes, always the same for a seed."""
    rng = random.Random(seed)
    for _ in range(count):
        changed = bytearray(data)
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            changed = _changed(changed, rng)
        yield bytes(changed)


def _changed(data: bytearray, rng: random.Random) -> bytearray:
    size = len(data)
    at = rng.randrange(size + 1)
    # Headers are short and decide most: half of the changes fall into the first 300 bytes.
    if rng.random() < 0.5:
        at = min(at, rng.randrange(301))
    kind = rng.choice(["flip", "byte", "cut", "drop", "insert", "over", "double", "swap", "zeros"])
    if kind == "cut":
        return data[:at]
    if kind == "insert":
        return data[:at] + rng.choice(VALUES) + data[at:]
    if not size:
        return data
    at = min(at, size - 1)
    end = min(size, at + rng.choice([1, 2, 4, 8, 64, 1000]))
    if kind == "flip":
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        data[at] = rng.randrange(256)
    elif kind == "over":
        value = rng.choice(VALUES)[: size - at]
        data[at : at + len(value)] = value
    elif kind == "drop":
        del data[at:end]
    elif kind == "double":
        data[at:at] = data[at:end]
    elif kind == "zeros":
        data[at:end] = bytes(end - at)
    else:
        other = rng.randrange(size)
        length = min(end - at, size - other)
        data[at : at + length], data[other : other + length] = data[other : other + length], data[at : at + length]
    return data
