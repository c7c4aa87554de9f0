"""Archives and folders of images, for tests of `fastbyol prepare`."""

import io
import tarfile

import pytest
from PIL import Image

from fastbyol import cli
from fastbyol.errors import InputError


def jpeg(color):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (color % 256, 40, 90)).save(buffer, "JPEG")
    return buffer.getvalue()


def tar(members, mode="w"):
    """Return a tar archive of {name: bytes}; a value may be a TarInfo, of a link for example."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def write_tree(root, members):
    for name, content in members.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def tree(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def assert_one_line(tmp_path, prepare, message):
    """The command fails with one line and leaves nothing."""
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match=message) as caught:
        prepare(tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == before


def assert_command(tmp_path, capsys, name, words, text):
    """The command prints a summary, and refuses to write into the same folder again."""
    words = ["prepare", name, "--out", str(tmp_path / f"out-{name}"), *words]
    assert cli.main(words) == 0
    assert text in capsys.readouterr().out
    before = tree(tmp_path)
    assert cli.main(words) == 2
    assert "not overwritten" in capsys.readouterr().err
    assert tree(tmp_path) == before


def without(members, *words):
    return {name: content for name, content in members.items() if not any(word in name for word in words)}


def changed(members, name, change):
    return {key: change(content) if name in key else content for key, content in members.items()}
