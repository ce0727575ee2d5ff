"""The account of cells against one that writes every cell down."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from brim.scheduler.cells import CellAccount, CellPath


class CellMachine(RuleBasedStateMachine):
    """Extends, cuts and forks paths; beside them lists of cell numbers."""

    @initialize(forks_share=st.booleans())
    def begin(self, forks_share: bool) -> None:
        self.forks_share = forks_share
        self.account = CellAccount(forks_share=forks_share)
        self.pairs: list[tuple[CellPath, list[int]]] = []
        self.next_cell = 0

    def new_cells(self, num_cells: int) -> list[int]:
        self.next_cell += num_cells
        return list(range(self.next_cell - num_cells, self.next_cell))

    @precondition(lambda self: len(self.pairs) < 6)
    @rule()
    def open(self) -> None:
        self.pairs.append((CellPath(), []))

    @precondition(lambda self: self.pairs)
    @rule(data=st.data(), num_tokens=st.integers(1, 9))
    def extend(self, data: st.DataObject, num_tokens: int) -> None:
        path, cells = data.draw(st.sampled_from(self.pairs))
        self.account.extend(path, num_tokens)
        cells += self.new_cells(num_tokens)

    @precondition(lambda self: self.pairs)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        path, cells = data.draw(st.sampled_from(self.pairs))
        num_tokens = data.draw(st.integers(0, len(cells)))
        self.account.truncate(path, num_tokens)
        del cells[num_tokens:]

    @precondition(lambda self: self.pairs)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        source, cells = data.draw(st.sampled_from(self.pairs))
        num_tokens = data.draw(st.integers(0, len(cells)))
        target = CellPath()
        self.account.fork(source, target, num_tokens)
        copied = cells[:num_tokens] if self.forks_share else self.new_cells(num_tokens)
        self.pairs.append((target, copied))

    @precondition(lambda self: self.pairs)
    @rule(data=st.data())
    def detach(self, data: st.DataObject) -> None:
        path, cells = data.draw(st.sampled_from(self.pairs))
        self.account.detach(path)
        cells[:] = self.new_cells(len(cells))

    @invariant()
    def counts_agree(self) -> None:
        if not hasattr(self, "account"):
            return
        everything = [cell for _, cells in self.pairs for cell in cells]
        assert self.account.num_used == len(set(everything))
        for path, cells in self.pairs:
            assert path.num_tokens == len(cells)
            own = [cell for cell in cells if everything.count(cell) == 1]
            assert self.account.num_own(path) == len(own)
        halves = [(path, (len(cells) + 1) // 2) for path, cells in self.pairs]
        union = {cell for _, cells in self.pairs for cell in cells[: (len(cells) + 1) // 2]}
        assert self.account.num_held(halves) == len(union)


TestCells = CellMachine.TestCase
TestCells.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
