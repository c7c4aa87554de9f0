"""Publish a run's backbone on the Hugging Face Hub, in timm's layout:

config.json        architecture, preprocessing
model.safetensors  weights with timm's names, and the settings that `--init` checks
README.md          the model card
"""

import os
import tempfile
from pathlib import Path

import huggingface_hub
import timm
from huggingface_hub import errors

from fastbyol.config import ModelConfig
from fastbyol.data.crops import CENTER_FRACTION
from fastbyol.errors import InputError, RunError, error_reason, first_line
from fastbyol.kernels.augment_params import IMAGENET_MEAN, IMAGENET_STD
from fastbyol.runtime.files import check_output
from fastbyol.runtime.logging import logger
from fastbyol.weights.export import load_source, model_card
from fastbyol.weights.files import BACKBONE_FIELDS, plain_tensors, write_safetensors
from fastbyol.weights.formats import Source, feature_code, fenced, is_plain_timm, timm_arguments
from fastbyol.weights.hub import PREFIX, WEIGHTS, parse_hub

_CARD = "README.md"


def push(run: Path, target: str, dry_run: Path | None) -> str:
    """Upload the online backbone of a checkpoint, so that timm.create_model loads it by name.

    The repository is created if it does not exist. An existing model card is kept.

    Args:
        run: A run's folder, for its newest valid checkpoint, or a checkpoint file.
        target: hf://USER/NAME.
        dry_run: Folder to create and fill instead of uploading.

    Returns:
        One line for the log.

    Raises:
        InputError: The checkpoint cannot be used, timm cannot build the network, the folder exists
            or cannot be written, or there is no token.
        RunError: The upload failed, or the disk is full.
    """
    repo, revision, file = parse_hub(target, target)
    if revision or file:
        raise InputError(f"{target}: expected {PREFIX}USER/NAME")
    if dry_run is not None:
        _check_new_folder(dry_run)
    elif huggingface_hub.get_token() is None:
        raise InputError(f"{target}: there is no Hugging Face token: set HF_TOKEN, or run `hf auth login`")
    source = load_source(run)
    if not is_plain_timm(source):
        raise InputError(
            f"{target}: timm.create_model cannot build {_description(source)}; "
            "`fastbyol export --format safetensors` writes a file, which you can upload"
        )
    parent = None if dry_run is None else dry_run.absolute().parent
    try:
        with tempfile.TemporaryDirectory(prefix=".fastbyol-push-", dir=parent, ignore_cleanup_errors=True) as folder:
            _write(source, repo, Path(folder) / "files")
            if dry_run is not None:
                os.rename(Path(folder) / "files", dry_run)
                return f"wrote {dry_run} ({_description(source)}); nothing was uploaded"
            return _upload(source, repo, Path(folder) / "files")
    except OSError as error:
        where = target if dry_run is None else f"--dry-run {dry_run}"
        raise RunError(f"{where}: {error_reason(error)}") from None


def _check_new_folder(folder: Path) -> None:
    if os.path.lexists(folder):
        raise InputError(f"--dry-run {folder}: already exists; remove it or choose another folder")
    check_output(folder, f"--dry-run {folder}")


def _description(source: Source) -> str:
    """Return the backbone's name and the settings that are not timm's defaults."""
    config, default = source.config.model, ModelConfig()
    changed = [
        f"model.{field}={getattr(config, field)}"
        for field in BACKBONE_FIELDS[1:]
        if getattr(config, field) != getattr(default, field)
    ]
    return " with ".join([source.name, *([", ".join(changed)] if changed else [])])


def _write(source: Source, repo: str, folder: Path) -> None:
    arguments, tensors = timm_arguments(source), plain_tensors(source.backbone)
    network = timm.create_model(source.name, num_classes=0, **arguments)
    network.load_state_dict(tensors)  # strict: timm's network has the same tensors
    network.pretrained_cfg = {
        "architecture": source.name,
        "num_classes": 0,
        "input_size": (3, source.size, source.size),
        "interpolation": "bicubic",
        "crop_pct": CENTER_FRACTION,
        "crop_mode": "center",
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        **{
            key: network.pretrained_cfg.get(key)
            for key in ("first_conv", "classifier", "pool_size", "fixed_input_size")
        },
    }
    timm.models.save_for_hf(network, str(folder), model_args=arguments, safe_serialization=True)
    write_safetensors(folder / WEIGHTS, tensors, source.config.model, source.size)
    (folder / _CARD).write_text(_card(source, repo), encoding="utf-8", errors="backslashreplace")


def _card(source: Source, repo: str) -> str:
    code = f"""\
import timm
import torch

backbone = timm.create_model("hf-hub:{repo}", pretrained=True).eval()
{feature_code(source)}"""
    init = fenced("sh", f"fastbyol train --init {PREFIX}{repo}")
    header = ["library_name: timm", "pipeline_tag: image-feature-extraction", "tags: [timm, byol, self-supervised]"]
    usage = f"{fenced('python', code)}\n\nTo start a run of fastbyol from it:\n\n{init}"
    return "\n".join(["---", *header, "---", model_card(source, "timm", usage)])


def _upload(source: Source, repo: str, folder: Path) -> str:
    api = huggingface_hub.HfApi()
    try:
        repo = api.create_repo(repo, exist_ok=True).repo_id
        kept = api.file_exists(repo, _CARD)
        if kept:
            logger.info(f"{PREFIX}{repo} has a {_CARD}: it is kept")
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            ignore_patterns=[_CARD] if kept else None,
            commit_message=f"{_description(source)}, {source.checkpoint.stem}",
        )
    except (errors.HTTPError, OSError, ValueError) as error:
        raise RunError(f"{PREFIX}{repo}: the upload failed: {first_line(error)}") from None
    return f"uploaded {_description(source)} to {PREFIX}{repo}"
