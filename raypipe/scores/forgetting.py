"""Forgetting: how often a sample that was classified correctly is wrong in the next epoch.

Source: Toneva et al., "An Empirical Study of Example Forgetting during Deep Neural Network Learning", ICLR 2019 (arXiv 1812.05159):

    F(x) = number of epochs t with correct_t = 1 and correct_{t+1} = 0

Higher means keep. A sample that was never correct counts as forgotten at every step in the paper (infinitely often); several
codes (DeepCore, CCS) give it 0 and so rank it easiest. Here `never_learned: hardest` (the paper, default) gives it one more than
the most forgotten sample could have, `easiest` gives it 0.
"""

from __future__ import annotations

import numpy as np

from raypipe.scores.trajectory import Trajectory, need_epochs


def score(trajectory: Trajectory, never_learned: str = "hardest") -> np.ndarray:
    """Forgetting events, float32 [samples]. Raises ScoreError for fewer than 2 epochs.

    never_learned  hardest or easiest: where samples go that were never correct
    """
    need_epochs("forgetting", trajectory.epochs, 2, "it counts changes")
    correct = trajectory.margin > 0
    events = np.count_nonzero(correct[:-1] & ~correct[1:], 0).astype(np.float32)
    if never_learned == "hardest":
        events[~correct.any(0)] = trajectory.epochs // 2 + 1
    return events
