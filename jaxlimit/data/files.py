"""Official data files: where they are looked for, and whether they are what they should be."""

import gzip
import hashlib
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

_VARIABLE = "JAXLIMIT_DATA"
_GZIP = b"\x1f\x8b"  # its first bytes

_IDX_REMEDY = (
    "Get the four official {title} files from the data set's home page and place them, plain or as .gz, in "
    "{{folder}}: train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, "
    "t10k-labels-idx1-ubyte."
)
_REMEDY = {
    "mnist": _IDX_REMEDY.format(title="MNIST"),
    "fashion-mnist": _IDX_REMEDY.format(title="Fashion-MNIST"),
    "cifar10": (
        "Get the official CIFAR-10 binary version (or the Python version) from the data set's home page and "
        "unpack it in {folder}, which then holds cifar-10-batches-bin (or cifar-10-batches-py)."
    ),
    "cifar100": (
        "Get the official CIFAR-100 Python version from the data set's home page and unpack it in {folder}, "
        "which then holds cifar-100-python."
    ),
    "tiny-imagenet": (
        "Get the official Tiny ImageNet from the data set's home page and unpack it in {folder}, which then "
        "holds tiny-imagenet-200."
    ),
}


def data_folder(name: str, folder: str | os.PathLike[str] | None = None) -> Path:
    """Find the folder of a data set: the one given, or $JAXLIMIT_DATA/name.

    Args:
        name: "mnist", "fashion-mnist", "cifar10", "cifar100" or "tiny-imagenet".
        folder: the data set's own folder; by default the environment variable decides.

    Returns:
        An existing folder. What it holds is checked by the loaders.

    Raises:
        ValueError: the name is none of these.
        FileNotFoundError: there is no such folder, or no folder is given and the variable is not set. The
            message says which files to get and where to place them.

    Examples:
        >>> import tempfile
        >>> parent = tempfile.mkdtemp()
        >>> data_folder("mnist", parent) == Path(parent)
        True
        >>> data_folder("mnist", Path(parent) / "missing")
        Traceback (most recent call last):
        FileNotFoundError: There is no folder ...missing. Get the four official MNIST files ...
    """
    if name not in _REMEDY:
        raise ValueError(f"name must be one of {', '.join(_REMEDY)}, got {name!r}")
    if folder is None:
        parent = os.environ.get(_VARIABLE)
        if not parent:
            raise FileNotFoundError(
                f"The environment variable {_VARIABLE} is not set: set it to the folder that holds {name}/, "
                f"or pass the data set's folder. {remedy(name, f'${_VARIABLE}/{name}')}"
            )
        folder = Path(parent) / name
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"There is no folder {path}. {remedy(name, path)}")
    return path


def remedy(name: str, folder: str | os.PathLike[str]) -> str:
    """Say in a sentence which files of the data set to get and how to lay them out in the folder."""
    return _REMEDY[name].format(folder=folder)


def find_files(
    name: str,
    folder: Path,
    files: Sequence[str],
    variants: Callable[[str], Sequence[str]] = lambda file: (file,),
) -> list[Path]:
    """Find each file in the folder under the first of its names that exists.

    Args:
        name: of the data set, for the message.
        folder: the data set's folder.
        files: paths relative to the folder.
        variants: `variants(file)`: the names to try in turn.

    Returns:
        One existing path for each of the files, in their order.

    Raises:
        FileNotFoundError: naming the folder, every missing file, and the remedy.
    """
    found = {
        file: next((path for found in variants(file) if (path := folder / found).is_file()), None)
        for file in files
    }
    missing = [file for file, path in found.items() if path is None]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}. {remedy(name, folder)}")
    return [path for path in found.values() if path is not None]


def read_bytes(path: Path, limit: int | None = None) -> bytes:
    """Read a file, decompressed where it begins as gzip does, whatever its name, up to `limit` bytes.

    Raises:
        ValueError: the compressed data are truncated or corrupt.
    """
    size = -1 if limit is None else limit
    with path.open("rb") as plain:
        if plain.read(len(_GZIP)) != _GZIP:
            plain.seek(0)
            return plain.read(size)
    try:
        with gzip.open(path, "rb") as compressed:
            return compressed.read(size)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path} is truncated or corrupt and cannot be decompressed ({error}). Get the file again."
        ) from error


def check_size(path: Path, content: bytes, num_bytes: int, advice: str = "Get the file again.") -> None:
    """Raise ValueError unless the content, read with a limit above num_bytes, has num_bytes bytes."""
    if len(content) < num_bytes:
        raise ValueError(
            f"{path} is truncated: it holds {len(content)} bytes, expected {num_bytes}. {advice}"
        )
    if len(content) > num_bytes:
        raise ValueError(
            f"{path} is not the expected file: it holds more than the expected {num_bytes} bytes. {advice}"
        )


def check_sha256(path: Path, content: bytes, sha256: str | None) -> None:
    """Raise ValueError unless the content has this SHA-256; None asks for no check."""
    if sha256 is None:
        return
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(
            f"{path} is not the official file: its content has SHA-256 {found}, expected {sha256}. "
            "Get the file again, or pass verify=False if it was changed on purpose."
        )
