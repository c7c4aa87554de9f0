"""Find a config: a YAML file, or one of the configs that come with the package."""

from pathlib import Path

from fastbyol.errors import InputError
from fastbyol.settings.messages import format_name, nearest

FOLDER = Path(__file__).parents[1] / "configs"  # in a checkout a link to the folder at the top


def shipped_configs() -> dict[str, Path]:
    """Return the configs that come with the package: name -> file, by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def find_config(name_or_path: str) -> Path:
    """Return the file of a config.

    Args:
        name_or_path: a file, or the name of a shipped config such as "demo". A file of that name in
            the working directory comes first.

    Raises:
        InputError: there is neither.
    """
    path, shipped = Path(name_or_path), shipped_configs()
    if name_or_path in shipped and (path.is_dir() or not path.exists()):
        return shipped[name_or_path]
    try:
        path.stat()
    except FileNotFoundError:
        raise _not_found(path, name_or_path, shipped) from None
    except OSError as error:
        raise InputError(f"config={format_name(name_or_path)}: cannot be read: {error.strerror}") from None
    return path


def _not_found(path: Path, given: str, shipped: dict[str, Path]) -> InputError:
    """Return the error with the nearest file in the same folder or the nearest shipped config."""
    folder, is_name = path.parent, path.name == given
    files = [file.name for file in folder.iterdir() if file.is_file()] if folder.is_dir() else []
    if path.stem in shipped:  # as in a checkout: configs/demo.yaml
        near = path.stem
    elif near := nearest(path.name, [*files, *shipped] if is_name else files):
        near = str(folder / near)
    hint = f"did you mean {near}?" if near else "`fastbyol configs` lists the shipped configs"
    what = "there is no such file and no shipped config of this name" if is_name else "there is no such file"
    return InputError(f"config={format_name(given)}: {what}; {hint}")
