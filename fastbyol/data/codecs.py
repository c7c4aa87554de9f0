"""Compression of Parquet's pages, by pyarrow."""

from fastbyol.errors import first_line

CODECS = ("UNCOMPRESSED", "SNAPPY", "GZIP", "BROTLI", "ZSTD")
"""Parquet's names of the supported codecs."""


def decompress(data: bytes, codec: int, raw: int) -> bytes:
    """Return the `raw` bytes that `data` holds.

    Args:
        data: of a whole page; or any number of blocks of snappy, without the header of the stream.
        codec: index in CODECS, not 0.
        raw: size of the result.

    Raises:
        OSError: the data is damaged.
    """
    import pyarrow

    if CODECS[codec] == "SNAPPY":
        data = varint(raw) + data
    try:
        return pyarrow.decompress(data, decompressed_size=raw, codec=CODECS[codec].lower(), asbytes=True)
    except (OSError, ValueError) as error:
        raise OSError(f"cannot be decompressed: {first_line(error)}") from None


def decompress_page(data: bytes, codec: int, raw: int) -> bytes:
    """Return the content of a whole page, as `decompress`."""
    return decompress(data[len(varint(raw)) :] if CODECS[codec] == "SNAPPY" else data, codec, raw)


def varint(value: int) -> bytes:
    """Encode a number, seven bits a byte. It is the header of a snappy stream."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
