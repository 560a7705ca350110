"""The task and the actor of the stage `embed`, in this process; whole runs are in test_run."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from helpers import QUIET, photograph, small_config
from PIL import Image
from ray.data.block import BlockAccessor
from safetensors.torch import save

from raypipe import storage
from raypipe.config import Config
from raypipe.distributed.actor_pool import WorkerContext
from raypipe.distributed.cluster import Cluster
from raypipe.distributed.context import Context
from raypipe.errors import ResourceError
from raypipe.proxies.networks import build_network
from raypipe.runs.checkpoints import load_checkpoint
from raypipe.runs.ledger import StageRecord
from raypipe.runs.manifests import ProxyManifest, ProxyOfPart, SeedManifest, TrainedProxy
from raypipe.runs.run import Run
from raypipe.sources import Fragment
from raypipe.stages.embed.actor import EmbedActor
from raypipe.stages.embed.stage import EmbedStage, _read
from raypipe.stages.index.stage import IndexStage
from raypipe.vision.decode import decode

SIZE = 16


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Fragment, dict[str, bytes]]:
    """An indexed folder of JPEGs and other files, and an untrained proxy; the files by sample id."""
    folder = tmp_path_factory.mktemp("embed")
    pictures = [photograph(0).resize((40 + number, 50)) for number in range(6)]
    files = {
        f"a/{number}.jpg": encode(picture, "JPEG", quality=90)
        for number, picture in enumerate(pictures)
    }
    files |= {
        "b/0.png": encode(pictures[0], "PNG"),
        "b/1.jpg": encode(pictures[1].convert("CMYK"), "JPEG"),
    }
    files |= {
        "b/2.jpg": files["a/2.jpg"][:-30],
        "b/3.jpg": b"words",
        "b/4.jpg": encode(pictures[4].convert("L"), "JPEG"),
    }
    for name, content in files.items():
        path = folder / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    where = [
        f"source.uri={folder}/data",
        "source.format=imagefolder",
        "source.limit=null",
        f"proxy.image_size={SIZE}",
    ]
    config = small_config(f"{folder}/run", *where, "embed.batch_size=4")
    run = Run(config.run)
    IndexStage().execute(Context(config, run, QUIET), StageRecord(fingerprint=""))
    torch.manual_seed(0)
    storage.write_bytes(
        run.path("proxy", "checkpoints", "final.safetensors"),
        save(build_network("small", 2, SIZE).state_dict()),
    )
    proxy = TrainedProxy(1, 1, (), (), "final.safetensors")
    part = ProxyOfPart(20, (20,), proxy)
    mean, std = (0.5,) * 3, (0.25,) * 3
    ProxyManifest("small", 2, SIZE, mean, std, 20, 0, (part,)).write(run)
    SeedManifest(samples=20, shard_samples=(20,)).write(run)
    (fragment,) = run.fragments()
    return config, fragment, files


def embed(
    ready: tuple[Config, Fragment, dict[str, bytes]], aside: bool
) -> tuple[dict[str, Any], dict[str, str]]:
    """Embeddings and reject reasons by sample id; the columns go through a block of Ray Data."""
    config, fragment, _ = ready
    run = Run(config.run)
    block = BlockAccessor.batch_to_block(_read(config, config.run, aside, fragment))
    batch = BlockAccessor.for_block(block).to_batch_format("numpy")
    actor = EmbedActor(WorkerContext(config, config.run, threads=1, gpu=False), aside)
    counts = actor(fragment.fragment_id, batch)
    table = storage.read_table(run.path("embeddings", f"{fragment.fragment_id}.parquet"))
    rejects = storage.read_table(run.path("rejects", f"{fragment.fragment_id}.parquet")).to_pylist()
    assert (counts.samples, counts.rejects) == (len(table), len(rejects))
    found = dict(zip(table["sample_id"].to_pylist(), table["embedding"].to_pylist(), strict=True))
    return found, {row["sample_id"]: row["reason"] for row in rejects}


def test_an_embedding_is_that_of_the_plain_image(
    ready: tuple[Config, Fragment, dict[str, bytes]],
) -> None:
    """Only the training flips and shifts images."""
    config, _, files = ready
    found, rejects = embed(ready, aside=False)
    assert config.proxy.crop_padding > 0
    assert set(rejects) == {"b/2.jpg", "b/3.jpg"} and set(found) == set(files) - set(rejects)
    run = Run(config.run)
    pixels = np.stack([decode(files[sample_id], SIZE, 10**6) for sample_id in found])
    with torch.inference_mode():
        expected = load_checkpoint(run, "final.safetensors").embed(torch.from_numpy(pixels)).numpy()
    np.testing.assert_allclose(np.array(list(found.values())), expected, rtol=1e-4, atol=1e-5)


def test_jpegs_left_to_the_actor_give_the_same_samples_and_nearly_the_same_embeddings(
    ready: tuple[Config, Fragment, dict[str, bytes]],
) -> None:
    here, rejects = embed(ready, aside=False)
    there, rejected = embed(ready, aside=True)
    assert rejected == rejects and list(there) == list(here)
    for sample_id in ("b/0.png", "b/1.jpg"):
        np.testing.assert_allclose(there[sample_id], here[sample_id], rtol=1e-5, atol=1e-6)
    difference = np.array(list(there.values())) - np.array(list(here.values()))
    assert 0 < np.abs(difference).mean() < 0.1 * np.std(list(here.values()))


def test_a_gpu_is_asked_for_where_there_is_one(
    ready: tuple[Config, Fragment, dict[str, bytes]],
) -> None:
    config, stage = ready[0], EmbedStage()
    context = Context(
        config.model_copy(update={"embed": config.embed.model_copy(update={"decode": "gpu"})}),
        Run(config.run),
        QUIET,
    )
    context.__dict__["cluster"] = Cluster(2, 0, 1, 2, False)
    with pytest.raises(
        ResourceError,
        match=r"embed\.decode is gpu, but embed has no GPU \(1 node, 2 CPUs, 0 GPUs\); set it to auto",
    ):
        stage.execute(context, StageRecord(fingerprint=""))
    # the pixels differ then, and so do the embeddings
    assert stage.settings(context.config) == {**stage.settings(config), "decode": "gpu"}
