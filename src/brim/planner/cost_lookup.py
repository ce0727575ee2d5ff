"""Looks costs up by term, and derives those that no stand-in had from the nearest that one had."""

from collections.abc import Mapping

from brim.planner.speed_terms import BITS_PER_WEIGHT, STATE_BYTES

NEAREST_TYPE = {
    "F32": "F16", "BF16": "F16",
    "Q5_1": "Q4_0", "Q5_0": "Q4_0", "Q4_1": "Q4_0", "IQ4_NL": "Q4_0", "MXFP4": "Q4_0",
    "IQ4_XS": "Q4_K", "Q3_K": "Q4_K", "Q2_K": "Q4_K",
    "IQ3_S": "Q4_K", "IQ3_XXS": "Q4_K", "IQ2_S": "Q4_K", "IQ2_XS": "Q4_K", "IQ2_XXS": "Q4_K",
    "IQ1_S": "Q4_K", "IQ1_M": "Q4_K",
}  # fmt: skip
"""Tensor types that are not calibrated, and the one whose unpacking is most like theirs: blocks of
32 with one scale, or super-blocks of 256 with packed scales."""

OTHER_TYPE_SPREAD = 1.4
"""Widens a forecast for a type that was not measured: the calibrated types themselves take between
0.72 and 1.4 of their median time for a weight (2-core AVX-512 VM, November 2026)."""

OTHER_KV_SPREAD = 1.3
"""Widens a forecast for KV types that were not measured together."""


class CostTable:
    """Seconds by term, with a record of what had to be derived."""

    def __init__(self, costs: Mapping[str, float]) -> None:
        self._costs = costs
        self.derived: list[str] = []
        """Sentences on terms that were not measured."""
        self.spread = 1.0
        """What the range has to be widened by for them."""

    def seconds(self, terms: Mapping[str, float]) -> float:
        """Amounts times costs."""
        return sum(amount * self.cost(term) for term, amount in terms.items() if amount)

    def cost(self, term: str) -> float:
        """Seconds for one unit; a fixed term that the fit found to cost nothing is 0."""
        if term in self._costs:
            return self._costs[term]
        kind, _, rest = term.partition(" ")
        if kind in ("bytes", "pass"):
            return self._of_type(kind, rest)
        if kind == "scores":
            return self._of_scores(rest)
        if term == STATE_BYTES:
            # A state is read and written as it lies in memory, like weights that need no unpacking.
            return self._costs.get("bytes F16", 0.0)
        return 0.0

    def _of_type(self, kind: str, rest: str) -> float:
        """Bytes of a tensor type that was not measured: time for a weight, not for a byte."""
        name = rest.removesuffix(" repacked")
        if name != rest and f"{kind} {name}" in self._costs:
            return self._costs[f"{kind} {name}"]
        measured = [term.split(" ")[1] for term in self._costs if term.startswith(f"{kind} ")]
        if not measured:
            return 0.0
        nearest = NEAREST_TYPE.get(name, "Q4_K")
        if nearest not in measured:
            nearest = measured[0]
        if kind == "bytes":
            self._derive(f"{name} weights as {nearest}", OTHER_TYPE_SPREAD)
        bits = BITS_PER_WEIGHT.get(name, 4.5)
        return self._costs[f"{kind} {nearest}"] * BITS_PER_WEIGHT[nearest] / bits

    def _of_scores(self, rest: str) -> float:
        """KV types that were not measured together: K's and V's extra costs added up."""
        types, _, flash = rest.partition(" ")
        key, _, value = types.partition("/")
        flash = f" {flash}" if flash else ""
        base = self._costs.get(f"scores f16/f16{flash}")
        if base is None:
            base = next((c for t, c in self._costs.items() if t.startswith("scores ")), 0.0)
        self._derive(f"KV {types} from other KV types", OTHER_KV_SPREAD)
        return max(0.0, base + self._extra(key, is_key=True) + self._extra(value, is_key=False))

    def _extra(self, kv_type: str, *, is_key: bool) -> float:
        """What a type costs above f16, as K or as V, under flash attention where V may be any."""
        if kv_type in ("f16", "bf16", "f32"):
            return 0.0

        def measured(key: str, value: str) -> float | None:
            return self._costs.get(f"scores {key}/{value} flash")

        nearest = kv_type if measured(kv_type, kv_type) is not None else "q4_0"
        if measured(nearest, nearest) is None:
            nearest = "q8_0"
        plain, both = measured("f16", "f16"), measured(nearest, nearest)
        if plain is None or both is None:
            return 0.0
        key_share = self._key_share(plain)
        return (both - plain) * (key_share if is_key else 1 - key_share)

    def _key_share(self, plain: float) -> float:
        """How much of the extra cost of a quantised KV is K's, by q8_0, of which both are known."""
        key = self._costs.get("scores q8_0/f16 flash")
        both = self._costs.get("scores q8_0/q8_0 flash")
        if key is None or both is None or both <= plain:
            return 0.5
        return min(1.0, max(0.0, (key - plain) / (both - plain)))

    def _derive(self, sentence: str, spread: float) -> None:
        if sentence not in self.derived:
            self.derived.append(sentence)
            self.spread = max(self.spread, spread)
