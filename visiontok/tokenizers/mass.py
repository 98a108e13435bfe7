"""Mass tokenising on Ray Data: pictures in, Parquet shards out, on as many workers as there are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from visiontok.errors import MissingDependencyError
from visiontok.tokenizers import loading, shards, sources
from visiontok.tokenizers.batch import Choice, Summary, encode_job

__all__ = ["tokenize_dataset"]


def tokenize_dataset(
    source: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    tokenizer: str,
    load_options: dict[str, Any] | None = None,
    tokens: int | None = None,
    target_psnr: float | None = None,
    budget_bytes: int | None = None,
    mean_tokens: float | None = None,
    fit: str = "crop",
    batch_size: int = 32,
    shard_size: int = 1024,
    workers: int = 4,
    concurrency: int = 1,
    num_cpus: float = 1,
    num_gpus: float = 0,
    resume: bool = True,
) -> Summary:
    """Encodes a source on Ray; every worker loads the tokenizer once.

    A shard is written whole by one worker, under a name that depends on the source only. So a worker that dies costs
    its unfinished shard, which another worker does again, and a run that was killed continues where it was. Pictures
    that cannot be read are rows with an `error`.

    Args:
        source: As in `encode_files`. Workers on other machines must see it under the same path.
        output: Folder that all workers see.
        tokenizer: Name for `tokenizers.load`.
        load_options: Its other arguments.
        tokens, target_psnr, budget_bytes, mean_tokens, fit, batch_size, shard_size, workers: As in `encode_files`.
        concurrency: Workers, each with a model.
        num_cpus, num_gpus: What each worker reserves.
        resume: Continue `output`.

    Raises:
        MissingDependencyError: Ray is not installed.
        ParameterError: As `encode_files`.
    """
    try:
        import ray.data
    except ImportError as error:
        raise MissingDependencyError("mass tokenising needs Ray: pip install 'visiontok[dist]'") from error
    begun, folder = time.perf_counter(), Path(output).resolve()
    choice = Choice(tokens, target_psnr, budget_bytes, mean_tokens)
    # The driver needs the model too, briefly: for its checks, and so that all shards have one identity.
    model = loading.load(tokenizer, **{**(load_options or {}), "device": "cpu"})
    choice.check(model)
    found = sources.jobs(_absolute(source), shard_size)
    settings = {"family": model.name, "model_id": model.model_id, "to": "parquet", "fit": fit, **asdict(choice)}
    shards.open_output(folder, {**settings, "shard_size": shard_size}, resume)
    todo = [number for number in range(len(found)) if not shards.shard_path(folder, "parquet", number).is_file()]
    summary = Summary(skipped=sum(len(found[number].keys) for number in set(range(len(found))) - set(todo)))
    if todo:
        items = [{"number": number, "job": asdict(found[number])} for number in todo]
        worker: Any = _Worker
        results = ray.data.from_items(items, override_num_blocks=len(items)).map(
            worker,
            fn_constructor_args=(tokenizer, load_options or {}, choice, fit, batch_size, workers, str(folder)),
            concurrency=concurrency,
            num_cpus=num_cpus,
            num_gpus=num_gpus,
        )
        for row in results.take_all():
            summary.images += row["images"]
            summary.tokens += row["tokens"]
            summary.bytes += row["bytes"]
            for key, reason in row["failures"]:
                summary.fail(key, reason)
    summary.seconds = time.perf_counter() - begun
    return summary


class _Worker:
    """One model, kept over many shards."""

    def __init__(
        self, name: str, options: dict[str, Any], choice: Choice, fit: str, batch_size: int, workers: int, folder: str
    ) -> None:
        self.tokenizer = loading.load(name, **options)
        self.choice, self.folder = choice, Path(folder)
        self.options: dict[str, Any] = {"fit": fit, "batch_size": batch_size, "workers": workers}

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        job = sources.Job(item["job"]["kind"], tuple(item["job"]["paths"]), tuple(item["job"]["keys"]))
        rows = encode_job(self.tokenizer, sources.entries(job), self.choice, **self.options)
        size = shards.write_job(self.folder, "parquet", int(item["number"]), rows, self.tokenizer)
        good = [row.ids for row in rows if row.ids is not None]
        return {
            "images": len(good),
            "tokens": sum(map(len, good)),
            "bytes": size,
            "failures": [[row.key, row.error] for row in rows if row.ids is None],
        }


def _absolute(source: str | Path | Sequence[str | Path]) -> list[str]:
    parts = [source] if isinstance(source, (str, Path)) else source
    return [str(Path(part).resolve()) for part in parts]
