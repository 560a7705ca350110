"""Train a PyTorch network on the kept part of a dataset, and compare it with a random part.

Run it with `python examples/train_with_keep_list.py`; it uses the digits of scikit-learn.
"""

import argparse

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import raypipe

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--run", default="runs/train-example", help="folder for the results")
parser.add_argument("--samples", type=int, default=1297, help="train on the first N")
parser.add_argument("--keep", type=float, default=0.3, help="share of these to keep")
parser.add_argument("--strategy", default="ccs", help="how to choose them; see `raypipe select`")
parser.add_argument("--seeds", type=int, default=5, help="trainings of each list")
parser.add_argument("--epochs", type=int, default=20, help="epochs of proxy and network")
options = parser.parse_args()

# Score the training images. The 500 test images are not scored: `limit` stops before them.
result = raypipe.run(
    {
        "run": options.run,
        "source": {"uri": "digits://", "limit": options.samples},
        "seed": {"fraction": 0.3},
        "proxy": {
            "model": "small",
            "image_size": 16,
            "epochs": options.epochs,
            "batch_size": 32,
            "flip": False,
        },
        # The default, `auto`, draws at random without evidence that a strategy helps. There would
        # then be nothing to compare.
        "select": {"keep": [options.keep], "strategy": options.strategy},
    }
)

# The dataset as your training code has it, in the order of the source.
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(digits.target)
train = TensorDataset(images[: options.samples], labels[: options.samples])
test_images, test_labels = images[options.samples :], labels[options.samples :]

# This is the only line that training with a keep-list adds. The subset is an ordinary Dataset.
# docs/guides/training.md lists the datasets that raypipe recognises; for others, pass `ids=`.
kept = raypipe.KeepList(result.uri, keep=options.keep).subset(train)


def accuracy(dataset: Dataset, seed: int) -> float:
    """Return the test accuracy, in percent, of a network trained on a dataset."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)),
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(options.epochs):
        for batch, target in DataLoader(dataset, batch_size=32, shuffle=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(batch), target).backward()
            optimizer.step()
    with torch.no_grad():
        return 100 * float((network(test_images).argmax(1) == test_labels).float().mean())


# A keep-list is worth something if it beats a random list of the same size. One training says
# little, so compare over several seeds. Every seed draws its own random list.
accuracies = np.empty((options.seeds, 2))
for seed in range(options.seeds):
    random = np.random.default_rng(seed).permutation(len(train))[: len(kept)]
    accuracies[seed] = accuracy(kept, seed), accuracy(Subset(train, random.tolist()), seed)
    print("seed {}: keep-list {:.1f} %, random {:.1f} %".format(seed, *accuracies[seed]))

gain = accuracies[:, 0] - accuracies[:, 1]
error = gain.std(ddof=1) / len(gain) ** 0.5
print(f"{len(kept)} of {len(train)} images, tested on {len(test_labels)}")
print("mean: keep-list {:.1f} %, random {:.1f} %".format(*accuracies.mean(0)))
print(f"difference {gain.mean():+.1f} points, standard error {error:.1f}")
