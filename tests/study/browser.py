"""Chromium without a screen, driven over its DevTools protocol: no driver, no package beside aiohttp."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from aiohttp import ClientSession, ClientWebSocketResponse

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell")


def found() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--mute-audio", "--hide-scrollbars",
    "--proxy-server=direct://", "--remote-debugging-port=0",
)  # fmt: skip


class Browser:
    """A running browser; `page` opens a window of its own cookies."""

    def __init__(self, socket: ClientWebSocketResponse):
        self.socket, self.numbers = socket, itertools.count(1)
        self.waiting: dict[int, asyncio.Future[Any]] = {}
        self.pages: dict[str, Page] = {}

    async def listen(self) -> None:
        async for message in self.socket:
            said = json.loads(message.data)
            if "id" in said:
                future = self.waiting.pop(said["id"])
                if not future.done():
                    error = said.get("error")
                    future.set_exception(AssertionError(error)) if error else future.set_result(said["result"])
            elif (page := self.pages.get(said.get("sessionId", ""))) is not None:
                page.hears(said["method"], said["params"])

    async def call(self, method: str, session: str | None = None, **params: Any) -> Any:
        number = next(self.numbers)
        self.waiting[number] = asyncio.get_running_loop().create_future()
        await self.socket.send_json(
            {"id": number, "method": method, "params": params, **({"sessionId": session} if session else {})}
        )
        return await asyncio.wait_for(self.waiting[number], 60)

    async def page(self, width: int, height: int, *, touch: bool = False) -> Page:
        context = (await self.call("Target.createBrowserContext"))["browserContextId"]
        target = (await self.call("Target.createTarget", url="about:blank", browserContextId=context))["targetId"]
        session = (await self.call("Target.attachToTarget", targetId=target, flatten=True))["sessionId"]
        page = self.pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Log"):
            await page.call(f"{domain}.enable")
        await page.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch
        )
        if touch:
            await page.call("Emulation.setTouchEmulationEnabled", enabled=True, maxTouchPoints=1)
        return page


class Page:
    """`complaints`: errors of scripts, of the network and of the page's policy."""

    def __init__(self, browser: Browser, session: str):
        self.browser, self.session = browser, session
        self.complaints: list[str] = []

    def hears(self, method: str, params: Any) -> None:
        if method == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(str(params["entry"]))

    async def call(self, method: str, **params: Any) -> Any:
        return await self.browser.call(method, self.session, **params)

    async def go(self, url: str) -> None:
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete'")

    async def value(self, expression: str) -> Any:
        said = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in said, said
        return said["result"].get("value")

    async def until(self, expression: str, seconds: float = 60) -> None:
        deadline = asyncio.get_running_loop().time() + seconds
        while True:
            with contextlib.suppress(AssertionError):  # between two pages there is nothing to ask
                if await self.value(expression):
                    return
            assert asyncio.get_running_loop().time() < deadline, (
                f"not within {seconds:g} s: {expression}; {self.complaints}"
            )
            await asyncio.sleep(0.02)

    async def key(self, key: str) -> None:
        codes = {"Enter": 13, " ": 32, "ArrowLeft": 37, "ArrowRight": 39, "Tab": 9}
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        one = {"key": key, "windowsVirtualKeyCode": codes.get(key, ord(key[0]))}
        await self.call("Input.dispatchKeyEvent", type="keyDown", **one, **({"text": text} if text else {}))
        await self.call("Input.dispatchKeyEvent", type="keyUp", **one)

    async def tap(self, selector: str) -> None:
        """A finger on the middle of an element, which has to be in sight."""
        box = await self.value(
            f"(() => {{ const r = document.querySelector({selector!r}).getBoundingClientRect(); return [r.x, r.y, r.width, r.height] }})()"
        )
        point = {"x": box[0] + box[2] / 2, "y": box[1] + box[3] / 2}
        await self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[point])
        await self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    async def picture(self, file: Path) -> None:
        data = (await self.call("Page.captureScreenshot", format="png"))["data"]
        file.write_bytes(base64.b64decode(data))


@contextlib.asynccontextmanager
async def browser() -> AsyncIterator[Browser]:
    """A browser that ends with the block."""
    executable = found()
    assert executable is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [executable, *OPTIONS, f"--user-data-dir={profile}"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port = Path(profile) / "DevToolsActivePort"
            for _ in range(6000):
                if port.exists() and len(port.read_text().splitlines()) == 2:
                    break
                assert process.poll() is None, "the browser ended"
                await asyncio.sleep(0.02)
            number, path = port.read_text().splitlines()
            async with (
                ClientSession() as session,
                session.ws_connect(f"ws://127.0.0.1:{number}{path}", max_msg_size=0) as socket,
            ):
                one = Browser(socket)
                listening = asyncio.create_task(one.listen())
                yield one
                await one.call("Browser.close")
                listening.cancel()
        finally:
            process.kill()
            process.wait()
