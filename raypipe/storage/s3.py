"""S3 with every request retried by itself, those that others make through fsspec (Ray Train, pyarrow) and parts of uploads as well."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import fsspec.config
from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem

from raypipe.storage.faults import Attempts

CONNECT_TIMEOUT, READ_TIMEOUT = 10, 60
"""Seconds without an answer, after which a request is a failed one."""


def s3(once: bool = False) -> S3FileSystem:
    """A filesystem for s3://. `once`: its requests are not retried, for a caller that looks at something before every attempt.

    What the user has told fsspec (`FSSPEC_S3='{"config_kwargs": {"read_timeout": 20}}'`) goes before the time-outs here.
    """
    given = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    options = {"connect_timeout": CONNECT_TIMEOUT, "read_timeout": READ_TIMEOUT, **given}
    options["retries"] = {"total_max_attempts": 1, "mode": "standard"}
    # A listing must show what other machines wrote a moment ago, so fsspec's own cache of listings is off.
    return Retrying(
        once=once, config_kwargs=options, use_listings_cache=False, skip_instance_cache=True
    )


class Retrying(S3FileSystem):
    """s3fs whose requests are retried by `raypipe.storage.faults` and by nobody else."""

    retries = 1  # of s3fs itself

    def __init__(self, *args: Any, once: bool = False, **kwargs: Any) -> None:
        self._once = once
        super().__init__(*args, **kwargs)

    async def _call_s3(self, method: str, *akwarglist: Any, **kwargs: Any) -> Any:
        if self._once:
            return await super()._call_s3(method, *akwarglist, **kwargs)
        attempts = Attempts(
            f"s3://{kwargs.get('Bucket', '')}/{kwargs.get('Key', kwargs.get('Prefix', ''))}"
        )
        again = False
        while True:
            try:
                result = await super()._call_s3(method, *akwarglist, **kwargs)
            except Exception as error:
                if (
                    again
                    and method == "complete_multipart_upload"
                    and isinstance(error, FileNotFoundError)
                ):
                    return await self._completed(kwargs, error)
                pause = attempts.failed(error)
            else:
                attempts.succeeded()
                return result
            again = True
            await asyncio.sleep(pause)

    call_s3 = sync_wrapper(_call_s3)

    async def _completed(self, asked: dict[str, Any], error: Exception) -> dict[str, Any]:
        """The object that a completion made whose answer was lost: the upload is gone, and the object has the ETag of its parts."""
        parts = asked["MultipartUpload"]["Parts"]
        try:
            digests = b"".join(bytes.fromhex(part["ETag"].strip('"')) for part in parts)
        except ValueError:  # of an encryption whose ETags are no hashes
            raise error from None
        found = await self._call_s3("head_object", Bucket=asked["Bucket"], Key=asked["Key"])
        if found["ETag"].strip('"') != f"{hashlib.md5(digests).hexdigest()}-{len(parts)}":
            raise error
        return found
