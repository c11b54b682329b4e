"""Artifacts that stages hand on: written aside and renamed, with fingerprints of what they were made from."""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

META_FILE = "villa_artifact.json"


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder beside `folder`, then put it in `folder`'s place: it is there whole or not at all.

    Raises:
        OSError: the disk is full, or the folder can't be written; what stood there before is kept.
    """
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        write(aside)
        for path in aside.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
    except Exception as error:
        shutil.rmtree(aside, ignore_errors=True)
        # safetensors reports a full disk as an error of its own, with the system's words in it.
        if getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error):
            free = shutil.disk_usage(folder.parent if folder.parent.exists() else Path.cwd()).free
            raise OSError(
                errno.ENOSPC,
                f"The disk is full ({free / 2**20:.0f} MiB free); nothing was changed and what was saved before is "
                "whole. Make room, then run the same command again: it goes on from the last checkpoint",
                str(folder),
            ) from error
        raise
    remove_folder(folder)
    aside.rename(folder)


def remove_folder(folder: Path) -> None:
    """Remove a folder, under another name: who is killed here leaves no half of it where it would be picked up."""
    removed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    if folder.exists():
        folder.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Keep `meta` in the artifact's folder."""
    (folder / META_FILE).write_text(json.dumps(meta, indent=2, sort_keys=True) + "\n")


def read_meta(folder: Path, made_by: str) -> dict[str, Any]:
    """What an artifact says of itself.

    Raises:
        ValueError: there is no whole artifact in the folder; the message says which stage makes it.
    """
    path = folder / META_FILE
    if not path.is_file():
        raise ValueError(f"{folder} holds no finished artifact (no {META_FILE}); run training/{made_by}.py first.")
    return json.loads(path.read_text())


def is_finished(folder: Path, meta: dict[str, Any], resume: bool) -> bool:
    """Whether the artifact is there already, made from the same things with the same arguments.

    Raises:
        ValueError: it is there, but was made otherwise; the message names what differs.
    """
    if not (folder / META_FILE).is_file() or not resume:
        return False
    check_same(json.loads((folder / META_FILE).read_text()), meta, str(folder))
    logger.info("%s is finished and was made with these arguments: skipped", folder)
    return True


def check_same(found: dict[str, Any], expected: dict[str, Any], where: str) -> None:
    """Compare what was kept with what is wanted now.

    Raises:
        ValueError: naming each entry that differs, both values, and the two ways out.
    """
    if differing := differences(found, expected):
        raise ValueError(
            f"{where} was made with other arguments or inputs: {'; '.join(differing)}. "
            "Add --no_resume to replace it, or write elsewhere with --run_dir or --output_dir."
        )


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """What was kept and what is wanted now, one phrase per entry that differs."""
    found, expected = json.loads(json.dumps(found)), json.loads(json.dumps(expected))
    return [
        f"{key} was {found.get(key)!r}, is now {expected.get(key)!r}"
        for key in sorted(set(found) | set(expected))
        if found.get(key) != expected.get(key)
    ]


def check_made_for(meta: dict[str, Any], folder: str | Path, **expected: Any) -> None:
    """Check that a store or pairs file belongs to the model, vocabulary and split that it is used with.

    Raises:
        ValueError: naming the entry, what the artifact was made for and what it is used with.
    """
    for key, value in expected.items():
        if meta.get(key) != value:
            raise ValueError(
                f"{folder} was made for another {key.replace('_', ' ')}: it holds {meta.get(key)!r}, "
                f"this run has {value!r}. Make it again for this run, or point to the right one."
            )


def fingerprint_of_strings(strings: Iterable[str]) -> str:
    """A short hash of a sequence of strings: of a split's image ids, of a vocabulary."""
    digest = hashlib.sha256()
    for string in strings:
        digest.update(string.encode() + b"\0")
    return digest.hexdigest()[:16]


def fingerprint_of_model(folder: Path, made_by: str) -> str:
    """A short hash of a model's weights and configuration on disk.

    Raises:
        ValueError: there are no safetensors weights in the folder; the message says which stage makes them.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{folder} holds no model (no *.safetensors file); run training/{made_by}.py first, or name the folder of "
            f"a model with --{'mapping_model' if made_by == 'stage1' else 'vlm'}."
        )
    digest = hashlib.sha256()
    for path in [folder / "config.json", *files]:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
