from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raypipe import storage
from raypipe.assessment.fidelity import compare
from raypipe.assessment.held_out import HeldOutPredictions
from raypipe.config import parse_config
from raypipe.config.choices import STRATEGY_TEXTS
from raypipe.distributed.context import Context
from raypipe.errors import RaypipeError
from raypipe.progress import Progress
from raypipe.report import build, formats, plots, thumbnails
from raypipe.runs.ledger import StageRecord
from raypipe.runs.run import Run
from raypipe.selection import STRATEGIES
from raypipe.stages.report import ReportStage
from raypipe.stages.select.stage import write_keep_lists

MakeRun = Callable[..., Run]
HOSTILE = (
    "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7*7 }}$\\frac{1}{2}$\x07]]>-->"
    "</style></svg>"
)


class Elements(HTMLParser):
    """Every element with its attributes, and the text outside of style."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._open = "", ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._open = tag

    def handle_data(self, data: str) -> None:
        self.text += data if self._open != "style" else ""


def built(run: Run) -> tuple[str, Elements]:
    uri = build(run)
    assert uri == run.path("report", "index.html")
    page = Path(uri).read_text("utf-8")
    return page, Elements(page)


def test_every_link_within_the_page_leads_somewhere_and_terms_are_explained(
    make_run: MakeRun,
) -> None:
    _, elements = built(make_run())
    ids = {attributes["id"] for _, attributes in elements.found if attributes.get("id")}
    links = {attributes.get("href") or "" for tag, attributes in elements.found if tag == "a"}
    inner = {link[1:] for link in links if link.startswith("#")}
    assert inner <= ids
    assert {"terms", "term-fidelity", "term-proxy"} <= inner
    assert {"term-seed-set", "term-audit-set", "term-keep-list", "term-rehearsal"} <= ids


def test_the_page_says_what_the_strategy_keeps(make_run: MakeRun) -> None:
    run = make_run(select={"keep": [0.5]})
    text = built(run)[1].text
    assert "Strategy top: the highest scores." in text and "Every keep-list holds these." in text
    write_keep_lists(
        run,
        parse_config(
            {"run": run.uri, "source": {"uri": "x"}, "select": {"strategy": "random", "keep": 0.5}}
        ).select,
    )
    text = built(run)[1].text
    assert (
        "Strategy random: drawn at random, whatever the score." in text
        and "100 samples, random" in text
    )
    assert "Every keep-list" not in text and text.count("The strategy decides which") == 2


def test_every_strategy_has_words() -> None:
    assert set(STRATEGY_TEXTS) == set(STRATEGIES)


def test_the_page_shows_the_run(make_run: MakeRun) -> None:
    run = make_run()
    page, elements = built(run)
    text = " ".join(elements.text.split()).replace("\u202f", " ")
    assert "Keep 50 %: 100 of 199 samples" in text
    assert "Trust in these scores is good. Fidelity" in text
    assert "measured scores on 10 seed samples held out of the fit" in text
    for title in (
        "Training on it for the same number of epochs takes 50 % fewer steps, "
        "and so costs about 50 % less.",
        "Class by class: the lowest and the highest scores of 3 classes and the unlabelled",
        "Highest scores",
        "Lowest scores",
        "Most uncertain",
        "Labels to check",
        "Embedding map",
        "Where the time went",
    ):
        assert title in text
    assert len(re.findall(r"<svg role", page)) == 6
    assert len(re.findall(r'<svg class="mini"', page)) == 4, "three classes and the unlabelled"
    images = [attributes for tag, attributes in elements.found if tag == "img"]
    assert len(images) > 24
    assert all(
        (attributes["src"] or "").startswith("data:image/") and attributes["class"] == "pixelated"
        for attributes in images
    )
    summary = json.loads(Path(run.path("report", "summary.json")).read_text())
    assert summary["keep"][1]["samples"] == 100


def test_nothing_is_loaded_and_nothing_runs(make_run: MakeRun) -> None:
    page, elements = built(make_run())
    tags = {tag for tag, _ in elements.found}
    assert not tags & {"script", "iframe", "object", "embed", "form"}
    for _, attributes in elements.found:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in {"src", "href", "xlink:href", "srcset", "action"}:
                assert (value or "").startswith(("data:", "#"))
    assert not re.search(r"url\((?!#)", page)
    assert "@import" not in page


def test_ids_of_plots_do_not_clash(make_run: MakeRun) -> None:
    page, elements = built(make_run())
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)


def test_plots_take_their_colours_from_the_page(make_run: MakeRun) -> None:
    page, _ = built(make_run())
    svgs = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.S))
    assert "var(--ink)" in svgs and "var(--measured)" in svgs and "var(--extrapolated)" in svgs
    assert not set(re.findall(r"#0101\d\d", svgs))
    assert not re.search(r"(fill|stroke): #(000000|ffffff)", svgs)


def test_the_audit_set_leads_beside_every_baseline(make_run: MakeRun) -> None:
    rng = np.random.default_rng(0)

    def judged(n: int, noise: float) -> dict:
        measured = rng.normal(size=n)
        rivals = {
            "class_mean": rng.normal(size=n),
            "gnn_published": measured + 3 * rng.normal(size=n),
        }
        predicted = measured + noise * rng.normal(size=n)
        found = HeldOutPredictions(
            np.zeros(n, np.int64), measured, predicted, np.ones(n, np.float32), rivals, n_fit=400
        )
        return compare(found, 0, (0.25, 0.5)).as_dict()

    run = make_run()
    audit, seed = judged(60, 1.0) | {"judged_on": "audit"}, judged(500, 0.2) | {"judged_on": "seed"}
    points = [
        {"samples": 100 * 2**step, "spearman": 0.3 + 0.1 * step, "spearman_interval": [0.2, 0.9]}
        for step in range(3)
    ]
    doubled = {
        "samples": 800,
        "spearman": 0.57,
        "spearman_interval": [0.4, 0.7],
        "gain": 0.07,
        "gain_interval": [0.01, 0.12],
    }
    curve = {
        "method": "kernel regression",
        "n_held": 60,
        "judged_on": "audit",
        "points": points,
        "doubled": doubled,
        "note": "",
    }
    about = {"method": "gnn", "fidelity": audit, "fidelity_seed": seed, "learning_curve": curve}
    storage.write_json(run.path("extrapolator", "extrapolator.json"), about)
    page, _ = built(run)
    shown = " ".join(
        re.sub(r"<(svg|style).*?</\1>|<[^>]+>", " ", page, flags=re.S).split()
    ).replace("\u202f", " ")
    assert "extrapolated and measured scores on 60 audit samples outside the seed set" in shown
    assert shown.index("60 audit samples") < shown.index(
        "On 500 seed samples held out of the fit, each predicted by a fit on at least 400"
    )
    assert "Spearman Pearson top 25 % top 50 %" in shown
    low, high = audit["baselines"]["gnn_published"]["overlap_interval"]["0.25"]
    table = shown[shown.index("Spearman Pearson top") : shown.index("Top: cut a keep-list")]
    for row in ("gnn_published", "class_mean", "random"):
        figures = re.search(rf"{row} ([^a-z]*(to [^a-z]*)*)", table)[1]
        assert len(re.findall(r"to", figures)) == 5, f"{row}: five figures, each with its interval"
    assert f"{formats.share(low, 0)} to {formats.share(high, 0)}".replace("\u202f", " ") in shown
    assert (
        "Doubling the seed set is predicted to raise the Spearman correlation by 0.070 "
        "(95 % range 0.010 to 0.120)." in shown
    )
    assert "800, predicted 0.570 0.400 to 0.700" in shown
    summary = json.loads(Path(run.path("report", "summary.json")).read_text())
    assert (
        summary["fidelity"]["judged_on"] == "audit"
        and summary["fidelity_seed"]["judged_on"] == "seed"
    )


def test_refused_keep_lists_are_said(make_run: MakeRun) -> None:
    run = make_run()
    records = run.ledger()
    records["select"].state, records["select"].error = (
        "refused",
        "no keep-lists: too low. More epochs would help",
    )
    run.write_ledger(records)
    storage.delete(run.path("keep"))
    _, elements = built(run)
    assert "No keep-lists: too low. More epochs would help." in elements.text
    assert "not finished" not in elements.text
    summary = json.loads(Path(run.path("report", "summary.json")).read_text())
    assert summary["unfinished"] == [] and summary["refused"].startswith("no keep-lists")


def test_hostile_names_stay_text(make_run: MakeRun) -> None:
    run = make_run(names=(HOSTILE, "dog", "owl"), path=HOSTILE + "-{}", fragments=2)
    storage.write_table(
        run.path("rejects", "f001.parquet"),
        pa.table({"sample_id": [HOSTILE], "fragment": ["f001"], "reason": [HOSTILE]}),
    )
    _, elements = built(run)
    tags = [tag for tag, _ in elements.found]
    assert "script" not in tags
    small = sum(
        tag == "svg" and attributes.get("class") == "mini" for tag, attributes in elements.found
    )
    assert (
        tags.count("style") == 1 + tags.count("svg") - small
    )  # Matplotlib puts one into each plot
    assert "49" not in re.findall(r"img>(\S+)\$", elements.text)
    titles = [
        attributes["title"]
        for tag, attributes in elements.found
        if attributes.get("class") == "tile"
    ]
    assert titles
    assert all((title or "").startswith(HOSTILE) for title in titles)
    assert HOSTILE.partition("\x07")[0] in elements.text


@pytest.mark.parametrize(
    "folder", ["index", "scores", "embeddings", "keep", "rejects", "extrapolator"]
)
def test_a_run_that_lacks_something_has_a_report(make_run: MakeRun, folder: str) -> None:
    run = make_run()
    storage.delete(run.path(folder))
    _, elements = built(run)
    assert "How to read this page" in elements.text
    said = {
        "scores": "There are no scores yet",
        "keep": "No keep-lists yet",
        "extrapolator": "is not known",
        "rejects": "0 samples and 1 whole file",
    }
    assert said.get(folder, "") in elements.text
    assert ("Embedding map" in elements.text) == (folder not in {"embeddings", "scores"})


def test_a_stability_of_before_repeats_were_told_apart_is_shown(make_run: MakeRun) -> None:
    run = make_run()
    assessment = storage.read_json(run.extrapolator_summary)
    assessment["stability"] = {
        "value": 0.91,
        "interval": [0.9, 0.92],
        "single": 0.83,
        "proxies": 2,
        "samples": 1000,
        "within_classes": True,
        "note": "",
    }
    storage.write_json(run.extrapolator_summary, assessment)
    _, elements = built(run)
    assert "those of a run with another seed set and other proxies" in elements.text


def test_no_rejects_is_said(make_run: MakeRun) -> None:
    run = make_run()
    storage.delete(run.path("rejects"))
    table = storage.read_table(run.path("index", "fragments-0.parquet"))
    storage.write_table(run.path("index", "fragments-0.parquet"), table.slice(0, 4))
    _, elements = built(run)
    assert "None: every sample of the source could be read." in elements.text


def test_a_run_of_which_nothing_is_done(make_run: MakeRun) -> None:
    run = make_run()
    for folder in ("index", "scores", "embeddings", "keep", "rejects", "extrapolator"):
        storage.delete(run.path(folder))
    run.write_ledger({})
    _, elements = built(run)
    assert "This run is not finished: index, seed, proxy" in elements.text
    assert "No stage has run yet." in elements.text


def test_a_source_that_is_gone_is_said_and_the_samples_are_listed(
    make_run: MakeRun, source
) -> None:
    run = make_run()
    source.broken = {f"f{number:03d}" for number in range(4)}
    _, elements = built(run)
    assert "The source cannot be read, so no images are shown" in elements.text
    assert not any(tag == "img" for tag, _ in elements.found)
    assert sum(attributes.get("class") == "tile" for _, attributes in elements.found) > 24


def test_of_many_classes_the_ends_are_shown(make_run: MakeRun) -> None:
    run = make_run(names=[f"class {number:03d} {'x' * 40}" for number in range(60)], fragments=12)
    _, elements = built(run)
    assert sum(attributes.get("class") == "gap" for _, attributes in elements.found) == 1
    assert "All of 60 classes and the unlabelled: middle 80 %" in elements.text
    shown = json.loads(Path(run.path("report", "summary.json")).read_text())["shown_classes"]
    assert len(shown) == 24


def test_a_damaged_keep_list_is_named(make_run: MakeRun) -> None:
    run = make_run()
    storage.write_bytes(run.path("keep", "keep-0.50.parquet"), b"PAR1nothing")
    with pytest.raises(RaypipeError, match=r"keep-0\.50\.parquet: not a readable keep-list"):
        build(run)


def test_class_names_are_no_formulas_in_plots() -> None:
    item = {"name": r"$\undefined{x}$", "q10": 0.0, "q25": 0.1, "q50": 0.2, "q75": 0.3, "q90": 0.4}
    svg = plots.class_spread([item, {**item, "name": "\x00\n"}, {**item, "name": "犬"}])
    assert r"$\undefined{x}$" in svg
    assert "犬" in svg
    assert "\x00" not in svg


def test_matplotlib_needs_no_writable_home(tmp_path: Path) -> None:
    code = "import raypipe.report.plots, matplotlib; print(matplotlib.get_configdir())"
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": "/proc/nowhere",
        "TMPDIR": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(str(tmp_path))
    assert done.stderr == ""


def test_the_stage_is_complete_until_something_it_shows_changes(make_run: MakeRun) -> None:
    run = make_run()
    context = Context(parse_config(run.config().model_dump()), run, Progress(quiet=True))
    stage, record = ReportStage(), StageRecord()
    assert not stage.complete(context, record)
    stage.execute(context, record)
    assert record.samples == 199
    assert stage.complete(context, record)
    write_keep_lists(run, context.config.select.model_copy(update={"keep": (0.25,)}))
    assert not stage.complete(context, record)
    stage.execute(context, record)
    records = run.ledger()
    records["extrapolate"].finished = "later"
    run.write_ledger(records)
    assert not stage.complete(context, record)


def test_a_run_in_an_object_store(make_run: MakeRun, s3: str) -> None:
    run, there = make_run(), Run(f"{s3}/report")
    for file in storage.listing(run.uri):
        storage.write_bytes(there.path(file.path), storage.read_bytes(run.path(file.path)))
    assert build(there) == f"{s3}/report/report/index.html"
    assert b"Keep 50" in storage.read_bytes(there.path("report", "index.html"))
    assert storage.read_json(there.path("report", "summary.json"))["counts"]["samples"] == 199


def test_images_can_be_left_out(make_run: MakeRun, source) -> None:
    _, elements = built(make_run(report={"images": 0}))
    assert source.reads == []
    assert not any(tag == "img" for tag, _ in elements.found)


def test_classes_with_a_histogram_and_images_of_their_own(make_run: MakeRun) -> None:
    run = make_run(
        names=[f"c{number}" for number in range(9)], report={"classes": 4, "class_images": 2}
    )
    page, elements = built(run)
    assert page.count('<svg class="mini"') == 4
    assert "4 of 9 classes and the unlabelled: the lowest and the highest medians" in elements.text
    summary = json.loads(Path(run.path("report", "summary.json")).read_text())
    assert [len(item[end]) for item in summary["class_grids"] for end in ("lowest", "highest")] == [
        2
    ] * 8
    assert [item["name"] for item in summary["class_grids"]] == [
        item["name"] for item in summary["class_histograms"]
    ]
    run = make_run(report={"classes": 0})
    page, elements = built(run)
    assert 'class="mini"' not in page and "Class by class" not in elements.text


def test_every_point_of_the_map_is_in_a_table(make_run: MakeRun) -> None:
    run = make_run(select={"keep": [0.5]})
    _, elements = built(run)
    table = storage.read_table(run.path("report", "map.parquet"))
    kept = set(storage.read_table(run.path("keep", "keep-0.50.parquet"))["sample_id"].to_pylist())
    scores = pa.concat_tables([shard for _, shard in storage.iter_tables(run.path("scores"))])
    score = dict(zip(scores["sample_id"].to_pylist(), scores["score"].to_pylist(), strict=True))
    assert table.column_names == ["sample_id", "x", "y", "score", "kept"] and len(table) == 199
    assert all(
        row["kept"] == (row["sample_id"] in kept) and row["score"] == score[row["sample_id"]]
        for row in table.to_pylist()
    )
    assert "kept (100)" in elements.text and "pruned (99)" in elements.text
    storage.delete(run.path("keep"))
    build(run)
    assert storage.read_table(run.path("report", "map.parquet"))["kept"].null_count == 199, (
        "without a list"
    )
    storage.delete(run.path("embeddings"))
    build(run)
    assert "map.parquet" not in storage.names(run.path("report"))


def test_thumbnails_are_read_with_the_settings_of_the_run(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, asked = make_run(source={"uri": "elsewhere", "max_pixels": 7}), []

    def refuse(settings: object) -> None:
        asked.append(settings)
        raise RaypipeError("no")

    monkeypatch.setattr(thumbnails, "open_source", refuse)
    build(run)
    assert (asked[0].uri, asked[0].max_pixels) == ("elsewhere", 7)


def test_the_histogram_marks_where_keep_lists_end() -> None:
    edges = np.linspace(0, 1, 11).tolist()
    svg = plots.score_histogram(
        {"edges": edges, "measured": [1] * 10, "extrapolated": [0] * 10}, [(0.3, 0.7), (0.5, 5.0)]
    )
    assert "30\u202f%" in svg
    assert "50\u202f%" not in svg  # ends outside the drawn range
    assert "extrapolated (" not in svg
