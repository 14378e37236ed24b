"""Loaders that decode images: Tiny ImageNet and data sets of the Hugging Face hub, both written by the tests.

Oracles: Pillow's own decoding of the same file with the normalisation written out, and arrays from which
lossless images are made. The hub itself is never asked.
"""

import io
import sys

import numpy as np
import pytest

from jaxlimit import data
from jaxlimit.data import tiny_imagenet
from jaxlimit.data.images import decode_image

Image = pytest.importorskip("PIL.Image")
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def encoded(pixels, format="PNG", **options):
    """Encode an array, or an image of Pillow."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


# ---- images ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3)])
@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_images_are_decoded_exactly(shape, format):
    pixels = noise(*shape)
    found = decode_image(encoded(pixels, format, lossless=True), where="image")
    # WebP has no grey images.
    channels = 3 if format == "WEBP" or len(shape) == 3 else 1
    np.testing.assert_array_equal(found, np.broadcast_to(pixels.reshape(4, 5, -1), (4, 5, channels)))


def test_palettes_masks_and_transparency_become_plain_pixels():
    colors = noise(4, 5, 3) // 128 * 255
    palette = Image.fromarray(colors).quantize(8)
    np.testing.assert_array_equal(decode_image(encoded(palette, "GIF"), where=""), colors)
    mask = Image.fromarray(colors[..., 0]).convert("1")
    np.testing.assert_array_equal(decode_image(encoded(mask), where=""), colors[..., :1])
    np.testing.assert_array_equal(decode_image(encoded(noise(4, 5, 4)), where=""), noise(4, 5, 4)[..., :3])


JPEG = encoded(noise(64, 64, 3), "JPEG")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated, corrupt or no image"),
        (b"<html>", "truncated, corrupt or no image"),
        (JPEG[:20], "truncated, corrupt or no image"),
        (JPEG[: len(JPEG) // 2], "truncated, corrupt or no image .*truncated"),
        (JPEG[2:], "truncated, corrupt or no image"),
        (encoded(noise(64, 64, 3))[:-30], "truncated, corrupt or no image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n", "truncated, corrupt or no image"),
        (encoded(noise(64, 63, 3), "JPEG"), r"must have \(height, width\) \(64, 64\), found \(64, 63\)"),
        (encoded(noise(64, 64).astype(np.uint16)), "8 bits per channel, found Pillow's mode 'I;16'"),
    ],
)
def test_damaged_and_unsuitable_images_are_refused(content, message):
    with pytest.raises(ValueError, match=f"^a file.*{message}"):
        decode_image(content, where="a file", size=(64, 64))


def test_decompression_bombs_are_refused_before_they_are_decoded(monkeypatch):
    bomb = encoded(np.zeros((300, 400), np.uint8))
    assert decode_image(bomb, where="a file").shape == (300, 400, 1)
    for limit in (100_000, 1_000):  # Pillow warns above its limit, and refuses above twice that
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match=r"a file .*DecompressionBomb"):
            decode_image(bomb, where="a file")


def test_missing_pillow_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r'pip install "jaxlimit\[data\]"'):
        decode_image(JPEG, where="a file")


# ---- Tiny ImageNet ---------------------------------------------------------------------------------------

WNIDS = ("n03", "n01", "n02")  # as in the official file, not sorted
NUM_TRAIN, NUM_VAL = 2, 1


@pytest.fixture
def small_tiny(tmp_path, monkeypatch):
    """Three classes in the official layout, which count as the official 200."""
    root = tmp_path / "tiny-imagenet-200"
    (root / "val" / "images").mkdir(parents=True)
    (root / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    annotations = []
    for seed, wnid in enumerate(WNIDS):
        folder = root / "train" / wnid / "images"
        folder.mkdir(parents=True)
        (folder.parent / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t62\t62\n")
        for number in range(NUM_TRAIN):
            shape = (64, 64) if number == 0 else (64, 64, 3)
            (folder / f"{wnid}_{number}.JPEG").write_bytes(
                encoded(noise(*shape, seed=10 * seed + number), "JPEG")
            )
        (root / "val" / "images" / f"val_{seed}.JPEG").write_bytes(
            encoded(noise(64, 64, 3, seed=100 + seed), "JPEG")
        )
        annotations.append(f"val_{seed}.JPEG\t{wnid}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(annotations))
    monkeypatch.setattr(tiny_imagenet, "_NUM_CLASSES", len(WNIDS))
    monkeypatch.setattr(tiny_imagenet, "_NUM_TRAIN", NUM_TRAIN)
    monkeypatch.setattr(tiny_imagenet, "_NUM_TEST", NUM_VAL)
    return root


def by_pillow(path):
    with Image.open(path) as image:
        return (np.asarray(image.convert("RGB"), np.float64) / 255 - MEAN) / STD


def test_tiny_imagenet_agrees_with_pillow(small_tiny):
    dataset = data.load_tiny_imagenet(small_tiny.parent)
    assert repr(dataset) == (
        "Dataset(tiny-imagenet: 6 training and 3 test examples of shape (64, 64, 3), 3 classes)"
    )
    assert dataset.train_images.dtype == dataset.test_images.dtype == np.float32
    assert dataset.train_labels.dtype == dataset.test_labels.dtype == np.int32
    np.testing.assert_array_equal(dataset.train_labels, [0, 1, 2, 0, 1, 2])
    np.testing.assert_array_equal(dataset.test_labels, [0, 1, 2])
    for index, file in enumerate(
        ["n01/images/n01_0", "n02/images/n02_0", "n03/images/n03_0", "n01/images/n01_1", "n02/images/n02_1"]
    ):
        expected = by_pillow(small_tiny / "train" / f"{file}.JPEG")
        np.testing.assert_allclose(dataset.train_images[index], expected, atol=1e-5)
    for index, seed in enumerate((1, 2, 0)):
        expected = by_pillow(small_tiny / "val" / "images" / f"val_{seed}.JPEG")
        np.testing.assert_allclose(dataset.test_images[index], expected, atol=1e-5)


def test_tiny_imagenet_first_classes(small_tiny):
    whole, part = (data.load_tiny_imagenet(small_tiny.parent, num_classes=count) for count in (None, 2))
    assert part.num_classes == 2
    np.testing.assert_array_equal(part.train_images, whole.train_images[[0, 1, 3, 4]])
    np.testing.assert_array_equal(part.test_labels, [0, 1])
    for num_classes in (0, 4, 1.5):
        with pytest.raises(ValueError, match=rf"num_classes .* \[1, 3\], got {num_classes}"):
            data.load_tiny_imagenet(small_tiny.parent, num_classes=num_classes)


def test_tiny_imagenet_counts_can_be_waived(small_tiny):
    (small_tiny / "train" / "n02" / "images" / "n02_1.JPEG").unlink()
    with pytest.raises(ValueError, match=r"train: images of n02: found 1, expected 2\. .*verify=False"):
        data.load_tiny_imagenet(small_tiny.parent)
    dataset = data.load_tiny_imagenet(small_tiny.parent, verify=False)
    np.testing.assert_array_equal(dataset.train_labels, [0, 1, 2, 0, 2])


def test_tiny_imagenet_official_counts(small_tiny, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"wnids\.txt: classes: found 3, expected 200"):
        data.load_tiny_imagenet(small_tiny.parent)
    assert tiny_imagenet._NUM_CLASSES * tiny_imagenet._NUM_TRAIN == 100_000
    assert tiny_imagenet._NUM_CLASSES * tiny_imagenet._NUM_TEST == 10_000


def test_tiny_imagenet_counts_a_repeated_annotation_once(small_tiny):
    path = small_tiny / "val" / "val_annotations.txt"
    path.write_text(path.read_text().replace("val_1.JPEG\tn01", "val_0.JPEG\tn03"))
    with pytest.raises(FileNotFoundError, match=r"val holds no images of n01\. Get the official Tiny"):
        data.load_tiny_imagenet(small_tiny.parent)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("wnids.txt", r"lacks tiny-imagenet-200/wnids\.txt\. Get the official Tiny ImageNet"),
        ("val/val_annotations.txt", r"lacks tiny-imagenet-200/val/val_annotations\.txt"),
        ("val/images/val_1.JPEG", r"val_annotations\.txt, line 2: there is no file .*val_1\.JPEG"),
    ],
)
def test_tiny_imagenet_names_missing_files(small_tiny, file, message):
    (small_tiny / file).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        data.load_tiny_imagenet(small_tiny.parent)


def test_tiny_imagenet_names_a_missing_class(small_tiny):
    (small_tiny / "train" / "n02").rename(small_tiny / "train" / "n04")
    with pytest.raises(FileNotFoundError, match=r"train holds no images of n02\. Get the official Tiny"):
        data.load_tiny_imagenet(small_tiny.parent, verify=False)


@pytest.mark.parametrize("line", ["val_0.JPEG\tn09\t0\t0\t1\t1", "val_0.JPEG", "", "\xff\tn\xff"])
def test_tiny_imagenet_refuses_an_annotation(small_tiny, line):
    path = small_tiny / "val" / "val_annotations.txt"
    path.write_bytes(path.read_bytes() + f"{line}\n".encode("latin1"))
    with pytest.raises(ValueError, match=r"val_annotations\.txt, line 4: expected .* class of wnids\.txt"):
        data.load_tiny_imagenet(small_tiny.parent)


@pytest.mark.parametrize("file", ["train/n01/images/n01_1.JPEG", "val/images/val_0.JPEG"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (JPEG[:-400], "truncated, corrupt or no image"),
        (b"", "truncated, corrupt or no image"),
        (encoded(noise(32, 32, 3), "JPEG"), r"must have \(height, width\) \(64, 64\), found \(32, 32\)"),
    ],
)
def test_tiny_imagenet_names_a_damaged_image(small_tiny, file, content, message):
    (small_tiny / file).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file}.*{message}"):
        data.load_tiny_imagenet(small_tiny.parent)


# ---- the Hugging Face hub --------------------------------------------------------------------------------


@pytest.fixture
def hub():
    return pytest.importorskip("datasets")


def split(hub, images, labels, label=None):
    features = hub.Features(image=hub.Image(), label=label or hub.ClassLabel(names=["cat", "dog"]))
    encoded_images = [None if image is None else {"bytes": encoded(image), "path": None} for image in images]
    return hub.Dataset.from_dict({"image": encoded_images, "label": labels}, features=features)


def small_hub(hub, images=None, **changes):
    images = [noise(4, 5, 3, seed=seed) for seed in range(3)] if images is None else images
    parts = {"train": split(hub, images, [0, 1, 1]), "test": split(hub, images[1:], [1, 0])}
    return hub.DatasetDict(parts | changes)


def test_hub_images_are_normalised_by_their_own_statistics(hub):
    dataset = data.load_hub(small_hub(hub))
    assert repr(dataset) == "Dataset(hub: 3 training and 2 test examples of shape (4, 5, 3), 2 classes)"
    assert dataset.train_images.dtype == dataset.test_images.dtype == np.float32
    assert dataset.train_labels.dtype == dataset.test_labels.dtype == np.int32
    np.testing.assert_array_equal(dataset.train_labels, [0, 1, 1])
    np.testing.assert_array_equal(dataset.test_labels, [1, 0])
    pixels = np.stack([noise(4, 5, 3, seed=seed) for seed in range(3)]) / 255
    mean = [np.mean(pixels[..., channel]) for channel in range(3)]
    std = [np.std(pixels[..., channel]) for channel in range(3)]
    np.testing.assert_allclose(dataset.train_images, (pixels - mean) / std, atol=2e-6)
    np.testing.assert_allclose(dataset.test_images, (pixels[1:] - mean) / std, atol=2e-6)


def test_hub_normalisation_can_be_given(hub):
    normalization = data.Normalization((0.5, 0.4, 0.3), (0.2, 0.25, 0.5))
    dataset = data.load_hub(small_hub(hub), normalization=normalization)
    expected = (noise(4, 5, 3, seed=2) / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.25, 0.5]
    np.testing.assert_allclose(dataset.train_images[2], expected, atol=2e-6)
    with pytest.raises(ValueError, match="3 channels"):
        data.load_hub(small_hub(hub), normalization=data.MNIST_NORMALIZATION)


def test_hub_grey_images_have_one_channel_unless_there_are_others(hub):
    greys = [noise(4, 5, seed=seed) for seed in range(3)]
    unchanged = data.Normalization((0.0,), (1 / 255,))
    dataset = data.load_hub(small_hub(hub, greys), normalization=unchanged)
    np.testing.assert_allclose(dataset.train_images, np.stack(greys)[..., None], rtol=1e-6)
    mixed = small_hub(hub, greys, test=split(hub, [noise(4, 5, 3)], [0]))
    dataset = data.load_hub(mixed, normalization=data.Normalization((0.0,) * 3, (1 / 255,) * 3))
    for channel in range(3):
        np.testing.assert_allclose(dataset.train_images[..., channel], np.stack(greys), rtol=1e-6)
    np.testing.assert_allclose(dataset.test_images[0], noise(4, 5, 3), rtol=1e-6)


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_hub_reads_what_was_saved_to_disk(hub, tmp_path, kind):
    small_hub(hub).save_to_disk(tmp_path / "saved")
    dataset = data.load_hub(kind(tmp_path / "saved"))
    assert dataset.name == str(tmp_path / "saved")
    np.testing.assert_array_equal(dataset.train_images, data.load_hub(small_hub(hub)).train_images)


def test_hub_reads_a_folder_of_images(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(hub.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for part, label, seed in (("train", "cat", 0), ("train", "dog", 1), ("test", "dog", 2)):
        folder = tmp_path / "pets" / part / label
        folder.mkdir(parents=True)
        (folder / f"{seed}.png").write_bytes(encoded(noise(4, 5, 3, seed=seed)))
    unchanged = data.Normalization((0.0,) * 3, (1 / 255,) * 3)
    dataset = data.load_hub(tmp_path / "pets", normalization=unchanged)
    np.testing.assert_array_equal(dataset.train_labels, [0, 1])
    np.testing.assert_array_equal(dataset.test_labels, [1])
    np.testing.assert_allclose(dataset.test_images[0], noise(4, 5, 3, seed=2), rtol=1e-6)


def test_hub_asks_the_library_for_what_it_does_not_find(hub, monkeypatch):
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return small_hub(hub)

    monkeypatch.setattr(hub, "load_dataset", load_dataset)
    assert data.load_hub("owner/pets", config="small", revision="abc").name == "owner/pets"
    assert asked == [(("owner/pets", "small"), {"revision": "abc"})]


def test_hub_splits_columns_and_formats_of_one_s_own(hub):
    renamed = small_hub(hub).rename_columns({"image": "img", "label": "fine_label"}).with_format("numpy")
    parts = hub.DatasetDict(fit=renamed["train"], valid=renamed["test"])
    dataset = data.load_hub(parts, splits=("fit", "valid"), image="img", label="fine_label")
    np.testing.assert_array_equal(dataset.train_images, data.load_hub(small_hub(hub)).train_images)


def test_hub_integer_labels_count_the_classes_of_both_splits(hub):
    integer = hub.Value("int64")
    images = [noise(4, 5, 3, seed=seed) for seed in range(2)]
    parts = hub.DatasetDict(
        train=split(hub, images, [0, 2], integer), test=split(hub, images, [4, 0], integer)
    )
    assert data.load_hub(parts).num_classes == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"splits": ("train", "valid")}, r"no examples in split valid; .* train \(3\), test \(2\)"),
        ({"image": "img"}, "split 'train' has no column 'img'; columns there are: image, label"),
        ({"label": "y"}, "split 'train' has no column 'y'"),
        ({"image": "label"}, "column 'label' must hold images, found ClassLabel"),
        ({"label": "image"}, "column 'image' must hold integers or ClassLabels"),
    ],
)
def test_hub_names_what_is_missing(hub, options, message):
    with pytest.raises(ValueError, match=message):
        data.load_hub(small_hub(hub), **options)


def test_hub_refuses_labels(hub):
    images = [noise(4, 5, 3)]
    for kind, label, message in (
        ("string", "cat", r"integers .*found Value\('string'\); strings .*class_encode_column\('label'\)"),
        ("float32", 1.0, "must hold integers"),
        ("bool", True, "must hold integers"),
        ("int64", None, "without gaps"),
        ("int64", -1, r"\[0, 2\), found values from -1"),
    ):
        test = split(hub, images, [label], hub.Value(kind))
        train = split(hub, images, [1], hub.Value("int64"))
        with pytest.raises(ValueError, match=message):
            data.load_hub(hub.DatasetDict(train=train, test=test))


def test_hub_refuses_splits_with_other_classes(hub):
    swapped = split(hub, [noise(4, 5, 3)], [0], hub.ClassLabel(names=["dog", "cat"]))
    with pytest.raises(ValueError, match=r"differently: \['cat', 'dog'\] and \['dog', 'cat'\]"):
        data.load_hub(small_hub(hub, test=swapped))


def test_hub_names_a_damaged_image(hub):
    good = noise(4, 5, 3)
    for image, message in ((good[:3], r"\(4, 5\), found \(3, 5\)"), (None, "is missing")):
        parts = small_hub(hub, test=split(hub, [good, image], [0, 1]))
        with pytest.raises(ValueError, match=rf"hub, split 'test': image 1 .*{message}"):
            data.load_hub(parts)
    features = small_hub(hub)["test"].features
    truncated = {"image": [{"bytes": encoded(noise(64, 64, 3))[:-30], "path": None}], "label": [0]}
    parts = small_hub(hub, train=hub.Dataset.from_dict(truncated, features=features))
    with pytest.raises(ValueError, match="split 'train': image 0 is truncated, corrupt"):
        data.load_hub(parts)


def test_hub_without_the_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "jaxlimit\[data\]"'):
        data.load_hub("ylecun/mnist")
