"""What only the MLX engine promises: its own sizes, failures of its backend, aborts, KV types."""

import gc
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from support.driver import GREEDY, Run, assert_same, decode, decode_together, feed, generate
from support.mlx_models import FAMILIES, family_dir
from support.models import plan_for

from brim.core.plan import Plan
from brim.core.sampling import SamplingParams
from brim.core.step import Feed, StepPlan
from brim.errors import EngineError, ModelFileError, StoreError
from brim.planner.mlx_kv import mlx_kv_bytes, mlx_kv_types, mlx_state_bytes

BACKEND_EXCEPTIONS = (
    # What the binding makes of C++ exceptions, which all derive from std::exception.
    RuntimeError, MemoryError, ValueError, IndexError, OverflowError, TypeError,
    # What model classes and caches in Python can raise besides.
    AttributeError, KeyError, NotImplementedError, AssertionError, ZeroDivisionError, OSError,
)  # fmt: skip

Load = Callable[[Plan], Any]

PROMPT = [(37 * i * i + 11 * i + 5) % 4096 for i in range(60)]


@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("family", FAMILIES)
def test_footprint_is_what_was_planned(load: Load, family: str, kv_type: str) -> None:
    """Weights are the plan's to the byte, and a sequence at its admitted bound takes its KV.

    The plan has recurrent states twice, once more than a sequence at rest: a step that was launched
    ahead keeps the old ones.
    """
    plan = plan_for("mlx", path=family_dir(family), kv_tokens=512, max_sequences=1, kv_type=kv_type)
    spec = plan.model
    if kv_type not in mlx_kv_types(spec):
        with pytest.raises(EngineError, match="use f16"):
            load(plan)
        return
    engine = load(plan)
    feed(engine, Run(engine.open(GREEDY, 512)), PROMPT * 4)
    footprint = engine.footprint()
    planned_kv = mlx_kv_bytes(
        spec, kv_tokens=512, max_sequences=1, kv_type_k=kv_type, kv_type_v=kv_type
    )
    assert footprint.weights_bytes == spec.weights_bytes
    assert footprint.mapped_weights_bytes == 0
    assert footprint.kv_bytes == pytest.approx(planned_kv - mlx_state_bytes(spec), rel=0.03)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "falcon_h1"])
def test_a_closed_sequence_gives_its_memory_back(load: Load, family: str) -> None:
    """After a cancel MLX holds no more than before: measured, not computed."""
    import mlx.core as mx

    engine = load(plan_for("mlx", path=family_dir(family), max_sequences=4))
    # The last step's logits stay until the next one, so that there are some before as well.
    engine.close(generate(engine, PROMPT, 2).seq_id)
    gc.collect()  # engines of earlier tests
    before = mx.get_active_memory()
    runs = [generate(engine, PROMPT, 1) for _ in range(4)]
    decode_together(engine, runs, 4)
    assert mx.get_active_memory() > before + 4 * 30_000
    for run in runs:
        engine.close(run.seq_id)
    assert engine.footprint().kv_bytes == 0
    vocab_bytes = 4 * engine.tokenizer.vocab_size
    assert mx.get_active_memory() <= before + 4 * vocab_bytes


@pytest.mark.parametrize("exception", BACKEND_EXCEPTIONS)
def test_an_exception_in_a_step_is_ours_and_takes_the_step_back(
    load: Load, monkeypatch: pytest.MonkeyPatch, exception: type[Exception]
) -> None:
    """Whatever the model raises ends the step with an error, and every sequence goes on."""
    engine = load(plan_for("mlx"))
    reference = generate(engine, PROMPT, 12)
    runs = [generate(engine, PROMPT, 5), generate(engine, PROMPT[:20], 5)]

    def fail(*_args: object, **_options: object) -> None:
        raise exception("out of something")

    with monkeypatch.context() as patched:
        patched.setattr(engine._decoder, "_model", fail)
        step = StepPlan([Feed(runs[0].seq_id, runs[0].tokens[-1:]), Feed(runs[1].seq_id, [1, 2])])
        with pytest.raises(EngineError, match=r"mlx: .*out of something"):
            engine.step(step)
    assert engine.num_tokens(runs[0].seq_id) == len(PROMPT) + 4
    assert engine.num_tokens(runs[1].seq_id) == 24
    decode(engine, runs[0], 12)
    assert_same(reference, runs[0])


@pytest.mark.parametrize("call", ["fork", "truncate", "export_kv", "import_kv"])
def test_an_exception_in_any_call_is_ours(
    load: Load, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """A cache that fails, for want of memory for one, gives an error that names the engine."""
    engine = load(plan_for("mlx"))
    run, target = generate(engine, PROMPT, 3), engine.open(GREEDY)
    block = bytes(engine.export_kv(run.seq_id))
    calls: dict[str, tuple[str, Callable[[], object]]] = {
        "fork": ("fork", lambda: engine.fork(run.seq_id, target, 20)),
        "truncate": ("truncate", lambda: engine.truncate(run.seq_id, 20)),
        "export_kv": ("export_into", lambda: engine.export_kv(run.seq_id)),
        "import_kv": ("import_from", lambda: engine.import_kv(target, block)),
    }

    def fail(*_args: object) -> None:
        raise RuntimeError("[malloc] Unable to allocate")

    method, run_call = calls[call]
    with monkeypatch.context() as patched:
        for seq_id in (run.seq_id, target):
            patched.setattr(type(engine._sequences[seq_id].caches), method, fail)
        with pytest.raises(EngineError, match=r"mlx: .*Unable to allocate"):
            run_call()
    assert engine.num_tokens(target) == 0
    engine.import_kv(target, block)


class Failing:
    """Stands in for a part of a layer; the backend fails when it evaluates the result."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __call__(self, x: Any, *rest: Any, **options: Any) -> Any:
        import mlx.core as mx

        y = self._inner(x, *rest, **options)
        # This backend multiplies gathered matrices in float32 only, and finds out at evaluation.
        matrices = mx.zeros((2, x.shape[-1], x.shape[-1]), mx.bfloat16)
        experts = mx.zeros((*x.shape[:-1], 1), mx.uint32)
        rows = x.astype(mx.bfloat16)[..., None, None, :]
        return y + mx.gather_mm(rows, matrices, rhs_indices=experts)[..., 0, 0, :].astype(y.dtype)


@pytest.mark.parametrize("family", ["llama", "mamba2"])
def test_a_failed_evaluation_harms_nobody_else(load: Load, family: str) -> None:
    """What the backend fails to compute within a layer is lost for good; other sequences go on.

    A buffer that waits for a failed result can never be read again, so its sequence is refused
    until it is closed.
    """
    import mlx.core as mx

    if mx.default_device() != mx.cpu:
        pytest.skip("only the CPU backend lacks the operation that this relies on")
    engine = load(plan_for("mlx", path=family_dir(family), max_sequences=3))
    reference = generate(engine, PROMPT, 12)
    engine.close(reference.seq_id)
    spared, *runs = [generate(engine, PROMPT, 1) for _ in range(3)]
    decode_together(engine, [spared, *runs], 6)
    layer = engine._decoder._model.layers[0]
    name = "mlp" if family == "llama" else "mixer"
    inner = getattr(layer, name)
    setattr(layer, name, Failing(inner))
    step = StepPlan([Feed(run.seq_id, [7]) for run in runs])
    with pytest.raises(EngineError, match=r"mlx: RuntimeError: .*GatherMM"):
        engine.step(step)
    setattr(layer, name, inner)
    for run in runs:
        assert engine.num_tokens(run.seq_id) == len(PROMPT) + 5
        with pytest.raises(EngineError, match="close it"):
            feed(engine, run, [1])
        engine.close(run.seq_id)
    again = generate(engine, PROMPT, 6)
    decode_together(engine, [again, spared], 12)
    assert_same(reference, spared)
    assert_same(reference, again)


@pytest.mark.parametrize("family", ["gpt_oss", "mamba2", "granitemoehybrid", "deepseek_v3"])
def test_kv_types_that_a_model_lacks_are_refused(load: Load, family: str) -> None:
    """Sinks, states, narrow heads and latent attention are not quantised, and the error says so."""
    path = family_dir(family)
    assert load(plan_for("mlx", path=path)).capabilities.kv_types == {"f16"}
    with pytest.raises(EngineError, match="use f16"):
        load(plan_for("mlx", path=path, kv_type="q8_0"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_type_k": "q5_1", "kv_type_v": "q5_1"}, "no KV type q5_1"),
        ({"kv_type_k": "q8_0"}, "share one type"),
    ],
)
def test_plans_that_mlx_cannot_follow_are_refused(
    load: Load, changes: dict[str, Any], message: str
) -> None:
    """KV types that MLX lacks, or would mix up, raise an error with their names."""
    with pytest.raises(EngineError, match=message):
        load(msgspec.structs.replace(plan_for("mlx"), **changes))


def test_experts_that_the_processor_cannot_compute_are_refused(load: Load) -> None:
    """A mixture of experts in bf16 is refused when loaded, not in the first step."""
    import mlx.core as mx

    if mx.default_device() != mx.cpu:
        pytest.skip("Metal computes them")
    with pytest.raises(ModelFileError, match="mixtures of experts"):
        load(plan_for("mlx", path=family_dir("qwen3_moe", dtype="bfloat16")))


def test_a_block_of_another_model_is_refused(load: Load) -> None:
    """A block goes back only into the model that it came from."""
    source = load(plan_for("mlx", path=family_dir("llama")))
    block = bytes(source.export_kv(generate(source, PROMPT, 2).seq_id))
    target = load(plan_for("mlx", path=family_dir("qwen3")))
    seq_id = target.open(GREEDY)
    with pytest.raises(StoreError, match="not of"):
        target.import_kv(seq_id, block)
    assert target.num_tokens(seq_id) == 0


def test_sampling_leaves_the_process_wide_random_state_alone(load: Load) -> None:
    """MLX's own random state is global; draws come from each sequence's."""
    import mlx.core as mx

    engine = load(plan_for("mlx"))
    state: Any = mx.random.state
    before = np.array(state[0])
    generate(engine, PROMPT, 8, SamplingParams(temperature=1.0, seed=3))
    assert np.array_equal(before, np.array(state[0]))
