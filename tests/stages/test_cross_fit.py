"""Cross-fitting: no proxy sees, scores or embeds a sample that it was trained on."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from helpers import QUIET, cross_fit_config, score_files, small_config, table_of
from threadpoolctl import threadpool_limits

import raypipe
from raypipe import storage
from raypipe.assessment.membership import set_shares
from raypipe.config import Config
from raypipe.distributed.actor_pool import WorkerContext
from raypipe.errors import ConfigError, StageError
from raypipe.runs.checkpoints import load_checkpoint
from raypipe.runs.embeddings import nodes_of
from raypipe.runs.partition import proxy_parts
from raypipe.runs.proxy_roles import VIEWERS, ProxyRoles
from raypipe.runs.run import Run
from raypipe.runs.seed_shards import read_shard
from raypipe.scores.linear_probe import LinearProbe
from raypipe.sources.id_sampling import in_sample
from raypipe.stages.embed import stage as embed
from raypipe.stages.embed.actor import EmbedActor
from raypipe.stages.extrapolate.assess import write_curve, write_fidelity
from raypipe.stages.extrapolate.fit_part import fit_part
from raypipe.stages.extrapolate.measured import PartData, read_samples
from raypipe.stages.extrapolate.probe import ProbeActor, fit_probes, load_probes, read_viewed
from raypipe.stages.extrapolate.stage import ScoreActor
from raypipe.vision.output_statistics import output_statistics

PARTS = 3


def config_of(uri: str, score: str) -> Config:
    return cross_fit_config(
        uri, score, "measure.scores=[moso, loss, el2n]", "extrapolate.method=gnn"
    )


@pytest.fixture(scope="module")
def run(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose score, MoSo, is extrapolated."""
    uri = str(tmp_path_factory.mktemp("cross-fit") / "run")
    raypipe.run(config_of(uri, "moso"), progress=QUIET)
    return Run(uri)


@pytest.fixture(scope="module")
def direct(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run with the loss of a linear probe as its score."""
    uri = str(tmp_path_factory.mktemp("direct") / "run")
    for file in storage.walk(run.uri):
        content = storage.read_bytes(storage.join(run.uri, file.path))
        storage.write_bytes(storage.join(uri, file.path), content)
    raypipe.run(config_of(uri, "loss"), progress=QUIET)
    return Run(uri)


def cross_fit(run: Run) -> ProxyRoles:
    return ProxyRoles.of(run.config())


def test_every_proxy_but_that_of_its_part_measures_a_sample(run: Run) -> None:
    for folder in ("measured", "measured/audit"):
        table = table_of(run, folder)
        part = cross_fit(run).part_of(table["sample_id"].to_pylist())
        by_proxy = np.array(table["moso_by_proxy"].to_pylist(), np.float64)
        own = np.arange(PARTS)[None] == part[:, None]
        assert np.isnan(by_proxy[own]).all()
        assert np.isfinite(by_proxy[~own]).all()
        mean = by_proxy[~own].reshape(len(table), PARTS - 1).mean(1)
        assert table["moso"].to_numpy() == pytest.approx(mean, rel=1e-5, abs=1e-9)
        assert "loss" not in table.column_names  # every sample has it anyway


def test_accuracy_is_that_of_proxies_on_samples_they_have_not_seen(direct: Run) -> None:
    """A probe gives the samples that it is fitted to their label, whatever the proxy learned."""
    figures = direct.ledger()["extrapolate"].detail["fidelity"]
    embedded = table_of(direct, "embeddings")
    right = embedded["margin"].to_numpy() > 0
    assert figures["n_held"] == len(embedded)  # so few that the probes are fitted to all
    assert figures["proxy_accuracy"] == pytest.approx(right.mean())


def test_too_few_steps_are_said_before_the_training(run: Run) -> None:
    logs = run.path("logs")
    (file,) = storage.names(logs)
    lines = storage.read_bytes(storage.join(logs, file)).decode().splitlines()
    said = next(number for number, line in enumerate(lines) if "steps only (4 epochs over" in line)
    trained = next(number for number, line in enumerate(lines) if " proxy  " in line)
    assert said < trained and "set proxy.epochs to auto" in lines[said]


def test_proxies_have_a_common_scale(run: Run) -> None:
    by_proxy = np.array(table_of(run, "measured")["moso_by_proxy"].to_pylist(), np.float64)
    spread = np.nanstd(by_proxy, axis=0)
    assert spread == pytest.approx(np.full(PARTS, spread.mean()), rel=1e-3)


def test_statistics_are_means_over_proxies_that_were_not_trained_on_the_sample(run: Run) -> None:
    import torch

    stored = {row["sample_id"]: row for row in table_of(run, "embeddings").to_pylist()}
    models = [
        load_checkpoint(run, part.trained.final, folder=part.checkpoints)
        for part in proxy_parts(run)
    ]
    shard = min(run.done("seed"))
    ids, images, labels = read_shard(run, shard)
    pixels, target = torch.from_numpy(images.copy()), torch.from_numpy(labels)
    with torch.inference_mode():
        logits = torch.stack([model(pixels) for model in models])
        embedding = models[0].embed(pixels).numpy()
    losses = [output_statistics(logits[proxy], target)["loss"].numpy() for proxy in range(PARTS)]
    probabilities = logits.softmax(2).numpy()
    for row, (sample_id, part) in enumerate(zip(ids, cross_fit(run).part_of(ids), strict=True)):
        others = [proxy for proxy in range(PARTS) if proxy != part]
        expected = np.mean([losses[proxy][row] for proxy in others])
        assert stored[sample_id]["loss"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
        mean = probabilities[others, row].mean(0)
        assert stored[sample_id]["confidence"] == pytest.approx(mean.max(), rel=1e-4)
        assert stored[sample_id]["embedding"] == pytest.approx(embedding[row], rel=1e-3, abs=1e-4)


def test_viewers_are_two_proxies_that_were_not_trained_on_the_sample(run: Run) -> None:
    table = table_of(run, "views")
    part = cross_fit(run).part_of(table["sample_id"].to_pylist())
    proxy = table["proxy"].to_numpy()
    assert set(proxy) == set(VIEWERS[1:])
    assert not (proxy == part).any()
    samples = len(table_of(run, "embeddings"))
    # one sample in three has two further embeddings; the others have one beside that of proxy 0
    assert len(table) == samples + (part == 0).sum() // 2


def test_all_scores_are_predicted_and_the_measured_ones_stand_next_to_them(run: Run) -> None:
    scores, measured = table_of(run, "scores"), table_of(run, "measured")
    known = dict(zip(measured["sample_id"].to_pylist(), measured["moso"].to_pylist(), strict=True))
    rows = [row for row in scores.to_pylist() if row["sample_id"] in known]
    assert len(rows) == len(known)
    for row in rows:
        assert row["measured"]
        assert row["measured_score"] == pytest.approx(known[row["sample_id"]])
        assert row["lower"] < row["score"] < row["upper"]
    unmeasured = scores.filter(pc.invert(scores["measured"]))
    assert unmeasured["measured_score"].null_count == len(unmeasured) > 0


def test_fidelity_is_judged_on_every_measured_sample(run: Run) -> None:
    detail = run.ledger()["extrapolate"].detail
    measured = len(table_of(run, "measured")) + len(table_of(run, "measured/audit"))
    assert detail["fidelity"]["judged_on"] == "cross-fit"
    assert detail["fidelity"]["n_held"] == measured
    assert detail["stability"]["proxies"] == PARTS - 1
    assert detail["stability"]["samples"] == measured
    assert -1 <= detail["stability"]["value"] <= 1


def test_a_lost_score_shard_is_written_again_alike(run: Run) -> None:
    before = score_files(run.uri)
    fragment = min(run.done("scores"))
    storage.delete(run.score_shard(fragment))
    raypipe.run(config_of(run.uri, "moso"), progress=QUIET)
    assert score_files(run.uri) == before


def test_scores_from_embeddings_are_those_of_linear_probes(direct: Run) -> None:
    config, roles = direct.config(), cross_fit(direct)
    embeddings, views = table_of(direct, "embeddings"), table_of(direct, "views")
    classes = len(direct.classes().names)
    label = dict(
        zip(embeddings["sample_id"].to_pylist(), embeddings["label"].to_pylist(), strict=True)
    )
    losses: dict[str, list[float]] = {}
    for proxy in VIEWERS:
        table = embeddings if proxy == 0 else views.filter(pc.equal(views["proxy"], proxy))
        ids = table["sample_id"].to_pylist()
        viewed = roles.is_viewed(roles.part_of(ids), proxy)
        table = table.filter(pa.array(viewed))
        ids = table["sample_id"].to_pylist()
        column = table["embedding"].combine_chunks()
        embedding = np.asarray(column.flatten(), np.float32).reshape(len(ids), -1)
        y = np.array([label[sample_id] for sample_id in ids])
        loss = LinearProbe.fit(embedding, y, classes).statistics(embedding, y)["loss"]
        for sample_id, value in zip(ids, loss.tolist(), strict=True):
            losses.setdefault(sample_id, []).append(value)
    assert config.scores_embeddings
    for row in table_of(direct, "scores").to_pylist():
        assert len(losses[row["sample_id"]]) == 2
        expected = np.mean(losses[row["sample_id"]])
        assert row["score"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert row["measured"]
        assert row["lower"] == row["score"] == row["upper"]


def test_a_direct_score_has_a_stability_and_nothing_to_extrapolate(direct: Run) -> None:
    record = direct.ledger()["extrapolate"]
    assert record.detail["measured"] == record.samples
    assert record.detail["fidelity"]["spearman"] is None
    assert record.detail["stability"]["samples"] == record.samples
    summary = storage.read_json(direct.report_summary)
    assert summary["stability"]["value"] == record.detail["stability"]["value"]
    assert "Every sample was scored directly" in summary["fidelity"]["sentence"]


@pytest.mark.parametrize("which", ["run", "direct"])
def test_lists_hold_the_same_share_of_the_seed_set_as_of_the_rest(
    which: str, request: pytest.FixtureRequest
) -> None:
    run = request.getfixturevalue(which)
    config = run.config()
    in_seed = in_sample(config.seed.fraction, config.seed.seed)
    ids = table_of(run, "scores")["sample_id"].to_pylist()
    for file in storage.names(run.keep_folder):
        held = set(storage.read_table(run.keep_list(file))["sample_id"].to_pylist())
        samples = {"seed": sum(map(in_seed, ids))}
        kept = {"seed": sum(in_seed(sample_id) for sample_id in held)}
        samples["rest"], kept["rest"] = len(ids) - samples["seed"], len(held) - kept["seed"]
        shares = set_shares(samples, kept)
        assert shares["seed"].within_chance, (file, shares)
    sets = storage.read_json(run.report_summary)["sets"]
    assert sets["sentence"] == ""
    assert set(sets["lists"]) == set(storage.names(run.keep_folder))


def test_roles_of_the_proxies() -> None:
    roles = ProxyRoles(4, 0)
    part = roles.part_of([str(number) for number in range(4000)])
    assert np.bincount(part, minlength=4) == pytest.approx(1000, rel=0.1)
    for number in range(4):
        assert number not in roles.viewers(number)
        assert not set(roles.fit_parts(number)) & {number, *roles.space(number)}
        assert len(roles.fit_parts(number)) == 2
    assert [roles.viewers(number) for number in range(4)] == [(1, 2), (0, 2), (0, 1), (0, 1)]


def test_signals_of_the_extrapolators_are_the_stored_statistics(run: Run) -> None:
    table = table_of(run, "embeddings")
    assert nodes_of(table).signals[:, 0] == pytest.approx(table["loss"].to_numpy())


def copied(run: Run, folder: Path) -> Run:
    shutil.copytree(run.uri, folder / "run")
    return Run(str(folder / "run"))


def assert_same_file(run: Run, copy: Run, uri: str) -> None:
    """Compare a file of the copy with that of the run, which workers wrote."""
    path = uri.removeprefix(f"{copy.uri}/")
    assert storage.read_bytes(uri) == storage.read_bytes(run.path(path)), path


def one_blas_thread() -> threadpool_limits:
    """As in a worker: the number of threads changes the rounding of numpy's products."""
    return threadpool_limits(1)


def silent(done: int, total: int) -> None:
    """Progress of a step."""


def test_fits_in_this_process_are_those_of_the_workers(run: Run, tmp_path: Path) -> None:
    copy, config = copied(run, tmp_path), run.config()
    for file in (copy.learning_curve_file, copy.fidelity_file):
        storage.delete(file)
    for part in range(PARTS):
        storage.delete(copy.part_model_file(part))
        storage.delete(copy.part_model_weights(part))
        for which in ("seed", "audit"):
            storage.delete(copy.held_out_predictions(f"{which}-{part}"))
    with one_blas_thread():
        for part in range(PARTS):
            fit_part(part, config, copy, 600, silent)
        write_curve(config, copy, 600, silent)
        write_fidelity(config, copy, 600, silent)
    # not byte by byte: other tests of this process can have changed how its libraries round
    for part in range(PARTS):
        assert storage.exists(copy.part_model_weights(part))
        for which in ("seed", "audit"):
            name = f"{which}-{part}"
            old, new = (storage.read_table(each.held_out_predictions(name)) for each in (run, copy))
            assert new["sample_id"].equals(old["sample_id"])
            assert new["measured"].equals(old["measured"])
            spread = float(np.std(old["predicted"].to_numpy()))
            difference = np.abs(new["predicted"].to_numpy() - old["predicted"].to_numpy())
            assert difference.max() < 0.05 * spread
    for figure in ("spearman", "pearson"):
        old, new = (storage.read_json(each.fidelity_file)["fidelity"] for each in (run, copy))
        assert new[figure] == pytest.approx(old[figure], abs=0.01)
    curves = [storage.read_json(each.learning_curve_file) for each in (run, copy)]
    assert curves[0].keys() == curves[1].keys()


def test_probes_in_this_process_are_those_of_the_workers(direct: Run, tmp_path: Path) -> None:
    copy, config = copied(direct, tmp_path), direct.config()
    fragment = min(copy.done("scores"))
    for file in (copy.probe_weights, copy.fidelity_file, copy.score_shard(fragment)):
        storage.delete(file)
    with one_blas_thread():
        fit_probes(config, copy, 600, silent)
    worker = WorkerContext(config, copy.uri, threads=1, gpu=False)
    result = ProbeActor(worker)(fragment, read_viewed(config, copy.uri, fragment))
    assert result.samples == len(storage.read_table(copy.score_shard(fragment)))
    old, new = (load_probes(each) for each in (direct, copy))
    for proxy, probe in new.items():
        np.testing.assert_allclose(probe.mean, old[proxy].mean, rtol=1e-9)
        np.testing.assert_allclose(probe.temperature, old[proxy].temperature, rtol=1e-6)
    before, after = (storage.read_table(each.score_shard(fragment)) for each in (direct, copy))
    assert after["sample_id"].equals(before["sample_id"])
    np.testing.assert_allclose(after["score"].to_numpy(), before["score"].to_numpy(), rtol=1e-4)


def test_an_actor_in_this_process_embeds_and_scores_as_the_workers_do(
    run: Run, tmp_path: Path
) -> None:
    copy, config = copied(run, tmp_path), run.config()
    fragment = next(item for item in copy.fragments() if item.fragment_id in copy.done("views"))
    worker = WorkerContext(config, copy.uri, threads=1, gpu=False)
    name = fragment.fragment_id
    for file in (copy.embedding_shard(name), copy.view_shard(name), copy.score_shard(name)):
        storage.delete(file)
    batch = embed._read(config, copy.uri, False, fragment)
    EmbedActor(worker, probe_fraction=1.0)(name, batch)
    ScoreActor(worker)(name, read_samples(config, copy.uri, name))
    for file in (copy.embedding_shard(name), copy.view_shard(name), copy.score_shard(name)):
        assert_same_file(run, copy, file)


def test_a_part_without_seed_samples_is_an_error(run: Run, tmp_path: Path) -> None:
    copy, config = copied(run, tmp_path), run.config()
    for shard in copy.done("measured"):
        storage.delete(copy.measured_shard(shard))
    with pytest.raises(StageError, match="no seed sample to extrapolate to part 0 from"):
        PartData(config, copy, 0)


def test_cross_fitting_needs_three_parts() -> None:
    with pytest.raises(ConfigError, match="cross_fit needs 3 parts or more"):
        small_config("r", "proxy.parts=2", "proxy.cross_fit=true")
    with pytest.raises(ConfigError, match=r"measure\.loss\.at: embeddings needs proxies"):
        small_config("r", "measure.loss.at=embeddings")
    with pytest.raises(ConfigError, match="gnn-published needs the embeddings of one proxy"):
        small_config("r", "proxy.parts=3", "extrapolate.method=gnn-published")
    assert not small_config("r", "proxy.parts=3", "proxy.cross_fit=false").proxy.cross_fits
