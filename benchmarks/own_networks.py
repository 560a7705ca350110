"""Whole runs with networks, weights, a score and a strategy from outside raypipe.

    python benchmarks/own_networks.py DATA --dir FOLDER [--runs small,convnext,...]
        > benchmarks/results/own-networks-cpu.txt

DATA is a folder of Parquet files, as for jobs/configs/cifar10.yaml. The runs:

    small     raypipe's own network, for comparison
    convnext  torchvision:convnext_tiny
    vit       timm:vit_tiny_patch16_224, with weights from a safetensors file on an S3 server of
              this machine (moto). No weights are downloaded: the file has random ones
    module    a function in a file next to the configuration, submitted with `ray job submit`
    plugin    the score and the strategy of examples/plugin, installed with pip; with `small`
    proxy     `small`, with a score that is extrapolated from the embeddings of the proxy
    table     the same, from embeddings of a table: those that the run `convnext` wrote
    features  the same, from features by a function in a file next to the configuration, submitted
              with `ray job submit`

Each run is the command that a user would type, and `seconds` is its wall time, with the start of
Ray (for `module`, of the job). Trust limits are off, so that weak proxies also get keep-lists.
Finished runs in FOLDER are not repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from local_nodes import ROOT, LocalNodes, ray_command

SCORE, STRATEGY = "late-doubt", "uncontradicted"
BUCKET = "own-networks"
NETWORK = '''"""A network with a layer of its own."""

import torch
from torch import nn


class Scale(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, features):
        return features * self.factor


def build(classes, image_size, channels):
    layers = []
    for width in (32, 64, 128):
        layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.BatchNorm2d(width)]
        layers += [Scale(width), nn.GELU()]
        channels = width
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1)]
    return nn.Sequential(*layers, *pool, nn.Linear(channels, classes))
'''


FEATURES = '''"""Mean colours of the sixteen tiles of an image."""

from torch import nn


def build(image_size, channels):
    return nn.Sequential(nn.AvgPool2d(image_size // 4), nn.Flatten())
'''
EL2N = {"scores": ["el2n"], "el2n": {"at": "checkpoints"}}
"""A score that is extrapolated."""


def settings(run: str, arguments: argparse.Namespace, **changes: Any) -> dict[str, Any]:
    """The configuration that all runs have in common, with changes by section."""
    config: dict[str, Any] = {
        "run": run,
        "source": {
            "uri": str(Path(arguments.data).resolve()),
            "format": "parquet",
            "include": "train-*",
            "image_column": "image",
            "label_column": "label",
            "limit": arguments.samples,
        },
        "seed": {"fraction": arguments.fraction},
        "proxy": {
            "model": "small",
            "image_size": 32,
            "epochs": arguments.epochs,
            "batch_size": 32,
            "optimizer": "adamw",
            "lr": 1e-3,
            "checkpoints": 2,
        },
        "measure": {"scores": ["loss"]},
        "select": {"keep": [0.3, 0.5], "strategy": "ccs"},
        "trust": {"min_spearman": -1, "min_stability": -1, "min_accuracy_over_chance": -1},
    }
    for section, values in changes.items():
        config[section] = config.get(section, {}) | values
    return config


RUNS: dict[str, dict[str, Any]] = {
    "small": {},
    "convnext": {"proxy": {"model": "torchvision:convnext_tiny"}},
    "vit": {
        "proxy": {
            "model": "timm:vit_tiny_patch16_224",
            "weights": f"s3://{BUCKET}/vit.safetensors",
        }
    },
    "module": {"proxy": {"model": "my_network:build"}},
    "plugin": {
        "measure": {"scores": [SCORE], "options": {SCORE: {"epochs": 5}}},
        "select": {"strategy": STRATEGY, "options": {STRATEGY: {"max_loss": 3}}},
    },
    "proxy": {"measure": EL2N},
    "table": {"measure": EL2N, "embed": {"model": "none", "from": "../convnext/run/embeddings"}},
    "features": {"measure": EL2N, "embed": {"model": "my_features:build"}},
}
"""Changes of the configuration, by run."""


@contextlib.contextmanager
def weights_on_s3() -> Iterator[dict[str, str]]:
    """Put weights of the ViT on an S3 server, and yield the variables that lead there."""
    import logging

    import timm
    import torch
    from moto.server import ThreadedMotoServer
    from safetensors.torch import save_file

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    variables = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    }
    os.environ |= variables
    try:
        from raypipe import storage

        storage.filesystem(f"s3://{BUCKET}")[0].mkdir(BUCKET)
        torch.manual_seed(0)
        network = timm.create_model("vit_tiny_patch16_224", img_size=32)
        with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
            save_file(network.state_dict(), file.name)
            storage.write_bytes(f"s3://{BUCKET}/vit.safetensors", Path(file.name).read_bytes())
        yield variables
    finally:
        server.stop()


def environment(**variables: str) -> dict[str, str]:
    """The environment of a command."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **variables}


def finish(command: list[str], folder: Path, variables: Mapping[str, str]) -> None:
    """Run a command; its output is in the file `log` of its folder."""
    with open(folder / "log", "wb") as log:
        done = subprocess.run(command, cwd=folder, env=variables, stdout=log, stderr=log)
    if done.returncode:
        sys.exit(f"{folder.name} failed:\n{(folder / 'log').read_text()[-3000:]}")


def timed(command: list[str], folder: Path, variables: Mapping[str, str]) -> float:
    started = time.monotonic()
    finish(command, folder, variables)
    return time.monotonic() - started


def measure(name: str, folder: Path) -> float:
    """Do one run; return its seconds."""
    command = [sys.executable, "-m", "raypipe", "run", "run.yaml"]
    if name in ("module", "features"):
        (folder / "my_network.py").write_text(NETWORK)
        (folder / "my_features.py").write_text(FEATURES)
        with (
            tempfile.TemporaryDirectory(prefix="own-") as short,
            LocalNodes(Path(short) / "ray", jobs=True) as nodes,
        ):
            nodes.add(cpus=os.cpu_count() or 1)
            submit = ["job", "submit", f"--address={nodes.job_server}", "--working-dir=."]
            return timed(ray_command(*submit, "--", *command), folder, nodes.driver())
    if name == "plugin":
        site, source = folder / "site", folder / "source"
        shutil.copytree(ROOT / "examples" / "plugin", source, dirs_exist_ok=True)
        install = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps"]
        install += ["--no-build-isolation", f"--target={site}", str(source)]
        finish(install, folder, environment())
        path = os.pathsep.join([str(ROOT), str(site)])
        return timed(command, folder, environment(PYTHONPATH=path))
    if name == "vit":
        with weights_on_s3() as variables:
            return timed(command, folder, environment(**variables))
    return timed(command, folder, environment())


def figures(name: str, folder: Path) -> str:
    """A line of the table."""
    summary = json.loads((folder / "run" / "report" / "summary.json").read_text())
    config = yaml.safe_load((folder / "run.yaml").read_text())
    fidelity, stability = summary["fidelity"], summary["stability"] or {}
    kept = "/".join(str(item["samples"]) for item in summary["keep"])
    seen = config.get("embed", {})
    features = "embed.from" if "from" in seen else seen.get("model")
    network = config["proxy"]["model"] + (f", {features}" if features else "")
    columns = [
        f"{name:<9}{network:<28}{config['measure']['scores'][0]:<11}",
        *(
            f"{value:>10.2f}" if value is not None else f"{'-':>10}"
            for value in (fidelity["spearman"], stability.get("value"), fidelity["proxy_accuracy"])
        ),
        f"{float((folder / 'seconds').read_text()):>9.0f}",
        f"{kept:>11}",
    ]
    return "".join(columns)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="folder of Parquet files")
    parser.add_argument("--dir", required=True, help="folder for the runs")
    parser.add_argument("--runs", default=",".join(RUNS), help="names, with commas")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--fraction", type=float, default=0.3, help="seed.fraction")
    parser.add_argument("--epochs", type=int, default=10)
    arguments = parser.parse_args()
    print(
        f"{platform.machine()}, {os.cpu_count()} cores; {arguments.samples:,} images of 32 pixels, "
        f"seed.fraction {arguments.fraction}, {arguments.epochs} epochs"
    )
    print(
        f"{'run':<9}{'network':<28}{'score':<11}{'fidelity':>10}{'stability':>10}"
        f"{'accuracy':>10}{'seconds':>9}{'kept':>11}",
        flush=True,
    )
    for name in arguments.runs.split(","):
        folder = Path(arguments.dir).resolve() / name
        if not (folder / "seconds").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            config = settings(str(folder / "run"), arguments, **RUNS[name])
            (folder / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
            seconds = measure(name, folder)
            (folder / "seconds").write_text(f"{seconds:.1f}\n")
        print(figures(name, folder), flush=True)


if __name__ == "__main__":
    main()
