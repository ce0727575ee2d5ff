"""Bytes, by term: what is planned, and what a backend says it took."""

import msgspec


class MemoryTerms(msgspec.Struct, frozen=True, kw_only=True):
    """Planned bytes of one loaded model; `total_bytes` is what the ledger grants."""

    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    """Scratch and output buffers of the backend."""
    overhead_bytes: int
    """The process itself: interpreter, libraries, tokenizer tables."""
    repacked_bytes: int = 0
    """Anonymous second copy of weights that a backend rearranges for speed."""
    mapped_bytes: int = 0
    """The part of the weights that is file pages: clean, and dropped rather than swapped."""
    compute_touched_bytes: int = 0
    """The part of `compute_bytes` that a full micro-batch over a full context writes to."""
    load_peak_bytes: int = 0
    """Most that the process takes while it loads; 0 where nobody says."""

    @property
    def total_bytes(self) -> int:
        """Sum of all terms."""
        return (
            self.weights_bytes
            + self.repacked_bytes
            + self.kv_bytes
            + self.compute_bytes
            + self.overhead_bytes
        )

    @property
    def resident_bytes(self) -> int:
        """What the process will be seen to hold once its context was filled."""
        return self.total_bytes - self.compute_bytes + self.compute_touched_bytes

    def with_draft(self, draft: "MemoryTerms") -> "MemoryTerms":
        """A target and its draft in one process; `draft` is without a process of its own."""
        summed = {
            name: getattr(self, name) + getattr(draft, name) for name in self.__struct_fields__
        }
        return MemoryTerms(**summed)


class Footprint(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes as the backend itself reports them, not as they were planned."""

    weights_bytes: int
    """All weights, wherever they live."""
    mapped_weights_bytes: int
    """The part of the weights that is file pages: clean, shared, dropped rather than swapped."""
    kv_bytes: int
    compute_bytes: int = 0
    """Reserved scratch; a backend touches less of it when batches are small."""
    output_bytes: int = 0
    other_bytes: int = 0

    @property
    def dirty_bytes(self) -> int:
        """What would have to be swapped to be taken away."""
        return (
            self.weights_bytes
            - self.mapped_weights_bytes
            + self.kv_bytes
            + self.compute_bytes
            + self.output_bytes
            + self.other_bytes
        )
