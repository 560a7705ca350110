"""The work of every stage: the size of a run, times rates."""

from __future__ import annotations

from dataclasses import replace

from raypipe.config import Config
from raypipe.config.extrapolate import SEARCHERS_PER_GPU
from raypipe.config.measure import RECALIBRATED
from raypipe.estimate import rates
from raypipe.estimate.workload import Effort, Machine, Workload
from raypipe.runs.pilot import PilotPlan
from raypipe.runs.proxy_roles import ProxyRoles
from raypipe.runs.sizes import INDEX_TASK_FILES, PUBLISHED_SAMPLES, QUICK_FOLDS_AUDIT, probe_samples
from raypipe.stages.pilot.plan import make_plan, plan_seconds
from raypipe.vision import network_costs

QUICK_FOLD = 0.4
"""Time of a quick fold as a share of a fit: one network, where the audit set sets the intervals.

See `raypipe.stages.extrapolate.assess.write_fold`.
"""

PROBE_PRODUCT_SECONDS = 4e-10
"""Of a multiply-add in float64 on one CPU, in the products of linear probes."""


def efforts(work: Workload, machine: Machine) -> dict[str, Effort]:
    """Return the work of each stage, by the constants of `raypipe.estimate.rates`."""
    config = work.config
    by_stage = {
        "index": _indexing(work),
        "seed": _drawing(work),
        **({"label": _labelling(work, machine)} if config.unsupervised else {}),
        "proxy": _training(work, machine),
        "measure": _measuring(work, machine),
        **({"rehearse": _rehearsal(work, machine)} if config.rehearses else {}),
        "embed": _embedding(work, machine),
        "extrapolate": _extrapolation(work, machine),
        **({"pilot": _piloting(work, machine)} if config.pilots else {}),
        "select": Effort(work.samples * 1e-5, 0, 1),
        "report": Effort(1.0 + work.samples * 1e-5, 0, 1),
    }
    return {
        stage: replace(effort, cpu=effort.cpu + rates.START_CPU_SECONDS.get(stage, 0))
        for stage, effort in by_stage.items()
    }


def _indexing(work: Workload) -> Effort:
    scan = {
        "nothing": 0.0,
        "part": work.listed * rates.FILE_SECONDS,
        "all": work.samples * rates.HEADER_SECONDS,
    }[work.scan_reads]
    return Effort(scan, 0, work.listed / INDEX_TASK_FILES + 1)


def _drawing(work: Workload) -> Effort:
    """Return the work of the stage `seed`: hash every id, decode the samples that are drawn."""
    decoding = (work.seed + work.audit) * work.decode_seconds
    return Effort(decoding + work.samples * rates.HASH_SECONDS, 0, work.seed_shards)


def _training(work: Workload, machine: Machine) -> Effort:
    proxy = work.config.proxy
    attack = rates.ATTACK * proxy.adversary.iterations if proxy.adversary is not None else 0.0
    passes = network_costs.TRAINING + attack + (proxy.trajectory == "eval") * (1 + attack)
    seen = proxy.repeats * work.seed * proxy.passes
    overhead = (
        seen / proxy.batch_size * network_costs.STEP_SECONDS
        + proxy.passes * proxy.proxies * rates.EPOCH_SECONDS
    )
    amount = seen * passes * work.forward_macs * proxy.pixel_share
    if machine.uses_gpu(proxy.use_gpu):
        return Effort(overhead, amount / machine.gpu_macs + overhead, proxy.workers * proxy.proxies)
    on_one_thread = amount / machine.cpu_macs + overhead
    workers = min(float(proxy.proxies * proxy.workers), machine.cpus)
    threads = (
        max(1.0, machine.cpus / workers)
        if proxy.cpus_per_worker == "auto"
        else float(proxy.cpus_per_worker)
    )
    speed_up = threads**rates.THREADS_POWER
    return Effort(on_one_thread / speed_up * threads, 0, workers * threads)


def _measuring(work: Workload, machine: Machine) -> Effort:
    config = work.config
    passes, audit_passes = _passes(config, work.seed)
    checkpoints = _measured_checkpoints(config)
    amount = checkpoints * (work.seed * passes + work.audit * audit_passes) * work.forward_macs
    overhead = (work.seed + work.audit) * rates.SAMPLE_SECONDS
    return _network(amount, overhead, config.measure.use_gpu, machine, work.seed_shards)


def _rehearsal(work: Workload, machine: Machine) -> Effort:
    """Return the work of a rehearsal: half of the samples are trained on, all are embedded."""
    proxy = work.config.proxy.model_copy(update={"repeats": 1})
    config = work.config.model_copy(update={"proxy": proxy})
    training = _training(replace(work, config=config, seed=work.seed // 2), machine)
    embedding = _network(
        work.seed * work.forward_macs,
        work.seed * rates.SAMPLE_SECONDS,
        work.config.embed.use_gpu,
        machine,
        work.seed_shards,
    )
    return Effort(training.cpu + embedding.cpu, training.gpu + embedding.gpu, training.shared_by)


def embedding_passes(config: Config) -> float:
    """Return the forward passes of a sample in the stage `embed`.

    With cross-fitting, samples of part 0 pass through the proxy of their own part as well.
    """
    parts = config.proxy.parts
    return len(ProxyRoles.of(config).seen_by(0)) + (1 / parts if config.proxy.cross_fits else 0.0)


def _embedding(work: Workload, machine: Machine) -> Effort:
    forward = embedding_passes(work.config) * work.forward_macs
    decodings = 1
    if work.features is not None:
        forward += work.features.macs
        decodings += work.features.image_size != work.config.proxy.image_size
    return _network(
        work.samples * (forward + _label_feature_macs(work)),
        work.samples * (decodings * work.decode_seconds + rates.SAMPLE_SECONDS),
        work.config.embed.use_gpu,
        machine,
        work.fragments,
    )


def _label_feature_macs(work: Workload) -> float:
    """Return the multiply-adds of the features that give a sample its pseudo-label.

    They are 0 if the source has labels.
    """
    settings = work.config.pseudo_labels
    if settings.clusters is None:
        return 0.0
    if settings.features == "self-supervised":
        return work.forward_macs
    return network_costs.macs(settings.model, settings.image_size)


def _labelling(work: Workload, machine: Machine) -> Effort:
    """Return the work of pseudo-labels, without the clustering itself.

    Self-supervised training takes two views of each image.
    """
    settings, proxy = work.config.pseudo_labels, work.config.proxy
    features = _network(work.seed * _label_feature_macs(work), 0, proxy.use_gpu, machine, 1)
    if settings.features == "backbone":
        return features
    like_proxy = proxy.model_copy(
        update={
            "epochs": settings.epochs,
            "checkpoints": 1,
            "checkpoint_choice": "spaced",
            "batch_size": settings.batch_size,
            "parts": 1,
            "repeats": 1,
            "adversary": None,
            "workers": 1,
            "trajectory": "none",
        }
    )
    config = work.config.model_copy(update={"proxy": like_proxy})
    training = _training(replace(work, config=config, seed=2 * work.seed), machine)
    return Effort(training.cpu + features.cpu, training.gpu + features.gpu, training.shared_by)


def _passes(config: Config, seed: int) -> tuple[float, float]:
    """Return the forward passes that a checkpoint is worth, per seed and per audit sample."""
    measure, adversary = config.measure, config.proxy.adversary
    scores = measure.at_checkpoints
    if not scores:
        return 0.0, 0.0
    moso, grand = "moso" in scores, "grand" in scores
    self_term = measure.moso.uses_self_term(seed) and not config.proxy.cross_fits
    norms = (moso and measure.moso.gradient == "all" and self_term) or (
        grand and measure.grand.gradient == "all"
    )
    if norms:
        each = rates.WITH_NORMS
    else:
        each = rates.ALIGNMENT if moso and measure.moso.gradient == "all" else 0.0
    each += (moso and measure.moso.gradient == "head") or (
        grand and measure.grand.gradient == "head"
    )
    each += bool(set(scores) - {"moso", "grand"})
    mean = (rates.MEAN_GRADIENT if measure.moso.gradient == "all" else 1.0) if moso else 0.0
    # an attack precedes each pass over the seed set
    attack = rates.ATTACK * adversary.iterations if adversary is not None else 0.0
    recalibrated = measure.recalibrates / max(1, seed // config.proxy.parts // RECALIBRATED)
    each = len(ProxyRoles.of(config).seen_by(0)) * (each + attack)
    once = mean + recalibrated + attack * (moso + recalibrated)
    return each + config.proxy.repeats * once, each


def _extrapolation(work: Workload, machine: Machine) -> Effort:
    if work.config.scores_embeddings:
        return _probing(work)
    settings, values = work.config.extrapolate, work.embedding_values
    folds = _folds(work)
    quick = settings.method == "gnn" and work.audit >= QUICK_FOLDS_AUDIT
    fold = (QUICK_FOLD if quick else 1.0) * (1 - settings.holdout)
    epochs = None if settings.epochs == "auto" else settings.epochs
    fit = rates.fit_seconds(settings.method, work.seed, work.samples, epochs, values)
    fits = 1 + folds * fold + work.config.rehearses / 2
    if work.config.proxy.cross_fits:
        fits = work.config.proxy.parts * (QUICK_FOLD if settings.method == "gnn" else 1.0)
    cpu = fit * fits + rates.CURVE_SAMPLE * work.seed
    gpu = 0.0
    if settings.method != "gnn-published":
        on_gpu = machine.uses_gpu(settings.use_gpu) and work.seed <= settings.exact_neighbours
        predictions = work.samples * rates.predict_seconds(work.seed, values, search=not on_gpu)
        cpu, gpu = cpu + predictions, on_gpu * predictions / SEARCHERS_PER_GPU
        audit = _auditing(work, machine)
        cpu, gpu = cpu + audit.cpu, gpu + audit.gpu
        published = (
            work.samples <= PUBLISHED_SAMPLES
            if settings.judge_published == "auto"
            else settings.judge_published
        ) and not work.config.proxy.cross_fits
        cpu += published * rates.fit_seconds("gnn-published", work.seed, work.samples, None, values)
    return Effort(cpu, gpu, max(folds + 1, work.fragments / 2))


def _auditing(work: Workload, machine: Machine) -> Effort:
    """Return the work of the audit of extreme predictions: decode and measure some samples."""
    config, count = work.config, work.extremes
    _, passes = _passes(config, work.seed)
    amount = _measured_checkpoints(config) * count * passes * work.forward_macs
    overhead = count * (work.decode_seconds + rates.SAMPLE_SECONDS)
    return _network(amount, overhead, config.measure.use_gpu, machine, 1)


def _measured_checkpoints(config: Config) -> int:
    return sum(map(config.measure.uses_epoch, config.proxy.checkpoint_epochs()))


def _probing(work: Workload) -> Effort:
    """Return the work of linear probes: products of embeddings with covariance and class means."""
    width, repeats = work.proxy_width, work.config.proxy.repeats
    fitted = min(work.samples, probe_samples(work.classes))
    products = repeats * (fitted * width + 2 * work.samples * work.classes)
    cpu = PROBE_PRODUCT_SECONDS * width * products + work.samples * rates.SAMPLE_SECONDS
    return Effort(cpu, 0, max(1.0, work.fragments / 2))


def _piloting(work: Workload, machine: Machine) -> Effort:
    """Return the work of the pilot: the trainings that its budget allows."""
    config, settings = work.config, work.config.pilot
    plan = expected_plan(work)
    seconds = plan_seconds(settings, plan)
    overhead = work.samples * rates.SAMPLE_SECONDS / 10
    if machine.uses_gpu(config.proxy.use_gpu):
        on_gpu = seconds * network_costs.CPU_MACS / machine.gpu_macs
        return Effort(overhead, on_gpu, max(1, len(plan.trials())))
    cpu = seconds * network_costs.CPU_MACS / machine.cpu_macs
    return Effort(cpu + overhead, 0, max(1, len(plan.trials())))


def expected_plan(work: Workload) -> PilotPlan:
    """Return the pilot's plan for samples without rejects."""
    settings, size = work.config.pilot, work.config.proxy.image_size
    while size > settings.image_size and size % 2 == 0:
        size //= 2
    tested = min(work.config.seed.audit_samples(work.samples), work.samples - work.seed)
    used = min(work.seed, settings.max_samples)
    return make_plan(work.config, work.seed, used, tested, max(1, work.classes), size)


def _folds(work: Workload) -> int:
    settings = work.config.extrapolate
    one_will_do = settings.method == "gnn-published" or work.config.rehearses
    if settings.folds == "auto" and one_will_do:
        return 1
    return settings.folds_of(max(1, work.seed), work.classes)


def _network(
    macs: float, overhead: float, use_gpu: bool | str, machine: Machine, shared_by: float
) -> Effort:
    """Return the work of forward passes, with `overhead` processor seconds alongside."""
    if machine.uses_gpu(use_gpu):
        return Effort(overhead, macs / machine.gpu_macs, shared_by)
    return Effort(overhead + macs / machine.cpu_macs, 0, shared_by)
