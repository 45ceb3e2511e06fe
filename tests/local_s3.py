"""An S3 server of its own process on loopback (moto), and how a process is pointed at it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import boto3
import pytest
import s3fs
from fault_proxy import fault_proxy
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


@contextmanager
def s3_bucket() -> Iterator[str]:
    """Yield a bucket of such a server; the environment points at it for as long as the block."""
    with local_s3() as variables, pytest.MonkeyPatch.context() as patch:
        for key, value in variables.items():
            patch.setenv(key, value)
        forget_endpoint()
        boto3.client("s3").create_bucket(Bucket="lakes")
        try:
            yield "s3://lakes"
        finally:
            patch.undo()
            forget_endpoint()


@contextmanager
def failing(kind: str, only: str, most: int = 10**9) -> Iterator[str]:
    """Let (at most so many) requests in whose ``METHOD /path?query`` a pattern is found fail while the block lasts.

    Yields the address of what stands between (``tests/fault_proxy.py``).
    """
    with (
        fault_proxy(os.environ["AWS_ENDPOINT_URL"], 1.0, kinds=(kind,), only=only, most=most) as proxy,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("AWS_ENDPOINT_URL", proxy)
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        forget_endpoint()
        try:
            yield proxy
        finally:
            patch.undo()
            forget_endpoint()
