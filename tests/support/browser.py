"""Headless Chromium through its driver, by the WebDriver protocol: no package but requests is needed."""

from __future__ import annotations

import base64
import contextlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests

DRIVER = shutil.which("chromedriver")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = None if DRIVER and CHROMIUM else "needs chromium and chromedriver on PATH"
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element's id, from the W3C's standard
KEYS = dict(left="\ue012", up="\ue013", right="\ue014", down="\ue015", tab="\ue004", escape="\ue00c")


class Browser:
    """A window that shows pages and takes clicks and keys."""

    def __init__(self, session: str):
        self._session = session

    def call(self, method: str, path: str, **body: Any) -> Any:
        """Send a command of the protocol. AssertionError holds what the driver says."""
        answer = requests.request(method, self._session + path, json=body if method == "POST" else None, timeout=60)
        value = answer.json()["value"]
        assert answer.ok, value
        return value

    def open(self, path: Path) -> None:
        self.call("POST", "/url", url=path.resolve().as_uri())

    def run(self, script: str, *args: Any) -> Any:
        """Return what the body of a JavaScript function returns."""
        return self.call("POST", "/execute/sync", script=script, args=list(args))

    def find(self, css: str) -> list[str]:
        return [found[ELEMENT] for found in self.call("POST", "/elements", using="css selector", value=css)]

    def click(self, css: str) -> None:
        # In the middle of the window nothing that sticks to an edge covers it.
        self.run("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", css)
        self.call("POST", f"/element/{self.find(css)[0]}/click")

    def press(self, keys: str) -> None:
        """Press keys, one after the other, where the focus is."""
        actions = [dict(type=kind, value=key) for key in keys for kind in ("keyDown", "keyUp")]
        self.call("POST", "/actions", actions=[dict(type="key", id="keyboard", actions=actions)])

    def choose(self, css: str, value: str) -> None:
        """Choose the option with this value."""
        self.click(f'{css} option[value="{value}"]')

    def size(self, width: int, height: int, dark: bool = False) -> None:
        """Set the size of the page, also to narrower than a window can be."""
        metrics = dict(width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.cdp("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = dict(name="prefers-color-scheme", value="dark" if dark else "light")
        self.cdp("Emulation.setEmulatedMedia", features=[scheme])

    def cdp(self, command: str, **params: Any) -> Any:
        """Send a command of Chromium's own protocol."""
        return self.call("POST", "/goog/cdp/execute", cmd=command, params=params)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("GET", "/screenshot")))

    def log(self) -> list[str]:
        """Return the errors and warnings of the page since the last call."""
        return [entry["message"] for entry in self.call("POST", "/se/log", type="browser")]


@contextlib.contextmanager
def chromium(downloads: Path) -> Iterator[Browser]:
    """Start a browser that saves files in `downloads`, and stop it."""
    with tempfile.TemporaryDirectory() as profile:
        driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            port = next(match[1] for line in driver.stdout if (match := re.search(r"successfully on port (\d+)", line)))
            flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
            options = dict(binary=CHROMIUM, args=[*flags, f"--user-data-dir={profile}"])
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": dict(browser="ALL")}
            home = f"http://127.0.0.1:{port}/session"
            started = requests.post(home, json=dict(capabilities=dict(alwaysMatch=wanted)), timeout=60).json()["value"]
            assert "sessionId" in started, started
            browser = Browser(f"{home}/{started['sessionId']}")
            browser.cdp("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))
            try:
                yield browser
            finally:
                browser.call("DELETE", "")
        finally:
            driver.terminate()
            driver.wait()
            driver.stdout.close()
