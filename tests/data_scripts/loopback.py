"""A loopback server whose faults a test can choose."""

import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class File:
    """What the server holds under one path, and how it misbehaves.

    Args:
        data: the bytes.
        etag: the version it claims.
        ranges: whether it honors Range.
        honors_if_range: whether it compares the version before it resumes.
        statuses: error codes for the first requests, one each.
        cuts: bytes after which the connection of the first successful requests is closed, one each.
        stalls: how many of the first requests get a header and then nothing.
        asked: filled with the Range header of every request (None without).
    """

    data: bytes
    etag: str = '"1"'
    ranges: bool = True
    honors_if_range: bool = True
    statuses: list[int] = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)
    stalls: int = 0
    asked: list[str | None] = field(default_factory=list)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, File] = {}
        self.closing = threading.Event()

    def put(self, path: str, file: File) -> str:
        self.files[path] = file
        return f"http://127.0.0.1:{self.server_address[1]}{path}"

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that hangs up is part of the tests


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self.close_connection = True
        file = self.server.files.get(self.path)
        if file is None:
            return self.send_error(404)
        asked = self.headers.get("Range")
        file.asked.append(asked)
        if file.statuses:
            return self.send_error(file.statuses.pop(0))
        begin = 0
        if asked and file.ranges:
            wanted = self.headers.get("If-Range")
            if wanted in (None, file.etag) or not file.honors_if_range:
                begin = int(asked.removeprefix("bytes=").rstrip("-"))
        if begin >= len(file.data):
            return self.send_error(416)
        body = file.data[begin:]
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(file.data) - 1}/{len(file.data)}")
        self.send_header("ETag", file.etag)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if file.stalls:
            file.stalls -= 1
            self.server.closing.wait(5)
            return None
        self.wfile.write(body[: file.cuts.pop(0)] if file.cuts else body)
        return None
