"""CIFAR through TFDS: reading, preparing from an archive, and the failures."""

import dataclasses
import functools
import hashlib
import http.server
import io
import os
import pathlib
import sys
import tarfile
import threading
import time
import types

import numpy as np
import pytest

from fdg_jax import data
from fdg_jax.data import cifar

tensorflow_datasets = pytest.importorskip("tensorflow_datasets")

TFDS_DIR = os.environ.get("FDG_TFDS_DIR")
_LAYOUTS = {
    "cifar10": {
        "folder": "cifar-10-batches-bin",
        "train": [f"data_batch_{i}.bin" for i in range(1, 6)],
        "test": ["test_batch.bin"],
        "names": {"batches.meta.txt": 10},
        "num_labels": 1,
    },
    "cifar100": {
        "folder": "cifar-100-binary",
        "train": ["train.bin"],
        "test": ["test.bin"],
        "names": {"fine_label_names.txt": 100, "coarse_label_names.txt": 20},
        "num_labels": 2,
    },
}


@pytest.fixture
def no_network(monkeypatch):
    """Resolves no host name, as on a machine without a network."""

    def refuse(*args, **kwargs):
        raise OSError("no network in this test")

    for variable in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.upper(), raising=False)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


def write_archive(path, name):
    """Writes a tiny archive in CIFAR's format; returns images and labels by split."""
    layout = _LAYOUTS[name]
    rng = np.random.default_rng(0)
    content = {"train": ([], []), "test": ([], [])}
    with tarfile.open(path, "w:gz") as tar:

        def add(file, payload):
            info = tarfile.TarInfo(f"{layout['folder']}/{file}")
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))

        for split in ("test", "train"):
            for file in layout[split]:
                images = rng.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
                labels = rng.integers(0, 10, (3, layout["num_labels"]), dtype=np.uint8)
                pixels = images.transpose(0, 3, 1, 2).reshape(3, -1)
                add(file, np.concatenate([labels, pixels], axis=1).tobytes())
                content[split][0].extend(images)
                content[split][1].extend(labels[:, -1])
        for file, count in layout["names"].items():
            add(file, "".join(f"{file[0]}{i}\n" for i in range(count)).encode())
    return content


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Serves a folder on this machine; returns the folder and its address."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(
        http.server.SimpleHTTPRequestHandler, directory=os.fspath(folder)
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def served_builder(name, data_dir, url, archive):
    """TFDS's builder with another address, and checksum, of its archive."""
    stock = tensorflow_datasets.builder(
        name, data_dir=data_dir, file_format="array_record"
    )
    (original,) = stock.url_infos.values()
    checksum = hashlib.sha256(archive.read_bytes()).hexdigest()
    info = dataclasses.replace(original, size=archive.stat().st_size, checksum=checksum)
    return types.SimpleNamespace(
        name=stock.name,
        version=stock.version,
        info=stock.info,
        data_dir=stock.data_dir,
        url_infos={url: info},
    )


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_an_archive_is_prepared_and_read_back(name, serve, tmp_path):
    """The project does not install TensorFlow, so this does without it."""
    folder, address = serve
    archive = folder / f"{name}.tar.gz"
    content = write_archive(archive, name)
    data_dir = tmp_path / "tfds"
    stock = served_builder(name, data_dir, f"{address}/{archive.name}", archive)
    cifar.create_builder(tensorflow_datasets, stock).download_and_prepare(
        download_dir=tmp_path / "downloads"
    )

    dataset = data.load(name, data_dir)
    assert dataset.num_classes == (10 if name == "cifar10" else 100)
    assert (dataset.padding, dataset.flip) == (4, True)
    for split, (images, labels) in content.items():
        read = getattr(dataset, split)
        # TFDS stores a split in an order of its own.
        assert sorted(
            (image.tobytes(), int(label))
            for image, label in zip(read.images, read.labels, strict=True)
        ) == sorted(
            (image.tobytes(), int(label))
            for image, label in zip(images, labels, strict=True)
        )
    features = tensorflow_datasets.builder(name, data_dir=data_dir).info.features
    assert features["label"].int2str(3) == ("b3" if name == "cifar10" else "f3")
    if name == "cifar100":
        assert features["coarse_label"].int2str(3) == "c3"


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_not_there_and_no_network_says_what_to_do_and_leaves_nothing(
    name, tmp_path, no_network, monkeypatch
):
    data_dir = tmp_path / "deep" / "tfds"
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # nor does TFDS leave any
    start = time.perf_counter()
    with pytest.raises(ValueError) as error:
        data.load(name, data_dir)
    assert time.perf_counter() - start < 30
    message = str(error.value)
    for part in (name, str(data_dir), "python -c", "configs/digits.py"):
        assert part in message
    assert "\n" not in message
    assert isinstance(error.value.__cause__, OSError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("data_dir", [".", "deep/and/new"])
def test_a_failed_download_leaves_only_what_was_there(data_dir, tmp_path, monkeypatch):
    kept = [tmp_path / "downloads" / "mine", tmp_path / "cifar10" / "1.0.0" / "old"]
    for path in kept:
        path.parent.mkdir(parents=True)
        path.write_text("keep")
    before = sorted(tmp_path.rglob("*"))
    # The host answers, and then the download breaks.
    monkeypatch.setattr("requests.head", lambda *args, **kwargs: None)

    def half_a_download(tfds, builder):
        def download_and_prepare(download_dir, download_config):
            pathlib.Path(download_dir, "half").write_text("half")
            pathlib.Path(builder.data_dir).parent.mkdir(exist_ok=True)
            raise OSError("connection lost")

        return types.SimpleNamespace(download_and_prepare=download_and_prepare)

    monkeypatch.setattr(cifar, "create_builder", half_a_download)
    with pytest.raises(ValueError, match="connection lost"):
        data.load("cifar10", tmp_path / data_dir)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder "around", in it TFDS's directory "tfds" with a data set in it."""
    around = tmp_path_factory.mktemp("around")
    info = around / "tfds" / "cifar10" / "3.0.2" / "dataset_info.json"
    info.parent.mkdir(parents=True)
    info.write_text("{}")
    return around


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("cifar10", "."),
        ("cifar10", "tfds/cifar10"),
        ("cifar10", "tfds/cifar10/3.0.2"),
        ("cifar100", "tfds/cifar10"),
    ],
)
def test_a_folder_too_deep_or_too_shallow_is_refused_with_the_right_one(
    prepared, no_network, name, given
):
    with pytest.raises(ValueError) as error:
        data.load(name, prepared / given)
    message = str(error.value)
    assert f"got {prepared / given}, " in message
    assert message.endswith(f"; give data_dir={prepared / 'tfds'}")


def test_a_new_folder_beside_a_data_set_is_not_refused(prepared, no_network):
    for data_dir in (prepared / "new", prepared / "tfds" / "new"):
        with pytest.raises(ValueError, match="could not be downloaded"):
            data.load("cifar10", data_dir)


def test_files_of_another_format_are_refused(tmp_path):
    version = tensorflow_datasets.builder("cifar10", data_dir=tmp_path).version
    folder = tmp_path / "cifar10" / str(version)
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text("")
    with pytest.raises(ValueError, match="array_record.*another data_dir") as error:
        data.load("cifar10", tmp_path)
    assert str(tmp_path) in str(error.value)
    assert error.value.__cause__ is not None
    assert (folder / "dataset_info.json").exists()


@pytest.mark.parametrize("package", ["PIL", "tensorflow_datasets", "array_record"])
def test_a_missing_package_is_named_with_the_way_to_install_it(
    package, tmp_path, monkeypatch
):
    for module in list(sys.modules):
        if module == package or module.startswith(f"{package}."):
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"package {package}.*pip install .*Pillow"):
        data.load("cifar10", tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(
    not (TFDS_DIR and os.path.isdir(os.path.join(TFDS_DIR, "cifar10"))),
    reason="FDG_TFDS_DIR names no directory with TFDS's cifar10",
)
def test_real_cifar10_is_what_tfds_decodes():
    dataset = data.load("cifar10", TFDS_DIR)
    assert (len(dataset.train), len(dataset.test)) == (50_000, 10_000)
    assert dataset.image_shape == (32, 32, 3)
    np.testing.assert_array_equal(np.bincount(dataset.train.labels), np.full(10, 5000))
    np.testing.assert_array_equal(np.bincount(dataset.test.labels), np.full(10, 1000))
    # The statistics everybody uses, to what a re-encoding can change.
    np.testing.assert_allclose(dataset.mean, [0.4914, 0.4822, 0.4465], atol=2e-3)
    np.testing.assert_allclose(dataset.std, [0.2470, 0.2435, 0.2616], atol=4e-3)
    builder = tensorflow_datasets.builder("cifar10", data_dir=TFDS_DIR)
    source = builder.as_data_source("test")
    for i in (0, 1, 4999, 9999):
        np.testing.assert_array_equal(dataset.test.images[i], source[i]["image"])
        assert dataset.test.labels[i] == source[i]["label"]
