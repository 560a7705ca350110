"""Shares of the seed set, the audit set and the rest that each keep-list holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from raypipe.assessment.membership import LEVEL, set_shares
from raypipe.config import Config
from raypipe.report.formats import share
from raypipe.report.keep_lists import KeepListScan
from raypipe.report.schema import SetFigures, SetShares
from raypipe.runs.manifests import SeedManifest
from raypipe.runs.run import Run
from raypipe.sources.id_sampling import audit_rule, in_sample
from raypipe.sources.types import IdFilter
from raypipe.text import counted


def sample_sets(run: Run, config: Config) -> dict[str, IdFilter]:
    """Return the rules of the seed set and of the audit set; empty before they are drawn."""
    try:
        manifest = SeedManifest.read(run)
    except FileNotFoundError:
        return {}
    return {
        "seed": in_sample(config.seed.fraction, config.seed.seed),
        "audit": audit_rule(config.seed, manifest.audit_fraction),
    }


def set_share_figures(
    run: Run, samples: int, keep_lists: Sequence[KeepListScan]
) -> SetShares | None:
    """Return the shares of the sets in every list.

    Of a list with more than `MAX_LOOKED_UP` samples, only these were looked up, and their counts
    are scaled up. Returns None without a seed set, lists, or other samples.
    """
    try:
        manifest = SeedManifest.read(run)
    except FileNotFoundError:
        return None
    rest = samples - manifest.samples - manifest.audit_samples
    if rest <= 0 or not keep_lists:
        return None
    sizes = {"seed": manifest.samples, "audit": manifest.audit_samples, "rest": rest}
    looked_up = [item for item in keep_lists if item.looked_up]
    # so that in 99 % of runs chance leaves no count of any list outside its range (Bonferroni)
    level = 1 - (1 - LEVEL) / max(1, len(sizes) * len(looked_up))
    lists = {item.file: _of_list(sizes, item, level) for item in looked_up}
    sentence = uneven_sets(lists, run.config().proxy.cross_fits)
    return {"samples": sizes, "lists": lists, "sentence": sentence}


def _of_list(sizes: Mapping[str, int], item: KeepListScan, level: float) -> dict[str, SetFigures]:
    kept = {**item.in_sets, "rest": item.looked_up - sum(item.in_sets.values())}
    scale = item.samples / item.looked_up
    return {
        name: {
            "share": scale * found.share,
            "low": scale * found.low / found.samples if found.samples else 0.0,
            "high": scale * found.high / found.samples if found.samples else 0.0,
            "within_chance": found.within_chance,
        }
        for name, found in set_shares(sizes, kept, level).items()
    }


def uneven_sets(lists: Mapping[str, Mapping[str, SetFigures]], cross_fits: bool) -> str:
    """Return which lists hold more of a set than chance allows; empty if none does."""
    uneven = [
        (file, sets)
        for file, sets in lists.items()
        if not all(figures["within_chance"] for figures in sets.values())
    ]
    if not uneven:
        return ""
    file, sets = max(
        uneven, key=lambda item: abs(item[1]["seed"]["share"] - item[1]["rest"]["share"])
    )
    seed, audit, rest = (share(sets[name]["share"], 0) for name in ("seed", "audit", "rest"))
    return (
        f"{len(uneven)} of {counted(len(lists), 'keep-list')} treat measured samples differently: "
        f"{file} holds {seed} of the seed set, {audit} of the audit set and {rest} of the rest, "
        "which chance does not explain."
        + ("" if cross_fits else " Set proxy.parts to 3 for cross-fitting.")
    )
