"""Pseudo-labels for samples without labels: clusters of what a network that was trained without labels makes of the images.

    simclr    features from self-supervised training on the images themselves
    backbone  features of a torchvision network with weights that somebody has
    clusters  a linear rule that says which cluster a feature vector is in; k-means
    turtle    the same rule found by TURTLE
    labeller  images -> pseudo-labels: a network and such a rule

Arrays and tensors in, arrays and tensors out: no Ray, no storage.
"""
