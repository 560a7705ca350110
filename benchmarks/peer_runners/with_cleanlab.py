"""Selection with cleanlab: the samples of lowest quality, where a high score is a low quality."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from cleanlab.rank import find_top_issues


def top(arrays: dict[str, np.ndarray]) -> Callable[[], np.ndarray]:
    quality = -arrays["score"]
    count = round(float(arrays["keep"]) * len(quality))
    return lambda: find_top_issues(quality, top=count)
