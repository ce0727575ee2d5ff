"""How `brim doctor` shows what it found."""

import pytest

from brim.cli.doctor import WIDTH, _print
from brim.doctor.finding import Finding, Verdict


def test_a_path_is_never_broken(capsys: pytest.CaptureFixture[str]) -> None:
    """Lines end between words; a path that is longer than a line, with hyphens, stays whole."""
    long = "/" + "/".join(f"models-of-{name}" for name in ("here", "there") * 8)
    words = "nobody reads lines that never end " * 5
    finding = Finding(
        check="orphans",
        group="state",
        verdict=Verdict.WARNING,
        found=f"{words}{long} {words}",
        why=f"{words}{long} {words}",
    )
    _print([finding], shows_all=False)
    lines = capsys.readouterr().out.splitlines()
    assert len(long) > WIDTH
    assert [line.strip() for line in lines if "models-of" in line] == [long, long]
    assert all(len(line) <= WIDTH for line in lines if "models-of" not in line)
    assert lines[0].startswith("warning  state/orphans: nobody")
    assert [line for line in lines if line.startswith("    why: nobody")]
