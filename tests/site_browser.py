"""A headless Chromium driven over a pipe: the DevTools protocol without a library and without a socket."""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Refused(RuntimeError):
    """Chromium does not do what it was asked to, such as while a page gives way to another."""


class Browser:
    """One tab with the network off. Use as a context manager.

    Args:
        program: path of Chromium.
        width: of the window, in CSS pixels.
        height: of the window.
        dark: whether the page is told that the reader prefers dark.
    """

    def __init__(self, program: str, width: int = 1200, height: int = 900, dark: bool = False):
        self.program, self.size, self.dark = program, (width, height), dark
        self.count, self.buffer = 0, b""
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> "Browser":
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_child, self.write = os.pipe()
        self.read, from_child = os.pipe()
        command = [
            self.program,
            "--headless=new",
            "--no-sandbox",  # the tests may run as root, in a container
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--hide-scrollbars",
            "--host-resolver-rules=MAP * ~NOTFOUND",  # the network is off
            "--remote-debugging-pipe",
            f"--user-data-dir={self.profile.name}",
            f"--window-size={self.size[0]},{self.size[1]}",
        ]
        # Chromium reads commands on descriptor 3 and answers on 4. The pipes may have these numbers here, so they are
        # first moved out of the way.
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (to_child, from_child)]
        place = f"import os, sys; os.dup2({high[0]}, 3); os.dup2({high[1]}, 4); os.execv(sys.argv[1], sys.argv[1:])"
        self.process = subprocess.Popen(
            [sys.executable, "-c", place, *command],
            pass_fds=high,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in (to_child, from_child, *high):
            os.close(fd)
        self.session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.look(*self.size, dark=self.dark)
        return self

    def look(self, width: int, height: int, dark: bool) -> None:
        """Change the size of the window and whether the reader prefers dark."""
        self.size, self.dark = (width, height), dark
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def __exit__(self, *_: Any) -> None:
        self.session = None
        with contextlib.suppress(OSError, RuntimeError, TimeoutError):
            self.call("Browser.close")
        os.close(self.write)
        os.close(self.read)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.profile.cleanup()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol and its answer; events that arrive meanwhile are kept."""
        self.count += 1
        message: dict[str, Any] = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + 180
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == self.count:
                if "error" in answer:
                    raise Refused(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self.events.append(answer)

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            if not select.select([self.read], [], [], max(0, deadline - time.monotonic()))[0]:
                raise TimeoutError("Chromium does not answer")
            part = os.read(self.read, 1 << 16)
            if not part:
                raise RuntimeError("Chromium has ended")
            self.buffer += part
        line, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(line)

    def open(self, url: str) -> None:
        """Go to `url` and wait until the page, its scripts and its formulas are done."""
        self.call("Page.navigate", url="about:blank")  # or the page that was open would count as the new one
        self.until("location.href === 'about:blank'")
        self.events.clear()
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")
        self.js("window.MathJax && MathJax.startup && MathJax.startup.promise")

    def js(self, expression: str) -> Any:
        """The value of a JavaScript expression (a promise is waited for), as JSON would hold it."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"].get("exception", {}).get("description", str(answer)))
        return answer["result"].get("value")

    def until(self, condition: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(Refused):  # the page that was asked has just gone: ask the next
                if self.js(f"Boolean({condition})"):
                    return
            if time.monotonic() > deadline:
                raise TimeoutError(f"never true in the page: {condition}")
            time.sleep(0.05)

    def key(self, name: str, code: int) -> None:
        """Press and release a key, as a reader without a mouse would."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code)

    def requests(self) -> list[str]:
        """Addresses that the page has asked for since `open`."""
        self.js("0")  # collects what is still on its way
        asked = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [url for url in asked if not url.startswith(("data:", "blob:"))]

    def messages(self) -> list[str]:
        """What has reached the console since `open`, of any level: exceptions, the browser's own, what scripts log."""
        self.js("0")
        found = []
        for event in self.events:
            given = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown":
                details = given["exceptionDetails"]
                found.append(details.get("exception", {}).get("description", details["text"]))
            elif event.get("method") == "Log.entryAdded":
                found.append(f"{given['entry']['level']}: {given['entry']['text']}")
            elif event.get("method") == "Runtime.consoleAPICalled":
                said = " ".join(str(a.get("value", a.get("description"))) for a in given["args"])
                found.append(f"{given['type']}: {said}")
        return found

    def errors(self) -> list[str]:
        """What scripts have thrown, and what was logged as an error, since `open`."""
        quiet = ("log: ", "info: ", "debug: ", "warning: ", "verbose: ")
        return [message for message in self.messages() if not message.startswith(quiet)]

    def texts(self, selector: str) -> list[str]:
        """The visible text of all elements that match a selector."""
        return self.js(f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.innerText.trim())")

    def click(self, selector: str, nth: int = 0) -> None:
        """Scroll to an element and click into its middle, as a mouse would."""
        found = f"document.querySelectorAll({json.dumps(selector)})[{nth}]"
        place = "(e => {e.scrollIntoView({block: 'center', behavior: 'instant'}); const r = e.getBoundingClientRect();"
        x, y = self.js(f"{place} return [r.x + r.width / 2, r.y + r.height / 2]}})({found})")
        for kind in ("mousePressed", "mouseReleased"):
            with contextlib.suppress(Refused):  # the click has led to another page
                self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self, to: Path) -> None:
        to.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
