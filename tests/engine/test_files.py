"""What download.py promises: a file comes once, whole, and checked; what breaks off goes on where it stopped."""

import hashlib
import http.server
import multiprocessing
import threading

import pytest

from download import BROKEN, download

CONTENT = bytes(range(256)) * 8192  # 2 MiB
MD5, SHA256 = (f"{kind}:{hashlib.new(kind, CONTENT).hexdigest()}" for kind in ("md5", "sha256"))


class Site:
    """A server on this machine. cut: it hangs up after so many bytes; ranges: whether it knows of parts of files."""

    def __init__(self):
        self.content, self.cut, self.ranges, self.asked = CONTENT, None, True, []
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                first = int((self.headers.get("Range") or "bytes=0-")[6:-1]) if site.ranges else 0
                site.asked.append(first)
                if first >= len(site.content):
                    self.send_error(416)
                    return
                self.send_response(206 if first else 200)
                self.send_header("Content-Length", str(len(site.content) - first))
                self.end_headers()
                self.wfile.write(site.content[first : site.cut])

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/file.bin"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    site = Site()
    yield site
    site.server.shutdown()
    site.server.server_close()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "file.bin"


def left(path):
    """The files beside it, with their sizes."""
    return {file.name: file.stat().st_size for file in path.parent.iterdir()}


@pytest.mark.parametrize("checksum", [MD5, SHA256, SHA256[:15]])
def test_a_download_that_breaks_off_goes_on_where_it_stopped(checksum, site, path):
    """Twice here; the checksum says that the parts make the file."""
    for site.cut in (700_000, 1_500_000):
        with pytest.raises(BROKEN, match=f"only {site.cut} of {len(CONTENT)} bytes"):
            download(site.url, path, checksum)
        assert left(path) == {"file.bin.part": site.cut}
    site.cut = None
    assert download(site.url, path, checksum) == path
    assert site.asked == [0, 700_000, 1_500_000]
    assert path.read_bytes() == CONTENT
    assert left(path) == {"file.bin": len(CONTENT)}


def test_what_a_killed_process_left_whole_is_not_asked_for_again(site, path):
    path.parent.mkdir()
    path.with_name("file.bin.part").write_bytes(CONTENT)
    assert download(site.url, path, MD5).read_bytes() == CONTENT
    assert site.asked == []


def test_without_a_checksum_a_download_starts_again(site, path):
    """Nobody could tell halves of two files from a whole one."""
    path.parent.mkdir()
    path.with_name("file.bin.part").write_bytes(b"half of another file")
    site.cut = 700_000
    with pytest.raises(BROKEN):
        download(site.url, path)
    assert left(path) == {}
    site.cut = None
    assert download(site.url, path).read_bytes() == CONTENT
    assert site.asked == [0, 0]


def test_a_server_that_knows_no_parts_sends_the_whole_file_again(site, path):
    site.cut, site.ranges = 700_000, False
    with pytest.raises(BROKEN):
        download(site.url, path, MD5)
    site.cut = None
    assert download(site.url, path, MD5).read_bytes() == CONTENT


def test_a_part_of_another_file_is_noticed_and_not_kept(site, path):
    """At the end by its checksum, or by the server, when it is longer than the file: then the next try is a new one."""
    path.parent.mkdir()
    for part, error in ((bytes(700_000), ValueError), (bytes(len(CONTENT) + 1), BROKEN)):
        path.with_name("file.bin.part").write_bytes(part)
        with pytest.raises(error):
            download(site.url, path, MD5)
        assert left(path) == {}
    assert download(site.url, path, MD5).read_bytes() == CONTENT


def test_a_file_with_another_checksum_is_refused(site, path):
    """One bit is enough."""
    site.content = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
    with pytest.raises(ValueError, match=f"not {SHA256}; not kept"):
        download(site.url, path, SHA256)
    assert left(path) == {}


def test_a_file_of_the_wrong_kind_is_refused(site, path):
    def check(part):
        assert part.read_bytes() == CONTENT
        raise ValueError("a web page")

    with pytest.raises(ValueError, match="a web page"):
        download(site.url, path, check=check)
    assert left(path) == {}


def test_of_several_processes_one_downloads_and_the_others_wait(site, path):
    """As those that torchrun starts, which all want the data at the same moment."""
    context = multiprocessing.get_context("fork")
    everyone = [context.Process(target=download, args=(site.url, path, MD5)) for _ in range(4)]
    for process in everyone:
        process.start()
    for process in everyone:
        process.join(60)
    assert [process.exitcode for process in everyone] == [0, 0, 0, 0]
    assert site.asked == [0]
    assert left(path) == {"file.bin": len(CONTENT)}
