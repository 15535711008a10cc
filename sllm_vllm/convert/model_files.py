"""Model directories: copies the files that go with the weights, and publishes a whole directory atomically.

Needs the standard library alone. Conversion (``--out``) and export build the directory beside its target, under a
hidden name, and rename it when it is complete, so that the target is either absent or complete.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from sllm_vllm.checkpoint.core.manifest import MANIFEST_NAME, PARTITION_DIR
from sllm_vllm.checkpoint.fingerprint import INDEX_SUFFIX, READ_ASIDE, WEIGHT_SUFFIXES
from sllm_vllm.checkpoint.writer import sync_directory, write_errors, write_file_durably
from sllm_vllm.errors import ConfigError, WriteError, WriterBusy

CONFIG_NAME = "config.json"
_AUDIO_TOKENIZER = "audio_tokenizer"
_NOT_COPIED = (*WEIGHT_SUFFIXES, INDEX_SUFFIX, ".onnx", ".onnx_data", ".h5", ".msgpack", ".ot")
"""Suffixes of files that hold weights, for any framework, or are an index of such files."""


def folders_read_aside(source: Path) -> set[str]:
    """Sub-folders whose weight files vLLM (0.32) reads in other places than its loader.

    These are the modules of sentence-transformers (read in ``adapters.py``), adapters (``jina.py``, ``lora_model.py``)
    and an audio tokenizer (``mimo_audio.py``).

    Raises:
        ConfigError: ``modules.json`` is not JSON.
    """
    found = {_AUDIO_TOKENIZER, *_module_folders(source / "modules.json")}
    found |= {path.parent.relative_to(source).as_posix() for path in source.rglob("adapter_config.json")}
    return {folder for folder in found if folder not in ("", ".") and (source / folder).is_dir()}


def _module_folders(path: Path) -> list[str]:
    try:
        modules = json.loads(path.read_bytes())
    except FileNotFoundError:
        return []
    except ValueError:
        raise ConfigError(f"{path}: it is not JSON; fix it") from None
    if isinstance(modules, dict):
        modules = modules.get("modules", [])
    return [str(PurePosixPath(str(m.get("path", "")))) for m in modules if isinstance(m, dict)]


def copy_model_files(source: Path, target: Path) -> None:
    """Copy all files but the weights that the loader reads: configuration, tokenizer, code, adapters.

    Symbolic links are followed; hidden files are left out.

    Raises:
        WriteError: ``source`` can't be read, or ``target`` can't be written.
    """
    aside = folders_read_aside(source)
    with write_errors(target):
        for directory, subdirectories, names in os.walk(source, followlinks=True):
            folder = Path(directory).relative_to(source)
            subdirectories[:] = [name for name in subdirectories if _is_entered(Path(directory, name))]
            place = target / folder
            place.mkdir(parents=True, exist_ok=True)
            for name in names:
                if _is_copied(name, has_all=folder.as_posix() in aside):
                    write_file_durably(place / name, (Path(directory) / name).read_bytes())


def _is_entered(directory: Path) -> bool:
    """Whether a sub-folder is copied: it is neither hidden, nor ours, nor a link to one of its parents."""
    is_ours = directory.name.startswith(".") or directory.name == PARTITION_DIR
    return not is_ours and directory.resolve() not in [above := directory.parent.resolve(), *above.parents]


def _is_copied(name: str, *, has_all: bool) -> bool:
    if name.startswith(".") or name == MANIFEST_NAME:
        return False
    return has_all or name in READ_ASIDE or not name.endswith(_NOT_COPIED)


def read_config(directory: Path) -> dict[str, Any]:
    """Read a model's ``config.json``.

    Raises:
        ConfigError: it is missing or not a JSON object.
    """
    path = directory / CONFIG_NAME
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: it can't be read ({error.strerror}); give a model's directory") from None
    except ValueError:
        raise ConfigError(f"{path}: it is not JSON; fix it") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: it is not a JSON object; fix it")
    return config


def adapt_config(directory: Path, *, dtype: str, is_untied: bool) -> None:
    """Write the weights' dtype into a copied ``config.json``, and that ``lm_head`` is untied if it is.

    vLLM can't derive either of these without the source's weight files. Does nothing if there is no ``config.json``.
    """
    path = directory / CONFIG_NAME
    if not path.exists():
        return
    config = read_config(directory)
    for key in {"dtype", "torch_dtype"} & config.keys() or {"dtype"}:
        config[key] = dtype
    if is_untied:
        for part in (config, config.get("text_config")):
            if isinstance(part, dict):
                part["tie_word_embeddings"] = False
    write_file_durably(path, json.dumps(config, indent=2).encode() + b"\n")


def is_free(target: Path) -> bool:
    """Whether a directory may be created at ``target``: nothing is there, or an empty directory.

    Raises:
        WriteError: the directory can't be listed.
    """
    with write_errors(target):
        return not os.path.lexists(target) or (target.is_dir() and not target.is_symlink() and not os.listdir(target))


def require_free(target: Path) -> None:
    """Raise if something at ``target`` would be overwritten.

    Raises:
        WriteError: ``target`` exists and is not an empty directory.
    """
    if not is_free(target):
        raise WriteError(target, "it exists and is not empty", "give a new or an empty directory")


@contextlib.contextmanager
def workplace(target: Path, purpose: str, *, keep: str | None = None) -> Iterator[Path]:
    """Lock ``target`` against other processes, and yield a working directory beside it, which is removed afterwards.

    After a failure it is kept if it has a file whose name matches ``keep``, so that the next attempt can continue.

    Raises:
        WriterBusy: another process is making ``target``.
        WriteError: the working directory can't be created.
    """
    root = target.parent / f".{target.name}.{purpose}"
    with write_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        fd = os.open(root / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WriterBusy(target, "another process is making it", "wait for it") from None
        try:
            yield root
        except BaseException:
            if keep is None or not any(root.rglob(keep)):
                shutil.rmtree(root, ignore_errors=True)
            raise
        shutil.rmtree(root, ignore_errors=True)
    finally:
        os.close(fd)


def put_in_place(directory: Path, target: Path) -> None:
    """Rename a finished directory to ``target``. The directory's files must be durable already.

    Raises:
        WriteError: the file system refuses, or ``target`` is not free.
    """
    with write_errors(target):
        for place, _, _ in os.walk(directory):
            sync_directory(Path(place))
        os.rename(directory, target)
        sync_directory(target.parent)


def sync_file(path: Path) -> None:
    """Flush a file's bytes to the storage device."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
