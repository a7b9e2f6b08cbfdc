"""CIFAR through TensorFlow Datasets (TFDS), without TensorFlow.

TFDS downloads and prepares a data set once, as array_record files; here they are read
and decoded with Pillow into one uint8 array per split.
"""

import contextlib
import glob
import io
import os
import pathlib
import re
import tempfile
import textwrap
from collections.abc import Iterator
from typing import Any

import numpy as np
import tqdm

from fdg_jax import folders
from fdg_jax.data import cifar
from fdg_jax.data.dataset import Dataset, Split

_CONNECT_SECONDS = 10
_CHUNK = 1000  # Images read at a time.


def load(name: str, data_dir: str | os.PathLike | None = None) -> Dataset:
    """Loads `cifar10` or `cifar100`, which TFDS prepares if it is not there yet.

    Args:
      name: the data set's name in TFDS.
      data_dir: the directory in which TFDS keeps data sets; None is its default.

    Returns:
      The data set, with CIFAR's usual augmentation: crops by 4 pixels, and flips.

    Raises:
      ValueError: a Python package is missing, or `data_dir` is a folder too deep or too
        shallow, or the data set cannot be read, or it is not there and cannot be
        downloaded; then nothing is left behind.
    """
    tfds = _import_tfds(name)
    if data_dir is not None:
        data_dir = os.path.abspath(folders.local(data_dir))
        if re.search(r"[*?[\ud800-\udfff]", data_dir):
            raise ValueError(
                f"TFDS reads no folder whose path has *, ? or [ in it or is not UTF-8; "
                f"got the data_dir {data_dir!r}; rename it, or name a link to it"
            )
        _check_level(name, data_dir)
    with _reading(name, data_dir), _without_bucket(tfds):
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    if not builder.is_prepared():
        _prepare(tfds, builder)
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    with _reading(name, builder.data_path):
        return Dataset(
            name=name,
            train=_read(tfds, builder, "train"),
            test=_read(tfds, builder, "test"),
            num_classes=builder.info.features["label"].num_classes,
            padding=4,
            flip=True,
        )


def _import_tfds(name: str) -> Any:
    """Imports TFDS, and the packages it needs here but does not always install."""
    try:
        import array_record.python.array_record_data_source  # noqa: F401
        import importlib_resources  # noqa: F401
        import PIL.Image  # noqa: F401
        import tensorflow_datasets
    except ImportError as error:
        raise ValueError(
            f"the data set {name} needs the Python package {error.name}: pip install "
            "tensorflow-datasets array_record importlib_resources Pillow; the data set "
            "digits (configs/digits.py) needs none of them"
        ) from error
    return tensorflow_datasets


def _check_level(name: str, data_dir: str) -> None:
    """Refuses a folder inside TFDS's directory, or the one around it.

    Raises:
      ValueError: it is one; names the directory.
    """

    def found(pattern):
        return sorted(glob.glob(f"{pattern}/dataset_info.json", root_dir=data_dir))

    if found(f"{name}/*"):
        return
    if found("."):  # a version
        right = os.path.dirname(os.path.dirname(data_dir))
    elif found("*"):  # a data set
        right = os.path.dirname(data_dir)
    elif below := found(f"*/{name}/*"):
        right = os.path.join(data_dir, below[0].split(os.sep)[0])
    else:
        return
    raise ValueError(
        f"data_dir must be the folder in which TFDS has a folder per data set, such as "
        f"{name}/; got {data_dir}, but that folder is {right}; give data_dir={right}"
    )


def _without_bucket(tfds: Any) -> Any:
    """Keeps TFDS from looking in its bucket for what is not there.

    It is off anyway, but leaves an empty folder where the system has temporary files.
    """
    from unittest import mock

    return mock.patch.object(tfds.core.DatasetInfo, "initialize_from_bucket")


@contextlib.contextmanager
def _reading(name: str, where: str | os.PathLike | None) -> Iterator[None]:
    """Says in a ValueError which data set it was that could not be read."""
    try:
        yield
    except Exception as error:
        place = "TFDS's default directory" if where is None else os.fspath(where)
        raise ValueError(
            f"{name} in {place} cannot be read as a TFDS data set of array_record "
            f"files ({type(error).__name__}: {error}); remove it to have it prepared "
            "again, or use another data_dir"
        ) from error


def _read(tfds: Any, builder: Any, split: str) -> Split:
    """Reads and decodes a split: image by image, so little beyond the result is held.

    Pillow itself decodes 32x32 pixels faster than threads can take turns, and in half
    the time of TFDS's feature decoder around it.
    """
    import PIL.Image

    raw = {"image": tfds.decode.SkipDecoding()}
    source = builder.as_data_source(split, decoders=raw)
    shape = builder.info.features["image"].shape
    images = np.empty((len(source), *shape), np.uint8)
    labels = np.empty(len(source), np.int32)
    with tqdm.tqdm(
        total=len(source), desc=f"{builder.name} {split}", unit=" images", leave=False
    ) as progress:
        for start in range(0, len(source), _CHUNK):
            positions = range(start, min(start + _CHUNK, len(source)))
            for i, example in zip(
                positions, source.__getitems__(positions), strict=True
            ):
                with PIL.Image.open(io.BytesIO(example["image"])) as image:
                    images[i] = image
                labels[i] = example["label"]
            progress.update(len(positions))
    return Split(images, labels)


def _prepare(tfds: Any, builder: Any) -> None:
    """Downloads and prepares a data set, or fails and leaves nothing behind."""
    place = pathlib.Path(builder.data_path).parent
    root = place.parent
    created = [path for path in (place, root, *root.parents) if not path.exists()]
    try:
        _check_connection(builder)
        root.mkdir(parents=True, exist_ok=True)
        # A directory of its own: removing it cannot touch another run's download.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as download_dir:
            with _without_bucket(tfds):
                own = cifar.create_builder(tfds, builder)
            own.download_and_prepare(
                download_dir=download_dir,
                download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            )
    except Exception as error:
        raise ValueError(
            f"{builder.name} is not in {root} and could not be downloaded and prepared "
            f"there ({type(error).__name__}: {textwrap.shorten(str(error), 120)}); "
            'where there is a network run `python -c "from fdg_jax import data; '
            f"data.load('{builder.name}', '{root}')\"` and copy {place} if need be; "
            "configs/digits.py needs no download"
        ) from error
    finally:
        for path in created:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def _check_connection(builder: Any) -> None:
    """Raises OSError at once where TFDS would retry for minutes."""
    import requests

    for url in builder.url_infos:
        requests.head(url, timeout=_CONNECT_SECONDS)
