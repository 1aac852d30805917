"""A real browser for tests of pages: headless Chromium, told what to do by its debugging protocol.

with opened() as browser:  # skips the test where there is no Chromium
    page = browser.page(url, width=390, height=800)
    page.wait("document.querySelector('h1')")
    page.press("ArrowRight")
    assert page.run("document.title") == "..."
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell")
START_S = 60.0
ANSWER_S = 60.0

KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Enter": 13, "Escape": 27, "Tab": 9, " ": 32}


class Page:
    """A tab. Errors of its scripts, and what its policy blocked, are in `complaints`."""

    def __init__(self, browser: Browser, session: str):
        self._browser, self._session = browser, session

    @property
    def complaints(self) -> list[str]:
        return [words for session, words in self._browser.complaints if session == self._session]

    def tell(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Sends a command of the protocol, and gives its result."""
        return self._browser.tell(method, parameters, self._session)

    def run(self, script: str) -> Any:
        """The value of an expression in the page; a promise is awaited."""
        found = self.tell("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise AssertionError(f"{script}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = 60.0) -> None:
        """Waits until an expression is true."""
        end = time.monotonic() + seconds
        while True:
            with contextlib.suppress(AssertionError):  # between two pages there is nothing to ask
                if self.run(f"Boolean({script})"):
                    return
            assert time.monotonic() < end, f"never true within {seconds:.0f} s: {script}; {self.complaints}"
            time.sleep(0.05)

    def go(self, url: str) -> None:
        self.tell("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def press(self, key: str) -> None:
        """Presses a key, by its name in `KEYS` or a letter or digit."""
        code = KEYS.get(key, ord(key.upper()) if len(key) == 1 else 0)
        text = key if len(key) == 1 else "\r" if key == "Enter" else ""
        for kind in ("keyDown", "keyUp"):
            self.tell(
                "Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, text=text if kind == "keyDown" else ""
            )  # fmt: skip

    def click(self, selector: str) -> None:
        """Clicks in the middle of the first element that the selector finds, scrolled into view."""
        x, y = self._middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.tell("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def point(self, selector: str) -> None:
        """Moves the pointer to the middle of an element."""
        x, y = self._middle(selector)
        self.tell("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def touch(self, selector: str) -> None:
        """Taps on an element with a finger."""
        x, y = self._middle(selector)
        self.tell("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.tell("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def _middle(self, selector: str) -> tuple[float, float]:
        box = self.run(
            f"(() => {{ const one = document.querySelector({selector!r}); if (!one) return null; "
            "one.scrollIntoView({block: 'center', behavior: 'instant'}); const box = one.getBoundingClientRect(); "
            "return [box.x + box.width / 2, box.y + box.height / 2] })()"
        )
        assert box is not None, f"there is no {selector}"
        return box[0], box[1]

    def picture(self, path: Path, *, whole: bool = False) -> Path:
        """Writes a PNG of what is seen, or of the whole page."""
        taken = self.tell("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(taken["data"]))
        return path

    def overflowing(self) -> list[str]:
        """Elements whose text is cut or hangs out of them, and `page` if one must scroll sideways to see all of it."""
        found: list[str] = self.run(CUT)
        return found


CUT = """(() => {
  const cut = [...document.querySelectorAll('body *')].filter(one => {
    const style = getComputedStyle(one);
    if (!one.clientWidth || !one.textContent.trim() || style.overflowX === 'auto' || style.overflowX === 'scroll') return false;
    if (one.closest('svg, select, .scroll, pre')) return false;
    const hidden = style.overflowX === 'hidden' || style.overflowY === 'hidden';
    const sideways = one.scrollWidth > one.clientWidth + 1 && (hidden || one.children.length === 0);
    return sideways || (hidden && one.scrollHeight > one.clientHeight + 1);
  }).map(one => `${one.tagName}.${one.className}: ${one.textContent.trim().slice(0, 60)}`);
  return document.documentElement.scrollWidth > innerWidth + 1 ? ['page', ...cut] : cut;
})()"""


class Browser:
    """A running browser. `complaints`: session and words of each error in a page."""

    def __init__(self, address: str):
        self.complaints: list[tuple[str, str]] = []
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._call(self._connect(address))

    def page(
        self, url: str, *, width: int = 1280, height: int = 900, phone: bool = False, stranger: bool = False
    ) -> Page:
        """A new tab of that size that shows the address; of a `stranger` with cookies of its own."""
        apart = self.tell("Target.createBrowserContext", {}) if stranger else {}
        target = self.tell("Target.createTarget", {"url": "about:blank", **apart})["targetId"]
        page = Page(self, self.tell("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"])
        for domain in ("Page", "Runtime", "Log"):
            page.tell(f"{domain}.enable")
        page.tell("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        page.tell("Emulation.setTouchEmulationEnabled", enabled=phone)
        page.go(url)
        return page

    def tell(self, method: str, parameters: dict[str, Any], session: str | None = None) -> dict[str, Any]:
        return self._call(self._send(method, parameters, session))

    def close(self) -> None:
        self._call(self._disconnect())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, what: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result(ANSWER_S)

    async def _connect(self, address: str) -> None:
        self._http = aiohttp.ClientSession()
        self._socket = await self._http.ws_connect(address, max_msg_size=0)
        self._listening = asyncio.create_task(self._listen())

    async def _disconnect(self) -> None:
        await self._socket.close()
        await self._http.close()
        self._listening.cancel()

    async def _send(self, method: str, parameters: dict[str, Any], session: str | None) -> dict[str, Any]:
        number = next(self._numbers)
        self._answers[number] = answer = asyncio.get_running_loop().create_future()
        message = {"id": number, "method": method, "params": parameters}
        await self._socket.send_json(message if session is None else {**message, "sessionId": session})
        return await answer

    async def _listen(self) -> None:
        async for message in self._socket:
            said = message.json()
            if "id" in said:
                answer = self._answers.pop(said["id"])
                if "error" in said:
                    answer.set_exception(AssertionError(str(said["error"])))
                else:
                    answer.set_result(said["result"])
            elif said["method"] == "Runtime.exceptionThrown":
                details = said["params"]["exceptionDetails"]
                words = details.get("exception", {}).get("description", details["text"])
                self.complaints.append((said["sessionId"], words))
            elif said["method"] == "Log.entryAdded" and said["params"]["entry"]["level"] == "error":
                self.complaints.append((said["sessionId"], said["params"]["entry"]["text"]))


@contextmanager
def opened() -> Iterator[Browser]:
    """A headless Chromium of the distribution. Skips the test, with a reason, where there is none."""
    program = next((found for name in NAMES if (found := shutil.which(name)) is not None), None)
    if program is None:
        pytest.skip(f"none of {', '.join(NAMES)} is installed (Debian: apt-get install chromium)")
    with tempfile.TemporaryDirectory(prefix="nexus-browser-", ignore_cleanup_errors=True) as folder:
        options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
                   "--no-first-run", "--disable-extensions", "--mute-audio", "--proxy-server=direct://",
                   "--remote-debugging-port=0")  # fmt: skip
        with subprocess.Popen(
            [program, *options, f"--user-data-dir={folder}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        ) as process:  # fmt: skip
            try:
                browser = Browser(_address(Path(folder) / "DevToolsActivePort", process))
                try:
                    yield browser
                finally:
                    browser.close()
            finally:
                process.terminate()
                process.wait(START_S)


def _address(file: Path, process: subprocess.Popen[bytes]) -> str:
    end = time.monotonic() + START_S
    while True:
        lines = file.read_text().split() if file.exists() else []
        if len(lines) == 2:
            return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
        assert process.poll() is None, f"the browser ended with code {process.returncode}"
        assert time.monotonic() < end, f"the browser did not start within {START_S:.0f} s"
        time.sleep(0.05)
