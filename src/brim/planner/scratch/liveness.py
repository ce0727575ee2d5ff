"""How much scratch one computation graph takes: which tensors live at once, and where.

llama.cpp reserves its compute buffer by walking the graph of the largest micro-batch in order of
computation: a tensor takes the smallest free block that holds it, an operation that may work in
place takes over its operand's block, and a block is free again after its last reader.  The same
walk over the same sizes gives the same buffer.  What the graph holds is for `layers` to say.

Source: the rules of ggml's graph allocator (ggml-alloc.c of llama-cpp-python 0.3.36).
"""

from typing import NamedTuple

ALIGNMENT_BYTES = 32
"""Of tensors in a buffer of llama.cpp's CPU backend; others align more, by less than a page."""


class Tensor:
    """One tensor of a graph: how large it is and what it is computed from."""

    __slots__ = (
        "can_replace", "is_input", "is_output", "is_written", "item_bytes",
        "num_readers", "num_views", "offset", "root", "shape", "size_bytes", "sources", "taken",
    )  # fmt: skip

    def __init__(self, shape: tuple[int, ...], sources: tuple["Tensor", ...], item_bytes: int):
        self.shape = shape
        self.sources = sources
        self.item_bytes = item_bytes
        size = item_bytes
        for width in shape:
            size *= width
        self.size_bytes = -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        self.root: Tensor | None = None
        """The tensor that this one is a view of."""
        self.can_replace = False
        self.is_input = False
        self.is_output = False
        self.is_written = True
        self.num_readers = 0
        self.num_views = 0
        self.offset: int | None = None
        self.taken = False
        """Whether the block at `offset` is this tensor's to free."""


class Graph:
    """Tensors in order of computation; inputs are allocated before everything else."""

    def __init__(self) -> None:
        self.nodes: list[Tensor] = []
        self.inputs: list[Tensor] = []
        self._seen: set[int] = set()

    def input(self, *shape: int, item_bytes: int = 4, is_written: bool = True) -> Tensor:
        """Something that is copied in before each step, such as tokens or a mask."""
        tensor = Tensor(shape, (), item_bytes)
        tensor.is_input = True
        tensor.is_written = is_written
        return tensor

    def op(
        self, shape: tuple[int, ...], *sources: Tensor, in_place: bool = False, item_bytes: int = 4
    ) -> Tensor:
        """The result of an operation; weights and KV are no sources, as they lie elsewhere.

        Args:
            shape: Values along each axis.
            sources: Operands in order.
            in_place: Whether the operation may overwrite an operand of the same shape.
            item_bytes: Of one value: f32 unless said.
        """
        tensor = Tensor(shape, sources, item_bytes)
        tensor.can_replace = in_place
        return tensor

    def change(self, *sources: Tensor) -> Tensor:
        """An element-wise operation that keeps the first operand's shape and may replace it."""
        return self.op(sources[0].shape, *sources, in_place=True, item_bytes=sources[0].item_bytes)

    def view(self, source: Tensor, *shape: int) -> Tensor:
        """Another reading of the same values: it takes no memory but keeps its root alive."""
        tensor = Tensor(shape, (source,), source.item_bytes)
        tensor.root = source.root or source
        return tensor

    def expand(self, tensor: Tensor) -> None:
        """Append a tensor after everything that it needs and that is not there yet."""
        if id(tensor) in self._seen:
            return
        self._seen.add(id(tensor))
        for source in tensor.sources:
            self.expand(source)
        (self.inputs if tensor.is_input else self.nodes).append(tensor)


class _Blocks:
    """Free blocks of one growing buffer, by address; the last one has no end."""

    def __init__(self) -> None:
        self.starts = [0]
        self.ends = [1 << 62]
        self.peak_bytes = 0
        self.live_bytes = 0
        self.peak_live_bytes = 0

    def take(self, size: int) -> int:
        self.live_bytes += size
        self.peak_live_bytes = max(self.peak_live_bytes, self.live_bytes)
        best, best_size = len(self.starts) - 1, 1 << 63
        for index in range(len(self.starts) - 1):
            free = self.ends[index] - self.starts[index]
            if size <= free <= best_size:
                best, best_size = index, free
        offset = self.starts[best]
        self.starts[best] += size
        if self.starts[best] == self.ends[best]:
            del self.starts[best], self.ends[best]
        self.peak_bytes = max(self.peak_bytes, offset + size)
        return offset

    def free(self, offset: int, size: int) -> None:
        if not size:  # took nothing, so its offset may lie in what is free by now
            return
        self.live_bytes -= size
        starts, ends, end = self.starts, self.ends, offset + size
        index = 0
        while starts[index] < offset:
            index += 1
        joins_left = index > 0 and ends[index - 1] == offset
        joins_right = starts[index] == end
        if joins_left and joins_right:
            ends[index - 1] = ends[index]
            del starts[index], ends[index]
        elif joins_left:
            ends[index - 1] = end
        elif joins_right:
            starts[index] = offset
        else:
            starts.insert(index, offset)
            ends.insert(index, end)


class Room(NamedTuple):
    """What a graph needs."""

    buffer_bytes: int
    """Of one buffer with all tensors at their offsets, holes included."""
    live_bytes: int
    """The most that lives at once."""


def allocate(graph: Graph) -> Room:
    """Give every tensor of a graph its offset.

    Example:
        >>> graph = Graph()
        >>> a = graph.op((64, 2), graph.input(2))
        >>> b = graph.op((64, 2), a)
        >>> graph.expand(graph.change(b, a))
        >>> allocate(graph)  # the input, a and b; the sum replaces b
        Room(buffer_bytes=1056, live_bytes=1024)
    """
    blocks = _Blocks()
    for tensor in graph.inputs:
        _place(tensor, blocks)
    for node in graph.nodes:
        if node.root is not None:
            node.root.num_views += 1
        for source in node.sources:
            source.num_readers += 1
    for node in graph.nodes:
        if node.root is None:
            _place(node, blocks)
        for source in node.sources:
            source.num_readers -= 1
            _free_if_done(source, blocks)
    return Room(blocks.peak_bytes, blocks.peak_live_bytes)


def _place(node: Tensor, blocks: _Blocks) -> None:
    node.taken = True
    if node.can_replace:
        for source in node.sources:
            if _is_replaceable(node, source):
                node.offset, source.taken = source.offset, False
                return
    node.offset = blocks.take(node.size_bytes)


def _is_replaceable(node: Tensor, source: Tensor) -> bool:
    # A view is never taken over: the allocator holds it to be somebody else's memory.
    return (
        source.root is None
        and source.taken
        and not source.is_output
        and source.num_readers == 1
        and source.num_views == 0
        and source.shape == node.shape
        and source.item_bytes == node.item_bytes
    )


def _free_if_done(source: Tensor, blocks: _Blocks) -> None:
    if source.num_readers or source.num_views:
        return
    owner = source
    if source.root is not None:
        owner = source.root
        owner.num_views -= 1
        if owner.num_views or owner.num_readers:
            return
    if owner.taken and not owner.is_output and owner.offset is not None:
        blocks.free(owner.offset, owner.size_bytes)
        owner.taken = False


def touched_bytes(graph: Graph) -> int:
    """Bytes of the buffer that a step really writes to, once `allocate` has placed its tensors.

    Inputs that nobody fills and gaps between tensors stay untouched.
    """
    spans = sorted(
        (tensor.offset, tensor.offset + tensor.size_bytes)
        for tensor in (*graph.inputs, *graph.nodes)
        if tensor.offset is not None and tensor.is_written
    )
    covered = reach = 0
    for start, end in spans:
        covered += max(0, end - max(start, reach))
        reach = max(reach, end)
    return covered
