"""jaxlimit.data against files that are built here byte by byte from the published formats.

Where a value is expected at a place, the place is computed from the format (offset in the file), not by
reshaping. The real files are looked for under $JAXLIMIT_DATA; the facts asserted about them are published.
"""

import gzip
import hashlib
import os
import pickle
import struct
import sys

import numpy as np
import pytest

from jaxlimit import data
from jaxlimit.data import cifar, mnist
from jaxlimit.data.pickles import load_restricted

# ---- arrays ----------------------------------------------------------------------------------------------


def test_normalize_matches_the_formula_pixel_by_pixel():
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 2), np.uint8)
    mean, std = (0.2, 0.7), (0.5, 0.1)
    normalized = data.normalize(images, mean, std)
    assert normalized.dtype == np.float32
    for (n, h, w, c), value in np.ndenumerate(images):
        np.testing.assert_allclose(normalized[n, h, w, c], (value / 255 - mean[c]) / std[c], atol=2e-6)


def test_normalize_leaves_its_input_alone_and_returns_contiguous_memory():
    images = np.random.default_rng(0).integers(0, 256, (3, 2, 4, 5), np.uint8)
    before = images.copy()
    normalized = data.normalize(images.transpose(0, 2, 3, 1), (0.5, 0.5), (0.5, 0.5))
    np.testing.assert_array_equal(images, before)
    assert normalized.flags.c_contiguous


@pytest.mark.parametrize(
    ("images", "mean", "std", "message"),
    [
        (np.zeros((2, 3, 3, 1), np.float32), (0.5,), (0.5,), "must be uint8"),
        (np.zeros((2, 3, 3), np.uint8), (0.5,), (0.5,), r"\(N, H, W, C\)"),
        (np.zeros((2, 3, 3, 3), np.uint8), (0.5,), (0.5,), "3 channels"),
        (np.zeros((2, 3, 3, 1), np.uint8), (0.5,), (0.5, 0.5), "1 channels"),
        (np.zeros((2, 3, 3, 1), np.uint8), (0.5,), (0.0,), "positive"),
        (np.zeros((2, 3, 3, 1), np.uint8), (np.nan,), (1.0,), "finite"),
    ],
)
def test_normalize_refuses(images, mean, std, message):
    with pytest.raises(ValueError, match=message):
        data.normalize(images, mean, std)


def test_flatten_channel_first_places_every_pixel():
    images = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    flat = data.flatten_channel_first(images)
    assert flat.shape == (2, 60)
    for (n, h, w, c), value in np.ndenumerate(images):
        assert flat[n, (c * 3 + h) * 4 + w] == value
    with pytest.raises(ValueError, match=r"\(2, 60\)"):
        data.flatten_channel_first(flat)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_labels": np.array([0, 1], np.int32)}, "same number"),
        ({"train_labels": np.zeros((3, 1), np.int32)}, r"shape \(N,\)"),
        ({"test_images": np.zeros((0, 4), np.float32), "test_labels": np.zeros(0, np.int32)}, "N > 0"),
        ({"test_images": np.zeros((3, 5), np.float32)}, "one shape"),
        ({"train_labels": np.array([0, 1, 2], np.int32)}, r"\[0, 2\), found values from 0 to 2"),
        ({"test_labels": np.array([0, -1, 1], np.int32)}, "from -1 to 1"),
        ({"test_labels": np.array([0.0, 1.0, 1.0])}, "float64"),
    ],
)
def test_dataset_refuses(changes, message):
    images, labels = np.zeros((3, 4), np.float32), np.array([0, 1, 1], np.int32)
    fields = {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}
    data.Dataset(**fields, num_classes=2, name="toy")
    with pytest.raises(ValueError, match=message):
        data.Dataset(**fields | changes, num_classes=2, name="toy")


# ---- folders ---------------------------------------------------------------------------------------------


def test_data_folder_prefers_the_folder_that_is_given(tmp_path, monkeypatch):
    (tmp_path / "mnist").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("JAXLIMIT_DATA", str(tmp_path))
    assert data.data_folder("mnist") == tmp_path / "mnist"
    assert data.data_folder("mnist", tmp_path / "elsewhere") == tmp_path / "elsewhere"


@pytest.mark.parametrize("value", [None, ""])
@pytest.mark.parametrize(
    ("load", "layout"),
    [
        (data.load_mnist, "train-images-idx3-ubyte"),
        (data.load_fashion_mnist, "train-images-idx3-ubyte"),
        (data.load_cifar10, "cifar-10-batches-bin"),
        (data.load_cifar100, "cifar-100-python"),
        (data.load_tiny_imagenet, "tiny-imagenet-200"),
    ],
)
def test_no_folder_says_what_to_do(load, layout, value, monkeypatch):
    if value is None:
        monkeypatch.delenv("JAXLIMIT_DATA", raising=False)
    else:
        monkeypatch.setenv("JAXLIMIT_DATA", value)
    with pytest.raises(FileNotFoundError, match=rf"JAXLIMIT_DATA is not set.*official.*home page.*{layout}"):
        load()


def test_data_folder_refuses(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*absent.*binary version"):
        data.data_folder("cifar10", tmp_path / "absent")
    names = "mnist, fashion-mnist, cifar10, cifar100, tiny-imagenet"
    with pytest.raises(ValueError, match=f"{names}, got 'imagenet'"):
        data.data_folder("imagenet", tmp_path)


# ---- digits ----------------------------------------------------------------------------------------------


def test_digits_are_split_without_loss_or_overlap():
    from sklearn.datasets import load_digits

    digits = data.load_digits()
    assert digits.train_images.shape == (1438, 64)
    assert digits.test_images.shape == (359, 64)
    assert digits.train_images.dtype == digits.test_images.dtype == np.float32
    assert digits.train_labels.dtype == digits.test_labels.dtype == np.int32
    assert (digits.train_images.min(), digits.train_images.max()) == (0, 1)
    images = np.concatenate([digits.train_images, digits.test_images])
    labels = np.concatenate([digits.train_labels, digits.test_labels])
    features, targets = load_digits(return_X_y=True)
    ours = sorted(map(tuple, np.column_stack([images * 16, labels]).tolist()))
    theirs = sorted(map(tuple, np.column_stack([features, targets]).tolist()))
    assert ours == theirs


def test_digits_split_depends_on_the_seed_only():
    first, again, other = data.load_digits(), data.load_digits(seed=0), data.load_digits(seed=1)
    np.testing.assert_array_equal(first.train_images, again.train_images)
    np.testing.assert_array_equal(first.test_labels, again.test_labels)
    assert not np.array_equal(first.train_images, other.train_images)


def test_digits_split_is_the_one_that_results_are_quoted_for():
    # NumPy may change the stream behind a seed between versions; results on "digits" would change with it.
    digits = data.load_digits()
    content = digits.train_labels.astype("<i4").tobytes() + digits.test_labels.astype("<i4").tobytes()
    assert hashlib.sha256(content).hexdigest()[:16] == "97637fbc28175aac"


@pytest.mark.parametrize("seed", [-1, 0.5, None])
def test_digits_refuse_a_seed(seed):
    with pytest.raises(ValueError, match="seed must be a non-negative integer"):
        data.load_digits(seed)


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r'pip install "jaxlimit\[cli\]"'):
        data.load_digits()


# ---- MNIST -----------------------------------------------------------------------------------------------

IMAGES, LABELS, TEST_IMAGES, TEST_LABELS = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def idx(shape, content, magic=None):
    return struct.pack(f">I{len(shape)}I", magic or 0x800 + len(shape), *shape) + content


@pytest.fixture
def small_mnist(tmp_path, monkeypatch):
    """Seven training and three test examples, whose checksums count as the official ones of both."""
    generator = np.random.default_rng(0)
    contents, shapes = {}, {}
    for images, labels, count in ((IMAGES, LABELS, 7), (TEST_IMAGES, TEST_LABELS, 3)):
        contents[images] = idx((count, 28, 28), generator.bytes(count * 784))
        contents[labels] = idx((count,), bytes(range(10 - count, 10)))
        shapes |= {images: (count, 28, 28), labels: (count,)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(mnist, "_SHAPES", shapes)
    for official in ("_MNIST_SHA256", "_FASHION_MNIST_SHA256"):
        checksums = tuple(hashlib.sha256(contents[name]).hexdigest() for name in shapes)
        monkeypatch.setattr(mnist, official, checksums)
    return tmp_path


def compress(path):
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()


@pytest.mark.parametrize(
    ("load", "name", "mean", "std"),
    [(data.load_mnist, "mnist", 0.1307, 0.3081), (data.load_fashion_mnist, "fashion-mnist", 0.2860, 0.3530)],
)
@pytest.mark.parametrize("compressed", [(), (LABELS,), (IMAGES, LABELS, TEST_IMAGES, TEST_LABELS)])
def test_mnist_places_every_byte(small_mnist, compressed, load, name, mean, std):
    raw = (small_mnist / IMAGES).read_bytes()
    for file in compressed:
        compress(small_mnist / file)
    dataset = load(small_mnist)
    assert dataset.name == name
    assert dataset.train_images.shape == (7, 28, 28, 1)
    assert dataset.test_images.shape == (3, 28, 28, 1)
    assert dataset.train_images.dtype == dataset.test_images.dtype == np.float32
    assert dataset.train_labels.dtype == np.int32
    np.testing.assert_array_equal(dataset.train_labels, range(3, 10))
    np.testing.assert_array_equal(dataset.test_labels, range(7, 10))
    for n, h, w in ((0, 0, 0), (0, 3, 17), (4, 27, 0), (6, 27, 27)):
        expected = (raw[16 + (n * 28 + h) * 28 + w] / 255 - mean) / std
        np.testing.assert_allclose(dataset.train_images[n, h, w, 0], expected, atol=1e-6)


@pytest.mark.parametrize("official", [mnist._MNIST_SHA256, mnist._FASHION_MNIST_SHA256])
def test_mnist_checksums_are_four_of_each(official):
    assert [len(bytes.fromhex(sha256)) for sha256 in official] == [32] * 4
    assert len({*mnist._MNIST_SHA256, *mnist._FASHION_MNIST_SHA256}) == 8


def test_fashion_mnist_is_not_mistaken_for_mnist(small_mnist, monkeypatch):
    monkeypatch.setattr(mnist, "_FASHION_MNIST_SHA256", ("0" * 64,) * 4)
    data.load_mnist(small_mnist)
    with pytest.raises(ValueError, match=rf"{IMAGES} is not the official file"):
        data.load_fashion_mnist(small_mnist)
    assert data.load_fashion_mnist(small_mnist, verify=False).name == "fashion-mnist"


def test_mnist_names_every_missing_file(small_mnist):
    (small_mnist / LABELS).unlink()
    (small_mnist / TEST_IMAGES).unlink()
    with pytest.raises(FileNotFoundError, match=rf"lacks {LABELS}, {TEST_IMAGES}\. Get the four official"):
        data.load_mnist(small_mnist)


def flipped(content, position):
    return content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :]


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (IMAGES, lambda _: b"", "truncated: it holds 0 bytes, expected 5504"),
        (IMAGES, lambda content: content[:15], "truncated: it holds 15 bytes, expected 5504"),
        (IMAGES, lambda content: content[:-1], "truncated: it holds 5503 bytes, expected 5504"),
        (TEST_LABELS, lambda content: content[:-1], "truncated: it holds 10 bytes, expected 11"),
        (IMAGES, lambda content: content + b"\0", "more than the expected 5504"),
        (IMAGES, lambda content: flipped(content, 2), "magic number 0x00000803, but starts with 0x0000f703"),
        (IMAGES, lambda _: idx((7000,), bytes(7000)), "idx file of images: .*a file of labels"),
        (LABELS, lambda _: idx((7, 28, 28), bytes(7 * 784)), "idx file of labels: .*a file of images"),
        (IMAGES, lambda _: idx((3, 28, 28), bytes(3 * 784)), r"shape \(3, 28, 28\), expected \(7, 28, 28\)"),
        (IMAGES, lambda _: idx((7, 14, 56), bytes(7 * 784)), r"shape \(7, 14, 56\)"),
        (LABELS, lambda _: b"<html>" * 9, "neither images nor labels"),
    ],
)
def test_mnist_refuses_a_damaged_file(small_mnist, name, damage, message, verify):
    path = small_mnist / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        data.load_mnist(small_mnist, verify=verify)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-9],  # in the middle of the data
        lambda content: content[:-3],  # all data are there, the trailing checksum is not
        lambda content: flipped(content, len(content) // 2),
        lambda content: content[:10] + b"\xff" + content[11:],  # a kind of block that does not exist
        lambda content: flipped(content, len(content) - 6),  # the trailing checksum itself
    ],
)
@pytest.mark.parametrize("name", [IMAGES, TEST_LABELS])
def test_mnist_refuses_damaged_compression(small_mnist, name, damage):
    compress(small_mnist / name)
    path = small_mnist / f"{name}.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{name}\.gz is truncated or corrupt"):
        data.load_mnist(small_mnist, verify=False)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name, content: (name.replace("-idx", ".idx"), content),
        lambda name, content: (f"{name.replace('-idx', '.idx')}.gz", gzip.compress(content)),
        lambda name, content: (f"{name}.gz", content),  # unpacked, under the old name
        lambda name, content: (name, gzip.compress(content)),  # packed, under the new one
    ],
)
def test_mnist_is_known_by_its_content_whatever_the_name_says(small_mnist, rename):
    expected = data.load_mnist(small_mnist)
    for name in (IMAGES, LABELS, TEST_IMAGES, TEST_LABELS):
        renamed, content = rename(name, (small_mnist / name).read_bytes())
        (small_mnist / name).unlink()
        (small_mnist / renamed).write_bytes(content)
    found = data.load_mnist(small_mnist)
    np.testing.assert_array_equal(found.train_images, expected.train_images)
    np.testing.assert_array_equal(found.test_labels, expected.test_labels)


def test_mnist_checksum_is_of_the_content_and_can_be_waived(small_mnist):
    path = small_mnist / IMAGES
    intact = data.load_mnist(small_mnist)
    path.write_bytes(flipped(path.read_bytes(), 16))
    with pytest.raises(ValueError, match=rf"{IMAGES} is not the official file.*SHA-256.*verify=False"):
        data.load_mnist(small_mnist)
    changed = data.load_mnist(small_mnist, verify=False)
    assert np.count_nonzero(changed.train_images != intact.train_images) == 1


def test_mnist_refuses_labels_out_of_range(small_mnist):
    (small_mnist / LABELS).write_bytes(idx((7,), bytes([0, 1, 2, 3, 4, 5, 10])))
    with pytest.raises(
        ValueError, match=rf"{LABELS}: labels must lie in \[0, 10\), found values from 0 to 10"
    ):
        data.load_mnist(small_mnist, verify=False)


# ---- CIFAR -----------------------------------------------------------------------------------------------

COUNTS = {"data_batch_1": 3, "data_batch_2": 1, "test_batch": 2}  # uneven on purpose


def batches(num_classes):
    generator = np.random.default_rng(1)
    return {
        name: (generator.integers(0, 256, (count, 3072), np.uint8), generator.integers(0, num_classes, count))
        for name, count in COUNTS.items()
    }


def binary_batch(pixels, labels):
    return b"".join(bytes([label]) + row.tobytes() for row, label in zip(pixels, labels, strict=True))


def python2_batch(pixels, labels, labels_key=b"labels"):
    """Write opcodes as Python 2 did: byte strings, NumPy's old module names, integers for flags."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    def integer(value):
        return b"J" + struct.pack("<i", value)

    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + text(b"|") + b"NNN" + integer(-1) + integer(-1) + b"K\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    array += b"(K\x01" + integer(pixels.shape[0]) + integer(pixels.shape[1]) + b"\x86" + dtype
    array += b"\x89T" + struct.pack("<i", pixels.size) + pixels.tobytes() + b"tb"
    numbers = b"](" + b"".join(integer(label) for label in labels.tolist()) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(labels_key) + numbers + b"u."


def python3_batch(pixels, labels, labels_key=b"labels", protocol=2):
    return pickle.dumps({b"data": pixels, labels_key: labels.tolist()}, protocol=protocol)


def write_version(folder, contents, labels_key=None):
    """Write the files and describe them, checksums included, as the loader's table does."""
    folder.mkdir()
    files = []
    for (name, content), count in zip(contents.items(), COUNTS.values(), strict=True):
        (folder / name).write_bytes(content)
        files.append(cifar._File(name, count, len(content), hashlib.sha256(content).hexdigest()))
    return cifar._Version(folder.name, tuple(files[:-1]), tuple(files[-1:]), labels_key)


@pytest.fixture
def small_cifar10(tmp_path, monkeypatch):
    """Write a small CIFAR-10 in one or both versions, which counts as the official one."""

    def write(*versions):
        table = []
        if "binary" in versions:
            contents = {f"{name}.bin": binary_batch(*batch) for name, batch in batches(10).items()}
            table.append(write_version(tmp_path / "cifar-10-batches-bin", contents))
        if "python" in versions:
            contents = {name: python2_batch(*batch) for name, batch in batches(10).items()}
            table.append(
                write_version(tmp_path / "cifar-10-batches-py", contents, cifar._CIFAR10_PYTHON.labels_key)
            )
        monkeypatch.setattr(cifar, "_CIFAR10_VERSIONS", tuple(table))
        return tmp_path

    return write


@pytest.mark.parametrize("version", ["binary", "python"])
def test_cifar10_places_every_byte(small_cifar10, version):
    dataset = data.load_cifar10(small_cifar10(version))
    assert dataset.train_images.shape == (4, 32, 32, 3)
    assert dataset.test_images.shape == (2, 32, 32, 3)
    assert dataset.train_images.dtype == np.float32
    assert dataset.train_labels.dtype == dataset.test_labels.dtype == np.int32
    written = batches(10)
    first, second = written["data_batch_1"], written["data_batch_2"]
    np.testing.assert_array_equal(dataset.train_labels, [*first[1], *second[1]])
    np.testing.assert_array_equal(dataset.test_labels, written["test_batch"][1])
    mean, std = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)
    for n, h, w, c in ((0, 0, 0, 0), (2, 5, 30, 1), (1, 31, 0, 2), (3, 31, 31, 2), (3, 0, 9, 0)):
        row = first[0][n] if n < 3 else second[0][0]
        expected = (row[c * 1024 + h * 32 + w] / 255 - mean[c]) / std[c]
        np.testing.assert_allclose(dataset.train_images[n, h, w, c], expected, atol=2e-6)


@pytest.mark.parametrize("version", [cifar._CIFAR10_BINARY, cifar._CIFAR10_PYTHON, cifar._CIFAR100_PYTHON])
def test_cifar_tables_are_consistent_with_the_published_format(version):
    files = version.train + version.test
    assert [sum(file.num_examples for file in split) for split in (version.train, version.test)] == [
        50_000,
        10_000,
    ]
    assert len({file.sha256 for file in files}) == len({file.name for file in files}) == len(files)
    for file in files:
        assert len(bytes.fromhex(file.sha256)) == 32
        excess = file.num_bytes - file.num_examples * 3073
        # A pickle holds the same pixels byte for byte, and more beside them.
        assert excess == 0 if version.labels_key is None else excess > 0


def test_cifar10_prefers_the_binary_version(small_cifar10):
    folder = small_cifar10("binary", "python")
    (folder / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"never opened")
    assert len(data.load_cifar10(folder).train_labels) == 4


def test_cifar100_reads_the_fine_labels(tmp_path, monkeypatch):
    written = batches(100)
    contents = {
        name: pickle.dumps(
            {b"data": pixels, b"fine_labels": labels.tolist(), b"coarse_labels": [0] * len(labels)}
        )
        for name, (pixels, labels) in written.items()
    }
    version = write_version(tmp_path / "cifar-100-python", contents, cifar._CIFAR100_PYTHON.labels_key)
    monkeypatch.setattr(cifar, "_CIFAR100_VERSIONS", (version,))
    dataset = data.load_cifar100(tmp_path)
    assert dataset.num_classes == 100
    np.testing.assert_array_equal(dataset.test_labels, written["test_batch"][1])
    expected = (written["test_batch"][0][1, 1024] / 255 - 0.487) / 0.256
    np.testing.assert_allclose(dataset.test_images[1, 0, 0, 1], expected, atol=2e-6)


@pytest.mark.parametrize(
    ("version", "file"),
    [("binary", "cifar-10-batches-bin/test_batch.bin"), ("python", "cifar-10-batches-py/data_batch_2")],
)
def test_cifar10_names_missing_files(small_cifar10, version, file):
    folder = small_cifar10(version)
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=rf"lacks {file}\. Get the official CIFAR-10 binary version"):
        data.load_cifar10(folder)


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (
            data.load_cifar10,
            "holds no cifar-10-batches-bin nor cifar-10-batches-py. Get the official CIFAR-10",
        ),
        (data.load_cifar100, "holds no cifar-100-python. Get the official CIFAR-100 Python version"),
    ],
)
def test_cifar_in_an_empty_folder_says_what_to_do(tmp_path, load, message):
    with pytest.raises(FileNotFoundError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda _: b"", "truncated: it holds 0 bytes, expected 9219"),
        (lambda content: content[:-1], "truncated: it holds 9218 bytes, expected 9219"),
        (lambda content: content + b"\0", "more than the expected 9219"),
    ],
)
def test_cifar10_refuses_a_binary_file_of_another_size(small_cifar10, damage, message, verify):
    folder = small_cifar10("binary")
    path = folder / "cifar-10-batches-bin" / "data_batch_1.bin"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"data_batch_1\.bin.*{message}"):
        data.load_cifar10(folder, verify=verify)


def test_cifar10_refuses_labels_out_of_range(small_cifar10):
    folder = small_cifar10("binary")
    path = folder / "cifar-10-batches-bin" / "data_batch_1.bin"
    path.write_bytes(b"\x0a" + path.read_bytes()[1:])
    with pytest.raises(ValueError, match=r"data_batch_1\.bin: labels must lie in \[0, 10\), found .* to 10"):
        data.load_cifar10(folder, verify=False)


@pytest.mark.parametrize(
    ("version", "file"),
    [("binary", "cifar-10-batches-bin/test_batch.bin"), ("python", "cifar-10-batches-py/test_batch")],
)
def test_cifar10_checksum_can_be_waived(small_cifar10, version, file):
    folder = small_cifar10(version)
    intact = data.load_cifar10(folder)
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(flipped(content, len(content) // 3))
    with pytest.raises(ValueError, match=rf"{file} is not the official file.*SHA-256.*verify=False"):
        data.load_cifar10(folder)
    changed = data.load_cifar10(folder, verify=False)
    assert np.count_nonzero(changed.test_images != intact.test_images) == 1


PIXELS, SOME_LABELS = batches(10)["data_batch_1"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated or corrupt pickle"),
        (python2_batch(PIXELS, SOME_LABELS)[:-1], "truncated or corrupt pickle"),
        (python2_batch(PIXELS, SOME_LABELS)[:-4000], "truncated or corrupt pickle"),
        (binary_batch(PIXELS, SOME_LABELS), "truncated or corrupt pickle"),
        (pickle.dumps([1, 2]), r"dictionary with b'data' and b'labels', found list"),
        (pickle.dumps({"data": 0, "labels": 0}), r"b'data' must be uint8 of shape .*found int"),
        (pickle.dumps({"pixels": 0}), r"found \[b'pixels'\]"),
        (python2_batch(PIXELS, SOME_LABELS, b"fine_labels"), r"found \[b'data', b'fine_labels'\]"),
        (python2_batch(PIXELS[:2], SOME_LABELS), r"uint8 of shape \(3, 3072\), found uint8 \(2, 3072\)"),
        (python3_batch(PIXELS.astype(np.int64), SOME_LABELS), r"found int64 \(3, 3072\)"),
        (pickle.dumps({b"data": PIXELS.tolist(), b"labels": [0, 1, 2]}), "found list"),
        (python3_batch(PIXELS.astype(np.float32), SOME_LABELS), "dtype 'f4', not of integers"),
        (python2_batch(PIXELS, SOME_LABELS[:2]), r"b'labels' must have shape \(3,\), found \(2,\)"),
        (python2_batch(PIXELS, np.array([0, -1, 2])), r"\[0, 10\), found values from -1 to 2"),
        (python3_batch(PIXELS, np.array([0.0, 1.0, 2.0])), "must be integers, got dtype float64"),
        (pickle.dumps({b"data": PIXELS, b"labels": [[0], [1, 2], 3]}, 2), "not a list of integers"),
    ],
)
def test_cifar10_refuses_a_pickle_of_something_else(small_cifar10, content, message):
    folder = small_cifar10("python")
    (folder / "cifar-10-batches-py" / "data_batch_1").write_bytes(content)
    with pytest.raises(ValueError, match=rf"data_batch_1.*{message}"):
        data.load_cifar10(folder, verify=False)


def test_truncated_pickle_reports_both_sizes(small_cifar10):
    folder = small_cifar10("python")
    path = folder / "cifar-10-batches-py" / "data_batch_1"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=rf"data_batch_1 is truncated: it holds {size - 1} bytes, expected {size}"
    ):
        data.load_cifar10(folder)


# ---- restricted pickles ----------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", [list, np.array, lambda labels: [np.int64(label) for label in labels]])
def test_cifar10_that_was_pickled_anew(small_cifar10, protocol, order, kind):
    folder = small_cifar10("python")
    expected = data.load_cifar10(folder)
    for name, (pixels, labels) in batches(10).items():
        batch = {"data": np.asarray(pixels, order=order), "labels": kind(labels), "filenames": ["a.png"]}
        (folder / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(batch, protocol))
    with pytest.raises(ValueError, match="verify=False if it was written anew on purpose"):
        data.load_cifar10(folder)
    found = data.load_cifar10(folder, verify=False)
    np.testing.assert_array_equal(found.train_images, expected.train_images)
    np.testing.assert_array_equal(found.train_labels, expected.train_labels)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("value", [np.float64(1.5), np.array([{}], object), np.array(["a"])])
def test_pickled_arrays_and_numbers_of_other_types_are_refused(protocol, value):
    with pytest.raises(ValueError, match="refused: the pickle asks for"):
        load_restricted(pickle.dumps({"data": value}, protocol))


@pytest.mark.parametrize("protocol", range(6))
def test_restricted_unpickling_agrees_with_pickle(protocol):
    value = {b"data": PIXELS, b"labels": [1, 2], b"counts": np.arange(3)[::-1], "name": ("batch", 0.5, None)}
    content = pickle.dumps(value, protocol)
    restricted, full = load_restricted(content), pickle.loads(content, encoding="bytes")
    assert list(restricted) == list(full) == list(value)
    assert restricted["name"] == value["name"]
    for key in (b"data", b"counts"):
        assert restricted[key].dtype == value[key].dtype
        np.testing.assert_array_equal(restricted[key], value[key])


def test_restricted_unpickling_reads_what_python_2_wrote():
    batch = load_restricted(python2_batch(PIXELS, SOME_LABELS))
    np.testing.assert_array_equal(batch[b"data"], PIXELS)
    assert batch[b"labels"] == SOME_LABELS.tolist()


class Malicious:
    """Pickles as a call of os.mkdir."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_malicious_pickle_is_refused_and_not_run(small_cifar10, tmp_path, protocol):
    folder = small_cifar10("python")
    target = tmp_path / "created by the pickle"
    content = pickle.dumps({b"data": Malicious(target), b"labels": []}, protocol)
    (folder / "cifar-10-batches-py" / "data_batch_1").write_bytes(content)
    with pytest.raises(ValueError, match=rf"data_batch_1: refused: the pickle asks for {os.name}\.mkdir"):
        data.load_cifar10(folder, verify=False)
    assert not target.exists()
    pickle.loads(content)  # the pickle does what it is accused of
    assert target.exists()


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"cbuiltins\neval\n(S'1'\ntR.", "builtins.eval"),
        (b"cnumpy\nload\n(S'x'\ntR.", "numpy.load"),
        (b"cnumpy\nndarray.tofile\n.", "numpy.ndarray.tofile"),
        (b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.", "numpy.ndarray.tofile"),
        (b"ccodecs\nencode\n.", "codecs.encode"),
        (b"c_codecs\nencode\n(Vx\nVrot13\ntR.", "encoding 'rot13'"),
        (b"cnumpy\ndtype\n(VO8\nI0\nI1\ntR.", "dtype 'O8'"),
    ],
)
def test_restricted_unpickling_names_what_it_refuses(content, name):
    with pytest.raises(ValueError, match=rf"^refused: .*{name}"):
        load_restricted(content)


# ---- the real files --------------------------------------------------------------------------------------


def real(load, name):
    if not os.environ.get("JAXLIMIT_DATA"):
        pytest.skip("JAXLIMIT_DATA is not set")
    try:
        data.data_folder(name)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return load()


@pytest.mark.slow
@pytest.mark.mnist
def test_real_mnist():
    dataset = real(data.load_mnist, "mnist")
    assert dataset.train_images.shape == (60_000, 28, 28, 1)
    assert dataset.test_images.shape == (10_000, 28, 28, 1)
    assert np.bincount(dataset.train_labels).tolist() == [
        5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949,
    ]  # fmt: skip
    assert np.bincount(dataset.test_labels).tolist() == [
        980,
        1135,
        1032,
        1010,
        982,
        892,
        958,
        1028,
        974,
        1009,
    ]
    raw = dataset.train_images.astype(np.float64) * 0.3081 + 0.1307
    np.testing.assert_allclose([raw.mean(), raw.std()], [0.1307, 0.3081], atol=1e-4)
    # The digit one is taller than wide: rows are rows.
    one = raw[dataset.train_labels == 1].mean(axis=0)[..., 0]
    assert np.count_nonzero(one.sum(axis=1) > 0.5) > np.count_nonzero(one.sum(axis=0) > 0.5)


def test_real_fashion_mnist():
    dataset = real(data.load_fashion_mnist, "fashion-mnist")
    assert np.bincount(dataset.train_labels).tolist() == [6000] * 10
    assert np.bincount(dataset.test_labels).tolist() == [1000] * 10
    raw = dataset.train_images.astype(np.float64) * 0.3530 + 0.2860
    np.testing.assert_allclose([raw.mean(), raw.std()], [0.2860, 0.3530], atol=1e-4)


@pytest.mark.slow
@pytest.mark.cifar10
def test_real_cifar10():
    dataset = real(data.load_cifar10, "cifar10")
    assert dataset.train_images.shape == (50_000, 32, 32, 3)
    assert dataset.test_images.shape == (10_000, 32, 32, 3)
    assert np.bincount(dataset.train_labels).tolist() == [5000] * 10
    assert np.bincount(dataset.test_labels).tolist() == [1000] * 10
    pixels = dataset.train_images.reshape(-1, 3)
    mean, std = data.CIFAR10_NORMALIZATION
    np.testing.assert_allclose(pixels.mean(axis=0, dtype=np.float64) * std + mean, mean, atol=1e-3)
    np.testing.assert_allclose(pixels.std(axis=0, dtype=np.float64) * std, std, atol=1e-3)
