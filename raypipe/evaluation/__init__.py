"""Does it help? Fresh models trained on keep-lists, on random lists of the same size and on everything, compared on a test set.

fitting    one training and its test: arrays in, figures out. No Ray, no storage
figures    intervals over seeds, differences to random, break-even, sentences. No Ray, no storage
lists      what is trained on: rows of the scored samples, cut as keep-lists are
pixels     images decoded once, and the copy of them on each node
trainings  which trainings there are, what determines each, and the file that holds its result
running    the driver: trainings as Ray tasks, side by side as the cluster has room
"""
