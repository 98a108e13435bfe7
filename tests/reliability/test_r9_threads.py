"""R9: many threads on one model; traces per thread; exceptions; DataLoader workers beside a patched model."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from reliability_support import every_reducer_slowly, images, patched_tiny, tiny
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import visiontok as vt
from visiontok.errors import StateLostError

THREADS, EACH = 4, 40


@every_reducer_slowly
def test_concurrent_forwards_with_distinct_inputs(name: str) -> None:
    model, _ = patched_tiny(name)
    # Batches differ too, so that a state of another thread cannot fit by chance.
    inputs = [images(1 + seed % 3, seed) for seed in range(THREADS * EACH)]
    with torch.no_grad():
        want = [model(x) for x in inputs]
    start = threading.Barrier(THREADS)

    def work(rank: int) -> int:
        wrong = 0
        start.wait()
        with torch.no_grad():
            for index in range(rank, len(inputs), THREADS):
                wrong += not torch.equal(model(inputs[index]), want[index])
        return wrong

    with ThreadPoolExecutor(THREADS) as pool:
        assert sum(pool.map(work, range(THREADS))) == 0


def test_trace_and_tokens_are_per_thread() -> None:
    model = tiny(dynamic_img_size=True)
    red = vt.patch(model, "tome", r=3, trace=True)
    ready, go = threading.Barrier(2), threading.Barrier(2)
    seen: dict[str, Any] = {}

    def work(name: str, side: int) -> None:
        with torch.no_grad():
            model(torch.randn(side // 8, 3, side, side))
        ready.wait()
        # Both have run: each must still see its own.
        seen[name] = (red.tokens, [step.map.assign.shape for step in red.trace])
        go.wait()

    threads = [threading.Thread(target=work, args=args) for args in (("small", 32), ("large", 48))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert seen["small"] == ([14, 11, 8, 5], [(4, 17), (4, 14), (4, 11), (4, 8)])
    assert seen["large"] == ([34, 31, 28, 25], [(6, 37), (6, 34), (6, 31), (6, 28)])
    assert red.trace == []
    assert red.tokens == red.plan.tokens


def test_an_exception_in_one_thread_leaves_the_others_right() -> None:
    model, _ = patched_tiny()
    with torch.no_grad():
        want = model(images())

    def good(_: int) -> bool:
        with torch.no_grad():
            return all(torch.equal(model(images()), want) for _ in range(20))

    def bad(_: int) -> bool:
        failed = 0
        for _ in range(20):
            try:
                model.blocks[2](torch.randn(3, 17, 48))
            except StateLostError:
                failed += 1
        return failed == 20

    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(job, 0) for job in (good, bad, good, bad)]
        assert all(job.result() for job in jobs)


def test_set_while_others_run_gives_one_setting_or_the_other() -> None:
    model, red = patched_tiny("tome")
    with torch.no_grad():
        three = model(images())
        red.set(r=5)
        five = model(images())
    stop = threading.Event()
    torn: list[str] = []

    def work() -> None:
        with torch.no_grad():
            while not stop.is_set():
                try:
                    out = model(images())
                except vt.VisionTokError as error:
                    torn.append(str(error))
                    continue
                if out.shape != three.shape or not out.isfinite().all():
                    torn.append(str(out))

    thread = threading.Thread(target=work)
    thread.start()
    for r in (3, 5) * 4:
        red.set(r=r)
    stop.set()
    thread.join()
    assert torn == []
    with torch.no_grad():
        assert torch.equal(model(images()), five)


class Pictures(Dataset):
    """Images from a loader process; holds the patched model as careless user code does."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            return self.model(images(1, index))[0]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader_workers_with_a_patched_model_in_scope(method: str) -> None:
    model, _ = patched_tiny()
    with torch.no_grad():
        want = torch.cat([model(images(1, index)) for index in range(6)])
    loader = DataLoader(Pictures(model), batch_size=2, num_workers=1, multiprocessing_context=method, timeout=240)
    got = torch.cat(list(loader))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
