"""Files of the Hugging Face Hub, as hf://USER/NAME[@REVISION][/FILE]."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
from huggingface_hub import errors
from huggingface_hub.utils import logging as hub_logging

from fastbyol.errors import InputError, first_line

PREFIX = "hf://"
WEIGHTS = "model.safetensors"
"""Name of the weights in repositories of timm, and of `fastbyol push`."""
_NAME = r"[A-Za-z0-9][\w.-]*"
_SPEC = re.compile(rf"hf://(?P<repo>{_NAME}/{_NAME})(@(?P<revision>[^/@]+))?(/(?P<file>[^/].*))?")


class HubFile(NamedTuple):
    """A file in a repository."""

    repo: str
    revision: str | None
    file: str | None


def parse_hub(spec: str, where: str) -> HubFile:
    """Parse hf://USER/NAME[@REVISION][/FILE].

    Args:
        spec: The text.
        where: Start of error messages.

    Raises:
        InputError: The text has another form.
    """
    if (match := _SPEC.fullmatch(spec)) is None:
        raise InputError(f"{where}: expected {PREFIX}USER/NAME, or {PREFIX}USER/NAME@REVISION/FILE")
    return HubFile(match["repo"], match["revision"], match["file"])


def download(spec: str, where: str) -> Path:
    """Download a file, by default WEIGHTS, to the hub's cache, and return its path there.

    HF_TOKEN gives access to private repositories. With HF_HUB_OFFLINE=1, only the cache is used.

    Raises:
        InputError: The file cannot be downloaded.
    """
    repo, revision, file = parse_hub(spec, where)
    with _quiet():
        try:
            return Path(huggingface_hub.hf_hub_download(repo, file or WEIGHTS, revision=revision))
        except errors.LocalEntryNotFoundError:
            reason = "the hub cannot be reached, and the file is not in its cache"
        except errors.RepositoryNotFoundError:
            reason = "there is no such repository, or it is private: set HF_TOKEN"
        except errors.RevisionNotFoundError:
            reason = f"the repository has no revision {revision}"
        except errors.EntryNotFoundError:
            hint = "" if file else f"; name another file: {PREFIX}{repo}/FILE"
            reason = f"the repository has no {file or WEIGHTS}{hint}"
        except (OSError, ValueError, errors.HTTPError) as error:
            reason = f"cannot be downloaded: {first_line(error)}"
    raise InputError(f"{where}: {reason}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Context manager: without the hub's warnings about each attempt."""
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        hub_logging.set_verbosity(verbosity)
