"""Manifests: what they may say, and what is said to whoever writes them wrongly."""

from pathlib import Path

import pytest

from brim.apps.manifest import MAX_MANIFEST_BYTES, load_manifest, parse_manifest
from brim.core.app import App, Budgets, KvQuality, Limits, Pair
from brim.core.request import OverflowPolicy, Priority
from brim.errors import ConfigError

EXAMPLES = sorted((Path(__file__).parents[3] / "examples" / "apps").glob("*.toml"))

WHOLE = """
name = "mail-2"
priority = "background"
models = ["small", { target = "big", draft = "small" }, "other"]
kv_quality = "q8_0"
keep_loaded = true
accepts_draft = true

[requires]
memory_gb = 4.5

[context]
max_tokens = 8192
overflow = "trim"

[budgets]
tokens_per_day = 200_000
energy_wh_per_day = 2.5
ssd_write_gb_per_day = 0.5

[limits]
requests_per_minute = 30
max_concurrent = 2
memory_share = 0.25
"""


def test_a_whole_manifest() -> None:
    """Every key arrives in the app, in bytes and joules, and each model once."""
    assert parse_manifest(WHOLE, where="m.toml") == App(
        name="mail-2",
        priority=Priority.BACKGROUND,
        models=("small", "big", "other"),
        pairs=(Pair(target="big", draft="small"),),
        overflow=OverflowPolicy.TRIM,
        max_context_tokens=8192,
        kv_quality=KvQuality.Q8_0,
        required_bytes=4_500_000_000,
        accepts_draft=True,
        keep_loaded=True,
        budgets=Budgets(tokens=200_000, energy_j=9000.0, ssd_write_bytes=500_000_000),
        limits=Limits(requests_per_minute=30, max_concurrent=2, memory_share=0.25),
    )


def test_a_name_is_enough() -> None:
    """What is left out is no bound, and all models."""
    assert parse_manifest('name = "a"', where="m.toml") == App(name="a")


PAIR = 'name = "a"\nmodels = [{ target = "x", draft = "y" }, { target = "x", draft = "z" }]'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name =", "is not TOML"),
        ("", "missing required field `name`"),
        ('nme = "a"', "there is no key 'nme'; did you mean 'name'"),
        ('name = "a"\n[budget]\n', "there is no key 'budget'; did you mean 'budgets'"),
        ('name = "a"\n[budgets]\ntoken_per_day = 1', r"\[budgets\].*mean 'tokens_per_day'"),
        ('name = "a"\nmodels = [{ target = "x", darft = "y" }]', "models 1: .*mean 'draft'"),
        ('name = "a"\nmodels = [{ target = "x" }]', "models 1: .*`draft`"),
        ('name = "a"\nmodels = []', "models: expected `array` of length >= 1"),
        ('name = "a"\nmodels = "x"', "models: expected `array"),
        ('name = "a"\nmodels = [""]', "models 1: expected `str` of length >= 1"),
        ('name = "a"\nmodels = ["x\\n"]', "models 1: expected `str` matching"),
        ('name = "a"\nmodels = [{ target = "x", draft = "x" }]', "'x' cannot draft for itself"),
        (PAIR, "'x' has two drafts"),
        ('name = "a"\nkeep_loaded = true', "keep_loaded needs models"),
        ('name = "a"\nmodels = ["x"]\naccepts_draft = true', "accepts_draft needs a pair"),
        ('name = "a"\npriority = "high"', "priority: .*write interactive, background"),
        ('name = "a"\nkv_quality = "q8"', "kv_quality: .*write f32, f16, q8_0"),
        ('name = "a"\n[context]\noverflow = "cut"', "context.overflow: .*write reject, trim"),
        ('name = "a"\n[context]\nmax_tokens = 0', "context.max_tokens: expected `int` >= 16"),
        ('name = "a"\n[budgets]\ntokens_per_day = 0', "tokens_per_day: expected `int` >= 1"),
        ('name = "a"\n[budgets]\ntokens_per_day = 1.5', "tokens_per_day: expected `int"),
        ('name = "a"\n[budgets]\nenergy_wh_per_day = nan', "energy_wh_per_day: expected `float`"),
        ('name = "a"\n[budgets]\nenergy_wh_per_day = inf', "energy_wh_per_day: expected `float`"),
        ('name = "a"\n[limits]\nmemory_share = 1.1', "memory_share: expected `float` <= 1"),
        ('name = "a"\n[limits]\nmax_concurrent = true', "max_concurrent: expected `int"),
        ('name = "a"\nbudgets = 3', "budgets: expected `object`"),
        ('name = "a"\nx = ' + "[" * 9000, "nested too deeply"),
        ("x = " + "9" * 9000, "a number has thousands of digits"),
        ('name = "a" # ' + "x" * MAX_MANIFEST_BYTES, "is over 65536 bytes"),
    ],
)
def test_wrong_manifests_name_the_key(text: str, words: str) -> None:
    """A key or value that is wrong is one sentence with the file and the key."""
    with pytest.raises(ConfigError, match=words) as caught:
        parse_manifest(text, where="m.toml")
    assert caught.value.message.startswith("m.toml")


@pytest.mark.parametrize(
    "name", ["", "A", "a b", "a/b", "../a", "-a", "a\\n", "a" * 65, "\\u0000", "ä"]
)
def test_names_are_fit_for_files_and_urls(name: str) -> None:
    """A name has lower-case letters, digits, '-' and '_', 64 at most, and nothing behind them."""
    with pytest.raises(ConfigError, match="name cannot be"):
        parse_manifest(f'name = "{name}"', where="m.toml")


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("mlock", "keep_loaded keeps a model"),
        ("use_mlock", "keep_loaded keeps a model"),
        ("wired_limit_mb", "panics"),
        ("iogpu.wired_limit_mb", "panics"),
        ("no_mmap", "could only be swapped"),
        ("no-mmap", "could only be swapped"),
        ("threads", "gives way to other programs"),
        ("num_threads", "gives way to other programs"),
        ("n_threads", "gives way to other programs"),
        ("cpu_affinity", "priority says how urgent"),
        ("Cpu-Affinity", "priority says how urgent"),
        ("n_gpu_layers", "the plan decides"),
        ("kv_type", "the plan decides"),
    ],
)
def test_knobs_of_the_runtime_are_refused(key: str, reason: str) -> None:
    """How models are loaded is refused with the reason, at the top and in any table."""
    for text in (f'{key} = 1\nname = "a"', f'name = "a"\n[limits]\n{key} = 1'):
        with pytest.raises(ConfigError, match=f"an app cannot set .*{reason}"):
            parse_manifest(text, where="m.toml")


def test_files_are_read_as_text(tmp_path: Path) -> None:
    """A manifest is given with its text; one that is missing, binary or no file says so."""
    path = tmp_path / "m.toml"
    path.write_text('name = "a"  # mine\n')
    assert load_manifest(path) == (App(name="a"), 'name = "a"  # mine\n')
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_manifest(path)
    with pytest.raises(ConfigError, match="No such file"):
        load_manifest(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="no regular file"):
        load_manifest(tmp_path)
    path.write_bytes(b" " * (MAX_MANIFEST_BYTES + 1))
    with pytest.raises(ConfigError, match="over 65536 bytes"):
        load_manifest(path)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_in_order(path: Path) -> None:
    """Every manifest that is shown can be added, under the name of its file."""
    app, _ = load_manifest(path)
    assert app.name == path.stem


def test_there_are_examples_of_each_kind() -> None:
    """One in the background with budgets, one that is kept loaded, one for chat."""
    apps = [load_manifest(path)[0] for path in EXAMPLES]
    assert any(app.priority is Priority.BACKGROUND and app.budgets.energy_j for app in apps)
    assert any(app.keep_loaded and app.accepts_draft and app.pairs for app in apps)
    assert any(app.overflow is OverflowPolicy.SUMMARIZE for app in apps)


@pytest.mark.parametrize(
    ("least", "kept", "is_enough"),
    [
        (KvQuality.F16, ("f16", "f16"), True),
        (KvQuality.F16, ("bf16", "bf16"), True),
        (KvQuality.F16, ("f16", "q8_0"), False),
        (KvQuality.Q8_0, ("f32", "q8_0"), True),
        (KvQuality.Q8_0, ("q5_1", "q8_0"), False),
        (KvQuality.Q4_0, ("iq4_nl", "q4_0"), True),
        (KvQuality.Q4_0, ("q2_x", "q4_0"), False),
        (None, ("q2_x", "q2_x"), True),
    ],
)
def test_kv_quality_is_the_least_of_both(
    least: KvQuality | None, kept: tuple[str, str], is_enough: bool
) -> None:
    """Keys and values must both be as exact as the app wants; an unknown type is not."""
    assert App(name="a", kv_quality=least).accepts_kv(*kept) is is_enough
