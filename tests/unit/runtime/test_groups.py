"""Pairs as settings name them."""

from typing import cast

import pytest

from brim.config.tree import ModelSettings
from brim.errors import ConfigError
from brim.runtime.groups import groups_of
from brim.runtime.model_host import ModelHost


class Named:
    def __init__(self, name: str) -> None:
        self.name = name


HOSTS = {name: cast("ModelHost", Named(name)) for name in ("small", "chat", "embed")}


def names(*pairs: str) -> list[list[str]]:
    groups = groups_of(HOSTS, ModelSettings(pairs=pairs))
    return [[host.name for host in group.hosts] for group in groups]


def test_a_pair_stands_where_its_first_model_was_given_the_target_before_the_draft() -> None:
    """All other models stand alone."""
    assert names("chat+small") == [["chat", "small"], ["embed"]]
    assert names() == [["small"], ["chat"], ["embed"]]


def test_a_pair_of_models_that_are_not_all_served_is_none() -> None:
    """Settings outlive the command that serves one of them alone."""
    assert names("chat+other", "this+that") == names()


@pytest.mark.parametrize("pairs", [("chat+small", "embed+small"), ("chat+chat",)])
def test_a_model_has_one_partner(pairs: tuple[str, ...]) -> None:
    """Anything else is an error that names it."""
    with pytest.raises(ConfigError, match="in a pair already") as caught:
        names(*pairs)
    assert caught.value.param == "models.pairs"
