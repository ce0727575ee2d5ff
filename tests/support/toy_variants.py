"""The teaching engine with the limits of others: forks that copy, and states that cannot be cut."""

import msgspec

from brim.engine import guards
from brim.engine.base import Allocate
from brim.engine.toy import Cell, ToyEngine
from brim.errors import Busy, EngineError


class CopyingToy(ToyEngine):
    """Each sequence owns its cells, as with MLX."""

    capabilities = msgspec.structs.replace(ToyEngine.capabilities, forks_share_kv=False)

    def fork(self, source: int, target: int, num_tokens: int) -> None:
        src, dst = (guards.known(self._sequences, seq_id) for seq_id in (source, target))
        guards.check_fork(len(src.cells), len(dst.cells), num_tokens)
        guards.check_room(num_tokens, self._num_cells - self._num_used, Busy)
        dst.cells = [Cell(cell.token, cell.state) for cell in src.cells[:num_tokens]]
        self._num_used += num_tokens

    def move(self, source: int, target: int) -> None:
        src, dst = (guards.known(self._sequences, seq_id) for seq_id in (source, target))
        guards.check_fork(len(src.cells), len(dst.cells), len(src.cells))
        dst.cells, src.cells = src.cells, []
        self.close(source)


class WholeToy(CopyingToy):
    """A state that cannot be cut, as of recurrent models: whole copies, whole blocks."""

    capabilities = msgspec.structs.replace(
        CopyingToy.capabilities,
        can_truncate=False,
        can_fork_prefix=False,
        can_export_range=False,
        can_shift=False,
    )

    def fork(self, source: int, target: int, num_tokens: int) -> None:
        if num_tokens != self.num_tokens(source):
            raise EngineError("toy: this state cannot be cut")
        super().fork(source, target, num_tokens)

    def truncate(self, seq_id: int, num_tokens: int) -> None:
        if num_tokens not in (0, self.num_tokens(seq_id)):
            raise EngineError("toy: this state cannot be cut")
        super().truncate(seq_id, num_tokens)

    def export_kv(
        self,
        seq_id: int,
        start: int = 0,
        end: int | None = None,
        *,
        allocate: Allocate | None = None,
    ) -> memoryview:
        if start != 0 or end not in (None, self.num_tokens(seq_id)):
            raise EngineError("toy: this state is kept whole")
        return super().export_kv(seq_id, start, end, allocate=allocate)


class PassingToy(ToyEngine):
    """Rows pass over the cells of other sequences, at a tenth of a millisecond each."""

    capabilities = msgspec.structs.replace(ToyEngine.capabilities, foreign_cell_s=1e-4)


VARIANTS = {"sharing": ToyEngine, "copying": CopyingToy, "whole": WholeToy}
