"""Which plans are kept as files, and how one is made: models x machines, and worked examples.

Run it (`make goldens`) after a change that is meant to move plans; the diff is the review.
"""

import json
from pathlib import Path
from typing import Any

import msgspec

from brim.cli.plan_together import Wanted, plan_together
from brim.core.forecast import SpeedRange

HERE = Path(__file__).parent
PLANS = HERE / "plans"

MACHINES = (
    "M1:8:8",
    "M2:10:16",
    "M4:10:16",
    "M4 Pro:20:24",
    "M3 Pro:18:36",
    "M4 Max:40:48",
    "M1 Max:32:64",
    "M5 Max:40:128",
    "M2 Ultra:76:192",
    "M3 Ultra:80:512",
)

MODELS = {
    "qwen3-0.6b": "Q8_0",
    "llama-3.2-3b-instruct": "Q4_K_M",
    "llama-3.1-8b": "Q4_K_M",
    "gemma-3-12b-it": "Q4_K_M",
    "qwen3-30b-a3b": "Q4_K_M",
    "qwen3.6-35b-a3b": "MLX 4bit",
    "qwen3-32b": "MLX 4bit",
    "gpt-oss-20b": "MXFP4",
    "gpt-oss-120b": "MXFP4",
    "llama-3.3-70b": "Q4_K_M",
    "glm-4.5-air": "MLX 4bit",
    "deepseek-r1": "Q4_K_M",
}
"""By their names in the catalogue; the quant is the usual one of each."""


def _config(name: str) -> str:
    return str(HERE / "configs" / f"{name}.json")


WORKED = {
    "8b-on-16gb": Wanted(
        models=("llama-3.1-8b",),
        quant="Q4_K_M",
        machine="M4:10:16",
        context_tokens=8192,
        kv_type="q8_0",
    ),
    "7b-on-8gb": Wanted(models=(_config("qwen2.5-7b"),), quant="Q4_K_M", machine="M1:8:8"),
    "7b-with-draft": Wanted(
        models=(_config("qwen2.5-7b"),),
        quant="Q4_K_M",
        draft=_config("qwen2.5-0.5b"),
        machine="M4:10:16",
    ),
    "7b-and-14b-on-36gb": Wanted(
        models=(f"{_config('qwen2.5-7b')}:Q6_K", f"{_config('qwen2.5-14b')}:Q4_K_M"),
        machine="M3 Pro:18:36",
    ),
    **{
        f"70b-on-{ram}gb": Wanted(
            models=("llama-3.3-70b",), quant="Q4_K_M", machine=f"{chip}:{ram}"
        )
        for chip, ram in (("M3 Pro:18", 36), ("M4 Max:40", 48), ("M4 Max:40", 64))
    },
    "70b-on-128gb": Wanted(models=("llama-3.3-70b",), quant="Q4_K_M", machine="M4 Max:40:128"),
    "70b-for-eight": Wanted(
        models=("llama-3.3-70b",),
        quant="Q4_K_M",
        machine="M4 Max:40:128",
        context_tokens=16_384,
        max_sequences=8,
        kv_type="q8_0/q4_0",
    ),
}


def grid() -> dict[str, dict[str, Any]]:
    """File name -> machine -> what is kept of the plan."""
    return {
        model: {
            machine: kept(Wanted(models=(model,), quant=quant, machine=machine))
            for machine in MACHINES
        }
        for model, quant in MODELS.items()
    }


def kept(wanted: Wanted) -> dict[str, Any]:
    """What of a plan stands in its file: everything that a user would act on."""
    report = plan_together(wanted)
    return {
        "verdict": report.verdict.value,
        "engine": report.engine,
        "weights_bytes": report.weights_bytes,
        "kv_bytes": report.kv_bytes,
        "compute_bytes": report.compute_bytes,
        "overhead_bytes": report.overhead_bytes,
        "total_bytes": report.total_bytes,
        "budget_bytes": report.budget_bytes,
        "binding": report.binding,
        "kv_type": report.kv_type,
        "context_tokens": report.context_tokens,
        "decode_tok_s": _rounded(report.decode_tok_s),
        "prefill_tok_s": _rounded(report.prefill_tok_s),
        "models": [model.model for model in report.models],
        "ways_to_fit": list(report.ways_to_fit),
    }


def _rounded(speed: SpeedRange | None) -> dict[str, float] | None:
    if speed is None:
        return None
    return {name: round(value, 1) for name, value in msgspec.structs.asdict(speed).items()}


def write() -> None:
    """Write every golden file anew."""
    files = grid() | {"worked": {name: kept(wanted) for name, wanted in WORKED.items()}}
    PLANS.mkdir(exist_ok=True)
    for path in PLANS.glob("*.json"):
        path.unlink()
    for name, content in files.items():
        (PLANS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    write()
