"""The gate: refuse keep-lists where the fidelity is too low."""

from __future__ import annotations

from raypipe.config import TrustSettings
from raypipe.errors import TrustError
from raypipe.runs.ledger import StageRecord


def check_trust(extrapolated: StageRecord, trust: TrustSettings, force: bool) -> dict[str, str]:
    """The fidelity that a keep-list rests on, as it is written into the list, and whether it was forced.

    Raises TrustError when the lower end of its interval is below `trust.min_spearman`, or when it is not known, unless
    every sample was measured, or `force`. With a threshold of -1 every fidelity will do, an unknown one as well.
    """
    fidelity = extrapolated.detail.get("fidelity") or {}
    spearman, bounds = fidelity.get("spearman"), fidelity.get("spearman_interval")
    least = bounds[0] if bounds else spearman
    predicted = extrapolated.samples > extrapolated.detail.get("measured", 0)
    enough = (
        not predicted
        or trust.min_spearman == -1
        or (least is not None and least >= trust.min_spearman)
    )
    if not enough and not force:
        if least is None:
            found = f"the fidelity of the predicted scores is not known ({fidelity.get('note') or 'it was not judged'})"
        else:
            between = f" (95 % interval {bounds[0]:.2f} to {bounds[1]:.2f})" if bounds else ""
            found = (
                f"predicted and measured scores have a Spearman correlation of {spearman:.2f}{between}, and its lower end "
                f"is below trust.min_spearman ({trust.min_spearman:g})"
            )
        added = ((extrapolated.detail.get("learning_curve") or {}).get("doubled") or {}).get("gain")
        tables = extrapolated.detail.get("tables")
        promise = (
            f"twice as {'many' if tables else 'large'} is predicted to add {added:.2f}"
            if added is not None
            else ""
        )
        if tables:
            help_ = f"more scored samples{promise and f' ({promise})'} or other embeddings; --force of `raypipe select`"
        else:
            help_ = (
                f"a larger seed set (seed.fraction{promise and f'; {promise}'}), more epochs of the proxy "
                "(proxy.epochs) or another score (measure.scores); --force of `raypipe select`, or select.force,"
            )
        raise TrustError(
            f"no keep-lists: {found}. What can help is {help_} makes them all the same"
        )
    figures = {"spearman": spearman, "spearman_low": bounds[0] if bounds else None}
    return {
        **{
            name: f"{value:.4f}" if value is not None else "unknown"
            for name, value in figures.items()
        },
        "forced": "false" if enough else "true",
    }
