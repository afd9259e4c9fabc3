"""`evaluate.py --serve`: what the server answers and refuses, and the page in a headless Chromium, if there is one."""

import http.client
import io
import json
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
import pytest
import torch
from PIL import Image
from processes import Fresh, script

import evaluate
from mra import ranking
from mra.config import EvalConfig, UserError
from mra.retriever import Retriever
from mra.run.command import parse, run
from mra.show import gallery, page
from tests.test_gallery import ours  # noqa: F401 (a fixture: a small checkpoint)

EVIL = "<img src=x onerror=document.title='run'>.png"      # the name of a photograph
ASKED = "a woman in a red coat with a black backpack"


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    content: bytes

    @property
    def json(self) -> dict:
        return json.loads(self.content)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """30 photographs of noise, in two formats, of which one has a bad name."""
    folder = tmp_path_factory.mktemp("page") / "photos"
    folder.mkdir()
    for number in range(30):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 20, 3), np.uint8)
        name = EVIL if number == 7 else f"{number:02}.{'tif' if number % 2 else 'png'}"
        Image.fromarray(pixels).resize((60 + number, 120)).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def server(config, tokenizer, photographs) -> Iterator[page.Server]:
    """A server of these photographs, in a thread."""
    torch.manual_seed(0)
    model = Retriever(config).eval()
    paths = sorted(map(str, photographs.iterdir()))
    settings = ranking.Settings(k=8)
    features = ranking.encode_gallery(model, ranking.Images(paths, config), settings)
    searched = gallery.Gallery(model, tokenizer, "cuhk", paths, features, settings, 1.0)
    server = page.Server(0)
    thread = threading.Thread(target=server.serve, args=(searched, "my <b>photos</b>", -1.0, nullcontext))
    thread.start()
    yield server
    server.shutdown()
    thread.join()


@pytest.fixture
def ask(server) -> Callable[..., Answer]:
    """Send a request, with these headers in place of the usual ones."""
    def go(address: str, method: str = "GET", body: bytes | None = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
        connection.request(method, address, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return Answer(answer.status, answer.headers, answer.read())
    return go


def search(text: str) -> str:
    return f"/search?text={quote(text)}"


def png(width: int = 20, height: int = 40) -> bytes:
    packed = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(packed, "PNG")
    return packed.getvalue()


# ---- the server

def test_a_search_answers_as_the_gallery_does(ask, server):
    found = ask(search(ASKED), "POST").json
    hits, = server.gallery.search([ASKED], listed=page.LISTED)
    assert [(server.gallery.paths[hit["photo"]], hit["similarity"], hit["match"]) for hit in found["hits"]] == hits
    assert len(hits) == 30 and sum(hit.match is not None for hit in hits) == 8
    assert found["phrases"] == ["a woman", "a red coat", "a black backpack"]
    assert found["notes"] == [] and 0 < found["seconds"] < 60
    both, = server.gallery.search(["a hat"], Image.new("RGB", (20, 40), "red"), page.LISTED)
    found = ask(search("a hat"), "POST", png()).json
    assert [hit["similarity"] for hit in found["hits"]] == pytest.approx([hit.similarity for hit in both], abs=1e-6)
    assert ask(search("hatless"), "POST").json["phrases"] == ["hatless"]
    assert ask("/search", "POST", png()).json["phrases"] == []
    assert "does not read the last" in ask(search("coat " * 100), "POST").json["notes"][0]


def test_a_photograph_that_has_gone_is_named(ask, server):
    """The fusion encoder would read it."""
    first, = server.gallery.search([ASKED], listed=1)
    moved = Path(first[0].path).rename(Path(first[0].path).with_suffix(".gone"))
    try:
        said = ask(search(ASKED), "POST").json["error"]
    finally:
        moved.rename(first[0].path)
    assert Path(first[0].path).name in said
    assert ask(search(ASKED), "POST").json["notes"] == []


def test_links_of_other_sites_get_nothing(ask):
    """An image tag elsewhere sends no Origin."""
    for site, status in (("cross-site", 400), ("same-site", 400), ("same-origin", 200), ("none", 200)):
        assert ask("/photo/0", Sec_Fetch_Site=site).status == status


def test_a_photograph_has_a_number_and_no_path(ask, server, photographs):
    for number, path in list(enumerate(server.gallery.paths))[:3]:
        answer = ask(f"/photo/{number}")
        assert answer.headers["Content-Type"] == "image/jpeg"
        with Image.open(io.BytesIO(answer.content)) as sent, Image.open(path) as kept:
            assert sent.format == "JPEG" and sent.size == kept.size
            assert np.abs(np.asarray(sent, float) - np.asarray(kept, float)).mean() < 30
    for address in ("/photo/../../etc/passwd", "/photo/%2e%2e/%2e%2e/etc/passwd", "/photo/-1", "/photo/999",
                    "/photo/1e0", "/photo/0/../1", "/photo/", "/photo/" + "9" * 30, f"/photo/{photographs}/00.png",
                    "//etc/passwd", "/etc/passwd", "/search", "*", "/photo/\u0661"):
        answer = ask(quote(address, "/%:*"))
        assert answer.status == 400 and answer.json == {"error": "There is nothing at this address."}, address


def test_a_heat_map_has_the_shape_of_its_photograph(ask):
    plain, heat = ask("/photo/3"), ask("/heat/3?text=a+red+coat")
    with Image.open(io.BytesIO(plain.content)) as photograph, Image.open(io.BytesIO(heat.content)) as mapped:
        assert photograph.size == mapped.size
        red, _, blue = np.asarray(mapped, float).mean((0, 1)) - np.asarray(photograph, float).mean((0, 1))
        assert red > 10 and blue < -10


def test_other_sites_are_refused(ask, server):
    own = server.server_port
    for host in ("example.com", f"example.com:{own}", "127.0.0.1", f"127.0.0.1:{own + 1}", f"[::1]:{own}", ""):
        for address in ("/", "/about", "/photo/0"):
            answer = ask(address, Host=host)
            assert answer.status == 400 and "no other site" in answer.json["error"], host
    for origin in ("http://example.com", "null", f"https://127.0.0.1:{own}", f"http://127.0.0.1:{own + 1}"):
        assert "no other site" in ask(search("a hat"), "POST", Origin=origin).json["error"], origin
    for name in ("127.0.0.1", "localhost", "LOCALHOST"):
        assert ask(search("a hat"), "POST", Host=f"{name}:{own}", Origin=f"http://{name.lower()}:{own}").status == 200
    assert server.server_address[0] == "127.0.0.1"
    headers = ask("/").headers
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin" and headers["X-Content-Type-Options"] == "nosniff"
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    assert policy.count("sha256-") == 4 and not re.search(r"https?://|//[a-z]", page.PAGE.decode())


@pytest.mark.parametrize("address, body, headers, said", [
    ("/search", None, {}, "Type a sentence, or add a picture."),
    (search(" "), b"", {}, "Type a sentence, or add a picture."),
    (search("☃ ..."), None, {}, "'☃ ...': there is no word in it that the model knows."),
    (search("a" * 1001), None, {}, "longer than 1,000 characters"),
    (search("<script>" * 200), None, {}, "longer than 1,000 characters"),
    ("/search", b"no picture", {}, "The picture cannot be read"),
    ("/search", png()[:60], {}, "The picture cannot be read"),
    ("/search", png(8000, 6251), {}, "The picture cannot be read"),                 # 50,008,000 pixels
    ("/search", None, {"Content_Length": "16777217"}, "more than 16 MiB"),
    ("/search", None, {"Content_Length": "1" * 5000}, "more than 16 MiB"),
    ("/search", None, {"Content_Length": "-1"}, "more than 16 MiB"),
    ("/search/x", b"{", {}, "nothing at this address")])
def test_a_bad_request_gets_one_sentence(ask, capfd, address, body, headers, said):
    answer = ask(address, "POST", body, **headers)
    assert answer.status == 400 and answer.headers["Content-Type"] == "application/json"
    assert said in answer.json["error"] and answer.json.keys() == {"error"}
    assert ask("/about").status == 200 and capfd.readouterr() == ("", "")


def test_a_photograph_that_is_gone_is_told_without_its_folder(ask, server):
    path = Path(server.gallery.paths[0])
    away = path.rename(path.with_suffix(".away"))
    try:
        answer = ask("/photo/0")
    finally:
        away.rename(path)
    assert answer.status == 400 and path.name in answer.json["error"] and server.home not in answer.json["error"]
    assert ask("/photo/0").status == 200


def test_what_is_no_request_does_not_end_it(ask, server, capfd):
    for sent in (b"\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\xff\x00\n\n", b"GET /" + b"a" * 70000,
                 b"PUT / HTTP/1.1\r\nHost: x\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n"):
        with socket.create_connection(("127.0.0.1", server.server_port)) as raw:
            raw.sendall(sent)
            raw.shutdown(socket.SHUT_WR)
            answer = raw.makefile("rb").read()
            assert answer == b"" or json.loads(answer.split(b"\r\n\r\n")[-1])["error"], sent
    with socket.create_connection(("127.0.0.1", server.server_port)) as raw:        # it leaves before its answer
        raw.sendall(f"GET / HTTP/1.1\r\nHost: {server.hosts[0]}\r\n\r\n".encode())
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    assert ask("/about").status == 200 and capfd.readouterr() == ("", "")


def test_a_fault_of_the_program_is_one_sentence(ask, monkeypatch, capfd):
    def fail(*given) -> None:
        raise RuntimeError("out of memory\non this device")
    monkeypatch.setattr(gallery.Gallery, "search", fail)
    answer = ask(search("a hat"), "POST")
    assert answer.status == 500 and answer.json["error"] == r"RuntimeError: out of memory\non this device"
    assert capfd.readouterr().err == f"A search failed: {answer.json['error']}\n"
    assert ask("/photo/0").status == 200


def test_a_photograph_that_is_gone(ask, server, monkeypatch):
    paths = server.gallery.paths
    monkeypatch.setattr(server, "gallery", replace(server.gallery, paths=[*paths[:4], "gone.png", *paths[5:]]))
    assert "gone.png" in ask("/photo/4").json["error"]


def test_two_browsers_at_once(ask, server, monkeypatch):
    """One searches at a time, and a search keeps nobody from the photographs."""
    real, inside, most, hold = gallery.Gallery.search, [], [], threading.Event()

    def slow(*given) -> list:
        inside.append(1)
        most.append(len(inside))
        hold.wait(20)
        inside.pop()
        return real(*given)
    monkeypatch.setattr(gallery.Gallery, "search", slow)
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, search(text), "POST") for text in ("a red coat", "a hat", "a bag")]
        while not inside:
            time.sleep(0.01)
        assert ask("/photo/1").status == ask("/").status == 200
        hold.set()
        answers = [one.result().json for one in asked]
    monkeypatch.undo()
    assert most == [1, 1, 1]
    for text, answer in zip(("a red coat", "a hat", "a bag"), answers):
        assert answer["hits"] == ask(search(text), "POST").json["hits"]


# ---- the command

@pytest.mark.parametrize("given, port", [([], -1), (["--serve"], 8000), (["--serve", "0"], 0), (["--serve", "9"], 9)])
def test_the_port(given, port):
    assert parse(EvalConfig, "", [*given, "--device", "cpu"]).serve == port


@pytest.mark.parametrize("given", [["--serve", "65536"], ["--serve", "http"], ["--serve", "0", "--query", "a hat"],
                                   ["--serve", "0", "--dataset", "icfg", "cuhk"]])
def test_flags_that_do_not_go_together(given):
    with pytest.raises(UserError, match="--serve"):
        evaluate.check(parse(EvalConfig, "", given))


def test_the_command_serves_until_ctrl_c(tmp_path, ours, photographs, monkeypatch, capsys):  # noqa: F811
    flags = ("--device", "cpu", "--checkpoint", str(ours), "--gallery", str(photographs), "--serve")
    running = Fresh(tmp_path / "logs", tmp_path, script, "evaluate.py", *flags, "0", "--threshold", "0.25")
    running.until(lambda: "Ctrl-C" in running.out)
    said = r"^Search 30 photographs at (http://127\.0\.0\.1:(\d+)/) \(Ctrl-C ends it\)\.$"
    address = re.search(said, running.out, re.MULTILINE)
    with urllib.request.urlopen(address[1] + "about") as answer:
        about = json.load(answer)
    assert about["name"] == str(photographs) and about["photographs"] == 30 and about["threshold"] == 0.25

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["evaluate.py", *flags, address[2]])
    with pytest.raises(SystemExit) as end:
        run(evaluate.main)
    err = capsys.readouterr().err
    assert end.value.code == 2 and re.fullmatch(rf"error: --serve {address[2]}: .* give another port, .*\n", err)

    running.interrupt()
    assert (running.status(), running.err) == (0, "") and running.out.endswith("The page has ended.\n")


# ---- the page in a browser

ENTER, ESCAPE, TAB, LEFT, RIGHT, DOWN = "\ue007\ue00c\ue004\ue012\ue014\ue015"


class Browser:
    """A headless Chromium, driven by W3C's WebDriver: requests with JSON to a chromedriver."""

    def __init__(self, log: Path):
        self.log = log
        with open(log, "w") as out:
            self.process = subprocess.Popen(["chromedriver", "--port=0"], stdout=out)
        while not (started := re.search(r"successfully on port (\d+)", log.read_text())):
            time.sleep(0.02)
        self.address = f"http://127.0.0.1:{started[1]}/session"
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1200,900"]
        wanted = {"goog:chromeOptions": {"args": flags}, "goog:loggingPrefs": {"browser": "ALL"}}
        self.address += "/" + self("", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def __call__(self, command: str, given: dict | None = None, method: str | None = None):
        body = None if given is None else json.dumps(given).encode()
        with urllib.request.urlopen(urllib.request.Request(self.address + command, body, method=method)) as answer:
            return json.load(answer)["value"]

    def run(self, code: str):
        """What a piece of JavaScript returns."""
        return self("/execute/sync", {"script": code, "args": []})

    def until(self, condition: str, seconds: float = 20) -> None:
        """Wait until a condition of JavaScript holds."""
        end = time.monotonic() + seconds
        while not self.run(f"return !!({condition})"):
            assert time.monotonic() < end, condition
            time.sleep(0.02)

    def press(self, *keys: str) -> None:
        """Press keys, one after the other, wherever the focus is."""
        strokes = [{"type": kind, "value": key} for text in keys for key in text for kind in ("keyDown", "keyUp")]
        self("/actions", {"actions": [{"type": "key", "id": "keys", "actions": strokes}]})

    def media(self, **given) -> None:
        """Emulate a screen."""
        for command, params in given.items():
            self("/goog/cdp/execute", {"cmd": f"Emulation.{command}", "params": params})

    def texts(self, selector: str) -> list[str]:
        return self.run(f"return [...document.querySelectorAll('{selector}')].map(one => one.textContent)")

    def focus(self) -> str:
        """The name of what has the focus."""
        return self.run("return document.activeElement.id || document.activeElement.title")


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    if not (shutil.which("chromedriver") and shutil.which("chromium")):
        pytest.skip("no Chromium here: install chromium and chromium-driver from the distribution's packages")
    browser = Browser(tmp_path_factory.mktemp("browser") / "log")
    yield browser
    browser("", method="DELETE")
    browser.process.terminate()
    browser.process.wait()


@pytest.fixture
def visit(browser, server) -> Browser:
    """A browser that has just opened the page."""
    browser("/url", {"url": f"http://{server.hosts[0]}/"})
    browser.until("document.getElementById('gallery').textContent")
    yield browser
    errors = [line["message"] for line in browser("/se/log", {"type": "browser"})]
    assert not [line for line in errors if "400" not in line]       # nothing was blocked, and no script failed


def found(browser: Browser, *keys: str) -> None:
    """Press the keys and wait for photographs."""
    browser.press(*keys)
    browser.until("document.querySelector('.hit img')?.complete && !document.querySelector('[aria-busy=true]')")


def test_a_search_by_keyboard_alone(visit, server):
    """A sentence, pages, a photograph with its heat maps, and back."""
    assert visit.focus() == "sentence" and visit.texts("#gallery") == ["30 photographs in my <b>photos</b>"]
    found(visit, ASKED, ENTER)
    visit.until("document.querySelectorAll('.hit').length === 24")
    hits, = server.gallery.search([ASKED], listed=page.LISTED)
    assert visit.texts(".number:nth-child(3) b") == [f"{hit.similarity:.3f}" for hit in hits[:24]]
    matches = [f"{hit.match:.3f}" for hit in hits[:8]]       # of the candidates
    assert visit.texts(".number:nth-child(4) b") == matches + ["\u2013"] * 16
    said, = visit.texts("#status")
    assert re.fullmatch(r"30 of 30 photographs, found in \d+\.\d\d s\.", said)
    assert visit.run("return document.querySelector('.number').title") == gallery.MEANING["similarity"]
    assert gallery.MEANING["match"] in visit.texts("footer")[0]
    names = [Path(hit.path).name for hit in hits]
    assert EVIL in names

    visit.press(TAB * 4)                                        # two buttons, the slider, the first photograph
    assert visit.focus() == names[0]
    for key, number in ((RIGHT, 1), (DOWN, 9), (LEFT, 8), (LEFT, 7)):       # eight in a row
        visit.press(key)
        assert visit.focus() == names[number]
    visit.press(ENTER)
    visit.until("document.querySelectorAll('figure').length === 4")
    visit.until("[...document.querySelectorAll('figure img')].every(image => image.naturalWidth)")
    assert visit.texts("figcaption") == ["photograph", "a woman", "a red coat", "a black backpack"]
    assert visit.texts("#place") == ["Photograph 8 of 30"] and names[7] in visit.texts("#facts")[0]
    visit.press(RIGHT, RIGHT)
    visit.until("document.getElementById('place').textContent.startsWith('Photograph 10 ')")
    visit.press(ESCAPE)
    visit.until("!document.querySelector('dialog[open]')")
    assert visit.focus() == names[9]
    visit.run("document.getElementById('on').focus()")
    visit.press(ENTER)
    visit.until("document.querySelectorAll('.hit').length === 6")
    assert visit.texts("nav span") == ["Page 2 of 2"] and visit.texts(".rank")[0] == "25" and visit.focus() == names[24]
    visit.press(ENTER, LEFT, ESCAPE)                            # from page 2 to the last photograph of page 1
    visit.until("!document.querySelector('dialog[open]')")
    visit.until(f"document.activeElement.title === {json.dumps(names[23])}")


def test_the_threshold(visit, server):
    found(visit, ASKED, ENTER)
    hits, = server.gallery.search([ASKED], listed=page.LISTED)
    middle = sorted(hit.similarity for hit in hits)[20]
    visit.run(f"slider.value = {middle:.3f}; slider.dispatchEvent(new Event('input'))")
    kept = sum(hit.similarity >= round(middle, 3) for hit in hits)
    assert 0 < kept < 24 and len(visit.texts(".hit")) == kept and visit.texts("#status")[0].startswith(f"{kept} of 30 ")
    assert visit.texts("#threshold b") == [f"{middle:.3f}"] and not visit.run("return pages.offsetHeight")
    found(visit, " and a hat", ENTER)
    assert visit.texts("#threshold b") == [f"{middle:.3f}"]      # another search keeps it


def test_a_picture_is_dropped(visit, server):
    number = 5
    visit.run(f"""return fetch("/photo/{number}").then(answer => answer.blob()).then(blob => {{
        const dropped = new DataTransfer();
        dropped.items.add(new File([blob], "<i>example</i>.jpg", {{type: "image/jpeg"}}));
        document.dispatchEvent(new DragEvent("drop", {{dataTransfer: dropped, cancelable: true}}));
    }})""")
    found(visit)
    assert visit.texts("#picture span") == ["<i>example</i>.jpg"]
    assert visit.run("return document.querySelector('.hit').title") == Path(server.gallery.paths[number]).name
    assert set(visit.texts(".number:nth-child(4) b")) == {"\u2013"}
    visit.press(TAB * 5, ENTER)
    visit.until("document.querySelector('figure img')?.naturalWidth")
    assert visit.texts("figcaption") == ["photograph"] and not visit.run("return legend.offsetHeight")
    visit.press(ESCAPE)
    visit.until("!document.querySelector('dialog[open]')")
    visit.until(f"document.activeElement.title === {json.dumps(Path(server.gallery.paths[number]).name)}")
    visit.run("remove.click()")
    assert visit.focus() == "sentence" and not visit.run("return picture")
    visit.run("choose(new File([new Uint8Array(16777217)], 'large.jpg'))")
    assert visit.texts(".wrong") == ["This picture is too large; make it smaller."]


def test_names_and_sentences_are_text(visit):
    """The sentence is no HTML, nor is the name of a photograph."""
    found(visit, EVIL, ENTER)
    visit.run("document.querySelector('.hit').click()")
    visit.until("document.querySelectorAll('figure img')[1]?.naturalWidth")
    assert visit.texts("figcaption") == ["photograph", EVIL]
    assert visit.run("return [document.title, document.querySelectorAll('[onerror]').length]") == ["Find a person", 0]


def test_a_refusal_is_shown(visit):
    found(visit, ASKED, ENTER)
    visit.run("sentence.select()")
    visit.press("\u2603", ENTER)
    visit.until("document.querySelector('.wrong')")
    assert visit.texts("#status") == ["'\u2603': there is no word in it that the model knows."]
    assert visit.texts(".hit") == [] and not visit.run("return threshold.offsetHeight")
    visit.run("fetch = () => Promise.reject(new TypeError('Failed to fetch'))")
    visit.press(ENTER)
    visit.until("document.querySelector('.wrong').textContent.includes('still running')")


def test_a_phone_and_the_dark(visit):
    """Nothing is wider than the screen; the dark page is dark, and what is written on it is light."""
    def colour(selector: str, kind: str) -> list[int]:
        code = f"return getComputedStyle(document.querySelector('{selector}')).{kind}"
        return [int(level) for level in re.findall(r"\d+", visit.run(code))]

    visit.media(setDeviceMetricsOverride={"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True})
    found(visit, ASKED, ENTER)
    assert visit.run("return document.documentElement.scrollWidth") == 390
    across = visit.run("return new Set([...document.querySelectorAll('.hit')].map(one => one.offsetLeft)).size")
    assert across == 3 and min(colour("body", "backgroundColor")) > 200 and max(colour("body", "color")) < 60
    visit.run("document.querySelector('.hit').click()")
    visit.until("document.querySelector('dialog[open]')")
    assert visit.run("return detail.scrollWidth") <= 366
    visit.media(setEmulatedMedia={"features": [{"name": "prefers-color-scheme", "value": "dark"}]})
    for selector in ("body", "dialog", ".hit"):
        assert max(colour(selector, "backgroundColor")) < 60 and min(colour(selector, "color")) > 200
    visit.media(setEmulatedMedia={"features": []}, clearDeviceMetricsOverride={})
