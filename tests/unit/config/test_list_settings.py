"""Settings that are lists: in TOML, in variables, and when they are wrong."""

from pathlib import Path

import pytest

from brim.config.load import load_settings
from brim.errors import ConfigError


def test_a_list_is_read_from_toml_and_from_a_variable(tmp_path: Path) -> None:
    """TOML has lists; a variable has commas."""
    path = tmp_path / "brim.toml"
    path.write_text('[server]\nallowed_hosts = ["studio.lan", "::1"]\n')
    variables = {
        "BRIM_CONFIG": str(path),
        "BRIM_SERVER_ALLOWED_ORIGINS": "https://a.example, http://b.example:8080",
    }
    server = load_settings(environment=variables).settings.server
    assert server.allowed_hosts == ("studio.lan", "::1")
    assert server.allowed_origins == ("https://a.example", "http://b.example:8080")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("BRIM_SERVER_ALLOWED_HOSTS", "http://studio.lan"),
        ("BRIM_SERVER_ALLOWED_HOSTS", "studio.lan:2746"),
        ("BRIM_SERVER_ALLOWED_ORIGINS", "app.example"),
        ("BRIM_SERVER_ALLOWED_ORIGINS", "https://app.example/page"),
    ],
)
def test_what_can_never_match_is_refused(name: str, text: str) -> None:
    """A host has no scheme or port, and an origin has a scheme and no path."""
    with pytest.raises(ConfigError, match=f"^{name}: server.allowed"):
        load_settings(environment={name: text})
