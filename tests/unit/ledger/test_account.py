"""Grants of memory to models, refusals and what they say."""

import msgspec
import pytest

from brim.core.machine import MachineSpec
from brim.core.memory import MemoryTerms
from brim.core.model import ModelSpec
from brim.core.plan import Objective, Verdict
from brim.errors import DoesNotFit
from brim.ledger.account import Account, refusal
from brim.ledger.budget import Budget, Limit
from brim.ledger.correction import PastErrors
from brim.ledger.entry import TransientKind
from brim.ledger.kv import KvAccount
from brim.planner.fit import Room
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
    plan = make_plan(llama_8b, machine, engine="llamacpp", context_tokens=49_152)
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
        llama_8b, machine, engine="llamacpp", context_tokens=49_152, max_sequences=sequences
    )
    small = msgspec.structs.replace(machine, ram_bytes=17 * GB)
    ways = Account().ask(plan, small).ways_to_fit
    [shorter] = [way for way in ways if way.startswith("a context of ")]
    context = int(shorter.split("--ctx ")[1].rstrip(")"))
    for objective, tokens in ((Objective.DECODE, context), (Objective.MEMORY, 49_152)):
        again = make_plan(
            llama_8b, small, engine="llamacpp", context_tokens=tokens, objective=objective,
            max_sequences=sequences,
        )  # fmt: skip
        assert Account().ask(again, small).verdict is not Verdict.NO


@pytest.mark.parametrize(
    ("weights_bytes", "ram_bytes", "says"),
    [
        (8_541_000_000, 10 * GB, "a smaller quant, such as Q4_K_M (about 4.57 GiB of weights inst"),
        (4_912_898_048, 8_300_000_000, "a smaller quant, such as Q2_K (about 2.95 GiB of weights "),
        (4_912_898_048, 6_500_000_000, "a smaller model: at most "),
    ],
)
def test_a_smaller_file_is_named_where_it_helps(
    llama_8b: ModelSpec, machine: MachineSpec, weights_bytes: int, ram_bytes: int, says: str
) -> None:
    """The refusal names the largest usual quant that has room, or how large a model may be."""
    tiny = msgspec.structs.replace(machine, ram_bytes=ram_bytes, others_bytes=2 * GB)
    model = msgspec.structs.replace(llama_8b, weights_bytes=weights_bytes)
    ways = Account().ask(make_plan(model, tiny, engine="llamacpp"), tiny).ways_to_fit
    assert any(way.startswith(says) for way in ways), ways


def test_at_most_three_ways_are_named_and_the_cheapest_first(
    llama_8b: ModelSpec, machine: MachineSpec
) -> None:
    """Options before another model's end, that before a download; closing programs comes last."""
    account = Account()
    account.grant("helper", terms(4 * GB), machine)
    plan = make_plan(llama_8b, machine, engine="llamacpp", context_tokens=49_152)
    assert plan.memory.total_bytes > 10 * GB
    options, context, stop = account.ask(plan, machine).ways_to_fit
    assert options.endswith(f"--objective memory, {options.split(', ')[-1]}")
    assert context.startswith("a context of ")
    assert stop == "stop helper (3.73 GiB)"


def test_a_model_to_stop_is_named(machine: MachineSpec) -> None:
    """A loaded model whose memory would be enough is named; a smaller one is not."""
    account = Account()
    account.grant("large", terms(9 * GB), machine)
    account.grant("little", terms(1 * GB), machine)
    ways = account.ask(terms(6 * GB), machine).ways_to_fit
    assert "stop large (8.38 GiB)" in ways
    assert not any("little" in way for way in ways)


def test_several_wishes_are_answered_in_order(machine: MachineSpec) -> None:
    """Each stands beside those before it that fit; one that does not is left out of the sum."""
    account = fixed_budget(100, 120)
    account.grant("a", terms(50), machine)
    answers = account.ask_all([("b", terms(60)), ("c", terms(80)), ("d", terms(10))], machine)
    assert [(name, grant.verdict) for name, grant in answers] == [
        ("b", Verdict.TIGHT), ("c", Verdict.NO), ("d", Verdict.TIGHT),
    ]  # fmt: skip
    assert answers[2][1].budget_bytes == 0
    assert account.charged_bytes == 50


def test_a_wish_of_a_loaded_models_name_stands_in_its_place(machine: MachineSpec) -> None:
    """What if this model had more context: its present grant does not count twice."""
    account = fixed_budget(100, 120)
    account.grant("a", terms(50), machine)
    account.grant("b", terms(40), machine)
    [(_, grant)] = account.ask_all([("a", terms(60))], machine)
    assert (grant.verdict, grant.budget_bytes) == (Verdict.COMFORTABLE, 60)
    assert account.ask(terms(60), machine, without=["a"]).verdict is Verdict.COMFORTABLE
    assert account.room(machine, without=["a"]) == Room(60, 80)
    assert account.room(machine) == Room(10, 30)


def test_transients_are_charged_and_end_with_their_owner(machine: MachineSpec) -> None:
    """A copy for a moment must fit like a model, and is gone when it or its model is released."""
    account = fixed_budget(100, 120)
    account.grant("a", terms(60), machine)
    assert account.reserve("a", TransientKind.KV_GROWTH, 40, machine)
    assert not account.reserve("a", TransientKind.PREFIX_CACHE_WRITE, 21, machine)
    assert account.reserve("a", TransientKind.PREFIX_CACHE_WRITE, 20, machine)
    assert account.ask(terms(1), machine).verdict is Verdict.NO
    account.release_transient("a", TransientKind.KV_GROWTH)
    account.release_transient("a", TransientKind.KV_GROWTH)
    assert account.charged_bytes == 80
    account.release("a")
    assert account.charged_bytes == 0


def test_what_others_took_of_a_grant_is_short(machine: MachineSpec) -> None:
    """A request is short of what its model may still grow by and other programs hold."""
    account = fixed_budget(100, 100)
    pool = KvAccount(10)
    wanted = MemoryTerms(weights_bytes=30, kv_bytes=40, compute_bytes=0, overhead_bytes=0)
    account.grant("a", wanted, machine, pool=pool)
    assert account.short_of_growth("a", 10, machine) == 0, "unmeasured, it holds all of its grant"
    account.reconcile("a", 50)
    assert account.short_of_growth("a", 10, machine) == 0
    less = Account(
        lambda _: Budget(comfortable=Limit(55, ""), tight=Limit(55, ""), reserve_bytes=0)
    )
    less.grant("a", wanted, machine, pool=pool, force=True)
    less.reconcile("a", 50)
    assert less.short_of_growth("a", 10, machine) == 0, "forced: whoever loaded it accepts that"


@pytest.mark.parametrize(
    ("tight", "tokens", "short"), [(100, 10, 0), (60, 10, 10), (60, 2, 0), (40, 1, 4), (40, 10, 20)]
)
def test_shortage_is_counted_to_the_byte(
    machine: MachineSpec, tight: int, tokens: int, short: int
) -> None:
    """50 of 70 bytes are held; a token of the pool is 4, and at most 20 can still be taken."""
    limits = [100]
    account = Account(
        lambda _: Budget(comfortable=Limit(limits[0], ""), tight=Limit(limits[0], ""),
                         reserve_bytes=0)
    )  # fmt: skip
    wanted = MemoryTerms(weights_bytes=30, kv_bytes=40, compute_bytes=0, overhead_bytes=0)
    account.grant("a", wanted, machine, pool=KvAccount(10))
    account.reconcile("a", 50)
    limits[0] = tight
    assert account.short_of_growth("a", tokens, machine) == short


def test_what_was_admitted_before_is_not_free_any_more(machine: MachineSpec) -> None:
    """Of two requests, or of two models, that could grow by what is left, the second is short."""
    limits = [200]
    account = Account(
        lambda _: Budget(comfortable=Limit(limits[0], ""), tight=Limit(limits[0], ""),
                         reserve_bytes=0)
    )  # fmt: skip
    wanted = MemoryTerms(weights_bytes=30, kv_bytes=40, compute_bytes=0, overhead_bytes=0)
    pools = {name: KvAccount(10) for name in "ab"}
    for name, pool in pools.items():
        account.grant(name, wanted, machine, pool=pool)
        account.reconcile(name, 30)
    limits[0] = 60 + 24  # six tokens of 4 bytes are left
    assert account.short_of_growth("a", 6, machine) == 0
    pools["a"].reserve("first", 6)
    assert account.short_of_growth("a", 0, machine) == 0
    assert account.short_of_growth("a", 4, machine) == 16
    assert account.short_of_growth("b", 2, machine) == 8
    account.reconcile("b", 70)
    assert account.short_of_growth("b", 2, machine) == 0, "it holds all that it may take"


@pytest.mark.parametrize("cause", ["past errors", "load peak"])
def test_ways_count_what_is_asked_and_not_what_was_planned(
    llama_8b: ModelSpec, machine: MachineSpec, cause: str
) -> None:
    """Where the plan alone would fit, no way is named that leaves the model refused."""
    plan, past = make_plan(llama_8b, machine, engine="llamacpp"), PastErrors()
    asked = plan.memory.total_bytes * 5 // 4
    if cause == "past errors":
        past = PastErrors(ratios={"total_bytes": (2.0,) * 50})
    else:
        memory = msgspec.structs.replace(plan.memory, load_peak_bytes=asked)
        plan = msgspec.structs.replace(plan, memory=memory)
    free = asked - 500_000_000
    assert plan.memory.total_bytes < free
    account = fixed_budget(30 * GB, 30 * GB)
    account.grant("little", terms(GB), machine)
    account.grant("large", terms(29 * GB - free), machine)
    refused = account.ask(plan, machine, past=past)
    assert (refused.verdict, refused.short_bytes) == (Verdict.NO, asked - free)
    [shorter] = [way for way in refused.ways_to_fit if way.startswith("a context of ")]
    context = int(shorter.split("--ctx ")[1].rstrip(")"))
    again = make_plan(llama_8b, machine, engine="llamacpp", context_tokens=context)
    assert again.memory.total_bytes * 5 // 4 <= free
    assert "stop little (0.93 GiB)" in refused.ways_to_fit


def test_what_other_programs_have_to_give_back_is_what_is_missing(machine: MachineSpec) -> None:
    """Not what the plan alone would lack, which may be less than nothing."""
    peaked = msgspec.structs.replace(terms(GIB), load_peak_bytes=4 * GIB)
    refused = fixed_budget(3 * GIB, 3 * GIB).ask(peaked, machine)
    assert "close other programs that use 1.00 GiB" in refused.ways_to_fit


def test_a_plan_is_named_beside_its_cost_where_a_reader_sees_a_difference(
    machine: MachineSpec,
) -> None:
    """0.50 GiB (0.50 GiB planned) says nothing; 0.50 GiB (0.40 GiB planned) does."""
    grant = fixed_budget(1, 1).ask(terms(GIB // 2), machine)
    near = msgspec.structs.replace(grant, planned_bytes=GIB // 2 - 1)
    far = msgspec.structs.replace(grant, planned_bytes=GIB * 4 // 10)
    assert refusal("a", near).startswith("a needs 0.50 GiB, ")
    assert refusal("a", far).startswith("a needs 0.50 GiB (0.40 GiB planned), ")


def test_past_errors_are_charged_and_the_forecast_stays_visible(machine: MachineSpec) -> None:
    """A model that took a tenth more than planned is granted more; its plan is shown beside."""
    account = fixed_budget(1000, 1200)
    past = PastErrors(ratios={"weights_bytes": (1.1,) * 50})
    grant = account.grant("a", terms(500), machine, past=past)
    assert (grant.planned_bytes, grant.asked_bytes) == (500, 543)
    assert (account.entry("a").planned.total_bytes, account.charged_bytes) == (500, 543)
    with pytest.raises(DoesNotFit):
        account.grant("b", terms(640), machine, past=past)


def test_statement_adds_up_by_term(machine: MachineSpec) -> None:
    """Every term is in the statement, and what requests hold is a part of the pool."""
    account, pool = Account(), KvAccount(100)
    wanted = MemoryTerms(
        weights_bytes=10, kv_bytes=400, compute_bytes=30, overhead_bytes=5, repacked_bytes=7
    )
    account.grant("a", wanted, machine, pool=pool)
    pool.reserve("r", 25)
    account.reserve("a", TransientKind.PREFIX_CACHE_WRITE, 3, machine)
    account.reserve("a", TransientKind.KV_GROWTH, 2, machine)
    said = account.statement(machine)
    assert said.charged_bytes == wanted.total_bytes + 5 == (
        said.weights_mapped_bytes + said.weights_dirty_bytes + said.kv_committed_bytes
        + said.compute_reserved_bytes + said.overhead_bytes + said.prefix_cache_bytes
        + said.transient_bytes
    )  # fmt: skip
    assert (said.kv_committed_bytes, said.kv_reserved_bytes) == (400, 100)
    assert said.entries[0].kv_reserved_tokens == 25
    assert said.free_bytes == said.tight_bytes - said.charged_bytes
    assert said.others_bytes == machine.others_bytes


def test_promises_are_what_is_charged(machine: MachineSpec) -> None:
    """What other processes are told adds up to the account."""
    account = Account()
    account.grant("a", terms(10), machine)
    account.reserve("a", TransientKind.KV_GROWTH, 2, machine)
    assert account.promises() == [("a", 10), ("kv_growth", 2)]
    assert "a" in account
    assert "b" not in account


def test_a_load_peak_must_fit_and_ends_with_the_load(machine: MachineSpec) -> None:
    """A peak over the budget is refused by name; it is charged while the model loads, not after."""
    account = fixed_budget(100, 120)
    peaked = msgspec.structs.replace(terms(60), load_peak_bytes=110)
    assert account.ask(peaked, machine).verdict is Verdict.COMFORTABLE
    account.grant("a", terms(11), machine)
    account.begin_load("a")
    account.end_load("a")
    refused = account.ask(peaked, machine)
    assert (refused.verdict, refused.asked_bytes, refused.short_bytes) == (Verdict.NO, 110, 1)
    assert refused.binding == "ram minus others and reserve, while it loads"
    account.release("a")
    account.grant("b", peaked, machine)
    account.grant("c", terms(50), machine)
    assert account.charged_bytes == 110, "c is not loaded yet: b's peak may use its bytes"
    account.begin_load("b")
    assert account.charged_bytes == 110
    account.end_load("b")
    account.begin_load("c")
    assert account.charged_bytes == 110


def test_what_nothing_here_helps_is_told_the_machine_that_would(
    llama_8b: ModelSpec, machine: MachineSpec
) -> None:
    """After a smaller file comes the smallest machine that grants it; what fits needs none."""
    tiny = msgspec.structs.replace(machine, ram_bytes=8 * GIB, others_bytes=4 * GB)
    refused = Account().ask(make_plan(llama_8b, tiny, engine="llamacpp"), tiny)
    assert refused.ways_to_fit[-1] == "a machine with 16 GB of memory"
    larger = msgspec.structs.replace(tiny, ram_bytes=16 * GIB)
    plan = make_plan(llama_8b, tiny, engine="llamacpp")
    assert Account().ask(plan, larger).verdict is not Verdict.NO
    tight = fixed_budget(100, 120).ask(terms(110), machine)
    assert tight.verdict is Verdict.TIGHT
    assert not any(way.startswith("a machine") for way in tight.ways_to_fit)
