"""S3 with retries of every single request.

This includes the parts of uploads, and requests that Ray Train and pyarrow send through fsspec.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import fsspec.config
from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem

from raypipe.storage.faults import Attempts

CONNECT_TIMEOUT, READ_TIMEOUT = 10, 60
"""Seconds without an answer after which a request fails."""


def s3(once: bool = False) -> S3FileSystem:
    """Return a file system for s3://.

    The user's fsspec settings (`FSSPEC_S3='{"config_kwargs": {"read_timeout": 20}}'`) override the
    time-outs of this module.

    Parameters
    ----------
    once : bool
        Don't retry requests. For callers that check something before every attempt.
    """
    user_options = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    options = {"connect_timeout": CONNECT_TIMEOUT, "read_timeout": READ_TIMEOUT, **user_options}
    options["retries"] = {"total_max_attempts": 1, "mode": "standard"}
    # A listing must show what other machines have just written, so fsspec's listings cache is off.
    return RetryingS3(
        once=once, config_kwargs=options, use_listings_cache=False, skip_instance_cache=True
    )


class RetryingS3(S3FileSystem):
    """s3fs with the retries of `raypipe.storage.faults` instead of its own."""

    retries = 1  # the attempts of s3fs itself

    def __init__(self, *args: Any, once: bool = False, **kwargs: Any) -> None:
        self._once = once
        super().__init__(*args, **kwargs)

    async def _call_s3(self, method: str, *akwarglist: Any, **kwargs: Any) -> Any:
        if self._once:
            return await super()._call_s3(method, *akwarglist, **kwargs)
        attempts = Attempts(
            f"s3://{kwargs.get('Bucket', '')}/{kwargs.get('Key', kwargs.get('Prefix', ''))}"
        )
        is_retry = False
        while True:
            try:
                result = await super()._call_s3(method, *akwarglist, **kwargs)
            except Exception as error:
                if (
                    is_retry
                    and method == "complete_multipart_upload"
                    and isinstance(error, FileNotFoundError)
                ):
                    return await self._completed(kwargs, error)
                pause = attempts.failed(error)
            else:
                attempts.succeeded()
                return result
            is_retry = True
            await asyncio.sleep(pause)

    call_s3 = sync_wrapper(_call_s3)

    def unchanged(self, detail: dict[str, Any]) -> dict[str, Any]:
        """Return the option of `pipe_file` that writes only over the object of an `info`."""
        return {"IfMatch": detail["ETag"]} if "ETag" in detail else {}

    async def _completed(self, request: dict[str, Any], error: Exception) -> dict[str, Any]:
        """Return the object of a multipart upload whose completion succeeded but was not answered.

        The upload no longer exists then, and the object has the ETag of the uploaded parts. Raises
        `error` if it has another one.
        """
        parts = request["MultipartUpload"]["Parts"]
        try:
            digests = b"".join(bytes.fromhex(part["ETag"].strip('"')) for part in parts)
        except ValueError:  # with some encryptions, ETags are not hashes
            raise error from None
        head = await self._call_s3("head_object", Bucket=request["Bucket"], Key=request["Key"])
        if head["ETag"].strip('"') != f"{hashlib.md5(digests).hexdigest()}-{len(parts)}":
            raise error
        return head
