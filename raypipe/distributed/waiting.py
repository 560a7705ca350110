"""How threads of Ray workers wait for each other.

At the end of a parallel region, threads of OpenMP spin until the last one arrives. If another
process uses a core, the spinning takes processor time from the thread that all wait for: training
steps then take several times as long (benchmarks/results/waiting-threads-cpu.txt). With few spins,
a thread sleeps instead.
"""

from __future__ import annotations

import os

SPINS = 1000
"""Rounds that a thread spins before it sleeps."""


def waiting_variables() -> dict[str, str]:
    """Return the environment variables that workers need before torch is imported.

    Empty if the environment already says how threads wait. libgomp, which torch and FAISS bring on
    Linux, reads them when it is loaded.
    """
    if {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
        return {}
    return {"GOMP_SPINCOUNT": str(SPINS)}
