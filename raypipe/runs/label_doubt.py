"""How much the proxies contradict the label of each sample."""

from __future__ import annotations

import numpy as np


def label_doubt(label: np.ndarray, prediction: np.ndarray, margin: np.ndarray) -> np.ndarray:
    """Return by how much the predicted class beats the label, float [n].

    Parameters
    ----------
    label, prediction
        int [n]; -1 without one.
    margin
        float [n]: logit of the label minus the highest other logit.

    Returns
    -------
    np.ndarray
        Minus the margin; NaN where the label is the predicted class, or one of them is unknown.
    """
    contradicted = (label >= 0) & (prediction >= 0) & (label != prediction) & np.isfinite(margin)
    return np.where(contradicted, -margin, np.nan)
