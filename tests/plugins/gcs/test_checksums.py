"""CRC32C, as Google has it of each object."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llmft_plugins.storage import gcs_crc32c


@given(st.binary(), st.binary(max_size=3000))
def test_the_checksum_of_a_concatenation(one: bytes, other: bytes) -> None:
    first, second = (gcs_crc32c.crc32c(memoryview(each)) for each in (one, other))
    assert gcs_crc32c.joined(first, second, len(other)) == gcs_crc32c.crc32c(memoryview(one + other))


def test_the_checksum_is_google_s() -> None:
    """RFC 3720, B.4: 32 bytes of zeros, and 0 to 31."""
    assert gcs_crc32c.crc32c(memoryview(bytes(32))) == 0x8A9136AA
    assert gcs_crc32c.crc32c(memoryview(bytearray(range(32)))) == 0x46DD794E
    assert gcs_crc32c.decoded(gcs_crc32c.encoded(0x8A9136AA)) == 0x8A9136AA
