"""Groups of images that belong on one side of a split: of one patient, volume or scene by their names, and files of equal bytes."""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np
from jaxtyping import Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from mapet.config.shared import GroupBy, is_url
from mapet.data.image_list import ImageList
from mapet.device import num_workers
from mapet.errors import MapetError, option


def find_groups(lists: Sequence[ImageList], group_by: GroupBy | None = None) -> list[Int[np.ndarray, " n"]]:
    """Number the groups of the images of some lists together: images of one name by `group_by`, and of equal bytes, have one number.

    Args:
        lists: e.g. of training and test images.
        group_by: see `group_names`; None: only files of equal bytes are a group.

    Returns:
        For each list the number of the group of each image.

    Raises:
        MapetError: an image has no name by `group_by`.
    """
    lengths = [len(images) for images in lists]
    keys: list[Sequence[bytes]] = [digest_files(lists)]
    if group_by is not None:
        keys.append([*chain.from_iterable(group_names(images, group_by) for images in lists)])
    edges, count = [], sum(lengths)
    for own in keys:
        first: dict[bytes, int] = {}
        edges += [(first.setdefault(key, index), index) for index, key in enumerate(own) if key]
    rows, columns = np.array(edges, np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(rows), bool), (rows, columns)), (count, count))
    return np.split(connected_components(graph, directed=False)[1], np.cumsum(lengths)[:-1])


def group_names(images: ImageList, group_by: GroupBy) -> list[bytes]:
    """Return the name of the group of each image.

    Args:
        images: the list.
        group_by: a number N, the name of the N-th folder of its path below the source, counted from 1; or a regular expression, what its
            first group, or without one the whole expression, finds in the path.

    Raises:
        MapetError: an image is in fewer folders, or the expression finds nothing in its path.
    """
    if isinstance(group_by, int):
        names = [[*image_id.split(b"/")[:-1], *[b""] * group_by][group_by - 1] for image_id in images.ids]
    else:
        pattern = re.compile(group_by.encode())
        found = [pattern.search(image_id) for image_id in images.ids]
        names = [match[min(1, pattern.groups)] or b"" if match else b"" for match in found]
    if b"" in names:
        index, wrong = names.index(b""), f"{names.count(b''):,} of {len(names):,} images have no group"
        raise MapetError(
            f"{option('group_by', group_by)}: {wrong}, e.g. {images.id(index)!r} of {images.root}: give a number of a folder that all "
            "images are in, or a pattern that all paths have", field="group_by", value=group_by,
        )  # fmt: skip
    return names


_digests: dict[tuple[tuple[str, str], ...], list[bytes]] = {}
"""Of the lists that this process has read: to read the files takes as long as an epoch, and a command asks several times."""


def digest_files(lists: Sequence[ImageList]) -> list[bytes]:
    """Return a hash of each image's bytes, for those that may equal another one's: only files of equal size are read, and no URL.

    Returns:
        A digest for each image of all lists in turn; b'' where no other one has its size, or it can't be read.
    """
    key = tuple((str(images.root), images.hash) for images in lists)
    if key in _digests:
        return _digests[key]
    sizes = np.concatenate([images.file_sizes for images in lists])
    _, inverse, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    places = [(images, index) for images in lists for index in range(len(images))]
    digests = [b""] * len(places)

    read = [
        place for place in np.flatnonzero(counts[inverse] > 1).tolist() if not is_url(os.fspath(places[place][0].root))
    ]
    with ThreadPoolExecutor(num_workers() + 1) as pool:
        for place, value in zip(
            read, pool.map(lambda place: places[place][0].digest(places[place][1]), read), strict=True
        ):
            digests[place] = value
    _digests[key] = digests
    return digests
