"""CRC-32C (Castagnoli), the checksum of TFRecord files.

The checksum is linear: with the start value XORed into the first four bytes, the checksum of two
parts together is that of the first, advanced by the length of the second, XOR that of the second.
So all blocks of a record are computed at once with NumPy and then joined in pairs.
"""

from __future__ import annotations

import functools

import numpy as np

_POLYNOMIAL = 0x82F63B78  # reflected
_BLOCK = 64
"""Bytes of one block."""
_FEW_BYTES = 2048
"""Fewer bytes take longer with NumPy than one by one."""
_MASK = 0xA282EAD8
"""Constant of TFRecord's masking."""


def crc32c(data: bytes) -> int:
    """Return the CRC-32C of bytes."""
    if len(data) < _FEW_BYTES:
        return _short(data)
    length = -(-len(data) // _BLOCK) * _BLOCK
    padded = np.zeros(length, np.uint8)  # leading zeros leave a checksum of start value 0 alone
    padded[length - len(data) :] = np.frombuffer(data, np.uint8)
    padded[length - len(data) : length - len(data) + 4] ^= 0xFF
    words = np.ascontiguousarray(padded.view("<u4").reshape(-1, _BLOCK // 4).T)
    sums = np.zeros(words.shape[1], np.uint32)
    for word in words:
        sums = _advanced(sums ^ word, _advance_tables(4))
    width = _BLOCK
    while len(sums) > 1:
        if len(sums) % 2:
            sums = np.concatenate((np.zeros(1, np.uint32), sums))
        sums = _advanced(sums[::2], _advance_tables(width)) ^ sums[1::2]
        width *= 2
    return int(sums[0]) ^ 0xFFFFFFFF


def masked_crc32c(data: bytes) -> int:
    """Return the checksum as TFRecord files store it: rotated by 15 bits, plus a constant."""
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + _MASK) & 0xFFFFFFFF


def _short(data: bytes) -> int:
    crc, table = 0xFFFFFFFF, _byte_table()
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


@functools.cache
def _byte_table() -> list[int]:
    """Return, for each byte, the checksum of start value 0 after it."""
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (_POLYNOMIAL if byte & 1 else 0)
        table.append(byte)
    return table


@functools.cache
def _advance_tables(count: int) -> np.ndarray:
    """Return tables for `_advanced` by `count` bytes, 4 or a power of two above it: [4, 256]."""
    if count > 4:
        half = _advance_tables(count // 2)
        return np.stack([_advanced(row, half) for row in half])
    bytes_of = np.array(_byte_table(), np.uint32)
    tables = np.arange(256, dtype=np.uint32) << np.array([[0], [8], [16], [24]], np.uint32)
    for _ in range(count):
        tables = bytes_of[tables & 0xFF] ^ (tables >> 8)
    return tables


def _advanced(sums: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Return checksums, uint32 [n], after as many zero bytes as the tables stand for."""
    return (
        tables[0][sums & 0xFF]
        ^ tables[1][(sums >> 8) & 0xFF]
        ^ tables[2][(sums >> 16) & 0xFF]
        ^ tables[3][sums >> 24]
    )
