"""A page in a headless Chromium, driven by the DevTools protocol over a pipe: JSON texts, each ended by a zero byte.

https://chromedevtools.github.io/devtools-protocol/ names the methods.
"""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-extensions", "--disable-background-networking", "--remote-debugging-pipe", "--window-size=1000,760"),
)
SECONDS = 60  # for any one answer, on a busy machine


def find():
    """The browser's program; without one the test is skipped, or fails under QKV_FAST_REQUIRE_BROWSER."""
    program = next(filter(None, map(shutil.which, NAMES)), None) if os.name == "posix" else None
    if program is None:
        reason = f"pages are tested in a headless browser, one of {', '.join(NAMES)}"
        assert "QKV_FAST_REQUIRE_BROWSER" not in os.environ, f"QKV_FAST_REQUIRE_BROWSER, but there is none: {reason}"
        pytest.skip(reason)
    return program


class Browser:
    def __init__(self, folder):
        program = find()
        import fcntl  # not on Windows

        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # The browser reads descriptor 3 and writes 4: a program that puts them there becomes the browser.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_in, theirs_out)]
        os.close(theirs_in)
        os.close(theirs_out)
        script = f"import os, sys; os.dup2({ends[0]}, 3); os.dup2({ends[1]}, 4); os.execv(sys.argv[1], sys.argv[1:])"
        become = [sys.executable, "-I", "-S", "-c", script]
        command = [*become, program, *OPTIONS, f"--user-data-dir={folder}", "about:blank"]
        self._process = subprocess.Popen(
            command, pass_fds=ends, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True, env={**os.environ, "HOME": str(folder)},
        )  # fmt: skip
        for end in ends:
            os.close(end)
        self._numbers, self._rest, self.events = itertools.count(1), b"", []
        pages = self._ask("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in pages if target["type"] == "page")
        self._session = self._ask("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self("Domain.enable".replace("Domain", domain))

    def _ask(self, method, session=None, **parameters):
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._receive(method)).get("id") != number:
            self.events.append(answer)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _receive(self, method):
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], SECONDS)
            more = os.read(self._in, 1 << 20) if ready else b""
            assert more, f"no answer to {method}"
            self._rest += more
        text, _, self._rest = self._rest.partition(b"\0")
        return json.loads(text)

    def __call__(self, method, **parameters):
        """The result of a method of DevTools on the page."""
        return self._ask(method, self._session, **parameters)

    def open(self, path):
        self.events.clear()
        self("Page.navigate", url=Path(path).absolute().as_uri())
        self.wait("document.readyState === 'complete'")

    def run(self, code):
        """The value of a JavaScript expression, awaited."""
        answer = self("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, (code, answer["exceptionDetails"])
        return answer["result"].get("value")

    def wait(self, code):
        """Until an expression is true."""
        limit = time.monotonic() + SECONDS
        while not self.run(code):
            assert time.monotonic() < limit, f"never true: {code}"
            time.sleep(0.02)

    def mouse(self, kind, x, y, **parameters):
        self("Input.dispatchMouseEvent", type=kind, x=x, y=y, **parameters)

    def key(self, name, **parameters):
        for kind in ("keyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=name, **parameters)

    def troubles(self):
        """Errors and exceptions of the page, and what it asked of the network."""
        kinds = {"Runtime.exceptionThrown", "Log.entryAdded"}
        found = [event["params"] for event in self.events if event.get("method") in kinds]
        asked = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return found + [url for url in asked if url.split(":")[0] not in ("file", "data", "blob")]

    def screenshot(self):
        return base64.b64decode(self("Page.captureScreenshot")["data"])

    def close(self):
        try:
            self._ask("Browser.close")
            self._process.wait(SECONDS)
        finally:
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
            os.close(self._out)
            os.close(self._in)
