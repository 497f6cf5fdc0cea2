"""Values and pixels as text that a page can carry."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

import numpy as np

LEVELS = 254  # steps between the lowest and the highest value; code 0 is kept for "not finite"


def quantised(
    values: np.ndarray[Any, Any], *, signed: bool
) -> tuple[np.ndarray[Any, Any], int, float]:
    """Floating-point values in eight bits: of a code c > 0, the value is (c - zero) * step.

    Args:
        values: of any shape, float64.
        signed: the scale is symmetric, with 0 in its middle; else it goes from the lowest value (or
            0) to the highest (or 0).

    Returns:
        The codes, uint8, of the shape of the values, 0 where one is no number; `zero`, the code of
        the value 0, which is met exactly; and `step`, half of which no value is further from what
        its code says.
    """
    finite = np.isfinite(values)
    some = values[finite]
    low, high = (float(some.min()), float(some.max())) if some.size else (0.0, 0.0)
    low, high = min(low, 0.0), max(high, 0.0)
    if signed:
        high = max(-low, high)
        low = -high
    # A difference of the largest floats would overflow.
    step = high / LEVELS - low / LEVELS
    if step == 0.0:
        return np.where(finite, 1, 0).astype(np.uint8), 1, 0.0
    if 0 < -low / step < LEVELS and not signed:
        # 0 falls between two codes: one more step takes it to one of them.
        step = high / (LEVELS - 1) - low / (LEVELS - 1)
    zero = 1 + int(np.ceil(-low / step - 1e-9))
    codes = np.rint(np.where(finite, values, 0.0) / step) + zero
    return np.where(finite, codes, 0).astype(np.uint8), zero, step


def packed(values: np.ndarray[Any, Any]) -> str:
    """Bytes of an array, deflated (zlib's format) and in base64."""
    data = zlib.compress(np.ascontiguousarray(values).tobytes(), 9)
    return base64.b64encode(data).decode("ascii")


def png(pixels: np.ndarray[Any, Any]) -> str:
    """A data URI of a PNG.

    Args:
        pixels: uint8, of shape (H, W), or (H, W, 3) for red, green, blue.
    """
    height, width = pixels.shape[:2]
    colour = 2 if pixels.ndim == 3 else 0
    rows = np.ascontiguousarray(pixels).reshape(height, -1)
    # Each row begins with its filter; 0 is none.
    data = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1).tobytes()

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    head = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    parts = (
        b"\x89PNG\r\n\x1a\n",
        chunk(b"IHDR", head),
        chunk(b"IDAT", zlib.compress(data, 9)),
        chunk(b"IEND", b""),
    )
    return "data:image/png;base64," + base64.b64encode(b"".join(parts)).decode("ascii")
