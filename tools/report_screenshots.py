"""Opens a page of `leank report` in headless Chromium, looks at it in light, dark, at 360 pixels and in
print, and fails where it is not what a report must be.

    report_screenshots.py CHROMIUM PAGE OUT

What must hold: no error on the console, no request but for the page itself, no page wider than its
window, no picture of one colour. Pictures go to the folder OUT. Speaks Chromium's DevTools protocol over
a pipe: needs nothing but Python.
"""

import base64
import json
import os
import pathlib
import select
import subprocess
import sys
import tempfile
import zlib

# Name, width, height, theme, medium. Paper is light whatever the theme.
VIEWS = [
    ("light", 1280, 900, "light", "screen"),
    ("dark", 1280, 900, "dark", "screen"),
    ("phone", 360, 740, "light", "screen"),
    ("phone-dark", 360, 740, "dark", "screen"),
    ("print", 718, 1000, "dark", "print"),
]
# Everything that the script does: a cell of each heat map, the theme there and back.
USE = """(() => {
    for (const box of document.querySelectorAll("[data-cells]")) {
        box.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
        const words = box.parentElement.querySelector("output").textContent;
        if (!words.includes("layer 0")) throw new Error("no cell is read: " + words);
    }
    const paper = () => getComputedStyle(document.body).backgroundColor;
    const before = paper();
    document.getElementById("theme").click();
    if (paper() === before) throw new Error("the theme does not change");
    document.getElementById("theme").click();
    if (paper() !== before) throw new Error("the theme does not change back");
    scrollTo(0, 0);
})()"""
# Taller pictures than Chromium draws in one piece are cut.
MAX_HEIGHT = 15000


class Browser:
    """A headless Chromium, spoken to over file descriptors 3 and 4."""

    def __init__(self, chromium, profile):
        to_child, own_out = os.pipe()
        own_in, from_child = os.pipe()

        def connect():
            os.dup2(to_child, 3)
            os.dup2(from_child, 4)

        # The pipes must be neither 3 nor 4 before they become them.
        to_child, from_child = (os.dup(fd) if fd > 4 else os.dup(os.dup(fd)) for fd in (to_child, from_child))
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
                     "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update",
                     f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
        self.process = subprocess.Popen([chromium, *arguments], preexec_fn=connect, pass_fds=(3, 4),
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_child)
        os.close(from_child)
        self.out, self.into = os.fdopen(own_out, "wb", 0), os.fdopen(own_in, "rb")
        self.buffer, self.events, self.last, self.session = b"", [], 0, None

    def receive(self):
        while b"\0" not in self.buffer:
            if not select.select([self.into], [], [], 120)[0]:
                raise RuntimeError("Chromium said nothing for two minutes")
            piece = os.read(self.into.fileno(), 1 << 16)
            if not piece:
                raise RuntimeError("Chromium went away")
            self.buffer += piece
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def call(self, method, **parameters):
        self.last += 1
        message = {"id": self.last, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        self.out.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.last:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def wait_for(self, event):
        while not any(own["method"] == event for own in self.events):
            self.events.append(self.receive())

    def value(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def close(self):
        self.process.terminate()
        self.process.wait()


def is_blank(png):
    """Whether a PNG has one colour: then its filtered bytes are hardly more than one pixel's."""
    at, data = 8, b""
    while at < len(png):
        length, kind = int.from_bytes(png[at:at + 4], "big"), png[at + 4:at + 8]
        if kind == b"IDAT":
            data += png[at + 8:at + 8 + length]
        at += 12 + length
    return len(set(zlib.decompress(data))) < 16


def look(browser, page, name, width, height, theme, medium, out):
    """Takes a picture of one view; what is wrong with it."""
    wrong = []
    browser.events.clear()
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
    browser.call("Emulation.setEmulatedMedia", media=medium, features=[{"name": "prefers-color-scheme", "value": theme}])
    browser.call("Page.navigate", url=page)
    browser.wait_for("Page.loadEventFired")
    if medium == "screen":
        browser.value(USE)
    elif browser.value("getComputedStyle(document.documentElement).colorScheme") != "light":
        wrong.append("it is printed on dark paper")
    wide = browser.value("document.documentElement.scrollWidth")
    if wide > width:
        wrong.append(f"the page is {wide} pixels wide in a window of {width}")
    tall = min(browser.value("Math.ceil(document.documentElement.getBoundingClientRect().height)"), MAX_HEIGHT)
    clip = {"x": 0, "y": 0, "width": width, "height": tall, "scale": 1}
    png = base64.b64decode(browser.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"])
    (out / f"{name}.png").write_bytes(png)
    if is_blank(png):
        wrong.append("the picture has one colour")
    for event in browser.events:
        parameters = event.get("params", {})
        match event["method"]:
            case "Network.requestWillBeSent":
                url = parameters["request"]["url"]
                if url != page and not url.startswith("data:"):
                    wrong.append(f"it asks for {url}")
            case "Runtime.exceptionThrown":
                wrong.append(f"console: {parameters['exceptionDetails'].get('text')}")
            case "Runtime.consoleAPICalled" if parameters["type"] in ("error", "warning", "assert"):
                wrong.append(f"console: {parameters['args']}")
            case "Log.entryAdded" if parameters["entry"]["level"] in ("error", "warning"):
                wrong.append(f"console: {parameters['entry']['text']}")
    return [f"{name}: {what}" for what in wrong]


def main(chromium, page, out):
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    page = pathlib.Path(page).resolve().as_uri()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(chromium, profile)
        try:
            target = browser.call("Target.createTarget", url="about:blank")["targetId"]
            browser.session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                browser.call(f"{domain}.enable")
            wrong = [what for view in VIEWS for what in look(browser, page, *view, out)]
        finally:
            browser.close()
    for what in wrong:
        print(what, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
