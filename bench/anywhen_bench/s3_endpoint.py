"""The S3 endpoint of the tests, as a store that answers on loopback."""

import json
import subprocess
import sys
import urllib.request

from .programs import account

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "stories", "AWS_SECRET_ACCESS_KEY": "stories-secret", "AWS_REGION": "us-east-1",
               "AWS_ALLOW_HTTP": "true"}


def program(options):
    path = options.s3_endpoint or options.anywhen.parent / "examples" / "s3_endpoint"
    if not path.is_file():
        sys.exit(f"bench: no program at {path}\n  hint: cargo build --release --example s3_endpoint")
    return path.resolve()


class Endpoint:
    """One over the buckets that are folders of `folder`; each request waits up to `slow_ms`."""

    def __init__(self, options, folder, slow_ms=0):
        slow = ["--slow", str(slow_ms)] if slow_ms else []
        self.process = subprocess.Popen([program(options), *slow, folder], stdout=subprocess.PIPE, text=True,
                                        **account())
        self.address = self.process.stdout.readline().strip()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def environment(self):
        """What Anywhen finds it by."""
        return {**CREDENTIALS, "AWS_ENDPOINT": self.address}

    def counts(self):
        with urllib.request.urlopen(f"{self.address}/-/faults") as answer:
            return json.load(answer)

    def requests(self):
        return self.counts()["requests"]
