"""The same images in every format."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from helpers.common import jpeg

CLASSES = ("ant", "bee", "cat")


def contents(count: int) -> list[tuple[str, bytes, str]]:
    """Return (name, bytes, class), in the order of an image folder."""
    return [(f"{k:04d}", jpeg(k, 40 + k % 7, 50 + k % 5), CLASSES[k * 3 // count]) for k in range(count)]


def write_folder(folder: Path, images) -> None:
    for name, data, label in images:
        (folder / label).mkdir(parents=True, exist_ok=True)
        (folder / label / f"{name}.jpg").write_bytes(data)


def write_tar(path, members) -> None:
    """Write (name, bytes) pairs into a path or a file object."""
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
    target = {"name": path} if isinstance(path, Path) else {"fileobj": path}
    with tarfile.open(mode="w", **target) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def write_shards(pattern: str, images, shards: int, *, label: str = "cls") -> None:
    """Write consecutive images into PATTERN % 0, PATTERN % 1, ...

    `label` is cls (a number), json, name (text in cls) or folder.
    """
    for part, chosen in enumerate(np.array_split(np.arange(len(images)), shards)):
        members = []
        for k in chosen:
            name, data, of_class = images[k]
            if label == "folder":
                members.append((f"{of_class}/{name}.jpg", data))
                continue
            members.append((f"{name}.jpg", data))
            number = CLASSES.index(of_class)
            text = {"cls": str(number), "name": of_class, "json": json.dumps({"label": number, "x": [1]})}[label]
            members.append((f"{name}.{'json' if label == 'json' else 'cls'}", text.encode()))
        write_tar(Path(pattern % part), members)


def write_parquet(path: Path, images, *, names: bool = True, **options) -> None:
    """Write a file as `datasets` does; `options` are pyarrow's."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": data, "path": f"{name}.jpg"} for name, data, _ in images]
    labels = [CLASSES.index(of_class) for *_, of_class in images]
    table = pa.table({"image": pa.array(rows, type=struct), "label": pa.array(labels)})
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": list(CLASSES), "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, **{"compression": "none", "use_dictionary": False, "row_group_size": 10, **options})
