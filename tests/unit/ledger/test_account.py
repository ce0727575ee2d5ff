"""Grants of memory to models, refusals and what they say."""

import msgspec
import pytest

from brim.core.machine import MachineSpec
from brim.core.memory import MemoryTerms
from brim.core.model import ModelSpec
from brim.core.plan import Objective, Verdict
from brim.errors import DoesNotFit
from brim.ledger.account import Account
from brim.ledger.budget import Budget, Limit
from brim.planner.plan import make_plan

GB = 10**9
GIB = 2**30


def terms(num_bytes: int) -> MemoryTerms:
    return MemoryTerms(weights_bytes=num_bytes, kv_bytes=0, compute_bytes=0, overhead_bytes=0)


def fixed_budget(comfortable: int, tight: int) -> Account:
    limits = Limit(comfortable, "a"), Limit(tight, "ram minus others and reserve")
    return Account(lambda machine: Budget(comfortable=limits[0], tight=limits[1], reserve_bytes=0))


def test_verdict_follows_the_sum(machine: MachineSpec) -> None:
    """What fits beside the entries is comfortable, then tight, then refused, at the byte."""
    account = fixed_budget(100, 120)
    account.grant("a", terms(60), machine)
    for asked, verdict in ((40, "comfortable"), (41, "tight"), (60, "tight"), (61, "no")):
        assert account.ask(terms(asked), machine).verdict is Verdict(verdict)


def test_asking_changes_nothing(machine: MachineSpec) -> None:
    """A dry run leaves the account as it was."""
    account = fixed_budget(100, 120)
    account.ask(terms(100), machine)
    assert account.entries() == []
    assert account.grant("a", terms(100), machine).verdict is Verdict.COMFORTABLE


def test_refusal_has_the_numbers(machine: MachineSpec) -> None:
    """A grant of NO says what was free, by which term, and how much is missing."""
    account = fixed_budget(100, 120)
    account.grant("a", terms(90), machine)
    grant = account.ask(terms(50), machine)
    assert (grant.verdict, grant.asked_bytes, grant.budget_bytes, grant.short_bytes) == (
        Verdict.NO, 50, 30, 20,
    )  # fmt: skip
    assert grant.binding == "ram minus others and reserve"


def test_refused_models_are_not_entered(machine: MachineSpec) -> None:
    """A refusal raises and leaves the account unchanged; forcing enters the model with its NO."""
    account = fixed_budget(100, 120)
    with pytest.raises(DoesNotFit):
        account.grant("a", terms(121), machine)
    assert account.entries() == []
    assert account.grant("a", terms(121), machine, force=True).verdict is Verdict.NO
    assert account.charged_bytes == 121
    assert account.ask(terms(1), machine).budget_bytes == 0


def test_release_gives_back_everything(machine: MachineSpec) -> None:
    """A released entry leaves nothing behind, and releasing it again does nothing."""
    account = fixed_budget(100, 120)
    account.grant("a", terms(120), machine)
    account.release("a")
    account.release("a")
    assert account.charged_bytes == 0
    assert account.ask(terms(100), machine).verdict is Verdict.COMFORTABLE


def test_overrun_is_charged(machine: MachineSpec) -> None:
    """A process seen to hold more than its grant costs that much; one that holds less does not."""
    account = fixed_budget(100, 120)
    account.grant("a", terms(50), machine)
    account.reconcile("a", 30)
    assert account.charged_bytes == 50
    account.reconcile("a", 80)
    assert account.charged_bytes == 80
    assert account.entries()[0].measured_bytes == 80


def test_refusal_of_a_plan_says_what_helps(llama_8b: ModelSpec, machine: MachineSpec) -> None:
    """The message is one sentence with GiB, the binding term and each way to fit."""
    plan = make_plan(llama_8b, machine, engine="llamacpp", context_tokens=32_768)
    small = msgspec.structs.replace(machine, ram_bytes=17 * GB)
    with pytest.raises(DoesNotFit) as caught:
        Account().grant("llama-8b", plan, small)
    message = caught.value.message
    needs = plan.memory.total_bytes / GIB
    assert message.startswith(f"llama-8b needs {needs:.2f} GiB, ")
    assert "GiB by ram minus others and reserve): " in message
    assert "--objective memory" in message
    assert "--ctx " in message
    assert "close other programs that use " in message
    assert message.endswith("or load it anyway with --force")
    assert "\n" not in message


@pytest.mark.parametrize("sequences", [1, 16])
def test_every_context_that_is_named_fits(
    llama_8b: ModelSpec, machine: MachineSpec, sequences: int
) -> None:
    """Following the advice to shorten the context or to favour memory gives a plan that fits."""
    plan = make_plan(
        llama_8b, machine, engine="llamacpp", context_tokens=32_768, max_sequences=sequences
    )
    small = msgspec.structs.replace(machine, ram_bytes=17 * GB)
    ways = Account().ask(plan, small).ways_to_fit
    context = int(ways[0].split("--ctx ")[1].rstrip(")"))
    for objective, tokens in ((Objective.DECODE, context), (Objective.MEMORY, 32_768)):
        again = make_plan(
            llama_8b, small, engine="llamacpp", context_tokens=tokens, objective=objective,
            max_sequences=sequences,
        )  # fmt: skip
        assert Account().ask(again, small).verdict is not Verdict.NO


def test_a_smaller_file_is_named_where_only_that_helps(
    llama_8b: ModelSpec, machine: MachineSpec
) -> None:
    """Where the weights alone are too large, the refusal says how large they may be."""
    tiny = msgspec.structs.replace(machine, ram_bytes=9 * GB)
    plan = make_plan(llama_8b, tiny, engine="llamacpp")
    ways = Account().ask(plan, tiny).ways_to_fit
    assert any(way.startswith("a smaller quant or model: at most ") for way in ways)


def test_a_model_to_stop_is_named(machine: MachineSpec) -> None:
    """A loaded model whose memory would be enough is named; a smaller one is not."""
    account = Account()
    account.grant("large", terms(9 * GB), machine)
    account.grant("little", terms(1 * GB), machine)
    ways = account.ask(terms(6 * GB), machine).ways_to_fit
    assert "stop large (8.38 GiB)" in ways
    assert not any("little" in way for way in ways)
