"""The parser: quick to start, exit codes, and what is refused before anything runs (W6, U3)."""

from __future__ import annotations

import subprocess
import sys

import pytest

from visiontok.cli import _COMMANDS, main

HEAVY = ("torch", "numpy", "timm", "PIL", "yaml", "tqdm", "huggingface_hub", "matplotlib", "plotly", "gradio")
PROBE = """
import sys
from visiontok.cli import main
for arguments in (["--help"], ["--version"], *([name, "--help"] for name in sys.argv[1:]), [], ["nonsense"]):
    main(arguments)
print("heavy:", *(name for name in %r if name in sys.modules))
"""


def test_help_of_everything_imports_nothing_heavy() -> None:
    command = [sys.executable, "-c", PROBE % (HEAVY,), *_COMMANDS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy:"
    assert all(name in done.stdout for name in _COMMANDS)


def test_module_can_be_run() -> None:
    done = subprocess.run([sys.executable, "-m", "visiontok", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("visiontok ")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--version"], 0),
        (["list", "tom*"], 0),
        ([], 2),
        (["brew"], 2),
        (["list", "a", "b"], 2),
        (["bench", "--batch-size", "0"], 2),
        (["bench", "--num-bench-iter", "1"], 2),
        (["bench", "--set", "novalue"], 2),
        (["bench", "--set", "x=1e999"], 2),
        (["bench", "--r", "4"], 2),
        (["bench", "--reducer", "tome", "--r", "__import__('os')"], 2),
        (["bench", "--reducer", "tome", "--r", "2", "--keep", "0.5"], 2),
        (["bench", "--device", "warp"], 2),
        (["bench", "--img-size", "64", "--input-size", "3", "64", "64"], 2),
        (["sweep", "--share", "1.5"], 2),
        (["sweep", "--launcher", "pigeon", "--results-dir", "/dev/null/x", "--share", "0.7"], 2),
        (["eval", "--recipe", "gone.yaml"], 2),
        (["viz", "-o", "tokens.txt"], 2),
        (["demo", "clasify"], 2),
        (["list", "zzz*"], 3),
        (["list", "models", "zzz*"], 3),
        (["report", "gone"], 3),
        (["bench", "-m", "resnet18", "--reducer", "tome", "--r", "1"], 3),
        (["info", "-m", "resnet18"], 3),
    ],
)
def test_exit_codes(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert bool(captured.err) == (code != 0)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["list", "tomme*"],
            "visiontok list: error: no reducer matches 'tomme*'\n",
        ),
        (
            ["bench", "--r", "4", "--set", "alpha=1"],
            "visiontok bench: error: --r, --set alpha needs a reducer; add --reducer NAME (see 'visiontok list')\n",
        ),
        (
            ["eval", "--reducer", "tome", "--recipe", "x.yaml"],
            "visiontok eval: error: give --recipe or --reducer, not both; change a recipe's parameters with --set\n",
        ),
        (
            ["eval", "-m", "vit_tiny_patch16_224"],
            "visiontok eval: error: vit_tiny_patch16_224 needs images; "
            "pass a folder of class folders with --data-dir\n",
        ),
        (
            ["info", "-m", "deit_smal_patch16_224"],
            "visiontok info: error: unknown model 'deit_smal_patch16_224'. Did you mean 'deit_small_patch16_224'? "
            "List them with: visiontok list models 'deit*'\n",
        ),
        (
            ["report", "gone"],
            "visiontok report: error: no results in 'gone'; run 'visiontok sweep --results-dir gone' first\n",
        ),
        (
            ["bench", "--img-size", "64"],
            "visiontok bench: error: tiny_vit takes (3, 32, 32) images only, got (3, 64, 64); leave out --img-size\n",
        ),
        (
            ["bench", "--checkpoint", "gone.pth"],
            "visiontok bench: error: checkpoint 'gone.pth' does not exist; give a file, or a hub repository "
            "'owner/name'.\n",
        ),
    ],
)
def test_error_texts(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) != 0
    assert capsys.readouterr().err == text


def test_debug_shows_the_traceback() -> None:
    from visiontok.cli import NothingMatched

    with pytest.raises(NothingMatched):
        main(["list", "zzz*", "--debug"])
