"""One model's KV pool, granted to admitted requests by the token."""


class KvAccount:
    """Reservations against a pool; their sum never exceeds it.

    A request reserves its bound (prompt plus answer) when it is admitted and releases it when it
    ends, so that no step can find the pool full.  Shared prefixes take fewer cells than reserved,
    never more.
    """

    def __init__(self, kv_tokens: int) -> None:
        self.kv_tokens = kv_tokens
        self._reserved: dict[str, int] = {}

    @property
    def reserved_tokens(self) -> int:
        """Tokens that admitted requests hold."""
        return sum(self._reserved.values())

    @property
    def free_tokens(self) -> int:
        """Tokens that can still be reserved."""
        return self.kv_tokens - self.reserved_tokens

    def reserve(self, request_id: str, num_tokens: int) -> bool:
        """Reserve tokens for a request; False where they are not free now.

        At most the whole pool: admission's `check_fits` tells the client of more, which would
        never be free.
        """
        assert request_id not in self._reserved, f"{request_id} reserves twice"
        assert 0 <= num_tokens <= self.kv_tokens
        if num_tokens > self.free_tokens:
            return False
        self._reserved[request_id] = num_tokens
        return True

    def release(self, request_id: str) -> None:
        """Give back what a request reserved; nothing where it holds nothing."""
        self._reserved.pop(request_id, None)
