"""A small Google Cloud Storage: the part of its API that gcsfs and ArrayRecord use."""

import contextlib
import json
import re
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

_OBJECT = re.compile(r"(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)")
_COPY = re.compile(r"/storage/v1/b/([^/]+)/o/([^/]+)/(?:rewriteTo|copyTo)/b/([^/]+)/o/([^/]+)")


class Store(ThreadingHTTPServer):
    """The objects by bucket and name; requests with one of the words in `denied` get a 403."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[tuple[str, str], bytes] = {}
        self.sessions: dict[str, tuple[str, str, bytearray]] = {}
        self.denied: tuple[str, ...] = ()

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.server_port}"


@contextlib.contextmanager
def serving():
    """A store that answers while the block runs."""
    with Store() as store:
        thread = threading.Thread(target=store.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield store
        finally:
            store.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Store

    def log_message(self, *words):
        pass

    def do_GET(self):
        path, query = self._asked()
        if self._refused(path):
            return
        if found := _OBJECT.fullmatch(path):
            key = tuple(map(unquote, found.groups()))
            if key not in self.server.objects:
                self._error(404, "not found")
            elif query.get("alt") == "media":
                self._media(self.server.objects[key])
            else:
                self._json(self._resource(key))
        elif found := re.fullmatch(r"/storage/v1/b/([^/]+)/o", path):
            self._json(self._listing(found[1], query))
        elif found := re.fullmatch(r"/storage/v1/b/([^/]+)", path):
            self._json({"kind": "storage#bucket", "name": found[1], "id": found[1]})
        elif (key := tuple(unquote(path[1:]).split("/", 1))) in self.server.objects:
            self._media(self.server.objects[key])  # the older API, of XML
        else:
            self._error(404, "not found")

    def do_POST(self):
        path, query = self._asked()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self._refused(path):
            return
        if path.startswith("/batch/"):
            self._batch(body)
        elif found := _COPY.fullmatch(path):
            bucket, name, to, target = map(unquote, found.groups())
            self.server.objects[to, target] = self.server.objects[bucket, name]
            done = {"kind": "storage#rewriteResponse", "done": True}
            self._json(done | {"resource": self._resource((to, target))})
        elif found := re.fullmatch(r"(?:/resumable)?/upload/storage/v1/b/([^/]+)/o", path):
            kind, name = query["uploadType"], query.get("name")
            if kind == "multipart":
                described, content = _parts(self.headers["Content-Type"], body)
                self._put((found[1], json.loads(described)["name"]), content, query)
            elif kind == "media":
                self._put((found[1], name), body, query)
            else:
                name = name or json.loads(body)["name"]
                session = uuid.uuid4().hex
                self.server.sessions[session] = (found[1], name, bytearray())
                where = f"{self.server.endpoint}{path}?uploadType=resumable&upload_id={session}"
                self._send(200, b"", Location=where)
        else:
            self._error(404, "not found")

    def do_PUT(self):
        _, query = self._asked()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        bucket, name, content = self.server.sessions[query["upload_id"]]
        content += body
        if self.headers.get("Content-Range", "").endswith("/*"):
            self._send(308, b"", Range=f"bytes=0-{len(content) - 1}")
        else:
            self._put((bucket, name), bytes(content), query)

    def do_DELETE(self):
        path, _ = self._asked()
        if not self._refused(path):
            self._error(404, "not found") if self._delete_fails(path) else self._send(204, b"")

    def _delete_fails(self, path):
        key = tuple(map(unquote, _OBJECT.fullmatch(path).groups()))
        return self.server.objects.pop(key, None) is None

    def _batch(self, body):
        """Each part of the body is a request of its own; all of them remove an object."""
        boundary, answer = "batch_of_answers", []
        for number, path in enumerate(re.findall(rb"DELETE (\S+)", body), 1):
            code = 404 if self._delete_fails(urlsplit(path.decode()).path) else 204
            answer.append(
                f"--{boundary}\r\nContent-Type: application/http\r\n"
                f"Content-ID: <response-{number}>\r\n\r\nHTTP/1.1 {code} Done\r\n"
                "Content-Length: 0\r\n\r\n\r\n"
            )
        whole = "".join(answer) + f"--{boundary}--"
        kind = f"multipart/mixed; boundary={boundary}"
        self._send(200, whole.encode(), **{"Content-Type": kind})

    def _put(self, key, content, query):
        if query.get("ifGenerationMatch") == "0" and key in self.server.objects:
            self._error(412, "conditionNotMet")
            return
        self.server.objects[key] = content
        self._json(self._resource(key))

    def _listing(self, bucket, query):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], set()
        for key in sorted(self.server.objects):
            if key[0] != bucket or not key[1].startswith(prefix):
                continue
            rest = key[1][len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                items.append(self._resource(key))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}

    def _resource(self, key):
        stamp = "2026-01-01T00:00:00.000Z"
        size = str(len(self.server.objects[key]))
        fixed = {"kind": "storage#object", "generation": "1", "metageneration": "1"}
        named = {"bucket": key[0], "name": key[1], "size": size, "storageClass": "STANDARD"}
        return fixed | named | {"updated": stamp, "timeCreated": stamp, "etag": "1"}

    def _asked(self):
        parts = urlsplit(self.path)
        return parts.path, {name: values[0] for name, values in parse_qs(parts.query).items()}

    def _refused(self, path):
        refused = any(word in unquote(path) for word in self.server.denied)
        if refused:
            self._error(403, "the caller does not have storage.objects access")
        return refused

    def _media(self, content):
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            self._send(200, content)
            return
        size = len(content)
        first = int(asked[1]) if asked[1] else max(size - int(asked[2]), 0)
        last = min(int(asked[2]), size - 1) if asked[1] and asked[2] else size - 1
        if first >= size:
            self._error(416, "out of range")
            return
        where = f"bytes {first}-{last}/{size}"
        self._send(206, content[first : last + 1], **{"Content-Range": where})

    def _json(self, content):
        self._send(200, json.dumps(content).encode(), **{"Content-Type": "application/json"})

    def _error(self, code, message):
        content = json.dumps({"error": {"code": code, "message": message}}).encode()
        self._send(code, content, **{"Content-Type": "application/json"})

    def _send(self, code, content, **headers):
        self.send_response(code)
        for name, value in ({"x-goog-generation": "1"} | headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _parts(kind, body):
    """The two parts of a multipart upload: what describes the object, and its content."""
    boundary = b"--" + re.search('boundary="?([^";]+)', kind)[1].strip("'").encode()
    # The content may end with either byte of a line's end: only the one before the boundary goes.
    newline = b"\r\n" if body.startswith(boundary + b"\r\n") else b"\n"
    _, *parts, _ = (newline + body).split(newline + boundary, 3)
    described, content = (part.split(2 * newline, 1)[1] for part in parts)
    return described, content
