"""Commands that start without importing pandas."""

from __future__ import annotations

import sys
from typing import Any


def pyarrow_without_pandas() -> None:
    """Let pyarrow do without pandas in this process, which holds no DataFrame.

    pyarrow imports pandas with the first value that it converts, a quarter of the time of `select`.
    Everything else can import pandas as usual.
    """
    if "pandas" in sys.modules:
        return
    import numpy as np
    import pyarrow as pa

    sys.meta_path.insert(0, _NoPandas)
    pa.scalar(0)  # the import in C++
    pa.array(np.zeros(0))  # and the one in Python
    sys.meta_path.remove(_NoPandas)


class _NoPandas:
    """An importer that has no pandas, and leaves all other modules to the next one."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(name=name)
