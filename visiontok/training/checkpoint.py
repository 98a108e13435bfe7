"""Checkpoints that survive a kill: written whole under another name, fsynced, renamed; read back as tensors only."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from visiontok.errors import FormatError, VisionTokError

__all__ = ["CHECKPOINT", "LOG", "Log", "TrainingError", "load", "save", "save_weights"]

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"
SCHEMA = 1
_KEYS = ("schema", "config", "epoch", "update", "updates", "model", "optimizer", "ema", "scaler", "extra", "loss_sum")


class TrainingError(VisionTokError, RuntimeError):
    """A training run cannot go on: the loss diverged, images are unreadable, or its files cannot be written."""


def save(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a checkpoint atomically: a reader, or a run after a crash, sees the old one or the new one.

    Args:
        path: File; its folder exists.
        values: Tensors, numbers, texts and containers of them.

    Raises:
        TrainingError: It cannot be written; the last checkpoint is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"schema": SCHEMA, **values}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise TrainingError(f"cannot write the checkpoint '{path}': {error}; the last one is untouched") from error


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint; nothing in it is executed.

    Raises:
        FormatError: No such file, damaged, or not a checkpoint of `visiontok train`.
    """
    if not path.is_file():
        raise FormatError(f"checkpoint '{path}' does not exist.")
    try:
        values: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # The unpickler raises kinds of its own for damaged and for hostile files.
        why = str(error).splitlines() or [type(error).__name__]
        raise FormatError(f"checkpoint '{path}' cannot be read: {why[0]}") from error
    if not isinstance(values, dict) or set(values) != set(_KEYS) or values["schema"] != SCHEMA:
        raise FormatError(f"'{path}' is not a checkpoint of this visiontok's training loop.")
    return values


def save_weights(model: nn.Module, path: Path) -> None:
    """Writes a model's weights, learned parts of reducers included, as safetensors; atomic.

    Args:
        model: Patched or not.
        path: File; its folder exists.
    """
    from safetensors.torch import save as to_bytes

    from visiontok.bench.results import write_atomic

    weights = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    try:
        write_atomic(path, to_bytes(weights))
    except OSError as error:
        raise TrainingError(f"cannot write '{path}': {error.strerror or error}") from error


class Log:
    """A file of JSON lines, one per record; `None` as path keeps the records in memory only.

    Args:
        path: The file, or None.
        updates: On continuing a run, records beyond this update are dropped: they will be made again.
    """

    def __init__(self, path: Path | None, updates: int = 0) -> None:
        self.records: list[dict[str, Any]] = []
        self._path = path
        if path is None:
            return
        if updates and path.is_file():
            self.records = [record for record in _records(path) if record.get("updates", 0) <= updates]
        from visiontok.bench.results import write_atomic

        write_atomic(path, "".join(json.dumps(record) + "\n" for record in self.records).encode())

    def write(self, **record: Any) -> None:
        """Appends one record."""
        rounded = {key: round(value, 6) if isinstance(value, float) else value for key, value in record.items()}
        self.records.append(rounded)
        if self._path is not None:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(rounded) + "\n")


def _records(path: Path) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        # The last line of a killed run may be torn.
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records


def _sync_folder(folder: Path) -> None:
    # The rename itself is durable only once the folder is; some systems cannot open one.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
