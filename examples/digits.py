"""Score the handwritten digits that ship with scikit-learn, and work with the scores.

Run it with `python examples/digits.py`; it needs no download.
"""

import argparse

import pyarrow.compute as pc

import raypipe

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--run", default="runs/digits-example", help="folder for the results")
parser.add_argument("--samples", type=int, default=1797, help="use the first N images")
parser.add_argument("--epochs", type=int, default=20, help="epochs of the proxy networks")
options = parser.parse_args()

# One call does the whole job: it trains three small proxy networks on 30 % of the images, scores
# every image by those that were not trained on it, and writes keep-lists and a report.
# Call it again and it resumes. `raypipe init` lists the settings that are not named here.
result = raypipe.run(
    {
        "run": options.run,
        "source": {"uri": "digits://", "limit": options.samples},
        "seed": {"fraction": 0.3},
        # A mirrored digit is not a digit, so augmentation must not flip.
        "proxy": {
            "model": "small",
            "image_size": 16,
            "epochs": options.epochs,
            "batch_size": 32,
            "flip": False,
        },
    }
)

# Can the scores be trusted? Stability is the rank correlation to expect with the scores of another
# training. If it were too low, `run` would raise a TrustError instead.
stability = result.summary["stability"]
low, high = stability["interval"]
print(f"stability {stability['value']:.2f} ({low:.2f} to {high:.2f})")

# Another keep-list takes seconds, because nothing is scored again.
for file, kept in raypipe.select(result.uri, keep=0.6, strategy="balanced").items():
    print(f"{file}: {kept} of {options.samples} images")

# The scores are a pyarrow.Table with one row for each image. Higher means: keep.
scores = raypipe.load_scores(result.uri)
ids = scores["sample_id"].take(pc.sort_indices(scores["score"], sort_keys=[("", "descending")]))
print("highest", *ids[:5].to_pylist())
print("lowest ", *ids[-5:].to_pylist()[::-1])
print("report ", f"{options.run}/report/index.html")
