import pytest

from brim.errors import InvalidRequest, ModelFileError, NotFound
from brim.registry.hub_choice import HubFile, choose, has_gguf


def names(quant: str | None, *files: str) -> list[str]:
    """Names of the files that are chosen."""
    chosen = choose([HubFile(name=name) for name in files], quant, "hf:org/repo")
    return [file.name for file in chosen]


USUAL = ("README.md", "M-F16.gguf", "M-Q4_K_M.gguf", "M-Q4_K_S.gguf", "M-Q8_0.gguf")


class TestQuants:
    @pytest.mark.parametrize("quant", ["Q4_K_S", "q4_k_s", "M-Q4_K_S", "m-q4_k_s.gguf"])
    def test_by_quant_or_file_in_any_case(self, quant: str) -> None:
        """A quant's or a file's name chooses, whatever its case."""
        assert names(quant, *USUAL) == ["M-Q4_K_S.gguf"]

    @pytest.mark.parametrize(
        "file",
        ["m.Q8_0.gguf", "m_q8_0.gguf", "q8_0.gguf", "Q8_0/m.Q8_0.gguf", "m-q8_0-v2.gguf"],
    )
    def test_ways_of_naming(self, file: str) -> None:
        """Quants stand after a dash, dot or line, alone, in a directory, or before a word."""
        assert names("Q8_0", file, "other-Q4_0.gguf") == [file]

    def test_a_quant_is_a_whole_word(self) -> None:
        """Q4_K is not Q4_K_M, and F16 is not BF16."""
        assert names("F16", "m-BF16.gguf", "m-F16.gguf") == ["m-F16.gguf"]
        with pytest.raises(NotFound):
            names("Q4_K", *USUAL)

    @pytest.mark.parametrize(
        ("files", "expected"),
        [
            (USUAL, "M-Q4_K_M.gguf"),
            (("m-F16.gguf", "m-Q8_0.gguf", "m-Q2_K.gguf"), "m-Q8_0.gguf"),
            (("m-F16.gguf", "m-Q2_K.gguf"), "m-F16.gguf"),
            (("only-IQ3_XS.gguf",), "only-IQ3_XS.gguf"),
            (("only-IQ3_XS.gguf", "mmproj-F16.gguf", "only.imatrix.gguf"), "only-IQ3_XS.gguf"),
        ],
    )
    def test_preference(self, files: tuple[str, ...], expected: str) -> None:
        """Without a quant: Q4_K_M, then Q8_0, then F16, then the only model there is."""
        assert names(None, *files) == [expected]


class TestSplits:
    def test_all_parts_in_order(self) -> None:
        """A split quant is all of its parts, in order, also from a directory of its own."""
        parts = [f"Q8_0/m-Q8_0-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
        assert names("q8_0", parts[2], "m-F16.gguf", parts[0], parts[1]) == parts

    def test_missing_part(self) -> None:
        """A repository that lacks a part is refused with the part's number."""
        with pytest.raises(ModelFileError, match="lacks part 2 of 3 of m"):
            names(None, "m-00001-of-00003.gguf", "m-00003-of-00003.gguf")


class TestRefusals:
    def test_nothing_matches(self) -> None:
        """An absent quant gives a sentence that lists what exists and how to name it."""
        with pytest.raises(NotFound) as caught:
            names("Q6_K", *USUAL)
        assert "no quant Q6_K" in caught.value.message
        for name in USUAL[1:]:
            assert name in caught.value.message
        assert "hf:ORG/REPO:QUANT" in caught.value.message

    def test_nothing_preferred(self) -> None:
        """Several unusual quants and none asked for: the user chooses from the list."""
        with pytest.raises(NotFound, match=r"m-Q2_K\.gguf, m-Q3_K_L\.gguf"):
            names(None, "m-Q2_K.gguf", "m-Q3_K_L.gguf")

    @pytest.mark.parametrize("quant", [None, "Q8_0"])
    def test_several_match(self, quant: str | None) -> None:
        """Two models of one quant are not chosen between."""
        with pytest.raises(InvalidRequest, match=r"several files for Q8_0: a-Q8_0\.gguf, b-Q8_0"):
            names(quant, "a-Q8_0.gguf", "b-Q8_0.gguf")

    def test_no_gguf_files(self) -> None:
        """A repository without GGUF files is refused with what to look for."""
        with pytest.raises(NotFound, match=r"no \.gguf files"):
            names(None, "model.safetensors", "mmproj-F16.gguf")

    def test_long_lists_are_cut(self) -> None:
        """Of forty files twelve are listed, and the rest are counted."""
        with pytest.raises(NotFound, match="and 28 more"):
            names("Q8_0", *(f"m-v{number}.gguf" for number in range(40)))


def test_projectors_are_no_models() -> None:
    """A repository whose only GGUF files go with a model has no GGUF model."""
    assert has_gguf([HubFile(name="m.GGUF")])
    assert not has_gguf([HubFile(name="mmproj-F16.gguf"), HubFile(name="config.json")])
