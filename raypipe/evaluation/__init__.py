"""Does a keep-list help? Compare models trained on keep-lists, on random lists and on everything.

- `figures`: intervals over seeds, differences to random, break-even. No Ray, no storage.
- `certificate`: a list chosen on one half of the test set and tested on the other. No Ray, no
  storage.
- `lists`: rows of the scored samples to train on, cut as keep-lists are.
- `epoch_samples`: trainings that take other samples in every epoch.
- `decoded`: images that are decoded once, and their copy on each node.
- `trainings`: every training, what determines it, and the file with its result.
- `summary`: what the trainings show together.
- `driver`: runs the trainings as Ray tasks, as many at a time as the cluster has room for.
"""
