"""What training on a keep-list saves, and what is known about its accuracy, in sentences."""

from __future__ import annotations

from raypipe.report.formats import SPACE, accuracy, count, plain_points, seconds, share
from raypipe.report.schema import ClassShare, Difference, HeadlineFigures, Trained
from raypipe.text import plural


def savings_sentences(headline: HeadlineFigures) -> list[str]:
    """Return what a keep-list saves of each training, and how trainings on it turned out."""
    if headline["saved_share"] <= 0:
        return ["It holds every sample, so training on it costs as much as training on everything."]
    saved = share(headline["saved_share"], 0)
    sentences = [
        f"Training on it for the same number of epochs takes {saved} fewer steps, and so costs "
        f"about {saved} less.",
        _accuracy(headline),
    ]
    if headline["trainings"]:
        sentences.append(_payback(headline, headline["trainings"]))
    least, most = headline["least_kept"], headline["most_kept"]
    if least and most and least["share"] < headline["fraction"] / 2:
        sentences.append(_uneven_classes(least, most))
    return sentences


def _accuracy(headline: HeadlineFigures) -> str:
    """Return what is known about the accuracy that goes with the saving."""
    if headline["trained"]:
        return _trained(headline["trained"])
    expected = headline["expected"]
    if expected is None:
        known = "What it does to the accuracy is not known: raypipe evaluate measures it."
        return f"{_as_sentence(headline['reason'])}{known}"
    random, everything = expected["against_random"], expected["against_everything"]
    less = f"{_difference(everything)} against everything"
    if random is None:
        prediction = f"Its expected accuracy, by the pilot, is {less}."
    else:
        prediction = (
            f"Its expected accuracy, by the pilot, is {_difference(random)} against a random list "
            f"of the same size, and {less}."
        )
    return (
        f"{_as_sentence(headline['reason']) if random is None else ''}{prediction} This is for a "
        f"network like that of the pilot ({expected['model']}), extrapolated from "
        f"{count(expected['tried'])} to {count(headline['of'])} samples."
    )


def _as_sentence(reason: str) -> str:
    """Return a reason as a sentence, before a space; empty without one."""
    return f"{reason[0].upper()}{reason[1:]}. " if reason else ""


def _difference(figure: Difference) -> str:
    """Return "+2.1 points (95 % interval +0.4 to +3.8)"."""
    mean, low, high = (plain_points(figure[name]) for name in ("mean", "low", "high"))
    return f"{mean} points (95{SPACE}% interval {low} to {high})"


def _payback(headline: HeadlineFigures, trainings: int) -> str:
    epochs = f"{count(headline['epochs'])} {plural(headline['epochs'], 'epoch')}"
    spent = "The scores and the pilot" if headline["expected"] else "The scores"
    when = (
        "with the first such training"
        if trainings == 1
        else f"after {count(trainings)} such trainings"
    )
    return (
        f"For a network like the proxy ({epochs}) this saves about "
        f"{seconds(headline['saved_seconds'])} of the {seconds(headline['training_seconds'])} "
        f"CPU + GPU time of a training. {spent} took "
        f"{seconds(headline['scores_seconds'])}; they pay off {when}, or sooner if a training "
        "costs more."
    )


def _trained(trained: Trained) -> str:
    return (
        f"Trained on it here, {trained['model']} reached an accuracy of "
        f"{accuracy(trained['list'])}; on random lists of the same size "
        f"{accuracy(trained['random'])}, on everything {accuracy(trained['everything'])}."
    )


def _uneven_classes(least: ClassShare, most: ClassShare) -> str:
    return (
        f"Classes are thinned out unevenly: the list keeps from {share(least['share'], 0)} of "
        f"“{least['name']}” to {share(most['share'], 0)} of “{most['name']}”."
    )
