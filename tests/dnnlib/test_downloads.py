"""Downloads from a server that disconnects, lies, loops, stalls and changes its file."""

import hashlib
import http.server
import os
import threading
import time

import pytest

import dnnlib
from dnnlib import downloads

DATA = bytes(range(256)) * 400
OTHER = DATA[::-1]
SHA = hashlib.sha256(DATA).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        server.asked.append((self.path, self.headers.get("Range"), self.headers.get("If-Range")))
        server.behavior(self, len(server.asked) - 1)
        self.close_connection = True

    def answer(self, status=200, body=b"", length=None, **headers):
        """Send an answer. `length` None states the length of the body, "" states none."""
        self.send_response(status)
        if length != "":
            headers["Content-Length"] = len(body) if length is None else length
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """Ignore clients that disconnect: these tests make them do so."""


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(downloads, "_TIMEOUT", (2, 0.4))
    monkeypatch.setattr(downloads, "_PAUSE", 0)
    with Server(("127.0.0.1", 0), Handler) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        server.url = f"http://127.0.0.1:{server.server_port}"
        yield server
        server.shutdown()


def versioned(tag='"v1"', data=DATA, cut=None, **changes):
    """Return the behavior of a correct server of `data` that disconnects after `cut(number of the request)` bytes."""

    def behave(handler, number):
        start = 0
        wanted = handler.headers.get("Range")
        if wanted and handler.headers.get("If-Range", tag) == tag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        body = data[start:]
        length = len(body)
        if cut is not None:
            body = body[: cut(number)]
        headers = {"ETag": tag} if tag else {}
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        handler.answer(206 if start else 200, body, length, **{**headers, **changes})

    return behave


def fetch(server, folder, path="/a.pkl", **kwargs):
    with dnnlib.open_url(f"{server.url}{path}", folder, verbose=False, allow_http=True, **kwargs) as file:
        return file.read()


def fails(server, folder, match, path="/a.pkl", left=(), **kwargs):
    with pytest.raises(dnnlib.UserError, match=match) as e:
        fetch(server, folder, path, **kwargs)
    assert f"{server.url}{path.split('#')[0]}: " in e.value.message and str(folder) in e.value.message
    assert "\n" not in e.value.message
    assert sorted(name[-9:] for name in os.listdir(folder)) == sorted(left)


def test_cache_is_private_and_keyed_by_url(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "deep" / "cache"))
    server.behavior = versioned()
    for _ in range(2):
        assert fetch(server, None) == DATA
    assert len(server.asked) == 1
    (file,) = (tmp_path / "deep" / "cache").iterdir()
    assert file.name.endswith("_a.pkl") and file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    assert fetch(server, None, "/b/a.pkl") == DATA and len(os.listdir(file.parent)) == 2
    dnnlib.open_url(f"{server.url}/c", allow_http=True).close()
    assert capsys.readouterr().out == f"Downloading {server.url}/c\n"


def test_cache_is_keyed_by_content_where_that_is_known(server, tmp_path, capsys):
    server.behavior = versioned()
    assert fetch(server, tmp_path, sha256=SHA.upper()) == DATA
    assert fetch(server, tmp_path, f"/mirror.pkl#sha256={SHA}") == DATA  # another URL, the same content
    assert len(server.asked) == 1 and os.listdir(tmp_path) == [f"sha256-{SHA}"]
    (tmp_path / f"sha256-{SHA}").write_bytes(DATA[:-1] + b"x")
    assert fetch(server, tmp_path, sha256=SHA) == DATA and "damaged" in capsys.readouterr().out
    wrong = SHA[::-1]
    fails(server, tmp_path, f"its SHA-256 is {SHA}, expected {wrong}", sha256=wrong, left=[SHA[-9:]])
    assert len(server.asked) == 3
    for text in ("abc", SHA + "0", "g" * 64, f"{SHA}\n"):
        with pytest.raises(dnnlib.UserError, match="not a SHA-256"):
            fetch(server, tmp_path, sha256=text)
    with pytest.raises(dnnlib.UserError, match="two different"):
        fetch(server, tmp_path, f"/a#sha256={wrong}", sha256=SHA)


def test_an_interrupted_download_continues_where_it_stopped(server, tmp_path):
    server.behavior = versioned(cut=lambda number: 30000 if number < 2 else None)
    assert fetch(server, tmp_path) == DATA
    assert [asked[1:] for asked in server.asked] == [(None, None), ("bytes=30000-", '"v1"'), ("bytes=60000-", '"v1"')]
    assert [p.name[-6:] for p in tmp_path.iterdir()] == ["_a.pkl"]


def test_another_run_continues_where_the_last_one_stopped(server, tmp_path):
    server.behavior = versioned(cut=lambda number: 10000)
    fails(server, tmp_path, "received|read", left=[".pkl.part", ".part.tag"])
    assert all(p.stat().st_mode & 0o777 == 0o600 for p in tmp_path.iterdir())
    server.behavior = versioned()
    assert fetch(server, tmp_path) == DATA and server.asked[-1] == ("/a.pkl", "bytes=30000-", '"v1"')


def test_parts_of_two_versions_are_never_mixed(server, tmp_path):
    server.behavior = versioned(cut=lambda number: 10000)
    fails(server, tmp_path, "received|read", left=[".pkl.part", ".part.tag"])
    server.behavior = versioned('"v2"', OTHER)
    assert fetch(server, tmp_path) == OTHER
    # The server ignores If-Range and has a different file now: only the checksum can tell.
    server.behavior = versioned("", OTHER, cut=lambda number: 10000)
    fails(server, tmp_path / "b", "received|read", sha256=SHA, left=[f"{SHA}.part"[-9:]])
    server.behavior = versioned("")
    assert fetch(server, tmp_path / "b", sha256=SHA) == DATA
    assert server.asked[-2][1] == "bytes=30000-" and server.asked[-1][1] is None


@pytest.mark.parametrize("tag", ["", 'W/"v1"'])
def test_what_cannot_be_continued_is_not_kept(server, tmp_path, tag):
    server.behavior = versioned(tag, cut=lambda number: 10000)
    fails(server, tmp_path, "received|read")
    assert [wanted for _, wanted, _ in server.asked] == [None] * 3


def test_last_modified_serves_as_version(server, tmp_path):
    day = "Wed, 21 Oct 2015 07:28:00 GMT"
    server.behavior = versioned(None, cut=lambda number: 10000 if not number else None, Last_Modified=day)
    assert fetch(server, tmp_path) == DATA and server.asked[1] == ("/a.pkl", "bytes=10000-", day)


@pytest.mark.parametrize(
    "second",
    [
        lambda h: h.answer(206, DATA[5000:], Content_Range=f"bytes 5000-{len(DATA) - 1}/{len(DATA)}"),
        lambda h: h.answer(206, DATA[10000:]),
        lambda h: h.answer(416),
        lambda h: h.answer(200, DATA),
    ],
)
def test_servers_that_continue_wrongly(server, tmp_path, second):
    good = versioned(cut=lambda number: None if number else 10000)
    server.behavior = lambda h, number: second(h) if number == 1 else good(h, number)
    assert fetch(server, tmp_path) == DATA
    assert server.asked[-1][1] is None or len(server.asked) == 2


def chunked(handler, parts, end=b"0\r\n\r\n"):
    handler.answer(200, length="", Transfer_Encoding="chunked")
    for part in parts:
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
    handler.wfile.write(end)


def stall(handler, _number):
    handler.answer(200, DATA[:100], len(DATA))
    time.sleep(1.5)


def drip(handler, _number):
    handler.answer(200, b"", len(DATA))
    for _ in range(30):
        time.sleep(0.1)
        handler.wfile.write(b"x")
        handler.wfile.flush()


@pytest.mark.slow
@pytest.mark.parametrize(
    "behave, reason, requests",
    [
        (lambda h, n: h.answer(404), "answers 404", 1),
        (lambda h, n: h.answer(503), "answers 503", 3),
        (lambda h, n: h.answer(302, b"no address"), "answers 302", 1),
        (lambda h, n: h.answer(204), "answers 204", 1),
        (lambda h, n: h.answer(302, Location="/again"), "more than 10 redirects", 10),
        (lambda h, n: h.answer(302, Location="file:///etc/passwd"), "only https", 1),
        (lambda h, n: h.answer(302, Location="https://"), "failed", 3),
        (lambda h, n: h.answer(200, DATA, len(DATA) + 1), "bytes", 3),
        (lambda h, n: h.answer(200, DATA, "-5"), "failed", 3),
        (lambda h, n: h.answer(200, DATA, "many"), "failed", 3),
        (lambda h, n: h.answer(200, b"", 1 << 60), "more than the limit", 1),
        (lambda h, n: h.answer(200, b"<html>log in", Content_Type="text/html; charset=utf-8"), "web page", 1),
        (lambda h, n: chunked(h, [DATA], b""), "failed", 3),
        (lambda h, n: chunked(h, [DATA], b"zz\r\n"), "failed", 3),
        (lambda h, n: h.wfile.write(b"nonsense\r\n\r\n"), "failed", 3),
        (lambda h, n: None, "failed", 3),
        (stall, "timed out|Read timed", 3),
        (drip, "bytes came in", 3),
    ],
)
def test_failed_downloads_leave_nothing(server, tmp_path, behave, reason, requests):
    server.behavior = behave
    start = time.monotonic()
    fails(server, tmp_path, reason)
    assert time.monotonic() - start < 10 and len(server.asked) == requests


def test_a_length_that_is_too_small_shows_in_the_checksum(server, tmp_path):
    server.behavior = lambda h, n: h.answer(200, DATA, len(DATA) - 5)
    fails(server, tmp_path, "its SHA-256 is", sha256=SHA)


def test_other_lengths_are_fine(server, tmp_path):
    server.behavior = lambda h, n: chunked(h, [DATA[:100], DATA[100:]])
    assert fetch(server, tmp_path, "/chunked") == DATA
    server.behavior = lambda h, n: h.answer(200, DATA, "")
    assert fetch(server, tmp_path, "/none") == DATA
    server.behavior = lambda h, n: h.answer(200, b"")
    assert fetch(server, tmp_path, "/empty") == b""
    server.behavior = lambda h, n: h.answer(302, Location="/y") if h.path == "/x" else h.answer(200, DATA)
    assert fetch(server, tmp_path, "/x") == DATA


def test_endless_downloads_end(server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "_MAX_FILE", 1 << 16)
    monkeypatch.setattr(downloads, "_CHUNK", 1 << 10)
    server.behavior = lambda h, n: h.answer(200, DATA, "")
    fails(server, tmp_path, "more than the limit")


def test_plain_http_is_refused_unless_allowed(server, tmp_path):
    with pytest.raises(dnnlib.UserError, match="only https"):
        dnnlib.open_url(f"{server.url}/a", tmp_path, verbose=False)
    assert server.asked == []
    with pytest.raises(dnnlib.UserError, match="not a URL"):
        dnnlib.open_url("good.pkl", tmp_path)


def test_folders_and_names_that_others_may_have_prepared(server, tmp_path):
    server.behavior = versioned()
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    fails(server, tmp_path / "open", "everybody may write")
    (tmp_path / "links").mkdir()
    (tmp_path / "target").write_text("mine")
    part = downloads._cache_path(f"{server.url}/a.pkl", tmp_path / "links", None)
    part.with_name(f".{part.name}.part").symlink_to(tmp_path / "target")
    with pytest.raises(dnnlib.UserError, match="failed"):
        fetch(server, tmp_path / "links")
    assert (tmp_path / "target").read_text() == "mine" and server.asked == []


def test_processes_that_download_the_same_file_at_once(server, tmp_path):
    meet, good = threading.Barrier(3, timeout=5), versioned()

    def behave(handler, number):
        if number < 3:
            meet.wait()
        good(handler, number)

    server.behavior = behave
    found = []
    threads = [threading.Thread(target=lambda: found.append(fetch(server, tmp_path))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [DATA] * 3 and len(os.listdir(tmp_path)) == 1
