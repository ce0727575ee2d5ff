"""Are the engines built for this machine?"""

from brim.doctor.facts import Build, Builds, Facts
from brim.doctor.finding import Check, Result, note, ok, problem, warning
from brim.doctor.words import some

GROUP = "engines"

NATIVE = {
    "avx2": "AVX2", "fma": "FMA", "f16c": "F16C", "avx512f": "AVX512", "avx512_vnni": "AVX512_VNNI",
    "avx_vnni": "AVX_VNNI", "asimddp": "DOTPROD", "i8mm": "MATMUL_INT8",
}  # fmt: skip
"""Instruction sets by the processor's name -> by llama.cpp's: those that its kernels are written
for.  Source: ggml-cpu's ggml_cpu_has_*."""

SLOW_WITHOUT = frozenset({"AVX2", "FMA", "F16C", "DOTPROD", "MATMUL_INT8"})
"""Without these a quantised model runs at a half to a tenth of its speed; the others gain less."""

REBUILD = (
    "CMAKE_ARGS=-DGGML_NATIVE=ON pip install --force-reinstall --no-cache-dir --no-binary "
    "llama-cpp-python llama-cpp-python"
)
REBUILD_METAL = REBUILD.replace("-DGGML_NATIVE=ON", "-DGGML_METAL=ON")


def _llamacpp(facts: Facts) -> Result:
    builds = facts.llamacpp
    assert builds is not None
    build = _of(builds)
    if build is None:
        return note("not installed", "pip install llama-cpp-python")
    if build.problem:
        return problem(f"does not start: {build.problem}", REBUILD)
    if _is_apple_silicon(builds) and not build.has_gpu:
        return problem(f"llama-cpp-python {build.version} was built without Metal", REBUILD_METAL)
    if builds.is_translated:
        return problem("Python runs translated, as x86_64", "install Python for arm64, then brim")
    missing = missing_instructions(builds, build)
    shown = f"llama-cpp-python {build.version}"
    if missing:
        found = f"{shown} was built without {some(missing, 8)}, which the processor has"
        severe = bool(SLOW_WITHOUT & set(missing)) and not build.has_gpu
        return warning(found, REBUILD) if severe else note(found, REBUILD)
    if builds.has_gpu and not build.has_gpu:
        return note(f"{shown} was built without GPU support, and there is a GPU", REBUILD)
    return ok(f"{shown}, {'with' if build.has_gpu else 'no'} GPU, native instructions")


def _mlx(facts: Facts) -> Result:
    builds = facts.mlx
    assert builds is not None
    build = _of(builds)
    if build is None:
        if _is_apple_silicon(builds):
            return note("not installed", "pip install 'brim[mlx]'")
        return ok("not installed; models in GGUF form need no MLX")
    if build.problem:
        return problem(f"does not start: {build.problem}", "pip install --force-reinstall mlx")
    if _is_apple_silicon(builds) and not build.has_gpu:
        return problem(
            f"mlx {build.version} finds no Metal", "pip install --force-reinstall mlx mlx-metal"
        )
    return ok(f"mlx {build.version}, {'with Metal' if build.has_gpu else 'on the processor'}")


def missing_instructions(builds: Builds, build: Build) -> list[str]:
    """Instruction sets that the processor has and the build does not use."""
    if not build.features:  # it does not say
        return []
    return [
        theirs
        for ours, theirs in NATIVE.items()
        if ours in builds.cpu_features and theirs not in build.features
    ]


def _of(builds: Builds) -> Build | None:
    return builds.builds[0] if builds.builds else None


def _is_apple_silicon(builds: Builds) -> bool:
    return builds.system == "darwin" and builds.architecture == "arm64"


CHECKS = (
    Check(
        name="llamacpp-build",
        group=GROUP,
        why="A build without the GPU or without the processor's own instructions runs at a "
        "fraction of the machine's speed, and says nothing.",
        needs=("llamacpp",),
        judge=_llamacpp,
    ),
    Check(
        name="mlx-build",
        group=GROUP,
        why="MLX is the faster engine on Apple silicon, and only with Metal.",
        needs=("mlx",),
        judge=_mlx,
    ),
)
