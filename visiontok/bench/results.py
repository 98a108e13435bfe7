"""Trials and their store: one file per trial, written atomically, so that any number of launchers may share it.

A trial is named by the sha256 of its canonical JSON. Its row is written to a temporary name in the same folder, fsynced
and renamed, so a reader never sees half a row and a killed run leaves at most a temporary file that the next one sweeps
away. Locks are the operating system's (through `filelock`), hence freed when their holder dies.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from visiontok.bench.schema import COLUMNS, SCHEMA_VERSION, check_row
from visiontok.errors import ParameterError, VisionTokError

SCHEDULES = ("r", "keep")


class StoreError(VisionTokError, RuntimeError):
    """The result store cannot be written or holds a file that is not a result."""


@dataclass(frozen=True)
class TrialSpec:
    """Everything that decides what a trial measures; two equal specs are one trial.

    Attributes:
        model: `tiny_vit`, `tiny_vit_small_dense` or a timm model name.
        reducer: registry name, or None to measure the model as it is.
        params: parameters of the reducer, its budget included. Plain values; a schedule for `r` or `keep` that is a
            list, `(r, inflection)` or `{layer: r}` is kept as text, because JSON has neither tuples nor integer keys.
        reference: unreduced model that accuracy and speed are compared with; None means `model` itself.
        pretrained: load timm's pretrained weights (the embedded models always carry theirs).
        checkpoint: path of a checkpoint for `model`, read as tensors only.
        data: `digits`, `none` (no accuracy) or a folder of class folders.
        split: sub-folder of `data`, or `test` / `train` of the digits.
        class_map: file with one class folder name per line, in the order of the model's outputs.
        max_images: evaluate only n images, evenly spaced; None means all.
        input_size: `(C, H, W)`, None for the model's own.
        batch_size: images per batch, for accuracy and timing.
        device: torch device.
        amp: run under autocast.
        amp_dtype: autocast's dtype, `bfloat16` or `float16`.
        dtype: dtype of weights and inputs, `float32`, `bfloat16` or `float16`.
        channels_last: use the channels-last memory format.
        torchcompile: backend of `torch.compile`, None for eager.
        timing: measure speed too.
        retry: halve the batch while it does not fit into memory.
        num_warm_iter: untimed calls before timing.
        num_bench_iter: interleaved rounds.
        threads: intra-op threads, None leaves torch's choice.
        seed: seed of weights that are not loaded and of the inputs that are timed.
        workers: processes that load images.
    """

    model: str
    reducer: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    reference: str | None = None
    pretrained: bool = False
    checkpoint: str | None = None
    data: str = "digits"
    split: str = "test"
    class_map: str | None = None
    max_images: int | None = None
    input_size: tuple[int, int, int] | None = None
    batch_size: int = 32
    device: str = "cpu"
    amp: bool = False
    amp_dtype: str = "bfloat16"
    dtype: str = "float32"
    channels_last: bool = False
    torchcompile: str | None = None
    timing: bool = True
    retry: bool = True
    num_warm_iter: int = 10
    num_bench_iter: int = 40
    threads: int | None = None
    seed: int = 42
    workers: int = field(default=0, metadata={"identity": False})

    def __post_init__(self) -> None:
        if self.reducer is None and self.params:
            raise ParameterError(f"params {dict(self.params)} were given without a reducer; name one with --reducer")
        # One plain form of each value, so that a spec read back from JSON equals the one that was written.
        params = {name: _as_text(value) if name in SCHEDULES else value for name, value in self.params.items()}
        object.__setattr__(self, "params", json.loads(_dumps(params)))
        if self.input_size is not None:
            object.__setattr__(self, "input_size", tuple(self.input_size))

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def role(self) -> str:
        """`reduced`, `smaller` (another, dense model) or `unreduced` (the reference itself)."""
        if self.reducer is not None:
            return "reduced"
        return "unreduced" if self.reference in (None, self.model) else "smaller"

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `visiontok.patch`: `params` with schedules read back from text."""
        from visiontok.core.schedule import parse_budget

        return {
            name: parse_budget(value) if name in SCHEDULES and isinstance(value, str) else value
            for name, value in self.params.items()
        }

    @property
    def budget(self) -> str:
        """The parameters as text, for tables: `gflops=2.7`."""
        return " ".join(f"{name}={_short(value)}" for name, value in self.params.items())

    @property
    def key(self) -> str:
        """sha256 of the canonical JSON, without what cannot change a result (`workers`)."""
        values = self.to_dict()
        identity = {f.name: values[f.name] for f in fields(self) if f.metadata.get("identity", True)}
        return hashlib.sha256(_dumps({"schema": SCHEMA_VERSION, **identity}).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The spec as JSON values."""
        values = asdict(self)
        values["input_size"] = None if self.input_size is None else list(self.input_size)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrialSpec:
        """Rebuilds a spec from `to_dict()`.

        Raises:
            ParameterError: a key is not a field of the spec.
        """
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ParameterError(f"unknown key(s) in a trial spec: {', '.join(unknown)}")
        return cls(**values)

    def identity_row(self) -> dict[str, Any]:
        """The part of a result row that is known before anything runs."""
        return {
            "schema_version": SCHEMA_VERSION,
            "trial_key": self.key,
            "role": self.role,
            "model": self.model,
            "reference": self.reference or self.model,
            "reducer": self.reducer,
            "params": dict(self.params),
            "budget": self.budget,
            "seed": self.seed,
            "spec": self.to_dict(),
        }


class ResultStore:
    """A folder with one JSON file per trial under `trials/`.

    Args:
        root: the folder; created on the first write.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        self.trials = self.root / "trials"
        self._locks = self.root / ".locks"

    def prepare(self) -> None:
        """Creates the folders and proves that they can be written.

        Raises:
            StoreError: the folder cannot be created or written.
        """
        with self._explained("create"):
            self.trials.mkdir(parents=True, exist_ok=True)
            self._locks.mkdir(parents=True, exist_ok=True)
            probe = self.root / f".probe.{os.getpid()}"
            probe.write_bytes(b"visiontok")
            probe.unlink()

    def read(self, key: str) -> dict[str, Any] | None:
        """The row of a trial, None where it has not been run.

        Raises:
            StoreError: the file is not a result of this schema.
        """
        path = self.trials / f"{key}.json"
        try:
            row = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise StoreError(f"{path} is not JSON ({error}); it was not written by visiontok, move it away") from error
        problems = check_row(row)
        if problems:
            raise StoreError(f"{path} does not follow the result schema: {'; '.join(problems)}; move it away")
        return row

    def write(self, row: Mapping[str, Any]) -> None:
        """Stores a row atomically, replacing an older one of the same trial; call it with the trial's lock held.

        Raises:
            StoreError: the row breaks the schema, or the folder cannot be written (read-only, disk full).
        """
        row = jsonable(row)
        problems = check_row(row)
        if problems:
            raise StoreError(f"refusing to store a row that breaks the result schema: {'; '.join(problems)}")
        name = f"{row['trial_key']}.json"
        with self._explained("clean"):
            for leftover in self.trials.glob(f".{name}.*.tmp"):
                leftover.unlink(missing_ok=True)
        self.write_text(f"trials/{name}", json.dumps(row, indent=1, sort_keys=True) + "\n")

    def write_text(self, name: str, text: str) -> Path:
        """Writes `root/name` atomically and returns its path.

        Raises:
            StoreError: the folder cannot be written.
        """
        target = self.root / name
        with self._explained("write"):
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(target, text.encode("utf-8"))
        return target

    def rows(self) -> list[dict[str, Any]]:
        """All rows, sorted by trial key."""
        keys = sorted(path.stem for path in self.trials.glob("*.json"))
        return [row for row in map(self.read, keys) if row is not None]

    @contextlib.contextmanager
    def lock(self, key: str, wait: bool = True) -> Iterator[bool]:
        """Holds a trial against other launchers; yields False where another one has it and `wait` is off.

        Raises:
            StoreError: the lock file cannot be created.
        """
        from filelock import FileLock, Timeout

        with self._explained("lock"):
            self._locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._locks / f"{key}.lock", timeout=-1 if wait else 0)
        try:
            with self._explained("lock"):
                lock.acquire()
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    @contextlib.contextmanager
    def _explained(self, verb: str) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            raise
        except OSError as error:
            raise StoreError(
                f"cannot {verb} results in {self.root}: {error.strerror or error}; "
                "free space or choose a writable folder with --results-dir, finished trials are kept"
            ) from error


def write_atomic(target: Path, data: bytes) -> None:
    """Writes a file under a temporary name in its own folder, fsyncs it and renames it into place."""
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def to_jsonl(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as JSON lines."""
    return "".join(json.dumps(jsonable(row), sort_keys=True) + "\n" for row in rows)


def to_csv(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as CSV with the columns of `schema.COLUMNS`, always all of them and in that order."""
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: "" if row.get(name) is None else row[name] for name in COLUMNS})
    return buffer.getvalue()


def jsonable(value: Any) -> Any:
    """A copy with tuples as lists and numbers that JSON lacks (NaN, infinities) as None."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _dumps(values: Mapping[str, Any]) -> str:
    try:
        return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ParameterError(f"a trial holds plain JSON values only: {error}") from error


def _as_text(value: Any) -> Any:
    return repr(value) if isinstance(value, (list, tuple, dict)) else value


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace(" ", "")
