"""What makes figures of two servers incomparable, said in sentences."""

from collections.abc import Sequence

from brim.bench.serving.report import Sample, ServerNote
from brim.core.machine import Conditions

MAX_BUSY = 0.10
"""Share of the processors that others may use during a turn before the report says so: above a
desktop's background, below any real work."""

PROMPT_SLACK_TOKENS = 8
"""Begin tokens and a template's own whitespace may differ between servers, words may not."""


def machine_complaints(conditions: Conditions) -> list[str]:
    """What calibration's checks of a machine leave out: a battery saves power when it pleases."""
    if conditions.is_on_battery:
        return ["it runs on battery, which may slow the processors at any time"]
    return []


def sample_complaints(samples: Sequence[Sample], servers: Sequence[ServerNote]) -> list[str]:
    """Unequal work, disturbed turns, and servers whose answers end where they like."""
    found = [
        f"'{server.name}' does not take ignore_eos, so its answers may be shorter than others'"
        for server in servers
        if not server.takes_ignore_eos and len(servers) > 1
    ]
    for workload in dict.fromkeys(sample.workload for sample in samples):
        mine = [sample for sample in samples if sample.workload == workload]
        if complaint := _unequal_work(mine):
            found.append(complaint)
    disturbed = [s for s in samples if s.others_busy_fraction > MAX_BUSY]
    if disturbed:
        worst = max(disturbed, key=lambda sample: sample.others_busy_fraction)
        found.append(
            f"other programs were busy during {len(disturbed)} of {len(samples)} turns, at most "
            f"{worst.others_busy_fraction:.0%} of the processors ({worst.server}, "
            f"{worst.workload}, repetition {worst.repetition + 1})"
        )
    return found


def _unequal_work(samples: Sequence[Sample]) -> str | None:
    """The first request of a workload for which two servers count different tokens."""
    by_request: dict[tuple[int, str], tuple[str, int, int]] = {}
    for sample in samples:
        for asked in sample.asked:
            key = (sample.repetition, asked.label)
            mine = (sample.server, asked.num_prompt_tokens, asked.num_completion_tokens)
            other = by_request.setdefault(key, mine)
            what = f"in {sample.workload}, '{asked.label}'"
            if mine[2] != other[2]:
                return (
                    f"{what} had {other[2]} answer tokens with '{other[0]}' and {mine[2]} with "
                    f"'{mine[0]}': the work was not equal"
                )
            if asked.is_same_text and abs(mine[1] - other[1]) > PROMPT_SLACK_TOKENS:
                return (
                    f"{what} had {other[1]} prompt tokens with '{other[0]}' and {mine[1]} with "
                    f"'{mine[0]}': they do not read the same text"
                )
    return None
