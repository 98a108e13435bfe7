"""Whole folders to tokens and back: loading threads ahead of the model, batches, resume, errors counted."""

from __future__ import annotations

import io
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visiontok.bench.data import UnreadableImageError
from visiontok.errors import FormatError, ParameterError
from visiontok.tokenizers import file_format, packing, quality, shards, sources
from visiontok.tokenizers.base import Tokenizer
from visiontok.tokenizers.file_format import TokenFile
from visiontok.tokenizers.pictures import FITS, to_picture
from visiontok.tokenizers.shards import Row

__all__ = ["Choice", "Summary", "decode_files", "encode_files", "encode_job"]


@dataclass(frozen=True)
class Choice:
    """How many tokens each picture gets; at most one field is set, and none means all of them.

    Attributes:
        tokens: As many.
        target_psnr: The fewest with which the reconstruction has as many dB.
        budget_bytes: As many as fit into a `.vtok` file of this size.
        mean_tokens: As many on average, more for pictures that need them (`quality.allocate`). They are shared out
            within each shard, so that every shard comes out the same however a run was interrupted.
    """

    tokens: int | None = None
    target_psnr: float | None = None
    budget_bytes: int | None = None
    mean_tokens: float | None = None

    def check(self, tokenizer: Tokenizer) -> None:
        """Raises ParameterError if more than one is set or one cannot be met."""
        given = [name for name, value in asdict(self).items() if value is not None]
        if len(given) > 1:
            names = ", ".join(asdict(self))
            raise ParameterError(f"give one of {names}, not {' and '.join(given)}.")
        most = self._most(tokenizer) if self.mean_tokens is None else self.mean_tokens
        if not tokenizer.shortest <= most <= tokenizer.length:
            limits = f"{tokenizer.shortest} to {tokenizer.length} tokens"
            raise ParameterError(f"{(given or ['tokens'])[0]} must give {limits}, got {most}.")

    def encode(self, tokenizer: Tokenizer, images: Tensor) -> list[Tensor]:
        """Ids of each image."""
        ids = tokenizer.encode(images, self._most(tokenizer))
        lengths = [ids.shape[1]] * len(ids) if isinstance(ids, Tensor) else [len(row) for row in ids]
        if self.target_psnr is not None:
            lengths, _ = quality.shortest(tokenizer, images, self.target_psnr)
        return [row[:length].cpu() for row, length in zip(ids, lengths)]

    def errors(self, tokenizer: Tokenizer, images: Tensor, ids: Sequence[Tensor]) -> NDArray[np.float64]:
        """Mean square errors `(B, L)` at `quality.default_lengths`, for `share`."""
        found = quality.rate_quality(tokenizer, images, ids=torch.stack(list(ids)))
        return 10 ** (-found.double().numpy() / 10)

    def share(self, tokenizer: Tokenizer, rows: Sequence[Row], errors: Sequence[NDArray[np.float64]]) -> list[Row]:
        """Rows of a shard with as many of their tokens as `mean_tokens` allows all of them together."""
        good = [row for row in rows if row.ids is not None]
        if self.mean_tokens is None or not good:
            return list(rows)
        budget = int(self.mean_tokens * len(good))
        lengths = iter(quality.allocate(np.concatenate(errors), quality.default_lengths(tokenizer), budget).tolist())
        return [row if row.ids is None else row._replace(ids=row.ids[: next(lengths)]) for row in rows]

    def _most(self, tokenizer: Tokenizer) -> int:
        if self.budget_bytes is None:
            return tokenizer.length if self.tokens is None else self.tokens
        room = self.budget_bytes - file_format.header_size(tokenizer)
        return min(tokenizer.length, room * 8 // packing.bits_for(tokenizer.codebook_size))


@dataclass
class Summary:
    """What a run did.

    Attributes:
        images: Done now.
        skipped: Done by an earlier run.
        failed: Could not be read.
        tokens, bytes: Written now.
        seconds: Of this run.
        failures: Name and reason of the first hundred.
    """

    images: int = 0
    skipped: int = 0
    failed: int = 0
    tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0
    failures: tuple[tuple[str, str], ...] = ()

    def fail(self, key: str, reason: str) -> None:
        """Counts one."""
        self.failed += 1
        self.failures = (*self.failures, (key, reason))[:100]


def encode_files(
    tokenizer: Tokenizer,
    source: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    to: str = "vtok",
    tokens: int | None = None,
    target_psnr: float | None = None,
    budget_bytes: int | None = None,
    mean_tokens: float | None = None,
    fit: str = "crop",
    batch_size: int = 32,
    shard_size: int = 1024,
    workers: int = 4,
    resume: bool = False,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    **hints: Any,
) -> Summary:
    """Encodes all pictures of a source.

    Args:
        tokenizer: With its weights.
        source: See `sources.jobs`.
        output: Folder, new or empty; a `.vtok` file if the source is one picture.
        to: "vtok" (one file for each picture), "parquet" or "webdataset" (shards).
        tokens, target_psnr, budget_bytes, mean_tokens: See `Choice`.
        fit: See `Tokenizer.preprocess`.
        batch_size: Pictures per batch.
        shard_size: Pictures per shard, of image files; a shard of a source becomes one shard.
        workers: Threads that read pictures.
        resume: Continue `output`. What is finished is left as it is; the rest comes out as it would have.
        progress: Wraps the jobs.
        **hints: `seed`, `steps`, `guidance` to store for decoding.

    Raises:
        ParameterError: A bad argument, a source without pictures, or an output that is not empty.
    """
    choice = Choice(tokens, target_psnr, budget_bytes, mean_tokens)
    choice.check(tokenizer)
    if to not in shards.FORMATS or fit not in FITS:
        raise ParameterError(f"to must be one of {shards.FORMATS} and fit one of {FITS}, got {to!r} and {fit!r}.")
    for name, value in (("batch_size", batch_size), ("shard_size", shard_size), ("workers", workers)):
        if value < 1:
            raise ParameterError(f"{name} must be at least 1, got {value}.")
    target, begun = Path(output), time.perf_counter()
    # Single files are written after a few batches, so that a killed run has lost little.
    found = sources.jobs(source, 8 * batch_size if to == "vtok" else shard_size)
    single = target.suffix == ".vtok" and to == "vtok"
    if single and (len(found) != 1 or len(found[0].keys) != 1):
        raise ParameterError(f"output {target} is one file, but the source holds more than one picture; name a folder.")
    if not tokenizer.model_id:
        tokenizer.identify()
    settings = {"family": tokenizer.name, "model_id": tokenizer.model_id, "to": to, "fit": fit, **asdict(choice)}
    if not single:
        shards.open_output(target, {**settings, "shard_size": shard_size, **hints}, resume)
    summary = Summary()
    for number, job in enumerate(progress(found)):
        todo = _unfinished(job, target, to, number, resume and not single, summary, tokenizer, choice)
        if todo is None:
            continue
        rows = encode_job(tokenizer, todo, choice, fit=fit, batch_size=batch_size, workers=workers)
        _account(summary, rows)
        if not single:
            summary.bytes += shards.write_job(target, to, number, rows, tokenizer, **hints)
        elif rows[0].ids is not None:
            summary.bytes += file_format.save(target, rows[0].ids, tokenizer, size=rows[0].size, **hints)
    summary.seconds = time.perf_counter() - begun
    return summary


def encode_job(
    tokenizer: Tokenizer,
    entries: Iterable[sources.Entry],
    choice: Choice,
    *,
    fit: str = "crop",
    batch_size: int = 32,
    workers: int = 4,
) -> list[Row]:
    """Rows of pictures, in their order; one that cannot be read becomes a row with the reason."""
    rows: list[Row] = []
    errors: list[NDArray[np.float64]] = []
    for batch in _batches(_loaded(entries, tokenizer, fit, workers, 2 * batch_size), batch_size):
        good = [item for item in batch if item.image is not None]
        images = torch.stack([item.image for item in good if item.image is not None]) if good else None
        found = [] if images is None else choice.encode(tokenizer, images)
        if images is not None and choice.mean_tokens is not None:
            errors.append(choice.errors(tokenizer, images, found))
        ids = iter(found)
        rows += [
            Row(item.key, None, item.size, item.error) if item.image is None else Row(item.key, next(ids), item.size)
            for item in batch
        ]
    return choice.share(tokenizer, rows, errors)


def decode_files(
    tokenizer: Tokenizer,
    source: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    tokens: int | None = None,
    batch_size: int = 32,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    **options: Any,
) -> Summary:
    """Decodes stored tokens to PNG files.

    Args:
        tokenizer: The one that made them.
        source: See `shards.read`.
        output: Folder; a `.png` file if the source is one `.vtok` file.
        tokens: At most as many of each image.
        batch_size: Images per batch.
        progress: Wraps the stored images.
        **options: Of `Tokenizer.decode`; they win over those that were stored.

    Raises:
        ParameterError: A bad argument or a source that holds no tokens.
        IncompatibleError: Tokens of another tokenizer.
    """
    if batch_size < 1 or (tokens is not None and tokens < tokenizer.shortest):
        raise ParameterError(
            f"batch_size must be at least 1 and tokens {tokenizer.shortest}, got {batch_size}, {tokens}."
        )
    tokenizer._check_options(tokenizer._decode, options)
    target, summary, begun = Path(output), Summary(), time.perf_counter()
    single = target.suffix == ".png"
    if single and not (isinstance(source, (str, Path)) and Path(source).suffix == ".vtok"):
        raise ParameterError(f"output {target} is one file, so the source must be one .vtok file, got {source}.")
    for batch in _batches(iter(progress(shards.read(source))), batch_size):
        groups: dict[tuple[Any, ...], list[tuple[str, Tensor]]] = {}
        for key, file in batch:
            reason = file if isinstance(file, str) else _undecodable(file, tokenizer)
            if reason or isinstance(file, str):
                summary.fail(key, reason)
                continue
            own = {**file.options(tokenizer), **options}
            groups.setdefault(tuple(sorted(own.items())), []).append((key, file.ids[:tokens]))
        for own, members in groups.items():
            images = tokenizer.decode([ids for _, ids in members], **dict(own))
            for (key, ids), image in zip(members, images):
                path = target if single else target / f"{key}.png"
                summary.bytes += _write_picture(path, image)
                summary.images, summary.tokens = summary.images + 1, summary.tokens + len(ids)
    summary.seconds = time.perf_counter() - begun
    return summary


class _Loaded(NamedTuple):
    key: str
    image: Tensor | None
    size: tuple[int, int] | None
    error: str = ""


def _load(entry: sources.Entry, tokenizer: Tokenizer, fit: str) -> _Loaded:
    if entry.content is None:
        return _Loaded(entry.key, None, None, entry.reason)
    try:
        picture = sources.load(entry)
    except UnreadableImageError as error:
        return _Loaded(entry.key, None, None, str(error))
    return _Loaded(entry.key, tokenizer.preprocess(picture, fit), picture.size)


def _loaded(
    entries: Iterable[sources.Entry], tokenizer: Tokenizer, fit: str, workers: int, ahead: int
) -> Iterator[_Loaded]:
    """Pictures in order, at most `ahead` of them in memory before they are asked for."""
    waiting: deque[Future[_Loaded]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for entry in entries:
            waiting.append(pool.submit(_load, entry, tokenizer, fit))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _batches(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while batch := list(islice(items, size)):
        yield batch


def _unfinished(
    job: sources.Job,
    target: Path,
    to: str,
    number: int,
    resume: bool,
    summary: Summary,
    tokenizer: Tokenizer,
    choice: Choice,
) -> list[sources.Entry] | Iterator[sources.Entry] | None:
    if not resume:
        return sources.entries(job)
    if to != "vtok":
        if not shards.shard_path(target, to, number).is_file():
            return sources.entries(job)
        summary.skipped += len(job.keys) or sum(1 for _ in shards.read(shards.shard_path(target, to, number)))
        return None
    todo = [entry for entry in sources.entries(job) if not _stored(target / f"{entry.key}.vtok", tokenizer)]
    if todo and choice.mean_tokens is not None:
        # What one picture gets depends on all of the job.
        return sources.entries(job)
    summary.skipped += (len(job.keys) or sum(1 for _ in sources.entries(job))) - len(todo)
    return todo or None


def _stored(path: Path, tokenizer: Tokenizer) -> bool:
    try:
        file = file_format.open(path)
    except (ParameterError, FormatError):
        return False
    return not file.truncated and file.model_id == tokenizer.model_id


def _account(summary: Summary, rows: Sequence[Row]) -> None:
    for row in rows:
        if row.ids is None:
            summary.fail(row.key, row.error)
        else:
            summary.images, summary.tokens = summary.images + 1, summary.tokens + len(row.ids)


def _undecodable(file: TokenFile, tokenizer: Tokenizer) -> str:
    # Tokens of another tokenizer are a mistake in the call and end it; damage is a matter of the one file.
    try:
        file_format.check_model(file, tokenizer)
    except FormatError as error:
        return str(error)
    return "" if len(file.ids) >= tokenizer.shortest else f"only {len(file.ids)} of {file.length} tokens are there"


def _write_picture(path: Path, image: Tensor) -> int:
    buffer = io.BytesIO()
    to_picture(image).save(buffer, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    file_format.write_atomically(path, buffer.getvalue())
    return len(buffer.getvalue())
