"""Certify that a keep-list beats random lists: choose on half of the test set, test on the other.

At each keep fraction the list with the highest accuracy on the first half is chosen. On the second
half its gain over random lists is tested, one-sided. The chance that anything harmful is certified
is at most 5 %: the level is divided by the number of lists times the number of fractions, since all
lists were trained once, and a lucky training is lucky on both halves. No Ray, no storage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from raypipe.assessment.gains import BETTER, WORSE, Gain, fit_gains
from raypipe.text import points

CERTIFIED, NO_EVIDENCE, HARMFUL = "certified", "no evidence", "harmful"
"""Verdicts; the words are part of `evaluation/summary.json`."""
VERDICT_EXIT_CODES = {CERTIFIED: 0, NO_EVIDENCE: 5, HARMFUL: 6}
"""Exit codes of `raypipe evaluate --certify`."""
SPLIT_SEED = 0x63657274
"""Seed of the draw of the halves."""


@dataclass(frozen=True)
class FractionCertificate:
    """The certificate at one keep fraction.

    Attributes
    ----------
    fraction
        Keep fraction.
    chosen
        Name of the list.
    chosen_by
        Its gain over random lists on the half that it was chosen on.
    gain
        Its gain on the other half.
    """

    fraction: float
    chosen: str
    chosen_by: float
    gain: Gain

    @property
    def verdict(self) -> str:
        """What the second half shows."""
        return {BETTER: CERTIFIED, WORSE: HARMFUL}.get(self.gain.verdict, NO_EVIDENCE)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON data."""
        return {
            "fraction": self.fraction,
            "chosen": self.chosen,
            "chosen_by": self.chosen_by,
            "gain": self.gain.as_dict(),
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class Certificate:
    """The certificates at all fractions.

    Attributes
    ----------
    choices
        Lists times fractions: the number of choices that is corrected for.
    tested
        Test samples in the second half.
    fractions
        One entry for each fraction.
    """

    choices: int
    tested: int
    fractions: tuple[FractionCertificate, ...]

    @property
    def verdict(self) -> str:
        """Harmful if any list is, certified if all are, else no evidence."""
        verdicts = {item.verdict for item in self.fractions}
        if HARMFUL in verdicts:
            return HARMFUL
        return CERTIFIED if verdicts == {CERTIFIED} else NO_EVIDENCE

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON data."""
        return {
            "verdict": self.verdict,
            "choices": self.choices,
            "tested": self.tested,
            "fractions": [item.as_dict() for item in self.fractions],
        }


def certify(
    correct: Mapping[float, Mapping[str, np.ndarray]], random: str = "random"
) -> Certificate:
    """Choose a list at each fraction, and test it.

    Parameters
    ----------
    correct
        By keep fraction and name of the list, which test samples the models got right: bool
        [seeds, test samples]. The same lists, seeds and samples everywhere.
    random
        Name of the random lists.

    Raises
    ------
    ValueError
        With fewer than two seeds.
    """
    fractions = sorted(correct)
    names = [name for name in correct[fractions[0]] if name != random]
    difference = np.stack(
        [
            np.stack(
                [
                    correct[fraction][name].astype(np.int8) - correct[fraction][random]
                    for fraction in fractions
                ]
            )
            for name in names
        ]
    )  # [lists, fractions, seeds, samples]
    order = np.random.default_rng(SPLIT_SEED).permutation(difference.shape[-1])
    first, second = np.array_split(order, 2)
    found = difference[..., first].mean((2, 3))
    choices = len(names) * len(fractions)
    models = fit_gains(difference[..., second], np.eye(len(fractions)), choices)
    certificates = []
    for place, fraction in enumerate(fractions):
        best = int(found[:, place].argmax())
        row = np.eye(len(fractions))[place]
        certificates.append(
            FractionCertificate(
                fraction, names[best], float(found[best, place]), models[best].at(*row)
            )
        )
    return Certificate(choices, len(second), tuple(certificates))


def certificate_lines(certificate: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines for a terminal, given `Certificate.as_dict`."""
    yield (
        f"certificate {certificate['verdict']} (chance of certifying harm at most 5 %, corrected "
        f"for {certificate['choices']} choices; {certificate['tested']:,} test samples that "
        "nothing was chosen on)"
    )
    for item in certificate["fractions"]:
        gain = item["gain"]
        yield (
            f"  keep {item['fraction']:g}: {item['chosen']}: {item['verdict']}, "
            f"{points(gain['mean'])} points against random (95 % interval {points(gain['low'])} "
            f"to {points(gain['high'])})"
        )
