"""Whatever somebody writes into a manifest, the answer is an app or one sentence."""

from hypothesis import given, settings
from hypothesis import strategies as st

from brim.apps.document import all_keys
from brim.apps.manifest import parse_manifest
from brim.core.app import App
from brim.errors import ConfigError

VALUES = st.one_of(
    st.sampled_from(
        ["1", "0", "-1", "0.5", "nan", "inf", "true", '""', '"a"', '"background"', '"f16"', "[]",
         '["x"]', '[{ target = "x", draft = "y" }]', "{}", "[[1]]", "1979-05-27", "9" * 5000,
         "[" * 2000, '"""\n"""', "0x7fffffffffffffffff", '["\\u0000"]']
    ),
    st.text(max_size=20),
)  # fmt: skip

LINES = st.one_of(
    st.tuples(st.sampled_from([*all_keys(), "mlock", "x"]), VALUES).map(" = ".join),
    st.sampled_from(["[budgets]", "[limits]", "[context]", "[requires]", "[[models]]", "[x.y]"]),
    st.text(max_size=30),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(LINES, max_size=8))
def test_any_text_is_an_app_or_a_sentence(lines: list[str]) -> None:
    """Nothing but a ConfigError of bounded length, or the app of that name."""
    text = "\n".join(['name = "a"', *lines])
    try:
        app = parse_manifest(text, where="m.toml")
    except ConfigError as error:
        assert error.message.startswith("m.toml")
        assert len(error.message) < 2000
    else:
        assert isinstance(app, App)
        assert app.name == "a"


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200))
def test_any_letters_are_an_app_or_a_sentence(text: str) -> None:
    """Also without a name."""
    try:
        parse_manifest(text, where="m.toml")
    except ConfigError as error:
        assert error.message.startswith("m.toml")
