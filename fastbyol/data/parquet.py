"""Parquet files as on the Hugging Face hub: a column of images, as bytes, and one of labels.

A row group holds 100 to 1,000 images, and reading one for every image of a random order would cost
100 to 1,000 times the bytes. So the index holds the byte range of every image:

- In a column without compression, which `datasets` writes now, the values lie in the file as they
  are: four bytes of length, then the image. One read gets an image, as from a tar archive.
- Snappy, the format's old default, compresses blocks of 64 KiB independently. The index holds where
  each block begins, and a read gets the blocks that an image touches.
- Of a page with another codec (zstd, gzip, ...), all is read and decompressed: about 1 MB an image.

pyarrow reads the metadata, the labels, and decompresses; it does not tell where values lie, so page
headers are parsed here. Format: https://github.com/apache/parquet-format (README, Encodings).
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from fastbyol.data.codecs import CODECS, decompress_page, varint
from fastbyol.data.shards import FileIndex, Position, ShardImages, as_positions, open_shards
from fastbyol.data.storage import RangeFile
from fastbyol.errors import InputError, first_line
from fastbyol.runtime.environment import has_module

SUFFIX = ".parquet"
_SNAPPY_BLOCK = 1 << 16
_MAX_PAGE = 1 << 31
# Of the format: page types, encodings.
_DATA_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_V2 = 0, 2, 3
_PLAIN, _PLAIN_DICTIONARY, _RLE_DICTIONARY = 0, 2, 8
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "cls", "target")
_IMAGE_COLUMNS = ("image", "img", "jpg", "bytes", "image_bytes")


class _Damaged(Exception):
    """The file does not follow the format."""


def open_parquet(root: Path | str, files: Sequence[RangeFile]) -> ShardImages:
    """Return the images of Parquet files, in the order of the files and their rows.

    Raises:
        InputError: pyarrow is missing, a file is damaged or has no column of images.
    """
    if not has_module("pyarrow"):
        raise InputError(f"{root}: reading Parquet needs pyarrow: pip install pyarrow")
    columns = _find_columns(files[0])
    kind = f"parquet {columns.image} {columns.label}"
    return open_shards(root, files, kind, partial(_index, columns=columns), columns.class_names)


@dataclass(frozen=True)
class _Columns:
    image: str  # dotted path of the bytes
    label: str | None
    class_names: tuple[str, ...]


def _find_columns(file: RangeFile) -> _Columns:
    """Find images and labels: by the features that `datasets` stores, else by the names."""
    import pyarrow as pa

    schema = _open(file).schema_arrow
    features = _features(schema.metadata)
    image = None
    names = [name for name, kind in features.items() if kind.get("_type") == "Image"]
    for name in [*names, *_IMAGE_COLUMNS, *schema.names]:
        kind = schema.field(name).type if name in schema.names else None
        if kind is not None and pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            image = f"{name}.bytes"
        elif kind is not None and (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            image = name
        if image is not None:
            break
    if image is None:
        raise InputError(f"{file.path}: no column of images as bytes among {', '.join(schema.names)}")
    classes = [name for name, kind in features.items() if kind.get("_type") == "ClassLabel"]
    known = [n for n in (*_LABEL_COLUMNS, *classes) if n in schema.names]
    label = next((n for n in known if n in classes), known[0] if known else None)
    class_names = features.get(label or "", {}).get("names", ())
    return _Columns(image, label, tuple(map(str, class_names if isinstance(class_names, list) else ())))


def _features(metadata: dict[bytes, bytes] | None) -> dict[str, dict[str, Any]]:
    """Return the features that `datasets` writes into the schema: column -> description."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {name: kind for name, kind in features.items() if isinstance(kind, dict)}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _open(file: RangeFile) -> Any:
    """Open a file with pyarrow."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file.stream(), pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file.path}: not a readable Parquet file: {first_line(error)}") from None


def _index(file: RangeFile, columns: _Columns) -> FileIndex:
    """List the images of one file. Rows without an image are left out."""
    import pyarrow as pa

    table = _open(file)
    positions, names, labels = list[Position](), list[str](), list[int | str | None]()
    row = 0
    try:
        values = _labels(table, columns.label)
        for group in range(table.num_row_groups):
            metadata = table.metadata.row_group(group)
            chunks = [metadata.column(k) for k in range(metadata.num_columns)]
            chunk = next((c for c in chunks if c.path_in_schema == columns.image), None)
            if chunk is None:
                raise InputError(f"{file.path}: has no column {columns.image}, as the first file has")
            level = table.schema.column(chunks.index(chunk)).max_definition_level
            for offset, position in enumerate(_values(file, chunk, level)):
                if position is not None:
                    positions.append(position)
                    names.append(f"{file.name}, row {row + offset}")
                    labels.append(values[row + offset])
            row += metadata.num_rows
    except (_Damaged, LookupError, TypeError, OverflowError, pa.ArrowException, OSError) as error:
        raise InputError(f"{file.path}: damaged Parquet file: {first_line(error) or 'a page is cut short'}") from None
    if not positions and row:
        raise InputError(f"{file.path}: column {columns.image} holds paths instead of bytes, or is empty")
    return FileIndex(as_positions(positions), names, labels)


def _labels(table: Any, column: str | None) -> list[int | str | None]:
    if column is None or column not in table.schema_arrow.names:
        return [None] * table.metadata.num_rows
    values = table.read(columns=[column], use_threads=False).column(0).to_pylist()
    # `datasets` writes -1 for the hidden labels of a test split.
    return [v if isinstance(v, int | str) and not isinstance(v, bool) and v != -1 else None for v in values]


def _values(file: RangeFile, chunk: Any, max_level: int) -> Iterator[Position | None]:
    """Yield the position of every value of a column chunk, None for a missing one.

    Args:
        max_level: definition level of a value that is there.
    """
    if chunk.compression not in CODECS:
        raise InputError(f"{file.path}: compression {chunk.compression} is not supported; write it with zstd or none")
    codec = CODECS.index(chunk.compression)
    at = chunk.data_page_offset
    if chunk.has_dictionary_page and chunk.dictionary_page_offset:
        at = min(at, chunk.dictionary_page_offset)
    stream, end = file.stream(), at + chunk.total_compressed_size
    dictionary: list[Position] = []
    seen = 0
    while seen < chunk.num_values:
        if at >= end:
            raise _Damaged(f"a column chunk ends after {seen} of {chunk.num_values} values")
        stream.seek(at)
        header = _read_struct(stream)
        body = stream.tell()
        kind, raw, stored = header.get(1), header.get(2, 0), header.get(3, 0)
        if not (0 <= raw < _MAX_PAGE and 0 <= stored and body + stored <= file.size):
            raise _Damaged("a page has an impossible size")
        at = body + stored
        if kind == _DICTIONARY_PAGE:
            dictionary = list(_plain(stream, body, stored, raw, 0, codec, header[7][1]))
        elif kind in (_DATA_PAGE, _DATA_PAGE_V2):
            for position in _page_values(stream, header, body, codec, max_level, dictionary):
                yield position
                seen += 1


def _page_values(
    stream: BinaryIO, header: dict[int, Any], body: int, codec: int, max_level: int, dictionary: list[Position]
) -> Iterator[Position | None]:
    """Yield the values of a data page."""
    raw, stored = header[2], header[3]
    if header[1] == _DATA_PAGE_V2:  # its levels lie before the values, uncompressed
        info = header[8]
        count, encoding, levels = info[1], info[4], info.get(5, 0) + info.get(6, 0)
        if not info.get(7, True):
            codec = 0
        stream.seek(body)
        defined = _levels(_exactly(stream, levels)[info.get(6, 0) :], count, max_level)
        body, stored, raw, skip = body + levels, stored - levels, raw - levels, 0
        content = None
    else:
        info = header[5]
        count, encoding = info[1], info[2]
        stream.seek(body)
        content = None if not codec else decompress_page(_exactly(stream, stored), codec, raw)
        defined, skip = [True] * count, 0
        if max_level:  # four bytes of length, then the levels
            head = content[:4] if content is not None else _exactly(stream, 4)
            size = int.from_bytes(head, "little")
            data = content[4 : 4 + size] if content is not None else _exactly(stream, size)
            defined, skip = _levels(data, count, max_level), 4 + size
    present = sum(defined)
    if encoding == _PLAIN:
        found: Iterator[Position] = _plain(stream, body, stored, raw, skip, codec, present)
    elif encoding in (_PLAIN_DICTIONARY, _RLE_DICTIONARY):
        if content is None:
            stream.seek(body + (0 if codec else skip))
            data = _exactly(stream, stored - (0 if codec else skip))
            content = decompress_page(data, codec, raw) if codec else b"\0" * skip + data
        numbers = _hybrid(content[skip + 1 :], content[skip], present) if present else []
        found = iter([dictionary[k] for k in numbers])
    else:
        raise _Damaged(f"encoding {encoding} of its images is not supported")
    for is_defined in defined:
        yield next(found) if is_defined else None


def _plain(stream: BinaryIO, body: int, stored: int, raw: int, skip: int, codec: int, count: int) -> Iterator[Position]:
    """Yield the positions of `count` values, each of them four bytes of length and the bytes.

    Args:
        body, stored: byte range of the page in the file.
        raw: its bytes without compression.
        skip: bytes before the first value.
    """
    if not codec:
        at = skip
        for _ in range(count):
            stream.seek(body + at)
            size = int.from_bytes(_exactly(stream, 4), "little")
            if at + 4 + size > stored:
                raise _Damaged("an image is longer than its page")
            yield Position(body + at + 4, size)
            at += 4 + size
        return
    stream.seek(body)
    data = _exactly(stream, stored)
    content = decompress_page(data, codec, raw)
    blocks = _snappy_blocks(data, raw) if CODECS[codec] == "SNAPPY" else None
    at = skip
    for _ in range(count):
        size = int.from_bytes(content[at : at + 4], "little")
        first, at = at + 4, at + 4 + size
        if at > len(content):
            raise _Damaged("an image is longer than its page")
        if blocks is None or not size:
            # A page of snappy without whole blocks is read with its own header left out.
            start = len(varint(raw)) if CODECS[codec] == "SNAPPY" else 0
            yield Position(body + start, stored - start, codec, raw, first, size)
            continue
        a, b = first // _SNAPPY_BLOCK, (at - 1) // _SNAPPY_BLOCK + 1
        part = min(b * _SNAPPY_BLOCK, raw) - a * _SNAPPY_BLOCK
        yield Position(body + blocks[a], blocks[b] - blocks[a], codec, part, first - a * _SNAPPY_BLOCK, size)


def _snappy_blocks(data: bytes, raw: int) -> list[int] | None:
    """Return where every block of 64 KiB begins in a snappy stream, and its end.

    None if the writer did not compress blocks independently, as Google's library does.
    Format: https://github.com/google/snappy/blob/main/format_description.txt
    """
    at, done, starts = len(varint(raw)), 0, list[int]()
    while done < raw:
        if done == len(starts) * _SNAPPY_BLOCK:
            starts.append(at)
        tag = data[at]
        if tag & 3 == 0:  # a literal
            size, extra = tag >> 2, 0
            if size >= 60:
                extra = size - 59
                size = int.from_bytes(data[at + 1 : at + 1 + extra], "little")
            done, at = done + size + 1, at + 2 + extra + size
        else:
            if tag & 3 == 1:
                size, offset, length = 4 + (tag >> 2 & 7), (tag >> 5) << 8 | data[at + 1], 2
            else:
                length = 3 if tag & 3 == 2 else 5
                size, offset = (tag >> 2) + 1, int.from_bytes(data[at + 1 : at + length], "little")
            if offset > done % _SNAPPY_BLOCK:
                return None  # a copy from another block
            done, at = done + size, at + length
        if done > len(starts) * _SNAPPY_BLOCK:
            return None  # an element of two blocks
    return [*starts, at]


def _levels(data: bytes, count: int, max_level: int) -> list[bool]:
    """Return for every row whether its value is there."""
    if not max_level:
        return [True] * count
    return [level == max_level for level in _hybrid(data, max_level.bit_length(), count)]


def _hybrid(data: bytes, width: int, count: int) -> list[int]:
    """Decode `count` numbers of `width` bits: runs, and groups of eight packed into bytes."""
    numbers, at = list[int](), 0
    while len(numbers) < count:
        header, at = _read_varint(data, at)
        if header & 1:
            size = (header >> 1) * width
            bits, at = int.from_bytes(data[at : at + size], "little"), at + size
            left = min((header >> 1) * 8, count - len(numbers))
            numbers += [bits >> k * width & (1 << width) - 1 for k in range(left)]
        else:
            size = (width + 7) // 8
            value, at = int.from_bytes(data[at : at + size], "little"), at + size
            numbers += [value] * min(header >> 1, count - len(numbers))
            if not header >> 1:
                raise _Damaged("a run of no values")
    return numbers


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Return a number, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise _Damaged("a number has too many bytes")


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise _Damaged("it ends in a page")
    return data


def _read_struct(stream: BinaryIO, depth: int = 0) -> dict[int, Any]:
    """Read a struct of Thrift's compact protocol: number of a field -> value."""
    if depth > 4:
        raise _Damaged("a page header is nested too deeply")
    fields, number = dict[int, Any](), 0
    while (byte := _exactly(stream, 1)[0]) != 0:
        number = number + (byte >> 4) if byte >> 4 else _zigzag(stream)
        fields[number] = _read_value(stream, byte & 15, depth)
    return fields


def _read_value(stream: BinaryIO, kind: int, depth: int) -> Any:
    if kind in (1, 2):  # true, false
        return kind == 1
    if kind == 3:
        return _exactly(stream, 1)[0]
    if kind in (4, 5, 6):
        return _zigzag(stream)
    if kind == 7:
        return _exactly(stream, 8)
    if kind == 8:  # bytes: minimum and maximum of the page may be whole images
        size = _stream_varint(stream)
        if size > _MAX_PAGE:
            raise _Damaged("a page header is too large")
        return len(_exactly(stream, size))
    if kind == 12:
        return _read_struct(stream, depth + 1)
    raise _Damaged(f"a page header has a field of type {kind}")


def _stream_varint(stream: BinaryIO) -> int:
    data = b""
    while not data or data[-1] > 127:
        data += _exactly(stream, 1)
    return _read_varint(data, 0)[0]


def _zigzag(stream: BinaryIO) -> int:
    value = _stream_varint(stream)
    return value >> 1 ^ -(value & 1)
