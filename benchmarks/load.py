"""Clients that cost next to nothing: what a round takes is then the server's. Run by `rounds.py`.

Reads a JSON job from standard input and writes one JSON line per finished round to standard output.
"""

import http.client
import json
import ssl
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

BLOCK = 2**20
BOUNDARY = "----fl-benchmark"


class LoadClient:
    """One participant: long-polls, downloads to nowhere, and uploads the same file every round."""

    def __init__(self, job: dict[str, object], token: str, number: int) -> None:
        self.url = urlsplit(str(job["url"]))
        self.headers = {"Authorization": f"Token {token}", "X-Forwarded-Proto": "https"}
        self.file = Path(str(job["file"]))
        self.number = number
        self.buffer = bytearray(BLOCK)
        self.connection = self._connect()
        self.known_at: dict[int, float] = {}  # round -> when this client heard of it
        self.done_at = 0.0

    def _connect(self) -> http.client.HTTPConnection:
        host, port = self.url.hostname or "", self.url.port
        if self.url.scheme == "https":
            context = ssl._create_unverified_context()  # noqa: S323 - loopback, own certificate
            return http.client.HTTPSConnection(
                host, port, timeout=300, context=context, blocksize=BLOCK
            )
        return http.client.HTTPConnection(host, port, timeout=300, blocksize=BLOCK)

    def get(self, path: str) -> http.client.HTTPResponse:
        headers = {**self.headers, "Accept": "application/vnd.safetensors, application/json"}
        self.connection.request("GET", path, headers=headers)
        return self.connection.getresponse()

    def run(self) -> None:
        while True:
            answer = json.loads(self.get("/api/tasks/?wait=25").read())
            if answer["state"] == "done":
                self.done_at = time.monotonic()
                return
            if answer["state"] != "task":
                time.sleep(0.01)
                continue
            task = answer["task"]
            self.known_at.setdefault(task["round"], time.monotonic())
            response = self.get(task["model"]["url"])
            while response.readinto(self.buffer):
                pass
            self.upload(task)

    def upload(self, task: dict[str, object]) -> None:
        fields = {"round": task["round"], "sample_size": 10 + self.number}
        head = "".join(
            f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n'
            for k, v in fields.items()
        )
        head += (
            f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="model_file"; filename="m"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        )
        tail = f"\r\n--{BOUNDARY}--\r\n"
        size = len(head) + self.file.stat().st_size + len(tail)
        connection = self.connection
        connection.putrequest("POST", str(task["upload_url"]))
        for name, value in self.headers.items():
            connection.putheader(name, value)
        connection.putheader("Content-Type", f"multipart/form-data; boundary={BOUNDARY}")
        connection.putheader("Content-Length", str(size))
        connection.endheaders(head.encode())
        with self.file.open("rb") as handle:
            connection.send(handle)
        connection.send(tail.encode())
        response = connection.getresponse()
        body = response.read()
        if response.status not in {200, 201, 409}:
            raise RuntimeError(f"{response.status}: {body[:500]!r}")


def main() -> None:
    job = json.loads(sys.stdin.readline())
    clients = [LoadClient(job, token, n) for n, token in enumerate(job["tokens"])]
    threads = [threading.Thread(target=client.run) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rounds = sorted(clients[0].known_at)
    starts = [max(client.known_at[r] for client in clients) for r in rounds]
    ends = [*starts[1:], max(client.done_at for client in clients)]
    print(json.dumps([end - start for start, end in zip(starts, ends, strict=True)]))


if __name__ == "__main__":
    main()
