"""Do the models lie well, and are they loaded as they are used?"""

from collections.abc import Iterator

from brim.core.model import ModelSpec
from brim.core.units import gib
from brim.doctor.facts import Facts, Folder, ServedModel
from brim.doctor.finding import Check, Result, note, ok, problem, warning
from brim.doctor.words import some
from brim.planner.memory import is_quantised
from brim.planner.mlx_kv import why_not_quantised
from brim.planner.options import FRUGAL_KV_TYPE, suits
from brim.registry.catalogue import perplexity_increase_percent, quality_cost

GROUP = "models"

NETWORK_FILE_SYSTEMS = frozenset(
    {
        "nfs", "nfs3", "nfs4", "cifs", "smb3", "smbfs", "afpfs", "webdav", "davfs", "fuse.sshfs",
        "fuse.rclone", "fuse.s3fs", "fuse.gcsfuse", "glusterfs", "fuse.glusterfs", "ceph", "9p",
        "afs", "lustre",
    }
)  # fmt: skip
"""Whose pages leave memory at the network's speed, and whose files may change under a mapping."""

SLOW_BYTES_PER_S = 300e6
"""Between a hard disk (up to 250 MB/s) and the slowest SSD (500): 5 GB in a quarter of a minute."""

MIN_ANSWERS = 20
"""Fewer say nothing about how a model is used."""

CONTEXT_OVER_USE = 8
"""A window eight times as long as the mean request has room for a request of three times the mean
beside a long tail."""

MIN_SPARE_BYTES = 512 * 2**20
"""Of KV that nobody uses: less is not worth a restart."""

FLOOR_PERCENT = 8.0
"""Perplexity that a quant may add, between Q4_0 (7.5) and Q3_K_L (8.9): the floor of what the
catalogue recommends for any use is four bits."""


def _search_index(facts: Facts) -> Result:
    folders, processes = facts.folders, facts.processes
    assert folders is not None
    assert processes is not None
    indexed = [folder.path for folder in folders if folder.is_indexed]
    busy = some(processes.indexers)
    if not indexed:
        if busy:
            return note(f"{busy} works now, not in a folder of models as far as is known")
        return ok("no folder of models is indexed, as far as the system says")
    mend = f"touch '{indexed[0]}/.metadata_never_index', or mdutil -i off on a disk of models"
    found = f"the system's search indexes {some(indexed)}"
    if busy:
        return warning(f"{found}, and {busy} works now", mend)
    return note(found, mend)


def _disk(facts: Facts) -> Result:
    folders = facts.folders
    assert folders is not None
    if not folders:
        return ok("no model lies here but the demo")
    remote = [f for f in folders if f.file_system in NETWORK_FILE_SYSTEMS]
    if remote:
        return problem(
            f"{some([f'{f.path} ({f.file_system})' for f in remote])} is on the network",
            "copy the models to an internal disk, and name them there",
        )
    slow = [f for f in folders if _is_slow(f)]
    if slow:
        return warning(
            f"{some([_described(f) for f in slow])}",
            "copy the models to an internal SSD, and name them there",
        )
    return ok(some([_described(f) for f in folders]))


def _is_slow(folder: Folder) -> bool:
    rate = folder.read_bytes_per_s
    # A disk that says it turns is believed only where nothing was measured: virtual ones say so.
    return bool(folder.is_rotational) if rate is None else rate < SLOW_BYTES_PER_S


def _described(folder: Folder) -> str:
    rate = folder.read_bytes_per_s
    if rate is None:
        turns = " on a hard disk" if folder.is_rotational else ""
        return f"{folder.path} ({folder.file_system or 'unknown file system'}){turns}"
    return f"{folder.path} reads {rate / 1e6:.0f} MB/s"


def _context(facts: Facts) -> Result:
    served = facts.served
    assert served is not None
    wide: list[str] = []
    mend = ""
    for model in served:
        if model.num_answers < MIN_ANSWERS:
            continue
        mean = (model.num_prompt_tokens + model.num_completion_tokens) / model.num_answers
        plan = model.plan
        spare_bytes = round(plan.memory.kv_bytes * (1 - CONTEXT_OVER_USE * mean / plan.kv_tokens))
        if plan.context_tokens > CONTEXT_OVER_USE * mean and spare_bytes > MIN_SPARE_BYTES:
            wide.append(
                f"{plan.model.name} has {plan.context_tokens} tokens and requests of {mean:.0f} on "
                f"average: {gib(spare_bytes)} of KV too much"
            )
            smaller = max(1024, _rounded(CONTEXT_OVER_USE * mean))
            mend = mend or f"start brim serve with --ctx {smaller}"
    if wide:
        return note(some(wide), mend)
    return ok("no model that is served has a window far above what its requests use")


def _rounded(tokens: float) -> int:
    """Up to a multiple of 1,024."""
    return -(-int(tokens) // 1024) * 1024


def _quant(facts: Facts) -> Result:
    served, local = facts.served, facts.local_models
    assert served is not None
    assert local is not None
    below_served = [_costly(model.plan.model) for model in served if _is_below(model.plan.model)]
    below_local = [_costly(model.spec) for model in local if _is_below(model.spec)]
    mend = "brim recommend lists models that fit in four bits or more"
    if below_served:
        return warning(some(below_served), mend)
    if below_local:
        return note(some(below_local), mend)
    return ok("none is below four bits a weight")


def _is_below(spec: ModelSpec) -> bool:
    percent = perplexity_increase_percent(spec.quant)
    return percent is not None and percent > FLOOR_PERCENT


def _costly(spec: ModelSpec) -> str:
    return f"{spec.name} is {spec.quant}: {quality_cost(spec.quant)}"


def _kv_type(facts: Facts) -> Result:
    served, local = facts.served, facts.local_models
    assert served is not None
    assert local is not None
    broken = [
        f"{m.plan.model.name} has a {m.plan.kv_type_v} V cache without flash attention"
        for m in served
        if is_quantised(m.plan.kv_type_v) and not m.plan.flash_attention
    ]
    if broken:
        return problem(some(broken), "leave the KV type to the planner, and serve it again")
    without = list(dict.fromkeys(_without_frugal(served, facts)))
    if without:
        return note(
            f"{FRUGAL_KV_TYPE} KV cannot be had for {some(without)}: a token takes twice the "
            "memory there",
            "plan a shorter context where memory is short: brim plan MODEL --ctx 4096",
        )
    return ok(f"{FRUGAL_KV_TYPE} can be had for every model here")


def _without_frugal(served: tuple[ServedModel, ...], facts: Facts) -> Iterator[str]:
    specs = [model.plan.model for model in served]
    specs += [model.spec for model in facts.local_models or ()]
    for spec in specs:
        if spec.format == "gguf" and not suits(spec, FRUGAL_KV_TYPE):
            yield f"{spec.name} (heads of {spec.key_dim} values are no whole blocks of 32)"
        elif spec.format == "safetensors" and (reason := why_not_quantised(spec)):
            yield f"{spec.name} ({reason})"


def _served_models(facts: Facts) -> Result:
    served = facts.served
    if served is None:
        return problem(facts.unread["served"], "brim stop, then brim serve again")
    if not served:
        return ok("no server runs")
    down = [f"{m.plan.model.name}: {m.reason}" for m in served if m.is_quarantined]
    if down:
        return problem(
            f"in quarantine: {some(down)}",
            "mend the cause and wait, or brim stop, then brim serve again",
        )
    died = [f"{m.plan.model.name} ({m.num_deaths})" for m in served if m.num_deaths]
    if died:
        return note(f"workers died and were started again: {some(died)}", "brim events")
    return ok(f"served: {some([model.plan.model.name for model in served], 8)}")


CHECKS = (
    Check(
        name="served-models",
        group=GROUP,
        why="A server that gives no answer hangs, and a model whose worker died three times in a "
        "row is tried again by a request, minutes later.",
        needs=(),
        judge=_served_models,
    ),
    Check(
        name="search-index",
        group=GROUP,
        why="The system's search reads every gigabyte of a new model, which takes the disk and "
        "pushes other files out of memory.",
        needs=("folders", "processes"),
        judge=_search_index,
    ),
    Check(
        name="model-disk",
        group=GROUP,
        why="Weights are mapped from the disk: a slow one makes every load wait, and under "
        "pressure every token; a file that changes on a share ends the worker.",
        needs=("folders",),
        judge=_disk,
    ),
    Check(
        name="context-use",
        group=GROUP,
        why="KV memory is taken for the whole window when a model is loaded, used or not.",
        needs=("served",),
        judge=_context,
    ),
    Check(
        name="quant-floor",
        group=GROUP,
        why="Below four bits a weight a model loses more than a smaller one in four bits does.",
        needs=("served", "local_models"),
        judge=_quant,
    ),
    Check(
        name="kv-type",
        group=GROUP,
        why="An 8-bit KV cache halves what a context takes; not every model can have one, and a "
        "quantised V cache needs flash attention.",
        needs=("served", "local_models"),
        judge=_kv_type,
    ),
)
