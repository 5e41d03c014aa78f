"""Inputs as small PNG pictures, for pages that show which examples a model gets wrong."""

import base64
import struct
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

SIDE = 96
"""Pixels of the longer side at most; larger images are shrunk."""
COLOURS = 64
"""Colours of a picture at most: a photograph takes a quarter of the bytes that it would take with all of them."""

_SMALLEST = 8
_GREY, _INDEXED = 0, 3


def is_image(x: torch.Tensor) -> bool:
    """Return whether one input, without a batch dimension, can be shown: 1 or 3 channels first, then at least 8x8.

    Floats and uint8 count; other integers are tokens or labels.
    """
    channels, *sides = x.shape if x.dim() == 3 else (0,)
    return channels in (1, 3) and min(sides) >= _SMALLEST and (x.is_floating_point() or x.dtype == torch.uint8)


def span(images: torch.Tensor) -> torch.Tensor:
    """Return the smallest and the largest value of each channel of `images`, (n, channels, H, W), as (2, channels)."""
    return torch.stack([images.amin((0, 2, 3)), images.amax((0, 2, 3))])


def join(spans: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the span of the images of several batches from the `span` of each, at least one."""
    together = torch.stack(list(spans))
    return torch.stack([together[:, 0].amin(0), together[:, 1].amax(0)])


def png(image: torch.Tensor, *, between: torch.Tensor | None = None) -> str:
    """Return `image` as a PNG in base64, at most `SIDE` pixels a side and of at most `COLOURS` colours.

    uint8 is shown as it is. How floats were normalised is not known, so they are shown between two values that become
    the darkest and the brightest. With the `span` of a whole split, images keep their brightness beside each other, and
    a mean and deviation for each channel are undone wherever the split reaches from black to white in each; else
    brightness and hue are right only up to a scale and an offset for each channel.

    Args:
        image: What `is_image` accepts.
        between: Values shown as the darkest and the brightest, for each channel: (2, channels). None takes the smallest
            and the largest value of the image itself, over all channels.

    Source: W3C, "Portable Network Graphics (PNG) Specification"; Heckbert, "Color image quantization for frame buffer
    display", SIGGRAPH 1982.
    """
    x = image.detach().cpu().double()
    if image.dtype != torch.uint8:
        low, high = (x.min(), x.max()) if between is None else between.cpu().double()[:, :, None, None]
        # Where nothing differs this is 0 / 0, which becomes black below.
        x = 255 * (x - low) / (high - low)
    if (longest := max(x.shape[1:])) > SIDE:
        sides = [max(1, round(side * SIDE / longest)) for side in x.shape[1:]]
        x = functional.interpolate(x[None], size=sides, mode="area")[0]
    pixels = x.nan_to_num().round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    return base64.b64encode(_grey(pixels[:, :, 0]) if pixels.shape[2] == 1 else _coloured(pixels)).decode()


def _grey(pixels: NDArray[np.uint8]) -> bytes:
    """Return a greyscale PNG; each row is stored as its difference to the one above, which takes fewer bytes."""
    differences = np.diff(pixels, axis=0, prepend=np.zeros_like(pixels[:1]))
    return _file(differences, kind=_GREY, filtered=2)


def _coloured(pixels: NDArray[np.uint8]) -> bytes:
    """Return a PNG with a palette of its own."""
    palette, index = _palette(pixels.reshape(-1, 3))
    return _file(index.reshape(pixels.shape[:2]), kind=_INDEXED, filtered=0, palette=palette)


def _palette(pixels: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return at most `COLOURS` colours, (n, 3), and the index of each pixel's, which is its own where they suffice."""
    colours, index = np.unique(pixels, axis=0, return_inverse=True)
    if len(colours) <= COLOURS:
        return colours, index.reshape(-1).astype(np.uint8)
    boxes = [np.arange(len(pixels))]
    while len(boxes) < COLOURS:
        widest = max(range(len(boxes)), key=lambda i: np.ptp(pixels[boxes[i]], axis=0).max() * len(boxes[i]) ** 0.5)
        box = boxes.pop(widest)
        channel = int(np.ptp(pixels[box], axis=0).argmax())
        box = box[np.argsort(pixels[box, channel], kind="stable")]
        boxes += [box[: len(box) // 2], box[len(box) // 2 :]]
    boxes.sort(key=lambda box: float(pixels[box].mean()))
    means = np.stack([pixels[box].mean(axis=0) for box in boxes])
    chosen = np.empty(len(pixels), dtype=np.uint8)
    for number, box in enumerate(boxes):
        chosen[box] = number
    return means.round().astype(np.uint8), chosen


def _file(rows: NDArray[np.uint8], *, kind: int, filtered: int, palette: NDArray[np.uint8] | None = None) -> bytes:
    """Return a PNG of 8 bits a pixel whose rows were all filtered alike."""
    height, width = rows.shape
    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    data = np.insert(rows, 0, filtered, axis=1).tobytes()
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(data, 9)), (b"IEND", b"")]
    if palette is not None:
        chunks.insert(1, (b"PLTE", palette.tobytes()))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, content) for name, content in chunks)


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
