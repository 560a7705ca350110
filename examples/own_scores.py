"""Predict a score of your own for a whole dataset from the scores of some samples.

It needs no images, only numpy arrays: an embedding of every sample and the scores of a few.
Run it with `python examples/own_scores.py`.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict

import raypipe

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", default="runs/own-scores", help="folder for the results")
parser.add_argument("--samples", type=int, default=1797, help="use only the first N")
options = parser.parse_args()

# Stand-ins for your data. The embedding of a sample is any vector in which similar samples are
# close. Here it is the pixels; yours may come from the last layer of a network.
digits = load_digits()
embeddings = digits.data[: options.samples].astype(np.float32)  # [n, 64]
labels = digits.target[: options.samples]
ids = [f"digit-{row}" for row in range(len(labels))]

# Score a quarter of the samples, drawn at random: the error intervals hold for samples like these.
# This score is high for a digit that a classifier trained on others does not recognise. Any score
# will do if higher means: keep.
scored = np.random.default_rng(0).permutation(len(labels))[: len(labels) // 4]
x, y = embeddings[scored] / 16, labels[scored]
probability = cross_val_predict(LogisticRegression(), x, y, cv=5, method="predict_proba")
scores = 1 - probability[np.arange(len(scored)), y]

# raypipe reads both as Parquet. The column `label` is optional.
folder = Path(options.out)
folder.mkdir(parents=True, exist_ok=True)
all_embeddings, some_scores = f"{folder}/embeddings.parquet", f"{folder}/scores.parquet"
columns: dict[str, Any] = {"sample_id": ids, "embedding": list(embeddings), "label": labels}
pq.write_table(pa.table(columns), all_embeddings)
columns = {"sample_id": [ids[row] for row in scored], "score": scores}
pq.write_table(pa.table(columns), some_scores)

result = raypipe.extrapolate(all_embeddings, some_scores, f"{folder}/run", method="knn")

# How well does the prediction rank samples whose score it was not given?
fidelity = result.summary["fidelity"]
low, high = fidelity["spearman_interval"]
print(f"fidelity {fidelity['spearman']:.2f} ({low:.2f} to {high:.2f})")
for name, baseline in fidelity["baselines"].items():
    print(f"  baseline {name}: {baseline['spearman']:.2f}")

# `scores/` has a row for every sample, with an interval around each predicted score.
first = raypipe.load_scores(result.uri).slice(0, 1).to_pylist()[0]
print(first)

raypipe.select(result.uri, keep=0.5)
keep = raypipe.KeepList(result.uri, keep=0.5)
print(f"kept {len(keep)} of {len(ids)}, such as {keep.ids[:3]}")
