"""Finding, compiling and keeping the C++ kernels: what goes wrong gives a reason, never a crash (S5)."""

from __future__ import annotations

import multiprocessing
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from visiontok.errors import MissingDependencyError
from visiontok.ops import dispatch
from visiontok.ops.cpu import building
from visiontok.ops.cpu.building import Compiler, build

ANSWER = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'
ABSENT = (Compiler(("/nonexistent/c++",), ("/nonexistent/c++",)),)
posix = pytest.mark.skipif(not hasattr(os, "getuid"), reason="folders are private to a user by themselves")


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The kernels are one small source, so that compiling takes no time."""
    here = tmp_path / "sources"
    here.mkdir()
    (here / "answer.cpp").write_text(ANSWER)
    monkeypatch.setattr(building, "_HERE", here)
    return here


@pytest.fixture
def found() -> list[Compiler]:
    compilers = list(building.compilers())
    if not compilers:
        pytest.skip("no C++ compiler here")
    return compilers[:1]


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What the process remembers is forgotten before and after."""
    caches: tuple[Any, ...] = (building._library, building._passing_folder, dispatch.wanted)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "cache"
    made.mkdir(mode=0o700)
    return made


def answer(built: building.Built) -> int:
    assert built.library is not None, built.note
    return built.library.answer()


@pytest.mark.usefixtures("tiny")
def test_a_second_process_finds_what_the_first_compiled(
    folder: Path, found: list[Compiler], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(folder, found)
    assert answer(first) == 42
    assert [path.name for path in folder.iterdir()] == [Path(first.note).name]
    monkeypatch.setattr(building, "_compile", lambda *_: pytest.fail("compiled again"))
    assert build(folder, found).note == first.note


def test_other_sources_or_another_processor_compile_anew(
    folder: Path, found: list[Compiler], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(folder, found)
    (tiny / "answer.cpp").write_text(ANSWER.replace("42", "43"))
    second = build(folder, found)
    assert (answer(first), answer(second)) == (42, 43)
    monkeypatch.setattr(building, "_processor", lambda: "another")
    assert build(folder, found).note not in (first.note, second.note)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("content", [b"", b"\x7fELF", None])
def test_a_damaged_file_is_made_anew(folder: Path, found: list[Compiler], content: bytes | None) -> None:
    # Compiled elsewhere: a file that this process has loaded must not be written to.
    good = Path(build(None, found).note)
    damaged = folder / good.name
    damaged.write_bytes(good.read_bytes()[:4000] if content is None else content)
    damaged.chmod(0o700)
    assert answer(build(folder, found)) == 42
    assert damaged.read_bytes() == good.read_bytes()


@pytest.mark.usefixtures("tiny")
def test_a_file_that_does_not_load_is_passed_over(folder: Path, found: list[Compiler]) -> None:
    key = Path(build(None, found).note).name.partition("-")[0]
    (folder / "draft").write_bytes(b"no library")
    other = folder / f"{key}-{building._content(folder / 'draft')}.so"
    (folder / "draft").rename(other)
    assert answer(build(folder, found)) == 42


def _build_at_once(start: Any, folder: Path, found: list[Compiler], answers: Any) -> None:
    start.wait()
    answers.put(answer(build(folder, found)))


@pytest.mark.skipif(sys.platform != "linux", reason="needs processes that inherit the small sources")
@pytest.mark.usefixtures("tiny")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_processes_may_build_at_once(folder: Path, found: list[Compiler]) -> None:
    context = multiprocessing.get_context("fork")
    start, answers = context.Event(), context.Queue()
    workers = [context.Process(target=_build_at_once, args=(start, folder, found, answers)) for _ in range(4)]
    for worker in workers:
        worker.start()
    start.set()
    assert [answers.get(timeout=60) for _ in workers] == [42] * 4
    for worker in workers:
        worker.join(timeout=60)
    assert {path.suffix for path in folder.iterdir()} == {".so"}


def test_without_a_compiler_there_is_a_reason(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("CXX", "missing-compiler -O")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert list(building.compilers()) == []
    built = build(folder, [])
    assert built.library is None
    assert "no C++ compiler was found" in built.note
    assert "/nonexistent/c++" in build(folder, ABSENT).note


def test_what_the_compiler_says_is_the_reason(folder: Path, found: list[Compiler], tiny: Path) -> None:
    (tiny / "answer.cpp").write_text("int broken = undeclared_name;\n")
    built = build(folder, found)
    assert built.library is None
    assert "undeclared_name" in built.note
    assert list(folder.iterdir()) == []


@pytest.mark.usefixtures("tiny")
def test_the_next_compiler_is_tried(folder: Path, found: list[Compiler]) -> None:
    assert answer(build(folder, [*ABSENT, *found])) == 42


@pytest.mark.usefixtures("tiny")
@pytest.mark.skipif(sys.platform == "win32", reason="the compiler is a shell script")
def test_unknown_flags_are_left_out(folder: Path, found: list[Compiler], tmp_path: Path) -> None:
    # As where there is no OpenMP and no -march=native.
    picky = tmp_path / "picky"
    picky.write_text(
        '#!/bin/sh\ncase "$*" in *native*|*fopenmp*) echo "error: unsupported option" >&2; exit 1;; esac\n'
        f'exec {" ".join(found[0].compile)} "$@"\n'
    )
    picky.chmod(0o700)
    assert answer(build(folder, [Compiler((str(picky),), (str(picky),))])) == 42


def test_cxx_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", f"{sys.executable} -m wrapper")
    assert next(building.compilers()).compile == (sys.executable, "-m", "wrapper")


# ---- where libraries are kept


def test_the_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISIONTOK_CACHE", str(tmp_path / "mine"))
    folder = building.cache_folder()
    assert folder == tmp_path / "mine" / "cpu"
    assert not hasattr(os, "getuid") or stat.S_IMODE(folder.stat().st_mode) == 0o700


@posix
def test_a_folder_that_others_may_write_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISIONTOK_CACHE", str(tmp_path))
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu").chmod(0o777)
    assert building.cache_folder() is None


@posix
@pytest.mark.usefixtures("tiny")
def test_a_file_that_others_may_write_is_not_loaded(
    folder: Path, found: list[Compiler], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(build(folder, found).note).chmod(0o777)
    compiled: list[Path] = []
    real = building._compile
    monkeypatch.setattr(building, "_compile", lambda *args: compiled.append(args[1]) or real(*args))
    assert answer(build(folder, found)) == 42
    assert compiled == [folder]


@posix
def test_a_folder_of_another_user_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISIONTOK_CACHE", str(tmp_path))
    assert building.cache_folder() is not None
    owner = (tmp_path / "cpu").stat().st_uid
    if owner == 0:
        pytest.skip("what belongs to root is trusted")
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    assert building.cache_folder() is None


@pytest.mark.usefixtures("tiny", "forgotten")
def test_a_home_that_cannot_be_written_gives_way_to_a_passing_folder(
    folder: Path, found: list[Compiler], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("VISIONTOK_CACHE", str(blocked))
    assert building.cache_folder() is None
    monkeypatch.setattr(os, "access", lambda *_: False)
    for place in (None, folder):
        built = build(place, found)
        assert answer(built) == 42
        assert Path(built.note).parent == building._passing_folder()
    assert list(folder.iterdir()) == []


# ---- VISIONTOK_KERNELS


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("setting", ["reference", "triton"])
def test_a_setting_leaves_them_out(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISIONTOK_KERNELS", setting)
    assert building.library() == (None, f"VISIONTOK_KERNELS={setting}")


@pytest.mark.usefixtures("forgotten")
def test_a_setting_makes_failure_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "compilers", lambda: iter(ABSENT))
    monkeypatch.setattr(building, "cache_folder", lambda: None)
    assert building.library().library is None
    building._library.cache_clear()
    dispatch.wanted.cache_clear()
    monkeypatch.setenv("VISIONTOK_KERNELS", "cpp")
    with pytest.raises(MissingDependencyError, match=r"VISIONTOK_KERNELS=cpp.*/nonexistent/c\+\+.*visiontok\[cpu\]"):
        building.library()
