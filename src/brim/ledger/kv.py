"""What admitted requests may come to need of one model's KV pool, by the token."""


class KvAccount:
    """Bounds of admitted requests against a pool.

    A request enters its bound (prompt plus answer) when it is admitted and releases it when it
    ends.  The bounds may add up to more than the pool: the worker's scheduler lets requests wait
    for cells, and knows which of them share some.  The pool is what all of them can come to hold.
    """

    def __init__(self, kv_tokens: int) -> None:
        self.kv_tokens = kv_tokens
        self._bounds: dict[str, int] = {}
        self._num_asked = 0

    @property
    def reserved_tokens(self) -> int:
        """Tokens of the pool that admitted requests can come to hold; at most all of it."""
        return min(self.kv_tokens, self._num_asked)

    @property
    def largest_bound(self) -> int:
        """Of one admitted request; a smaller pool would let it wait for ever."""
        return max(self._bounds.values(), default=0)

    def resize(self, kv_tokens: int) -> None:
        """The pool has another size now; no smaller than the largest bound in it."""
        assert kv_tokens >= self.largest_bound
        self.kv_tokens = kv_tokens

    def has_room_for(self, num_tokens: int) -> bool:
        """Whether a request of this bound would find its cells free, shared prefixes left out."""
        return self._num_asked + num_tokens <= self.kv_tokens

    def reserve(self, request_id: str, num_tokens: int) -> None:
        """Enter a request's bound.

        At most the whole pool: admission's `check_fits` tells the client of more, which would
        never be free.
        """
        assert request_id not in self._bounds, f"{request_id} reserves twice"
        assert 0 <= num_tokens <= self.kv_tokens
        self._bounds[request_id] = num_tokens
        self._num_asked += num_tokens

    def release(self, request_id: str) -> None:
        """Give back what a request reserved; nothing where it holds nothing."""
        self._num_asked -= self._bounds.pop(request_id, 0)
