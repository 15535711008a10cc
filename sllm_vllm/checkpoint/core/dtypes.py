"""Names of torch dtypes, and the safetensors code of each dtype that safetensors supports. Pure.

A dtype without a safetensors code is stored as ``U8`` with one extra trailing dimension, its item size in bytes; the
manifest records the real dtype.
"""

from __future__ import annotations

DTYPE_CODES: dict[str, tuple[str, int]] = {
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint64": ("U64", 8),
    "uint32": ("U32", 4),
    "uint16": ("U16", 2),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "complex64": ("C64", 8),
}
"""Torch dtype name → (safetensors code, bytes per item)."""

RAW_CODE = "U8"
ITEM_NBYTES_MAX = 16


def safetensors_view(dtype: str, shape: tuple[int, ...], item_nbytes: int) -> tuple[str, list[int]]:
    """Return the dtype code and shape that the safetensors header gives for a tensor."""
    known = DTYPE_CODES.get(dtype)
    if known is not None:
        return known[0], list(shape)
    return RAW_CODE, [*shape, item_nbytes]
