"""A real S3 server (moto) on a free loopback port, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request

import boto3

BUCKET = "runs"
_SERVE = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


class S3Server:
    """`settings` is the environment that leads AWS tools to it; closing is killing."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        port = int(self._process.stdout.readline())
        self.settings = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
        }
        self.client = boto3.client(
            "s3",
            endpoint_url=self.settings["AWS_ENDPOINT_URL"],
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )
        self._wait()
        self.client.create_bucket(Bucket=BUCKET)

    def environment(self) -> dict[str, str]:
        """This process's environment, for a child that shall use the server."""
        return {key: value for key, value in os.environ.items() if not key.startswith("AWS_")} | self.settings

    def keys(self, prefix: str = "") -> list[str]:
        found = self.client.list_objects_v2(Bucket=BUCKET, Prefix=prefix)
        return [entry["Key"] for entry in found.get("Contents", ())]

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _wait(self) -> None:
        ends = time.monotonic() + 30
        while True:
            try:
                urllib.request.urlopen(self.settings["AWS_ENDPOINT_URL"] + "/moto-api/data.json", timeout=1).close()
                return
            except OSError:
                assert time.monotonic() < ends, "the S3 server did not start"
                time.sleep(0.1)
