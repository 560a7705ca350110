"""The runs that `fidelity.py` compares: every training, measurement and fit is made once and kept in a file, whole when it is there."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import (
    Images,
    Missing,
    checkpoints,
    embed,
    final,
    fresh_proxy,
    last_layer,
    mean_gradient,
    outputs,
    predict,
    save,
    train,
    trajectory_of,
)

from raypipe.assessment.held_out import split
from raypipe.assessment.rank_agreement import spearman
from raypipe.assessment.rehearsal import Rehearsal, rehearse
from raypipe.config import ExtrapolateSettings, MeasureSettings, ProxySettings
from raypipe.errors import RaypipeError
from raypipe.extrapolators.base import Nodes
from raypipe.extrapolators.blend import AnchorGnn
from raypipe.proxies.networks import ProxyNet
from raypipe.runs.ledger import fingerprint
from raypipe.scores.calibration import recalibrate
from raypipe.scores.forward_mode import Aligner
from raypipe.scores.moso import combine, leave_one_out
from raypipe.scores.per_sample import norms_and_alignments
from raypipe.scores.registry import SCORES, trajectory_score
from raypipe.scores.trajectory import STATISTICS, Trajectory
from raypipe.vision import training
from raypipe.vision.devices import AdaptiveBatch
from raypipe.vision.forward import CPU_BATCH, forward

MOSO = {"moso": "lr", "moso-normalized": "normalized", "moso-none": "none"}
"""Weights of the checkpoints, by the name of the score."""
ALONE = "gnn-alone"
"""The default extrapolator without the rehearsal that goes with it for scores that need training on the sample."""
AT_CHECKPOINTS = "-checkpoints"
"""Ends the name of a score that the proxy at its checkpoints gives of any sample (`at: checkpoints`)."""
FULL_SEED, HALF_SEED = 1000, 2000
"""Seeds of the weights begin here, so that no two proxies that are compared start alike."""
FOLDS = 5
FIT_SECONDS = {"gnn": 20.0, "gnn-rehearsed": 35.0, "gnn-published": 30.0, "mlp": 6.0, "trees": 1.5}
"""Of a fit and its predictions, about, for the estimate of the time."""
EMBED_UNITS, GRADIENT_UNITS, ALIGN_UNITS, SQUARE_UNITS = 0.35, 1.0, 1.0, 2.3
"""Of one image, about, in steps of training, for the same."""
REHEARSED = "gnn-rehearsed"
CROSSED = {
    "no signals": "embedding and class alone",
    "ranks": "the signals of unscored samples moved to the quantiles of the seed set's",
    "crossed": "signals of a seed sample from the proxy of the half without it; of an unscored one from the proxy",
    "crossed, mean": "the same; of an unscored one the mean of both halves' proxies",
    "beside": "the proxy's signals, and beside them those of `crossed, mean`",
    "two fits": "two fits, each on the half that a half's proxy was not trained on, in its embedding and signals; mean of both",
}
"""Ways to make samples that were trained on look like those that were not."""


def direct(score: str) -> bool:
    """Whether a proxy can measure it on samples that it was not trained on."""
    return score in MOSO or score.endswith(AT_CHECKPOINTS)


@dataclass(frozen=True)
class ProxyRun:
    """A proxy: name of its folder, the rows it is trained on (int64, rising), and the seed of weights, order and augmentation; of a seed
    set its share of the samples."""

    name: str
    rows: np.ndarray
    seed: int
    size: float = 0.0


@dataclass(frozen=True)
class Step:
    """Something that is done when a file is there; it costs about so many `units` (one image's step of training) and `seconds`."""

    path: str
    do: Callable[[], object]
    units: float = 0.0
    seconds: float = 0.0


class Study:
    """Proxies of one dataset, and what they tell of every sample.

    images       all samples, n of them
    settings     of every proxy but for its seed;  measure  options of the scores
    folder       where the files are;  threads  of training and measuring; fits have one
    only_cached  raise `Missing` instead of training, measuring or fitting
    """

    def __init__(
        self,
        images: Images,
        settings: ProxySettings,
        measure: MeasureSettings,
        folder: str,
        threads: int,
        only_cached: bool,
    ) -> None:
        self.images, self.settings, self.measure = images, settings, measure
        self._folder, self._threads, self._only_cached = folder, threads, only_cached

    def full(self, seed: int) -> ProxyRun:
        """Trained on all samples."""
        return ProxyRun(f"full-{seed}", np.arange(len(self.images)), FULL_SEED + seed)

    def of_seed_set(self, size: float, seed: int) -> ProxyRun:
        """Trained on a random share of the samples; of the same seed, the smaller seed set is part of the larger."""
        return ProxyRun(f"seed-{size:g}-{seed}", np.sort(self._drawn(size, seed)), seed, size)

    def halves(self, size: float, seed: int) -> tuple[ProxyRun, ProxyRun]:
        """Each trained on a random half of a seed set."""
        parts = [np.sort(rows) for rows in np.array_split(self._drawn(size, seed), 2)]
        first, second = (
            ProxyRun(f"half-{size:g}-{seed}-{number}", rows, HALF_SEED + 2 * seed + number)
            for number, rows in enumerate(parts)
        )
        return first, second

    def others(self, run: ProxyRun) -> np.ndarray:
        """Rows of the samples that a proxy was not trained on."""
        return np.setdiff1d(np.arange(len(self.images)), run.rows)

    def nodes(self, run: ProxyRun) -> Nodes:
        """Every sample as the extrapolators see it, by the trained proxy."""

        def make(folder: str) -> dict[str, np.ndarray]:
            nodes = embed(final(self.settings, self.images.classes, folder), self.images)
            return {"embedding": nodes.embedding, "signals": nodes.signals}

        found = self._kept(run, "nodes", make, lambda: self._trained(run))
        return Nodes(found["embedding"], self.images.label, found["signals"])

    def outputs(self, run: ProxyRun) -> dict[str, np.ndarray]:
        """What the trained proxy gives for every sample, as `raypipe.vision.forward.forward` returns it, with probabilities."""

        def make(folder: str) -> dict[str, np.ndarray]:
            model = final(self.settings, self.images.classes, folder).eval()
            batched = AdaptiveBatch(CPU_BATCH)
            pixels, label = self.images.pixels, self.images.label
            return forward(model, pixels, label, batched, "cpu", False, probabilities=True)

        return self._kept(run, "outputs", make, lambda: self._trained(run))

    def measured(self, run: ProxyRun, score: str) -> np.ndarray:
        """A score as the proxy measures it, float64 [n]: of every sample where it can, else of those it was trained on, and NaN."""
        if score in MOSO:
            return self._moso(run, MOSO[score])
        options = self._options(score)
        if score.endswith(AT_CHECKPOINTS):
            return self._at_checkpoints(
                run,
                score.removesuffix(AT_CHECKPOINTS),
                options["first_epoch"],
                options["last_epoch"],
            )

        def make(folder: str) -> dict[str, np.ndarray]:
            followed = Trajectory.from_recorded(
                self.images.label[run.rows], trajectory_of(self.settings, folder)
            )
            return {"score": trajectory_score(score)(followed, **options)}

        result = np.full(len(self.images), np.nan)
        result[run.rows] = self._kept(
            run, self._label("score", score), make, lambda: self._trained(run), cheap=True
        )["score"]
        return result

    def predicted(self, run: ProxyRun, score: str, method: str) -> tuple[np.ndarray, float]:
        """What a method fitted on the measured scores of the seed set predicts outside it, float [n - m], and seconds it took.

        The default extrapolator comes with a rehearsal where a run has one.
        """
        if method == "gnn" and not direct(score):
            found = self._rehearsed(run, score)
            return found["predicted"], float(found["seconds"])
        method = "gnn" if method == ALONE else method

        def make(known: np.ndarray, nodes: Nodes) -> dict[str, np.ndarray]:
            return {"predicted": self._fit(run, method, nodes, run.rows, known, self.others(run))}

        name = self._label("predicted", method, score)
        found = self._kept(
            run, name, make, lambda: self.measured(run, score)[run.rows], lambda: self.nodes(run)
        )
        return found["predicted"], float(found["seconds"])

    def rehearsal(self, run: ProxyRun, score: str) -> float:
        """Spearman of what the rehearsal predicts of the half that it was not trained on: what a user is told."""
        return float(self._rehearsed(run, score)["judged"])

    def out_of_fold(self, run: ProxyRun, score: str, method: str) -> np.ndarray:
        """Every fifth of the seed set predicted by a fit on the others, float [m]."""

        def make(known: np.ndarray, nodes: Nodes) -> dict[str, np.ndarray]:
            predicted = np.empty(len(known))
            for held in split(len(known), 1 / FOLDS, FOLDS, 0):
                kept = np.setdiff1d(np.arange(len(known)), held)
                predicted[held] = self._fit(
                    run, method, nodes, run.rows[kept], known[kept], run.rows[held]
                )
            return {"predicted": predicted}

        name = self._label("folds", method, score)
        return self._kept(
            run, name, make, lambda: self.measured(run, score)[run.rows], lambda: self.nodes(run)
        )["predicted"]

    def crossed(self, size: float, seed: int, score: str, variant: str, method: str) -> np.ndarray:
        """What a method predicts outside the seed set in one of the ways of CROSSED, float [n - m]."""
        run, halves = self.of_seed_set(size, seed), self.halves(size, seed)
        others = self.others(run)

        def make(
            known: np.ndarray, main: Nodes, first: Nodes | None, second: Nodes | None
        ) -> dict[str, np.ndarray]:
            if variant == "two fits":
                assert first is not None and second is not None
                pairs = ((halves[0], first, halves[1].rows), (halves[1], second, halves[0].rows))
                parts = [
                    self._fit(half, method, nodes, rows, known[rows], others)
                    for half, nodes, rows in pairs
                ]
                return {"predicted": np.mean(parts, 0)}
            nodes = replace(
                main,
                signals=_signals(
                    variant, main.signals, run.rows, first, second, halves[0].rows, halves[1].rows
                ),
            )
            return {"predicted": self._fit(run, method, nodes, run.rows, known[run.rows], others)}

        needed = variant not in ("no signals", "ranks")
        return self._kept(
            run,
            self._label(f"cross-{variant.replace(', ', '-').replace(' ', '-')}", method, score),
            make,
            lambda: self.measured(run, score),
            lambda: self.nodes(run),
            *((lambda half=half: self.nodes(half) if needed else None) for half in halves),
        )["predicted"]

    def forget(self, methods: list[str]) -> None:
        """Delete what was predicted by some methods, so that they are fitted again."""
        for folder, _, names in os.walk(self._folder):
            for name in names:
                if any(f".{method}." in name for method in methods):
                    os.remove(os.path.join(folder, name))

    # -- the work ahead -----------------------------------------------------------------------------------------------

    def steps(
        self, scores: list[str], sizes: list[float], methods: list[str], seed: int
    ) -> Iterator[Step]:
        """What the tables of fidelity need of one seed."""
        yield from self._run_steps(self.full(seed), scores, with_nodes=False)
        for size in sizes:
            run = self.of_seed_set(size, seed)
            yield from self._run_steps(run, scores)
            for score, method in itertools.product(scores, methods):
                alone = "gnn" if method == ALONE else method
                if method == "gnn" and not direct(score):
                    yield from self._run_steps(self.halves(size, seed)[0], [score])
                    alone = REHEARSED
                yield self._fit_step(run, ("predicted", alone, score), 1,
                                     lambda score=score, method=method, run=run: self.predicted(run, score, method))  # fmt: skip

    def fold_steps(
        self, scores: list[str], size: float, methods: list[str], seed: int
    ) -> Iterator[Step]:
        """What the table of out-of-fold predictions needs beside `steps`."""
        run = self.of_seed_set(size, seed)
        for score, method in itertools.product(scores, methods):
            yield self._fit_step(run, ("folds", method, score), FOLDS,
                                 lambda score=score, method=method: self.out_of_fold(run, score, method))  # fmt: skip

    def crossed_steps(
        self, scores: list[str], size: float, method: str, seed: int
    ) -> Iterator[Step]:
        """What the table of cross-fitting needs beside `steps`."""
        run = self.of_seed_set(size, seed)
        for half in self.halves(size, seed):
            yield from self._run_steps(half, [])
        for score, variant in itertools.product(scores, CROSSED):
            part = f"cross-{variant.replace(', ', '-').replace(' ', '-')}"
            yield self._fit_step(run, (part, method, score), 1,
                                 lambda score=score, variant=variant: self.crossed(size, seed, score, variant, method))  # fmt: skip

    def unit(self) -> float:
        """Seconds of one step of training for one image."""
        part = self.images.take(slice(self.settings.batch_size))
        model, least = fresh_proxy(self.settings, self.images.classes), np.inf
        for _ in range(5):
            began = time.perf_counter()
            F.cross_entropy(
                model(torch.from_numpy(part.pixels)), torch.from_numpy(part.label)
            ).backward()
            least = min(least, time.perf_counter() - began)
        return least / len(part)

    def _run_steps(
        self, run: ProxyRun, scores: list[str], with_nodes: bool = True
    ) -> Iterator[Step]:
        own, everyone = len(run.rows), len(self.images)
        yield Step(
            self._path(run, "trained"), lambda: self._trained(run), units=own * self.settings.epochs
        )
        if with_nodes:
            yield Step(
                self._path(run, "nodes"), lambda: self.nodes(run), units=EMBED_UNITS * everyone
            )
        if any(score.endswith(AT_CHECKPOINTS) for score in scores):
            units = EMBED_UNITS * everyone * self.settings.checkpoints
            yield Step(
                self._path(run, self._measured("outputs")), lambda: self._outputs(run), units=units
            )
        if set(scores) & set(MOSO):
            squares = SQUARE_UNITS if self.measure.moso.uses_self_term(own) else 0
            each = (GRADIENT_UNITS + squares) * own + ALIGN_UNITS * everyone
            yield Step(
                self._path(run, self._measured("aligned")),
                lambda: self._aligned(run),
                units=self.settings.checkpoints * each,
            )
        for score in (score for score in scores if not direct(score)):
            name = self._label("score", score)
            yield Step(
                self._path(run, name), lambda score=score: self.measured(run, score), seconds=1
            )

    def _fit_step(
        self, run: ProxyRun, parts: tuple[str, ...], fits: int, do: Callable[[], object]
    ) -> Step:
        return Step(
            self._path(run, self._label(*parts)), do, seconds=fits * FIT_SECONDS.get(parts[1], 0.3)
        )

    # -- files ----------------------------------------------------------------------------------------------------------

    def _path(self, run: ProxyRun, name: str) -> str:
        return os.path.join(self._folder, run.name, f"{name}.npz")

    def _label(self, *parts: str) -> str:
        """Name of a file: what it is, perhaps the method, and the score, with a hash of its options where it has any."""
        options = self._options(parts[-1])
        return ".".join(parts) + (f"-{fingerprint(options)[:6]}" if options else "")

    def _options(self, score: str) -> dict[str, Any]:
        options = (
            {} if score in MOSO else self.measure.options_of(score.removesuffix(AT_CHECKPOINTS))
        )
        recalibrated = {"recalibrate": True} if direct(score) and self.measure.recalibrate else {}
        return {name: value for name, value in options.items() if name != "at"} | recalibrated

    def _measured(self, what: str) -> str:
        """Name of a file of what checkpoints give."""
        return what + ("-recalibrated" if self.measure.recalibrate else "")

    def _checkpoints(self, run: ProxyRun, folder: str) -> Iterator[tuple[int, float, ProxyNet]]:
        """Epoch, learning rate and network of every checkpoint, as scores are measured with it."""
        for epoch, rate, model in checkpoints(self.settings, self.images.classes, folder):
            if self.measure.recalibrate:
                recalibrate(
                    model, (pixels for pixels, _ in self.images.take(run.rows).batches(256))
                )
            yield epoch, rate, model

    def _kept(
        self,
        run: ProxyRun,
        name: str,
        make: Callable[..., dict[str, np.ndarray]],
        *inputs: Callable[[], Any],
        cheap: bool = False,
    ) -> dict[str, np.ndarray]:
        """What the file holds, or else what `make` gives from the inputs, and the seconds it took (without its inputs).

        Raises Missing where only files that are there are wanted, unless it is cheap and its inputs are there.
        """
        path = self._path(run, name)
        if not os.path.exists(path):
            if self._only_cached and not cheap:
                raise Missing(path)
            given = [each() for each in inputs]
            os.makedirs(os.path.dirname(path), exist_ok=True)
            began = time.perf_counter()
            arrays = make(*given)
            seconds = time.perf_counter() - began
            save(path, **arrays, seconds=np.array(seconds))
            print(
                f"{time.strftime('%H:%M:%S')}  {run.name:<14} {name:<48} {seconds:8.1f} s",
                flush=True,
            )
        with np.load(path) as found:
            return dict(found)

    def _trained(self, run: ProxyRun) -> str:
        """The folder of the training, when it is done."""
        folder = os.path.join(self._folder, run.name, "training")

        def make() -> dict[str, np.ndarray]:
            train(
                self.settings.model_copy(update={"seed": run.seed}),
                self.images.take(run.rows),
                folder,
            )
            return {}

        self._kept(run, "trained", make)
        return folder

    def _aligned(self, run: ProxyRun) -> dict[str, np.ndarray]:
        """aligned [n, checkpoints], with the mean gradient over the run's rows; rates [checkpoints]; with the self term squares
        [m, checkpoints]."""

        def make(folder: str) -> dict[str, np.ndarray]:
            parts = [
                self._kept(
                    run,
                    self._measured(f"aligned-{epoch:04d}"),
                    lambda rate=rate, model=model: self._align(run, rate, model),
                )
                for epoch, rate, model in self._checkpoints(run, folder)
            ]
            return {
                name: np.stack([part[name] for part in parts], -1)
                for name in parts[0]
                if name != "seconds"
            }

        return self._kept(run, self._measured("aligned"), make, lambda: self._trained(run))

    def _outputs(self, run: ProxyRun) -> dict[str, np.ndarray]:
        """outputs [checkpoints, n, 4], NUMBERS of every sample."""

        def make(folder: str) -> dict[str, np.ndarray]:
            return {
                "outputs": np.stack(
                    [outputs(model, self.images) for _, _, model in self._checkpoints(run, folder)]
                )
            }

        return self._kept(run, self._measured("outputs"), make, lambda: self._trained(run))

    def _rehearsed(self, run: ProxyRun, score: str) -> dict[str, np.ndarray]:
        """predicted [n - m], and judged, the Spearman correlation within the rehearsal."""
        half, other = self.halves(run.size, run.seed)

        def make(
            known: np.ndarray, nodes: Nodes, earlier: np.ndarray, seen: Nodes
        ) -> dict[str, np.ndarray]:
            def fresh(of: ProxyRun) -> AnchorGnn:
                model = AnchorGnn(ExtrapolateSettings(), self.images.classes)
                model.head = self._head(of)
                return model

            given = Rehearsal(
                seen.take(half.rows), earlier[half.rows], seen.take(other.rows), known[other.rows]
            )
            torch.set_num_threads(1)
            transfer, found = rehearse(lambda: fresh(half), given, 0)
            model = fresh(run)
            model.fit(nodes.take(run.rows), known[run.rows])
            model.transfer = transfer
            predicted = model.predict(nodes.take(self.others(run)))
            torch.set_num_threads(self._threads)
            return {
                "predicted": predicted,
                "judged": np.array(spearman(found.predicted, found.measured) or 0.0),
            }

        return self._kept(
            run,
            self._label("predicted", REHEARSED, score),
            make,
            lambda: self.measured(run, score),
            lambda: self.nodes(run),
            lambda: self.measured(half, score),
            lambda: self.nodes(half),
        )

    # -- computation --------------------------------------------------------------------------------------------------

    def _drawn(self, size: float, seed: int) -> np.ndarray:
        count = len(self.images)
        return np.random.default_rng([seed, 1]).permutation(count)[: round(size * count)]

    def _align(self, run: ProxyRun, rate: float, model: ProxyNet) -> dict[str, np.ndarray]:
        own = self.images.take(run.rows)
        direction = mean_gradient(model, own)
        result = {"rates": np.array(rate)}
        if self.measure.moso.uses_self_term(len(own)):
            squares = [
                norms_and_alignments(model, pixels, label, direction)[0].numpy()
                for pixels, label in own.batches()
            ]
            result["squares"] = np.concatenate(squares)
        aligner = Aligner(model, direction)
        return result | {
            "aligned": np.concatenate(
                [aligner(pixels, label).numpy() for pixels, label in self.images.batches()]
            )
        }

    def _moso(self, run: ProxyRun, weights: str) -> np.ndarray:
        found, samples = self._aligned(run), len(run.rows)
        aligned = found["aligned"].astype(np.float64)
        spread = aligned[run.rows].std(0)
        if "squares" in found:
            aligned[run.rows] = leave_one_out(aligned[run.rows], found["squares"], samples)
        steps = training.steps_per_epoch(samples, self.settings.batch_size) * self.settings.epochs
        return combine(
            aligned, found["rates"], weights, steps=steps, samples=samples, spread=spread
        ).astype(np.float64)

    def _at_checkpoints(
        self, run: ProxyRun, score: str, first: int, last: int | None
    ) -> np.ndarray:
        """The mean over the checkpoints among the epochs first to last (exclusive)."""
        epochs = self.settings.checkpoint_epochs()
        chosen = [
            place
            for place, epoch in enumerate(epochs)
            if first <= epoch and (last is None or epoch < last)
        ]
        if not chosen:
            raise RaypipeError(f"{score} at checkpoints: none between epochs {first} and {last}")
        column = STATISTICS.index(SCORES[score].reads[0])
        return self._outputs(run)["outputs"][chosen, :, column].mean(0, dtype=np.float64)

    def _head(self, run: ProxyRun) -> tuple[np.ndarray, np.ndarray]:
        return last_layer(self.settings, self._trained(run))

    def _fit(
        self,
        run: ProxyRun,
        method: str,
        nodes: Nodes,
        rows: np.ndarray,
        known: np.ndarray,
        wanted: np.ndarray,
    ) -> np.ndarray:
        """What a method predicts from samples as the proxy of `run` sees them."""
        torch.set_num_threads(1)
        try:
            return predict(
                method, nodes, rows, known, wanted, self.images.classes, run.seed, self._head(run)
            )
        finally:
            torch.set_num_threads(self._threads)


def _signals(
    variant: str,
    main: np.ndarray,
    rows: np.ndarray,
    first: Nodes | None,
    second: Nodes | None,
    first_rows: np.ndarray,
    second_rows: np.ndarray,
) -> np.ndarray:
    """Signals, float32 [n, s], in one of the ways of CROSSED.

    main           those of the proxy trained on `rows`
    first, second  samples as the proxies of the halves see them, trained on `first_rows` and `second_rows`
    """
    if variant == "no signals":
        return main[:, :0]
    if variant == "ranks":
        others = np.setdiff1d(np.arange(len(main)), rows)
        result = main.copy()
        for column, values in enumerate(main.T):
            rank = values[others].argsort().argsort() + 0.5
            result[others, column] = np.quantile(values[rows], rank / len(others))
        return result
    assert first is not None and second is not None
    mean = (first.signals + second.signals) / 2
    result = main.copy() if variant == "crossed" else mean.copy()
    result[first_rows], result[second_rows] = second.signals[first_rows], first.signals[second_rows]
    return np.concatenate([main, result], 1) if variant == "beside" else result
