"""Import a folder with FiftyOne, and print what it read: python fiftyone_reader.py FOLDER.

FiftyOne needs MongoDB. An in-memory stand-in, mongomock, takes its place.
"""

from __future__ import annotations

import json
import os
import sys

os.environ["FIFTYONE_DATABASE_URI"] = "mongodb://localhost"
os.environ["FIFTYONE_DATABASE_VALIDATION"] = "false"
os.environ["FIFTYONE_DO_NOT_TRACK"] = "true"

import mongoengine.connection
import mongomock
import mongomock.codec_options
import pymongo
from mongomock.store import ServerStore

STORE = ServerStore()


class Client(mongomock.MongoClient):  # type: ignore[misc]
    """All clients see the same data."""

    _closed, _topology = False, None

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__(_store=STORE)


mongomock.codec_options.is_supported = lambda _: mongomock.codec_options.CodecOptions()
pymongo.MongoClient = mongoengine.connection.MongoClient = Client  # type: ignore[misc]

import fiftyone  # noqa: E402

data = fiftyone.Dataset.from_dir(sys.argv[1], dataset_type=fiftyone.types.FiftyOneDataset)
fields = ("sample_id", "filepath", "score", "lower", "upper", "kept", "label_error_rank")
read = {name: data.values(name) for name in fields}
read |= {name: data.values(f"{name}.label") for name in ("ground_truth", "prediction")}
read["kept samples"] = data.match(fiftyone.ViewField("kept")).count()
read["classes"] = data.default_classes
print("READ" + json.dumps(read))
