import errno
import hashlib
import http.server
import threading

import pytest

from memspan.base.files import CorruptFile
from memspan.data import download
from memspan.data.download import DownloadFailed, Remote, fetch

CONTENT = bytes(range(256)) * 4096  # 1 MiB, four chunks
SHA256 = "sha256:" + hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT; what it does wrong is set by the test."""

    ranges = True
    cut_after: int | None = None  # bytes of a body after which the connection ends
    cuts = 0  # how many times still
    content = CONTENT

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/file.bin"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.asked.append(self.headers["Range"])
        if self.path != "/file.bin":
            self.send_error(404, "Not Found")
            return
        start = 0
        if self.headers["Range"] and server.ranges:
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            if start >= len(server.content):
                self.send_error(416)
                return
            self.send_response(206)
            last = len(server.content) - 1
            self.send_header("Content-Range", f"bytes {start}-{last}/{len(server.content)}")
        else:
            self.send_response(200)
        body = server.content[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.cut_after is not None and server.cuts > 0:
            server.cuts -= 1
            body = body[: server.cut_after]
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def remote(server, checksum=SHA256, url=None):
    return Remote(url or server.url, len(CONTENT), checksum)


def test_a_file_arrives_whole_and_is_not_fetched_twice(server, tmp_path):
    path = tmp_path / "deep" / "file.bin"
    assert fetch(remote(server), path).read_bytes() == CONTENT
    fetch(remote(server), path)
    assert len(server.asked) == 1
    assert [item.name for item in path.parent.iterdir()] == ["file.bin"]


def test_md5_is_accepted_as_a_published_checksum(server, tmp_path):
    md5 = "md5:" + hashlib.md5(CONTENT).hexdigest()
    assert fetch(remote(server, md5), tmp_path / "a", progress=False).read_bytes() == CONTENT


def test_a_connection_that_breaks_off_is_continued_from_where_it_broke(server, tmp_path):
    server.cut_after, server.cuts = 300_000, 2
    fetch(remote(server), tmp_path / "a", progress=False)
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert server.asked == [None, "bytes=300000-", "bytes=600000-"]


def test_a_download_that_never_ends_keeps_what_arrived_and_the_next_call_continues(server, tmp_path):
    server.cut_after, server.cuts = 1000, 100
    with pytest.raises(DownloadFailed, match="run the same command again"):
        fetch(remote(server), tmp_path / "a", progress=False)
    kept = (tmp_path / "a.part").stat().st_size
    assert kept > 0
    assert not (tmp_path / "a").exists()
    server.cuts, before = 0, len(server.asked)
    fetch(remote(server), tmp_path / "a", progress=False)
    assert server.asked[before:] == [f"bytes={kept}-"]
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_a_server_without_ranges_sends_the_whole_file_again(server, tmp_path):
    (tmp_path / "a.part").write_bytes(b"x" * 500)
    server.ranges = False
    fetch(remote(server), tmp_path / "a", progress=False)
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_a_wrong_checksum_is_refused_and_leaves_nothing(server, tmp_path):
    server.content = CONTENT[:-1] + b"!"
    with pytest.raises(CorruptFile, match="is published: refused and removed"):
        fetch(remote(server), tmp_path / "a", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_part_is_found_by_the_checksum(server, tmp_path):
    (tmp_path / "a.part").write_bytes(b"x" * 500)
    with pytest.raises(CorruptFile):
        fetch(remote(server), tmp_path / "a", progress=False)
    assert fetch(remote(server), tmp_path / "a", progress=False).read_bytes() == CONTENT


def test_a_part_that_is_complete_needs_no_request(server, tmp_path):
    (tmp_path / "a.part").write_bytes(CONTENT)
    fetch(remote(server), tmp_path / "a", progress=False)
    assert server.asked == []


def test_a_part_beyond_the_end_is_refused_by_the_checksum(server, tmp_path):
    (tmp_path / "a.part").write_bytes(CONTENT + b"more")
    with pytest.raises(CorruptFile):
        fetch(remote(server), tmp_path / "a", progress=False)


def test_a_file_in_place_that_was_altered_is_refused(server, tmp_path):
    (tmp_path / "a").write_bytes(b"other")
    with pytest.raises(CorruptFile, match="remove it and fetch it again"):
        fetch(remote(server), tmp_path / "a")
    assert server.asked == []


def test_a_missing_file_is_reported_at_once_with_its_address(server, tmp_path):
    url = server.url.replace("file.bin", "gone.bin")
    with pytest.raises(DownloadFailed, match=r"gone\.bin answered 404"):
        fetch(remote(server, url=url), tmp_path / "a", progress=False)
    assert len(server.asked) == 1


def test_a_server_that_is_not_there_is_reported(tmp_path):
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as closed:
        url = f"http://127.0.0.1:{closed.server_port}/file.bin"
    with pytest.raises(DownloadFailed, match="nothing is kept"):
        fetch(Remote(url, 1, SHA256), tmp_path / "a", progress=False)


def test_a_full_disk_raises_and_leaves_no_file_that_looks_whole(server, tmp_path, monkeypatch):
    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, chunk):
            if self.file.tell() >= 500_000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(chunk)

        def __enter__(self):
            return self

        def __exit__(self, *arguments):
            self.file.close()

    real = download._open
    monkeypatch.setattr(download, "_open", lambda path, mode: Full(real(path, mode)))
    with pytest.raises(OSError, match="No space left"):
        fetch(remote(server), tmp_path / "a", progress=False)
    assert not (tmp_path / "a").exists()
    monkeypatch.undo()
    assert fetch(remote(server), tmp_path / "a", progress=False).read_bytes() == CONTENT
    assert server.asked[-1] is not None


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://127.0.0.1/a"])
def test_only_http_addresses_are_followed(url, tmp_path):
    with pytest.raises(DownloadFailed, match="not an http address"):
        fetch(Remote(url, 1, SHA256), tmp_path / "a", progress=False)
