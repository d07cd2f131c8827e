"""CRC32C, the checksum that Google keeps of every object, and that of a concatenation from those of its parts."""

from __future__ import annotations

import base64

POLYNOMIAL = 0x82F63B78  # Castagnoli's, with x^0 in the highest of 32 bits, as all numbers below
_ONE = 1 << 31  # x^0
_BYTE = 1 << 23  # x^8: what one more byte behind them does to the bytes before
_PIECE = 2**18  # bytes


def crc32c(data: memoryview) -> int:
    """Of some bytes."""
    from google_crc32c import extend

    value = 0
    for start in range(0, len(data), _PIECE):
        value = extend(value, bytes(data[start : start + _PIECE]))  # it takes no memory that may change
    return int(value)


def joined(first: int, second: int, length: int) -> int:
    """The CRC32C of two pieces one behind the other, from both their own; `length`: bytes of the second one."""
    return _times(first, _power(_BYTE, length)) ^ second


def encoded(value: int) -> str:
    """As Google writes it."""
    return base64.b64encode(value.to_bytes(4, "big")).decode()


def decoded(text: str) -> int:
    """From what Google writes."""
    return int.from_bytes(base64.b64decode(text), "big")


def _times(one: int, other: int) -> int:
    """The product of two polynomials over GF(2), modulo `POLYNOMIAL`."""
    product = 0
    while one:
        if one & _ONE:
            product ^= other
        one = (one << 1) & 0xFFFFFFFF
        other = (other >> 1) ^ (POLYNOMIAL if other & 1 else 0)
    return product


def _power(base: int, exponent: int) -> int:
    result = _ONE
    while exponent:
        if exponent & 1:
            result = _times(result, base)
        base = _times(base, base)
        exponent >>= 1
    return result
