"""Google Cloud Storage with retries of every single request.

Credentials come from Google's usual places (`GOOGLE_APPLICATION_CREDENTIALS`, `gcloud auth
application-default login`, the metadata server of a machine or a Kubernetes workload).
"""

from __future__ import annotations

import asyncio
import json
import secrets
from typing import Any

import aiohttp
from fsspec.asyn import sync_wrapper
from gcsfs.core import GCSFileSystem, quote

from raypipe.storage.faults import Attempts

CONNECT_TIMEOUT, READ_TIMEOUT = 10, 60
"""Seconds without an answer after which a request fails."""
_BOUNDARY = f"raypipe-{secrets.token_hex(16)}"  # cannot be foreseen, so no content has it


class RetryingGCS(GCSFileSystem):
    """gcsfs with the retries of `raypipe.storage.faults` instead of its own.

    Parameters
    ----------
    once : bool
        Don't retry requests. For callers that check something before every attempt.
    """

    def __init__(self, *args: Any, once: bool = False, **kwargs: Any) -> None:
        self._once = once
        kwargs.setdefault(
            "requests_timeout",
            aiohttp.ClientTimeout(sock_connect=CONNECT_TIMEOUT, sock_read=READ_TIMEOUT),
        )
        super().__init__(*args, **kwargs)

    async def _request(self, method: str, path: str, *args: Any, **kwargs: Any) -> Any:
        request = GCSFileSystem._request.__wrapped__  # without the retries of gcsfs
        if self._once:
            return await request(self, method, path, *args, **kwargs)
        attempts = Attempts(self._format_path(path, args))
        while True:
            try:
                result = await request(self, method, path, *args, **kwargs)
            except Exception as error:
                pause = attempts.failed(error)
            else:
                attempts.succeeded()
                return result
            await asyncio.sleep(pause)

    def unchanged(self, detail: dict[str, Any]) -> dict[str, Any]:
        """Return the option of `pipe_file` that writes only over the object of an `info`."""
        return {"generation": str(detail["generation"])}

    async def _pipe_file(
        self, path: str, data: bytes, generation: str | None = None, **kwargs: Any
    ) -> Any:
        try:
            if generation is None:
                return await super()._pipe_file(path, data, **kwargs)
            bucket, key, _ = self.split_path(path)
            return await self._call(
                "POST",
                f"{self._location}/upload/storage/v1/b/{quote(bucket)}/o",
                uploadType="multipart",
                ifGenerationMatch=generation,
                headers={"Content-Type": f"multipart/related; boundary={_BOUNDARY}"},
                data=_multipart(key, data),
            )
        except FileNotFoundError as error:  # a name needs no folder: only the bucket can be missing
            bucket = self.split_path(path)[0]
            raise FileNotFoundError(f"the bucket {bucket} does not exist") from error

    pipe_file = sync_wrapper(_pipe_file)

    def list_page(
        self, bucket: str, prefix: str, delimiter: str, token: str, after: str, limit: int
    ) -> dict[str, Any]:
        """Return one page of keys after a key, as S3 answers `ListObjectsV2`."""
        arguments = {
            "prefix": prefix,
            "delimiter": delimiter,
            "pageToken": token,
            "startOffset": after,
        }
        given = {name: value for name, value in arguments.items() if value}
        _, answer = self.call("GET", "b/{}/o", bucket, maxResults=limit, **given)
        page = json.loads(answer)
        return {
            "Contents": [
                {"Key": item["name"], "Size": item["size"], "ETag": item["etag"]}
                for item in page.get("items", [])
                if item["name"] != after  # `startOffset` includes it
            ],
            "CommonPrefixes": [{"Prefix": folder} for folder in page.get("prefixes", [])],
            "NextContinuationToken": page.get("nextPageToken", ""),
            "IsTruncated": "nextPageToken" in page,
        }


def _multipart(key: str, data: bytes) -> bytes:
    """Return the body of an upload of a whole object: its name as JSON, and its content."""
    head = (
        f"--{_BOUNDARY}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n"
        f"{json.dumps({'name': key})}\r\n"
        f"--{_BOUNDARY}\r\nContent-Type: application/octet-stream\r\n\r\n"
    )
    return head.encode() + data + f"\r\n--{_BOUNDARY}--".encode()
