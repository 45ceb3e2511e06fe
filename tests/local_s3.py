"""An S3 server of its own process on loopback (moto), and how a process is pointed at it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import s3fs
from local_server import local_server

from store import context


@contextmanager
def local_s3() -> Iterator[dict[str, str]]:
    """Run it for as long as the block; yields the variables that point at it, ``AWS_ENDPOINT_URL`` among them."""
    with local_server(lambda port: [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", port]) as url:
        yield {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
        }


def forget_endpoint() -> None:
    """Let the settings of S3 be taken from the environment again."""
    context.tiledb_config.cache_clear()
    context.tiledb_context.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()
