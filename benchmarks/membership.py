"""Whether keep-lists hold the same share of the seed set, the audit set and the rest, for every strategy and keep fractions 0.1 to 0.9.

    python benchmarks/membership.py RUN [RUN ...]

A run is a finished run folder, for example of `agreement.py`. The three shares of a list should agree within what chance allows: each count is
compared with the two-sided 99 % interval of the hypergeometric distribution. Prints the shares at 0.3, 0.5 and 0.7, and for each strategy how many
of the counts at the nine fractions lie outside. About one in a hundred does by chance.
"""

from __future__ import annotations

import argparse

import raypipe
from raypipe import storage
from raypipe.assessment.membership import set_shares
from raypipe.config.choices import STRATEGY_NAMES
from raypipe.runs.manifests import SeedManifest
from raypipe.runs.run import Run
from raypipe.sources.id_sampling import audit_rule, in_sample

FRACTIONS = [round(0.1 * tenth, 1) for tenth in range(1, 10)]
SHOWN = (0.3, 0.5, 0.7)


def members(run: Run) -> dict[str, str]:
    """The set of every scored sample: seed, audit or rest."""
    config, manifest = run.config(), SeedManifest.read(run)
    in_seed = in_sample(config.seed.fraction, config.seed.seed)
    in_audit = audit_rule(config.seed, manifest.audit_fraction)
    ids = [
        sample_id
        for _, table in storage.iter_tables(run.scores_folder)
        for sample_id in table["sample_id"].to_pylist()
    ]
    return {
        name: "seed" if in_seed(name) else "audit" if in_audit(name) else "rest" for name in ids
    }


def counts(member: dict[str, str], ids: list[str]) -> dict[str, int]:
    result = dict.fromkeys(("seed", "audit", "rest"), 0)
    for sample_id in ids:
        result[member[sample_id]] += 1
    return result


def study(uri: str) -> None:
    run = Run(uri)
    member = members(run)
    samples = counts(member, list(member))
    print(f"\n{storage.name(uri)}: {samples}")
    print(
        f"{'strategy':<12}"
        + "".join(f"{f'keep {keep}':^26}" for keep in SHOWN)
        + "outside 99 % of 27"
    )
    for strategy in STRATEGY_NAMES:
        raypipe.select(uri, keep=FRACTIONS, strategy=strategy, force=True)
        outside, cells = 0, []
        for keep in FRACTIONS:
            ids = storage.read_table(run.keep_list(f"keep-{keep:.2f}.parquet"))[
                "sample_id"
            ].to_pylist()
            shares = set_shares(samples, counts(member, ids))
            outside += sum(not share.within_chance for share in shares.values())
            if keep in SHOWN:
                cells.append(" / ".join(f"{share.share:.3f}" for share in shares.values()))
        print(
            f"{strategy:<12}" + "".join(f"{cell:^26}" for cell in cells) + f"{outside:>6}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+")
    for uri in parser.parse_args().runs:
        study(uri)


if __name__ == "__main__":
    main()
