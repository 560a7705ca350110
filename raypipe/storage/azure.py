"""Azure Blob Storage and Data Lake Storage with retries of every single request.

The account and its credentials come from adlfs's variables: `AZURE_STORAGE_CONNECTION_STRING`, or
`AZURE_STORAGE_ACCOUNT_NAME` with `AZURE_STORAGE_ACCOUNT_KEY`, `AZURE_STORAGE_SAS_TOKEN` or an
identity that `DefaultAzureCredential` finds.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from typing import Any

from adlfs import AzureBlobFileSystem
from azure.core import MatchConditions
from azure.core.exceptions import (
    HttpResponseError,
    ResourceModifiedError,
    ResourceNotFoundError,
)
from azure.core.pipeline import PipelineRequest
from azure.core.pipeline.policies import AsyncHTTPPolicy
from azure.storage.blob import LocationMode
from azure.storage.blob.aio import BlobServiceClient
from fsspec.asyn import sync, sync_wrapper

from raypipe.storage.faults import TRANSIENT_STATUS, Attempts

logging.getLogger("azure.identity").setLevel(logging.ERROR)  # it logs what it then raises
CONNECT_TIMEOUT, READ_TIMEOUT = 10, 60
"""Seconds without an answer after which a request fails."""
_RETRY_OPTIONS = ("hosts", "location_mode", "retry_to_secondary")
"""Options of requests that the SDK's own policy of retries takes."""


class _Retries(AsyncHTTPPolicy):
    """The retries of `raypipe.storage.faults` instead of those of the Azure SDK."""

    def __init__(self, once: bool) -> None:
        super().__init__()
        self._once = once

    async def send(self, request: PipelineRequest) -> Any:
        for name in _RETRY_OPTIONS:
            request.context.options.pop(name, None)
        if self._once:
            return await self._sent(request)
        body = request.http_request.body
        start = body.tell() if hasattr(body, "tell") else None
        attempts = Attempts(request.http_request.url.partition("?")[0])
        while True:
            try:
                response = await self._sent(request)
                status = response.http_response.status_code
                if status not in TRANSIENT_STATUS:
                    attempts.succeeded()
                    return response
                await response.http_response.load_body()
                error: Exception = HttpResponseError(response=response.http_response)
            except Exception as raised:
                error = raised
            pause = attempts.failed(error)
            if start is not None:
                body.seek(start)
            await asyncio.sleep(pause)

    async def _sent(self, request: PipelineRequest) -> Any:
        response = await self.next.send(request)
        response.http_response.location_mode = LocationMode.PRIMARY  # the SDK's clients read it
        return response


class RetryingAzure(AzureBlobFileSystem):
    """adlfs with the retries of `raypipe.storage.faults`.

    Parameters
    ----------
    once : bool
        Don't retry requests. For callers that check something before every attempt.
    """

    service_client: BlobServiceClient
    commits_on_close = True
    """A file that is open for writing appears when it is closed; `commit` does nothing."""

    def __init__(self, *args: Any, once: bool = False, **kwargs: Any) -> None:
        self._once = once
        super().__init__(*args, **kwargs)

    def do_connect(self) -> None:
        super().do_connect()
        made = self.service_client  # of adlfs, with the SDK's retries
        self.service_client = BlobServiceClient(
            made.url,
            credential=made.credential,
            retry_policy=_Retries(self._once),
            connection_timeout=CONNECT_TIMEOUT,
            read_timeout=READ_TIMEOUT,
        )

    def unchanged(self, detail: dict[str, Any]) -> dict[str, Any]:
        """Return the option of `pipe_file` that writes only over the object of an `info`."""
        return {"etag": detail["etag"], "match_condition": MatchConditions.IfNotModified}

    async def _pipe_file(self, path: str, value: bytes, **kwargs: Any) -> Any:
        try:
            return await super()._pipe_file(path, value, **kwargs)
        except ResourceModifiedError as error:
            raise FileExistsError(errno.EEXIST, "changed by another process", path) from error
        except ResourceNotFoundError as error:  # only the container can be missing
            container = self.split_path(path)[0]
            raise FileNotFoundError(f"the container {container} does not exist") from error

    pipe_file = sync_wrapper(_pipe_file)

    def list_page(
        self, bucket: str, prefix: str, delimiter: str, token: str, after: str, limit: int
    ) -> dict[str, Any]:
        """Return one page of blobs after a name, as S3 answers `ListObjectsV2`."""
        return sync(self.loop, self._list_page, bucket, prefix, delimiter, token, after, limit)

    async def _list_page(
        self, bucket: str, prefix: str, delimiter: str, token: str, after: str, limit: int
    ) -> dict[str, Any]:
        client = self.service_client.get_container_client(bucket)
        options: dict[str, Any] = {
            "results_per_page": limit,
            "name_starts_with": prefix or None,
            "include": ["metadata"],  # says which blobs are folders
        }
        if after:
            options["start_from"] = after
        if delimiter:
            listing = client.walk_blobs(delimiter=delimiter, **options)
        else:
            listing = client.list_blobs(**options)
        pages = listing.by_page(continuation_token=token or None)
        try:
            items = [item async for item in await anext(pages)]
        except StopAsyncIteration:
            items = []
        except ResourceNotFoundError as error:
            raise FileNotFoundError(f"the container {bucket} does not exist") from error
        blobs = [item for item in items if hasattr(item, "etag") and item.get("etag")]
        folders = [item for item in items if not item.get("etag")]
        return {
            "Contents": [
                {"Key": blob.name, "Size": blob.size, "ETag": blob.etag}
                for blob in blobs
                if blob.name != after and not _is_folder(blob)  # `start_from` includes it
            ],
            "CommonPrefixes": [{"Prefix": folder.name} for folder in folders],
            "NextContinuationToken": pages.continuation_token or "",
            "IsTruncated": bool(pages.continuation_token),
        }


def _is_folder(blob: Any) -> bool:
    """Return whether a blob stands for a folder of Data Lake Storage."""
    return (blob.metadata or {}).get("hdi_isfolder") == "true"
