"""A web site on this machine, for the tests of what is downloaded."""

import contextlib
import http.server
import threading
import time


class Site:
    """What it has and how it answers; what it was asked for.

    url      its address, without a slash at the end
    pages    content by path, as {"/vit.pth": b"…"}; another path is a 404
    answers  how it answers its requests one after the other, the last way again and again: "whole"; "cut", it hangs
             up in the middle; "slow", after a while; "missing", a 404; "gzip", called a packed transfer if the client
             knows what to do with one
    asked    the paths
    """

    def __init__(self, url):
        self.url, self.pages, self.answers, self.asked = url, {}, ["whole"], []


@contextlib.contextmanager
def serve():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            answer = site.answers[min(len(site.asked), len(site.answers) - 1)]
            site.asked.append(self.path)
            if answer == "missing" or self.path not in site.pages:
                return self.send_error(404)
            if answer == "slow":
                time.sleep(0.3)
            content = site.pages[self.path]
            self.send_response(200)
            if answer == "gzip" and "gzip" in self.headers.get("Accept-Encoding", ""):
                self.send_header("Content-Encoding", "gzip")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if answer == "cut" else content)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site = Site(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
