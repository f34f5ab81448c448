"""Headless Chromium for tests of HTML pages, controlled over the pipe of its DevTools protocol: no driver, no port."""

import base64
import json
import os
import pathlib
import select
import shutil
import subprocess
import sys
import time
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 120  # seconds to wait for an answer or a condition
# Chromium reads from descriptor 3 and writes to 4. (A preexec_fn would fork a process that has threads of JAX.)
CONNECT = """
import os, sys
for to, fd in enumerate(sys.argv[1:3], 3):
    os.dup2(int(fd), to)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """One tab. `logs` holds the messages of the console and of the browser, `requests` all requested addresses."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.logs: list[str] = []
        self.requests: list[str] = []
        self.last, self.answers, self.buffer = 0, {}, b""
        chromium_in, self.write_to = os.pipe()
        self.read_from, chromium_out = os.pipe()
        spare = [os.dup(chromium_in), os.dup(chromium_out)]  # which are neither 3 nor 4
        assert CHROMIUM and min(spare) > 4
        command = [
            sys.executable,
            "-c",
            CONNECT,
            *map(str, spare),
            CHROMIUM,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--no-first-run",
        ]
        command += ["--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}", "about:blank"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, pass_fds=spare, **quiet)
        for end in (chromium_in, chromium_out, *spare):
            os.close(end)
        self.session = None
        targets = self.send("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self.session = self.send("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def close(self) -> None:
        self.session = None
        self.send("Browser.close")
        self.process.wait(PATIENCE)
        os.close(self.write_to)
        os.close(self.read_from)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Calls a method of the DevTools protocol and returns its result."""
        self.last += 1
        message: dict[str, Any] = {"id": self.last, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write_to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE
        while self.last not in self.answers:
            self._receive(deadline)
        answer = self.answers.pop(self.last)
        assert "error" not in answer, answer
        return answer["result"]

    def _receive(self, deadline: float) -> None:
        ready, _, _ = select.select([self.read_from], [], [], max(0, deadline - time.monotonic()))
        assert ready, f"no answer from Chromium for {PATIENCE} s"
        part = os.read(self.read_from, 1 << 20)
        assert part, "Chromium ended"
        *messages, self.buffer = (self.buffer + part).split(b"\0")
        for message in map(json.loads, messages):
            if "id" in message:
                self.answers[message["id"]] = message
                continue
            method, params = message["method"], message["params"]
            if method == "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            elif method == "Log.entryAdded":
                self.logs.append(params["entry"]["text"])
            elif method == "Runtime.exceptionThrown":
                self.logs.append(str(params["exceptionDetails"]))
            elif method == "Runtime.consoleAPICalled":
                self.logs.append(str(params["args"]))

    def open(self, page: pathlib.Path) -> None:
        self.send("Page.navigate", url=page.resolve().as_uri())
        self.wait("document.readyState === 'complete'")

    def reload(self) -> None:
        self.run("window.stale = true")
        self.send("Page.reload")
        self.wait("!window.stale && document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        """Waits until a JavaScript expression is true."""
        deadline = time.monotonic() + PATIENCE
        while not self.run(condition):
            assert time.monotonic() < deadline, f"not within {PATIENCE} s: {condition}"
            time.sleep(0.02)

    def press(self, key: str) -> None:
        text = {"text": "\r"} if key == "Enter" else {"text": " "} if key == " " else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key)

    def screen(self, width: int, height: int, dark: bool = False) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=features)

    def picture(self, file: pathlib.Path) -> None:
        file.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))
