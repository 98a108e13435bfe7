"""S5: importing, patching and running open no socket; the suite itself cannot leave this machine."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

CODE = """
import socket, sys
opened = []
real = socket.socket.__init__
def init(self, *args, **kwargs):
    opened.append(args)
    real(self, *args, **kwargs)
socket.socket.__init__ = init
socket.getaddrinfo = lambda *args, **kwargs: opened.append(args) or []
import torch, visiontok as vt
import visiontok.hub, visiontok.cli
from timm.models.vision_transformer import VisionTransformer
model = VisionTransformer(img_size=16, patch_size=8, embed_dim=12, depth=2, num_heads=1).eval()
red = vt.patch(model, "tome", r=1)
model(torch.randn(1, 3, 16, 16))
red.report()
red.save_pretrained(sys.argv[1])
red.unpatch()
vt.from_pretrained(model, sys.argv[1])
vt.compatibility()
print("opened", opened)
"""


def test_import_patch_run_and_save_open_no_socket(tmp_path: object) -> None:
    done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "opened []"


@pytest.mark.parametrize("address", ["192.0.2.1", "example.invalid", "2001:db8::1"])
def test_the_suite_is_offline(address: str, offline: list[str]) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as sock, pytest.raises(OSError, match="tests are offline"):
        sock.connect((address, 80))
    with pytest.raises(OSError, match="tests are offline"):
        socket.create_connection((address, 80), timeout=1)
    assert offline[-1] == address


def test_this_machine_stays_reachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname(), timeout=5):
            pass
        with socket.create_connection(("localhost", server.getsockname()[1]), timeout=5):
            pass
