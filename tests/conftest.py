"""Shared fixtures, and the last line of every run: how many browser tests really ran."""

from __future__ import annotations

import ipaddress
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

# One thread per worker: on tiny tensors more threads only wait for one another. Read when torch is first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER_FLAGS = [
    "--no-sandbox",
    "--headless",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@dataclass(eq=False)
class BrowserCount:
    """Counts the tests marked `browser` over all processes of a run."""

    run: int = 0
    reasons: dict[str, None] = field(default_factory=dict)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if "browser" not in report.keywords:
            return
        if report.skipped:
            self.reasons[str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)] = None
        elif report.when == "call":
            self.run += 1
        elif report.failed:
            self.reasons[f"{report.when} failed"] = None

    def __str__(self) -> str:
        reason = "; ".join(text.removeprefix("Skipped: ") for text in self.reasons) or "none selected"
        return f"browser tests: {self.run} run" + ("" if self.run else f": {reason}")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: left out by default; run everything with -m 'full or not full'")
    config.addinivalue_line("markers", "browser: needs headless Chromium ($VISIONTOK_CHROMIUM, or on the PATH)")
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(BrowserCount(), "browser-count")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "full" in (config.getoption("markexpr") or ""):
        return
    left = [item for item in items if item.get_closest_marker("full")]
    if left:
        items[:] = [item for item in items if not item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=left)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    count = config.pluginmanager.get_plugin("browser-count")
    if count is not None and config.pluginmanager.has_plugin("terminalreporter"):
        config.get_terminal_writer().line(str(count))


def is_local(host: Any) -> bool:
    """Whether a host is this machine: a loopback or wildcard address, `localhost`, or the machine's own name."""
    name = host.decode() if isinstance(host, bytes) else host
    if name in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        address = ipaddress.ip_address(str(name).partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


@pytest.fixture(scope="session", autouse=True)
def offline() -> Iterator[list[str]]:
    """No test reaches beyond this machine (S5): other addresses fail as if there were no network, and are listed."""
    tried: list[str] = []
    real_connect, real_connect_ex, real_lookup = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def refuse(host: Any) -> None:
        tried.append(str(host))
        raise OSError(f"tests are offline, refused {host}")

    def guard(real: Any) -> Any:
        def connect(self: socket.socket, address: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6) and not is_local(address[0]):
                refuse(address[0])
            return real(self, address)

        return connect

    def lookup(host: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_local(host):
            refuse(host)
        return real_lookup(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guard(real_connect))
        patch.setattr(socket.socket, "connect_ex", guard(real_connect_ex))
        patch.setattr(socket, "getaddrinfo", lookup)
        yield tried


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium, or a skip that says what is missing."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = os.environ.get("VISIONTOK_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} on the PATH, and VISIONTOK_CHROMIUM is not set")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=BROWSER_FLAGS)
        yield chromium
        chromium.close()


@dataclass
class Watched:
    """A page, the errors it raised, and the requests it made beyond its own origin."""

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def external(self, *allowed: str) -> list[str]:
        """Requests to anything but `allowed` prefixes and data inside the page."""
        return [url for url in self.requests if not url.startswith(("data:", "blob:", *allowed))]


@pytest.fixture
def watched(browser: Any) -> Iterator[Watched]:
    """A new page that records console errors, uncaught exceptions and requests."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(60_000)
    watch = Watched(context.new_page())
    watch.page.on("pageerror", lambda error: watch.errors.append(str(error)))
    watch.page.on("console", lambda said: watch.errors.append(said.text) if said.type == "error" else None)
    watch.page.on("request", lambda request: watch.requests.append(request.url))
    yield watch
    context.close()
