"""A page to search a gallery from (`evaluate.py --serve`), for the browsers of this machine alone.

A request names a photograph by its number in the gallery, never by a path, and gets a new JPEG of it. An error is JSON
with one sentence, which the page shows. Read next: page.html.
"""

import io
import json
import os
import re
import signal
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

from mra.config import UserError
from mra.data.files import open_image, printable, quoted
from mra.data.words import noun_phrases
from mra.show.gallery import MEANING, Gallery, unread
from mra.show.pictures import heat_map

LISTED, SENTENCE = 1000, 1000      # photographs of an answer, characters of a sentence, at most
BODY = 16 * 2**20       # bytes of a picture to search by, at most
SIZE = (480, 720)       # width and height of a photograph on the page, at most, pixels
PAGE = Path(__file__).with_name("page.html").read_bytes()
# a browser runs the script and the style that stand in the file, and nothing that might get into the page
HASHES = " ".join(f"'sha256-{b64encode(sha256(part).digest()).decode()}'"
                  for part in re.findall(b"<(?:style|script)>(.*?)</(?:style|script)>", PAGE, re.DOTALL))
POLICY = (f"default-src 'none'; style-src {HASHES}; script-src {HASHES}; connect-src 'self'; "
          "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
HEADERS = {"Content-Security-Policy": POLICY, "Cross-Origin-Resource-Policy": "same-origin",
           "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}


class Server(ThreadingHTTPServer):
    """It has its port as soon as it is made, and answers in `serve`. Raises UserError if the port is not free."""
    daemon_threads, request_queue_size = True, 64

    def __init__(self, port: int):
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as error:
            raise UserError(f"--serve {port}: {error.strerror}; give another port, or 0 for any free one.") from error
        self.hosts = [f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")]
        self.model = threading.Lock()       # one thread computes at a time; photographs are sent meanwhile

    def serve(self, gallery: Gallery, name: str, threshold: float, autocast: Callable) -> None:
        """Answer until Ctrl-C. `name` is the gallery's, for people; the model computes within `autocast()`."""
        # a process forked beside threads may hang
        self.gallery, self.autocast = replace(gallery, settings=replace(gallery.settings, workers=0)), autocast
        self.about = {"name": printable(name), "photographs": len(gallery.paths), "body": BODY, "threshold": threshold}
        self.numbers = {path: number for number, path in enumerate(gallery.paths)}
        self.home = os.path.commonpath([os.path.dirname(path) for path in gallery.paths])
        print(f"Search {len(gallery.paths):,} photographs at http://{self.hosts[0]}/ (Ctrl-C ends it).", flush=True)
        try:
            self.serve_forever()
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)        # a second one would abort the search at work
            print("The page has ended.")
        self.model.acquire()        # a thread that the interpreter ends within torch would abort the process
        self.server_close()

    def handle_error(self, *_) -> None:
        """A browser that left before its answer came is no error."""


class Handler(BaseHTTPRequestHandler):
    """One request."""
    timeout = 30        # seconds without a byte
    error_content_type, error_message_format = "application/json", '{"error": "This is no request of the page."}'

    def do_GET(self) -> None:
        """Send what is asked for, or why there is none."""
        try:
            host = self.headers.get("Host", "").lower()
            if (host not in self.server.hosts or self.headers.get("Origin", f"http://{host}") != f"http://{host}"
                    or self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin")):
                raise UserError(f"The page is at http://{self.server.hosts[0]}/ and answers to no other site.")
            status, (kind, content) = 200, self.content()
        except UserError as mistake:
            told = str(mistake).replace(os.path.join(self.server.home, ""), "")      # photographs without their folder
            status, kind, content = 400, "application/json", {"error": told}
        except Exception as error:
            status, kind, content = 500, "application/json", {"error": printable(f"{type(error).__name__}: {error}")}
            print(f"A search failed: {content['error']}", file=sys.stderr)
        if isinstance(content, dict):
            content = json.dumps(content).encode()
        self.send_response(status)
        for header in (HEADERS | {"Content-Type": kind, "Content-Length": str(len(content))}).items():
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(content)
    do_POST = do_GET

    def content(self) -> tuple[str, bytes | dict]:
        """Type and content of the page, of a search, of a photograph, or of the heat map of a phrase in it."""
        gallery, (place, _, options) = self.server.gallery, self.path.partition("?")
        text = parse_qs(options).get("text", [""])[0].strip()
        if len(text) > SENTENCE:
            raise UserError(f"The sentence is longer than {SENTENCE:,} characters.")
        if place == "/":
            return "text/html; charset=utf-8", PAGE
        if place == "/about":
            return "application/json", self.server.about | MEANING
        if place == "/search" and self.command == "POST":
            return "application/json", self.search(text)
        named = re.fullmatch("/(photo|heat)/([0-9]{1,9})", place)
        if not named or int(named[2]) >= len(gallery.paths):
            raise UserError("There is nothing at this address.")
        path = gallery.paths[int(named[2])]
        image = open_image(path)
        image.thumbnail(SIZE)
        if named[1] == "heat":
            with self.server.model:
                image = heat_map(gallery.model, gallery.tokenizer, path, text, image.size)
        jpeg = io.BytesIO()     # made anew: browsers do not show every format, and what else the file says stays here
        image.save(jpeg, "JPEG", quality=90)
        return "image/jpeg", jpeg.getvalue()

    def search(self, text: str) -> dict:
        """What is found for a sentence, for the picture that is the request's body, or for both."""
        gallery, length = self.server.gallery, self.headers.get("Content-Length", "0")
        if not re.fullmatch("[0-9]{1,9}", length) or int(length) > BODY:
            raise UserError(f"A picture of more than {BODY // 2**20} MiB is not read; make it smaller.")
        picture, notes, phrases = self.rfile.read(int(length)), [], []
        if text:
            notes = unread(text, gallery.tokenizer, gallery.dataset, gallery.model.config.max_tokens, quoted(text))
            phrases = list(dict.fromkeys(noun_phrases(text))) or [text]
        elif not picture:
            raise UserError("Type a sentence, or add a picture.")
        with self.server.model, self.server.autocast():
            image = open_image(io.BytesIO(picture)) if picture else None
            started = time.perf_counter()
            hits, = gallery.search([text], image, LISTED)
        rows = [{"photo": self.server.numbers[hit.path], "similarity": hit.similarity, "match": hit.match,
                 "name": printable(os.path.relpath(hit.path, self.server.home))} for hit in hits]
        return {"hits": rows, "phrases": phrases, "notes": notes, "seconds": time.perf_counter() - started}

    def log_message(self, *_) -> None:
        """No list of the requests is kept."""
