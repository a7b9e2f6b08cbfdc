"""How the archives of CIFAR become a TFDS data set without TensorFlow.

TFDS reads its data sets without TensorFlow, but its extraction of archives, its builder
of CIFAR and its encoder of images import it (tensorflow/datasets issue 11058). The
builder here differs from TFDS's in that alone: Python's tarfile reads the archive, and
Pillow writes the images as PNG.
"""

import io
import os
import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np

_IMAGE_SHAPE = (3, 32, 32)  # In the archive channels come first.


def create_builder(tfds: Any, stock: Any) -> Any:
    """Makes a builder that writes the data set that TFDS's own builder reads.

    Args:
      tfds: the module tensorflow_datasets.
      stock: TFDS's builder of `cifar10` or `cifar100`, with its data_dir.

    Returns:
      A `tfds.core.DatasetBuilder` of the same name, version, features and data_dir, for
      array_record files.
    """

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Generates examples from the archive that `stock` would download."""

        name = stock.name
        VERSION = stock.version
        url_infos = stock.url_infos

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                description=stock.info.description,
                features=stock.info.features,
                supervised_keys=stock.info.supervised_keys,
                homepage=stock.info.homepage,
                citation=stock.info.citation,
            )

        def _split_generators(self, dl_manager):
            (url,) = self.url_infos
            archive = dl_manager.download(url)
            features = self.info.features
            for key, names in zip(
                _label_keys(features), _read_class_names(archive), strict=True
            ):
                features[key].names = names
            return {
                split: self._generate_examples(archive, split)
                for split in ("train", "test")
            }

        def _generate_examples(self, archive, split):
            return _read_examples(archive, split, _label_keys(self.info.features))

    data_dir = os.path.dirname(os.path.dirname(stock.data_dir))
    return Builder(data_dir=data_dir, file_format="array_record")


def _label_keys(features: Any) -> list[str]:
    """Returns the labels of an example in the order of the archive's bytes."""
    return [key for key in ("coarse_label", "label") if key in features]


def _read_class_names(archive: os.PathLike) -> list[list[str]]:
    """Reads a list of names per label key: files `*meta.txt` or `*label_names.txt`."""
    with tarfile.open(archive) as tar:
        files = [
            name
            for name in sorted(tar.getnames())
            if name.endswith(("meta.txt", "label_names.txt"))
        ]
        return [tar.extractfile(name).read().decode().split() for name in files]


def _read_examples(
    archive: os.PathLike, split: str, label_keys: list[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields numbered examples: a byte per label, then the pixels channel by channel.

    The files of the test split begin with `test`, all others with data are for
    training.
    """
    num_labels = len(label_keys)
    index = 0
    with tarfile.open(archive) as tar:
        for name in sorted(tar.getnames()):
            is_test = os.path.basename(name).startswith("test")
            if not name.endswith(".bin") or is_test != (split == "test"):
                continue
            content = np.frombuffer(tar.extractfile(name).read(), np.uint8)
            records = content.reshape(-1, num_labels + np.prod(_IMAGE_SHAPE))
            for record in records:
                example = dict(zip(label_keys, record[:num_labels], strict=True))
                example["id"] = f"{split}_{index:05d}"
                example["image"] = _encode_png(record[num_labels:])
                yield index, example
                index += 1


def _encode_png(pixels: np.ndarray) -> bytes:
    """Compresses one image without loss, as TFDS stores it."""
    import PIL.Image

    encoded = io.BytesIO()
    image = pixels.reshape(_IMAGE_SHAPE).transpose(1, 2, 0)
    PIL.Image.fromarray(image).save(encoded, format="PNG")
    return encoded.getvalue()
