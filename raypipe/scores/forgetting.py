"""Forgetting: how often a correctly classified sample is misclassified in the next epoch.

    F(x) = number of epochs t with correct_t = 1 and correct_{t+1} = 0

Higher means keep. In the paper, a sample that was never classified correctly counts as forgotten
infinitely often. Several codes (DeepCore, CCS) give it 0 and so rank it easiest. Here
`never_learned: hardest` (the paper, default) gives it one more than the most forgotten sample could
have; `easiest` gives it 0.

References
----------
Toneva et al., "An Empirical Study of Example Forgetting during Deep Neural Network Learning", ICLR
2019 (arXiv 1812.05159).
"""

from __future__ import annotations

import numpy as np

from raypipe.scores.trajectory import Trajectory, require_epochs


def score(trajectory: Trajectory, never_learned: str = "hardest") -> np.ndarray:
    """Return the number of forgetting events, float32 [samples].

    Parameters
    ----------
    trajectory : Trajectory
        Predictions of the proxy.
    never_learned : {"hardest", "easiest"}
        Where samples rank that were never classified correctly.

    Raises
    ------
    ScoreError
        If there are fewer than 2 epochs.
    """
    require_epochs("forgetting", trajectory.epochs, 2, "it counts changes")
    correct = trajectory.margin > 0
    events = np.count_nonzero(correct[:-1] & ~correct[1:], 0).astype(np.float32)
    if never_learned == "hardest":
        events[~correct.any(0)] = trajectory.epochs // 2 + 1
    return events
