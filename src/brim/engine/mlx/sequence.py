"""What the MLX engine keeps of one open sequence."""

from brim.engine.mlx.caches import SequenceCaches
from brim.engine.mlx.sampler import SequenceSampler


class MlxSequence:
    """Tokens that were fed, the caches that hold them, and how the next one is drawn."""

    __slots__ = ("caches", "fed_in_step", "is_broken", "max_tokens", "row", "sampler", "tokens")

    def __init__(
        self,
        sampler: SequenceSampler,
        caches: SequenceCaches,
        max_tokens: int | None,
    ) -> None:
        self.sampler = sampler
        self.caches = caches
        self.max_tokens = max_tokens
        """Most tokens that it will be fed, where that is known."""
        self.tokens: list[int] = []
        self.fed_in_step = 0
        """Number of the last step that fed it."""
        self.row: int | None = None
        """Row of the last step's logits that is behind this sequence."""
        self.is_broken = False
        """A step failed in a way that could not be taken back; it can only be closed."""

    @property
    def num_cells(self) -> int:
        """Tokens for which memory is taken, or will be with the first one."""
        return self.caches.num_cells if self.tokens else self.max_tokens or 0
