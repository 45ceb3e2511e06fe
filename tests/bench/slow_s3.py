"""A read-only S3 server over a folder that answers after a while, to measure what latency costs.

usage: slow_s3.py FOLDER MILLISECONDS; prints its port. It knows what reading needs: HEAD and GET of objects, with
ranges, and lists. The first part of a path is the bucket.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from xml.sax.saxutils import escape

from aiohttp import web

STAMP = "2026-01-01T00:00:00.000Z"


def listing(folder: Path, bucket: str, prefix: str, delimiter: str) -> str:
    """Return the answer to ListObjectsV2, all on one page."""
    root = folder / bucket
    base = root / prefix.rpartition("/")[0]
    contents, prefixes = [], set()
    for where, _, names in os.walk(base):
        for name in names:
            key = str((Path(where) / name).relative_to(root))
            if not key.startswith(prefix):
                continue
            head, found, _ = key[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
            if found:
                prefixes.add(prefix + head + delimiter)
            else:
                size = (root / key).stat().st_size
                contents.append(
                    f"<Contents><Key>{escape(key)}</Key><LastModified>{STAMP}</LastModified><ETag>&quot;0&quot;</ETag>"
                    f"<Size>{size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
                )
    common = "".join(f"<CommonPrefixes><Prefix>{escape(one)}</Prefix></CommonPrefixes>" for one in sorted(prefixes))
    return (
        '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(contents) + len(prefixes)}</KeyCount>"
        f"<MaxKeys>1000000</MaxKeys><IsTruncated>false</IsTruncated>{''.join(contents)}{common}</ListBucketResult>"
    )


def application(folder: Path, seconds: float) -> web.Application:
    """Return the server."""

    async def answer(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(seconds)
        bucket, _, key = request.path.lstrip("/").partition("/")
        if not key:
            query = request.query
            return web.Response(
                text=listing(folder, bucket, query.get("prefix", ""), query.get("delimiter", "")),
                content_type="application/xml",
            )
        path = folder / bucket / key
        if not path.is_file():
            text = "<Error><Code>NoSuchKey</Code><Message>The specified key does not exist.</Message></Error>"
            return web.Response(status=404, text=text, content_type="application/xml")
        return web.FileResponse(path, chunk_size=2**20, headers={"ETag": '"0"'})

    made = web.Application()
    made.router.add_route("*", "/{tail:.*}", answer)
    return made


async def serve(folder: Path, seconds: float) -> None:
    """Serve until standard input ends."""
    runner = web.AppRunner(application(folder, seconds), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), float(sys.argv[2]) / 1000))
