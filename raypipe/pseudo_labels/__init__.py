"""Pseudo-labels for unlabelled samples: clusters of features that were learnt without labels.

- `simclr`: features from self-supervised training on the images themselves
- `backbone`: features of a torchvision network with existing weights
- `clusters`: a linear rule that assigns a feature vector to a cluster, and k-means, which finds one
- `turtle`: the same kind of rule, found by TURTLE
- `labeller`: maps images to pseudo-labels, with a network and such a rule

Arrays and tensors in, arrays and tensors out: no Ray, no storage.
"""
