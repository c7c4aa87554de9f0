"""HTTP server of a folder, with ranges and with faults on demand."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


@dataclass
class RangeServer:
    """A running server.

    `fault` is asked about each GET: (path, its count from 0) -> None, an HTTP status, "stall",
    "truncate" (fewer bytes than announced), "short" (fewer bytes than asked for), "hang up" or "no
    ranges".
    """

    url: str
    folder: Path
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, range
    fault: Callable[[str, int], int | str | None] = lambda path, count: None
    stall_s: float = 60.0
    stopped: threading.Event = field(default_factory=threading.Event)

    def gets(self) -> int:
        return sum(method == "GET" for method, *_ in self.requests)


@contextmanager
def serve(folder: Path) -> Iterator[RangeServer]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            with lock:
                count = server.gets()
                server.requests.append((self.command, self.path, self.headers.get("Range", "")))
            fault = server.fault(self.path, count) if body else None
            if fault == "stall":
                server.stopped.wait(server.stall_s)
                self.close_connection = True
                return
            if fault == "hang up":
                self.close_connection = True
                return
            path = server.folder / unquote(self.path).lstrip("/")
            if isinstance(fault, int) or not path.is_file():
                self.send_response(fault if isinstance(fault, int) else 404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            data = path.read_bytes()
            total, wanted = len(data), self.headers.get("Range")
            partial = wanted is not None and fault != "no ranges"
            first = 0
            if partial:
                low, high = wanted.removeprefix("bytes=").split("-")
                first, last = int(low), min(int(high or total - 1), total - 1)
                data = data[first : last + 1]
            if fault == "short":
                data = data[: len(data) // 2]
            self.send_response(206 if partial else 200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{path.stat().st_mtime_ns}-{total}"')
            if partial:
                self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{total}")
            self.end_headers()
            if body:
                self.wfile.write(data[: len(data) // 2] if fault == "truncate" else data)
            if fault == "truncate":
                self.close_connection = True

    lock = threading.Lock()
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    server = RangeServer(f"http://127.0.0.1:{httpd.server_port}", folder)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stopped.set()
        httpd.shutdown()
        httpd.server_close()
        thread.join()
