"""How far predicted scores can be trusted: fidelity, intervals, learning curve, drift."""
