#!/usr/bin/env bash
# mlcroissant 1.1.1: a field of type sc:Text comes as bytes from a file, and as str from inline data.
#
# Expected: records() gives the same Python type for the same data type, sc:Text, wherever the values are stored.
# Seen: values of a Parquet file that are str in pandas come back as bytes. Values in the `data` of a record set come
# back as str. A join of the two in Python, such as names[record["samples/name"]], finds nothing and reports nothing.
# What to do: decode the values that are bytes.
#
# Needs Python 3.11 or newer and a package index. Exits 0 as long as this is the behaviour.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check mlcroissant==1.1.1 pyarrow==26.0.1 pandas==3.1.1
mkdir "$folder/data" && cd "$folder/data"  # a file set is searched with its subfolders
../venv/bin/python - <<'PYTHON' 2>/dev/null
import importlib.metadata
import json

import mlcroissant
import pandas

pandas.DataFrame({"name": ["cat", "dog"]}).to_parquet("names.parquet")
print("in pandas:", type(pandas.read_parquet("names.parquet")["name"][0]).__name__)

file_set = {
    "@type": "cr:FileSet", "@id": "files", "encodingFormat": "application/x-parquet", "includes": "*.parquet",
}
text = {"@type": "cr:Field", "dataType": "sc:Text"}
source = {"fileSet": {"@id": "files"}, "extract": {"column": "name"}}
metadata = {
    "@context": {
        "@language": "en", "@vocab": "https://schema.org/", "column": "cr:column", "conformsTo": "dct:conformsTo",
        "cr": "http://mlcommons.org/croissant/", "data": {"@id": "cr:data", "@type": "@json"},
        "dataType": {"@id": "cr:dataType", "@type": "@vocab"}, "dct": "http://purl.org/dc/terms/",
        "extract": "cr:extract", "field": "cr:field", "fileSet": "cr:fileSet", "includes": "cr:includes",
        "recordSet": "cr:recordSet", "sc": "https://schema.org/", "source": "cr:source",
    },
    "@type": "sc:Dataset",
    "name": "names",
    "conformsTo": "http://mlcommons.org/croissant/1.0",
    "distribution": [file_set],
    "recordSet": [
        {"@type": "cr:RecordSet", "@id": "stored", "field": [{**text, "@id": "stored/name", "source": source}]},
        {
            "@type": "cr:RecordSet", "@id": "inline", "field": [{**text, "@id": "inline/name"}],
            "data": [{"inline/name": "cat"}, {"inline/name": "dog"}],
        },
    ],
}
with open("croissant.json", "w") as file:
    json.dump(metadata, file)
dataset = mlcroissant.Dataset("croissant.json")
stored = [record["stored/name"] for record in dataset.records("stored")]
inline = [record["inline/name"] for record in dataset.records("inline")]
print("mlcroissant", importlib.metadata.version("mlcroissant"))
print("from Parquet:", stored)
print("inline:      ", inline)
assert stored == [b"cat", b"dog"] and inline == ["cat", "dog"], "the behaviour has changed"
PYTHON
