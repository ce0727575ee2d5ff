"""Is there disk for the cache, and are brim's files its user's alone?"""

from brim.core.units import gib
from brim.doctor.facts import Facts, Permission
from brim.doctor.finding import Check, Result, note, ok, problem, warning
from brim.doctor.words import some

GROUP = "storage"

GROUP_OR_OTHERS_WRITE = 0o022
GROUP_OR_OTHERS = 0o077


def _free_disk(facts: Facts) -> Result:
    cache = facts.cache
    assert cache is not None
    free, floor = cache.free_disk_bytes, cache.free_disk_floor_bytes
    found = f"{gib(free)} free, {gib(floor)} of which stay free"
    if not cache.budget_bytes:
        return ok(f"{found}; the prefix cache is off")
    if free <= floor:
        return warning(
            f"{found}: no prompt is kept on disk",
            "free the disk, or lower cache.free_disk_floor_bytes",
        )
    room = free - floor + cache.entry_bytes
    if room < cache.budget_bytes:
        return note(
            f"{found}: the cache's {gib(cache.budget_bytes)} have room for {gib(room)}",
            "free the disk, or lower cache.budget_bytes",
        )
    return ok(found)


def _cache_budget(facts: Facts) -> Result:
    cache = facts.cache
    assert cache is not None
    removed = sum(model.entry_bytes for model in cache.models if model.is_removed)
    found = f"{gib(cache.entry_bytes)} of {gib(cache.budget_bytes)} in {cache.num_entries} entries"
    if cache.entry_bytes > cache.budget_bytes:
        return warning(f"{found}, more than it may", "brim cache trim")
    if cache.daily_write_bytes and cache.written_bytes_today >= cache.daily_write_bytes:
        return note(
            f"{found}; today's {gib(cache.daily_write_bytes)} are written: nothing more is kept",
            "raise cache.daily_write_bytes, or wait for midnight in UTC",
        )
    if removed * 2 > cache.entry_bytes > 0:
        return note(f"{found}, {gib(removed)} of models that are gone", "brim cache trim")
    return ok(found)


def _permissions(facts: Facts) -> Result:
    permissions = facts.permissions
    assert permissions is not None
    strangers = [p for p in permissions if not p.is_own]
    if strangers:
        return problem(
            f"{some([p.path for p in strangers])} belongs to another user",
            f"sudo chown -R \"$(id -un)\" '{strangers[0].path}'",
        )
    locked = [p for p in permissions if not p.is_writable]
    if locked:
        return problem(
            f"{some([p.path for p in locked])} cannot be written", f"chmod u+w '{locked[0].path}'"
        )
    open_ = [p for p in permissions if _is_open(p)]
    if open_:
        readable = [p for p in open_ if p.is_secret]
        first = (readable or open_)[0]
        what = "can be read by others" if readable else "can be written by others"
        return problem(f"{some([p.path for p in readable or open_])} {what}", _chmod(first))
    return ok(f"{len(permissions)} files and directories are their user's alone")


def _is_open(permission: Permission) -> bool:
    if permission.is_shielded:
        return False
    mask = GROUP_OR_OTHERS if permission.is_secret else GROUP_OR_OTHERS_WRITE
    return bool(permission.mode & mask)


def _chmod(permission: Permission) -> str:
    return f"chmod {'go-rwx' if permission.is_secret else 'go-w'} '{permission.path}'"


CHECKS = (
    Check(
        name="free-disk",
        group=GROUP,
        why="Prompts are kept on disk only while the disk stays above its floor; without, they "
        "are read anew after each restart.",
        needs=("cache",),
        judge=_free_disk,
    ),
    Check(
        name="cache-budget",
        group=GROUP,
        why="A cache at its bounds drops what would have been used, and one of models that are "
        "gone helps nobody.",
        needs=("cache",),
        judge=_cache_budget,
    ),
    Check(
        name="permissions",
        group=GROUP,
        why="Whoever writes brim's directories can change its answers, and whoever reads them "
        "learns who used what.",
        needs=("permissions",),
        judge=_permissions,
    ),
)
