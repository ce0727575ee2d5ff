"""What a plan will do: speed by whichever source knows the machine best, load time, first token.

Three sources, best first: a calibration of this machine, measured Macs of the same family, and a
probe of memory bandwidth.  Where none applies, as for MLX without a GPU, the forecast says nothing
rather than guess.
"""

from brim.core.calibration import Calibration, wait_policy_of
from brim.core.forecast import Forecast, SpeedForecast
from brim.core.machine import MachineSpec
from brim.core.plan import Plan
from brim.planner.apple.speed import forecast_apple
from brim.planner.calibrated_speed import forecast_calibrated, forecast_from_bandwidth, load_s
from brim.planner.shape import speed_shape
from brim.planner.sustained import sustained_range

DEFAULT_PROMPT_TOKENS = 512
"""A page of text; what most published prefill figures are measured with."""

SSD_BYTES_PER_S = {"base": 2_500_000_000, "large": 5_000_000_000}
"""What a Mac's SSD is taken to read: chips without a suffix, and Pro, Max and Ultra.

Apple's own figures reach 3.4 and 7.4 GB/s; the smallest SSD of each line reads about half of its
largest, and a model's file is not read at the very rate of a benchmark.  Only for machines that are
not at hand: `brim calibrate` measures this one.
"""

UNKNOWN_MACHINE = "nothing is known of this machine's speed; run: brim calibrate"

MLX_WITHOUT_GPU = (
    "how fast MLX is on a processor does not follow from its memory; measure it: "
    "brim bench speed -m MODEL --engine mlx"
)
"""Its CPU kernels are bound by arithmetic, on one thread: by probes of 35 and 72 GB/s the stand-in
of 113 M parameters would decode 78 and 155 tokens a second, and it decodes 10."""

START_S = 1.0
"""From nothing to a worker that could load: interpreter, imports and the backend's start.

0.56 s to the first token of the demo model on a 2-core x86-64 VM (benches/first_token.py), and as
much again for Metal to compile what it needs.
"""


def forecast_plan(
    plan: Plan,
    machine: MachineSpec,
    *,
    calibration: Calibration | None = None,
    read_bytes_per_s: float | None = None,
    depth_tokens: int = 0,
    prompt_tokens: int = DEFAULT_PROMPT_TOKENS,
) -> Forecast:
    """Speed, load time and time to first token of a plan on a machine.

    Args:
        plan: How the model is loaded.
        machine: The machine that it is planned for.
        calibration: What was measured of this machine with the plan's engine.
        read_bytes_per_s: Bandwidth by a short probe, where there is no calibration.
        depth_tokens: Tokens in the sequence when decode begins.
        prompt_tokens: Length of the prompt behind `prefill_tok_s` and `first_token_s`.
    """
    if plan.engine == "toy":
        return Forecast(reasons={"speed": "the toy engine computes nothing worth a forecast"})
    prompt_tokens = min(prompt_tokens, plan.context_tokens)

    def speed_at(depth: int) -> SpeedForecast | None:
        return _speed(plan, machine, calibration, read_bytes_per_s, depth, prompt_tokens)

    speed = speed_at(min(depth_tokens, plan.context_tokens))
    if speed is None:
        return Forecast(
            depth_tokens=depth_tokens,
            prompt_tokens=prompt_tokens,
            reasons={
                "speed": MLX_WITHOUT_GPU if _is_mlx_without_gpu(plan, machine) else UNKNOWN_MACHINE
            },
        )
    full = speed_at(plan.context_tokens - 1)
    sustained, sustained_reason = sustained_range(speed.decode_tok_s, machine.cooling)
    seconds, load_reason = _load(plan, machine, calibration)
    return Forecast(
        speed=speed,
        full_decode_tok_s=None if full is None else full.decode_tok_s,
        sustained_decode_tok_s=sustained,
        load_s=seconds,
        first_token_s=_first_token_s(speed, prompt_tokens),
        depth_tokens=depth_tokens,
        prompt_tokens=prompt_tokens,
        reasons={
            **speed.reasons,
            "speed": speed.source,
            "sustained": sustained_reason,
            "load": load_reason,
        },
    )


def _speed(
    plan: Plan,
    machine: MachineSpec,
    calibration: Calibration | None,
    read_bytes_per_s: float | None,
    depth: int,
    prompt: int,
) -> SpeedForecast | None:
    if _is_mlx_without_gpu(plan, machine):
        return None
    shape = speed_shape(plan.model, engine=plan.engine)
    if calibration is not None and machine.is_at_hand:
        return forecast_calibrated(
            shape,
            calibration,
            engine=plan.engine,
            kv_type_k=plan.kv_type_k,
            kv_type_v=plan.kv_type_v,
            flash_attention=plan.flash_attention,
            repack_weights=plan.repack_weights,
            num_threads=plan.num_threads,
            num_batch_threads=plan.num_batch_threads,
            wait_policy=wait_policy_of(plan.environment),
            depth_tokens=depth,
            prompt_tokens=prompt,
            micro_batch_tokens=plan.micro_batch_tokens,
        )
    if machine.chip is not None:
        return forecast_apple(
            shape,
            machine,
            engine=plan.engine,
            kv_type_k=plan.kv_type_k,
            kv_type_v=plan.kv_type_v,
            flash_attention=plan.flash_attention,
            depth_tokens=depth,
            prompt_tokens=prompt,
            num_sequences=1,
        )
    if read_bytes_per_s is not None and machine.is_at_hand:
        return forecast_from_bandwidth(
            shape,
            read_bytes_per_s,
            depth_tokens=depth,
            kv_type_k=plan.kv_type_k,
            kv_type_v=plan.kv_type_v,
        )
    return None


def _is_mlx_without_gpu(plan: Plan, machine: MachineSpec) -> bool:
    return plan.engine == "mlx" and machine.gpu_limit_bytes is None


def _first_token_s(speed: SpeedForecast, prompt_tokens: int) -> float:
    return prompt_tokens / speed.prefill_tok_s.expected + 1 / speed.decode_tok_s.expected


def _load(
    plan: Plan, machine: MachineSpec, calibration: Calibration | None
) -> tuple[float | None, str]:
    """Seconds until ready with a cold file, and what the figure was made from."""
    if calibration is not None and machine.is_at_hand:
        return load_s(plan.model, calibration, repack_weights=plan.repack_weights), "measured here"
    if machine.chip is None:
        return None, "the disk's speed is not known; run: brim calibrate"
    line = "large" if machine.chip.split()[-1] in ("Pro", "Max", "Ultra") else "base"
    rate = SSD_BYTES_PER_S[line]
    return (
        START_S + plan.model.weights_bytes / rate,
        f"the file read once at {rate / 1e9:.1f} GB/s, which is assumed of this chip's SSD",
    )
