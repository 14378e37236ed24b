"""Encoded images (JPEG, PNG, ...) as arrays of bytes."""

import io
import warnings

import numpy as np

# Only formats that hold pixels: Pillow reads others, such as EPS, by running a program.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")


def decode_image(content: bytes, *, where: str, size: tuple[int, int] | None = None) -> np.ndarray:
    """Decode an image of 8 bits per channel with Pillow; transparency is dropped.

    Args:
        content: the encoded image.
        where: it comes from, for the messages.
        size: (height, width) that it must have, checked before anything is decoded; by default any below
            Pillow's limit on decompression bombs.

    Returns:
        uint8 of shape (H, W, 1) for a grey image, (H, W, 3) in red, green and blue for any other.

    Raises:
        ImportError: Pillow is not installed.
        ValueError: the image is truncated, corrupt, of another format, size or depth, or a bomb.

    Examples:
        >>> decode_image(b"GIF89a", where="a.gif")
        Traceback (most recent call last):
        ValueError: a.gif is truncated, corrupt or no image (UnidentifiedImageError: ...
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            'Images are decoded with Pillow. Install it with: pip install "jaxlimit[data]"'
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=_FORMATS)
        found = (image.height, image.width)
        if size in (None, found):
            image.load()
    # Damaged bytes can make a decoder fail in any way: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        raise ValueError(
            f"{where} is truncated, corrupt or no image ({type(error).__name__}: {error})"
        ) from error
    if size not in (None, found):
        raise ValueError(f"{where} must have (height, width) {size}, found {found}")
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"{where} must have 8 bits per channel, found Pillow's mode {image.mode!r}")
    pixels = np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    return pixels.reshape(*found, -1)
