"""Recurrent layers of llama.cpp's graph: Mamba, gated delta nets, short convolutions.

Source: mamba-base.cpp, delta-net-base.cpp, qwen3next.cpp and lfm2.cpp of llama-cpp-python 0.3.36.
"""

from brim.planner.scratch.layers import Batch, DeltaNet, Mamba, Recurrent, ShortConvolution
from brim.planner.scratch.liveness import Graph, Tensor


class RecurrentLayers:
    """Adds recurrent layers to a graph.

    Args:
        graph: Where to.
        batch: What one computation carries.
        hidden: Width of the residual stream.
    """

    def __init__(self, graph: Graph, batch: Batch, hidden: int) -> None:
        self.graph = graph
        self.batch = batch
        self.hidden = hidden
        self.state_ids = graph.input(batch.num_sequences)

    def add(self, shape: Recurrent, normed: Tensor) -> Tensor:
        """One layer's result, as wide as the stream."""
        if isinstance(shape, DeltaNet):
            return self._delta_net(shape, normed)
        if isinstance(shape, ShortConvolution):
            return self._short_convolution(shape, normed)
        return self._mamba2(shape, normed) if shape.num_groups else self._mamba1(shape, normed)

    def _matmul(self, width: int, source: Tensor) -> Tensor:
        return self.graph.op((width, self.batch.num_rows), source)

    def _result(self, source: Tensor) -> Tensor:
        """Back to the stream's shape; as a view it is never overwritten by the sum."""
        return self.graph.view(self._matmul(self.hidden, source), self.hidden, source.shape[-1])

    def _states(self, num_values: int) -> Tensor:
        """A state of each sequence, copied out of the cache."""
        states = self.graph.op((num_values, self.batch.num_sequences), self.state_ids)
        self.graph.expand(states)
        return states

    def _convolve(self, source: Tensor, channels: int, kernel: int) -> Tensor:
        """Each row with those before it, whose last ones come from the cache and go back there."""
        graph, rows, sequences = self.graph, self.batch.num_rows, self.batch.num_sequences
        states = self._states((kernel - 1) * channels)
        states = graph.view(states, kernel - 1, channels, sequences)
        longer = (kernel - 1 + rows // sequences, channels, sequences)
        joined = graph.op(longer, states, graph.view(source, channels, rows))
        last = graph.view(joined, kernel - 1, channels, sequences)
        graph.expand(graph.op((0,), last))
        return graph.change(graph.op((channels, rows), joined))

    def _mamba1(self, shape: Mamba, normed: Tensor) -> Tensor:
        graph, rows, inner = self.graph, self.batch.num_rows, shape.inner
        both = self._matmul(2 * inner, graph.view(normed, *normed.shape))
        left, gate = graph.view(both, inner, rows), graph.view(both, inner, rows)
        x = graph.change(self._convolve(left, inner, shape.kernel))
        parts = self._matmul(shape.step_rank + 2 * shape.state, x)
        step = graph.op((shape.step_rank, rows), graph.view(parts, shape.step_rank, rows))
        b, c = (graph.view(parts, shape.state, 1, rows) for _ in range(2))
        step = graph.change(self._matmul(inner, step))
        y = self._scan(shape, graph.view(x, 1, inner, rows), step, b, c)
        y = graph.change(graph.view(y, inner, rows), graph.change(x))
        gate = graph.op((inner, rows), gate)
        return self._result(graph.op((inner, rows), gate, y))

    def _mamba2(self, shape: Mamba, normed: Tensor) -> Tensor:
        graph, rows, inner = self.graph, self.batch.num_rows, shape.inner
        channels = inner + 2 * shape.num_groups * shape.state
        joint = self._matmul(inner + channels + shape.step_rank, normed)
        joint = graph.view(joint, *joint.shape)
        gate, left = graph.view(joint, inner, rows), graph.view(joint, channels, rows)
        step = graph.view(joint, shape.step_rank, rows)
        xbc = graph.change(self._convolve(left, channels, shape.kernel))
        x = graph.view(xbc, inner, rows)
        b, c = (graph.view(xbc, shape.state, shape.num_groups, rows) for _ in range(2))
        step = graph.change(graph.op((shape.step_rank, rows), step))
        y = self._scan(shape, x, step, b, c)
        y = graph.change(graph.view(y, inner, rows), graph.change(x))
        gate = graph.op((inner, rows), gate)
        product = graph.op((inner, rows), gate, y)
        product = graph.change(graph.view(product, inner // shape.num_groups, rows))
        return self._matmul(self.hidden, graph.view(graph.change(product), inner, rows))

    def _scan(self, shape: Mamba, x: Tensor, step: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """Outputs of all rows and the last state of each sequence, in one tensor."""
        num_values = shape.inner * (self.batch.num_rows + shape.state * self.batch.num_sequences)
        result = self.graph.op((num_values,), x, step, b, c, self.state_ids)
        self.graph.expand(result)
        self._store(result, shape.inner * shape.state)
        return result

    def _store(self, result: Tensor, num_values: int) -> None:
        last = self.graph.view(result, num_values, self.batch.num_sequences)
        self.graph.expand(self.graph.op((0,), last))

    def _delta_net(self, shape: DeltaNet, normed: Tensor) -> Tensor:
        graph, rows, dim = self.graph, self.batch.num_rows, shape.head_dim
        inner = shape.num_value_heads * dim
        graph.expand(normed)
        mixed = self._matmul(shape.channels, normed)
        gate = self._matmul(inner, normed)
        rates = self._matmul(2 * shape.num_value_heads, normed)
        beta, decay = (
            graph.change(graph.op((shape.num_value_heads, rows), graph.view(rates, rows)))
            for _ in range(2)
        )
        convolved = self._convolve(mixed, shape.channels, shape.kernel)
        state = self._states(dim * dim * shape.num_value_heads)
        query, key = (self._key(shape, convolved) for _ in range(2))
        value = graph.view(convolved, inner, rows)
        num_values = inner * (rows + dim * self.batch.num_sequences)
        result = graph.op((num_values,), query, key, value, decay, beta, graph.view(state, dim))
        self._store(result, dim * inner)
        normalised = graph.change(graph.change(graph.view(result, inner, rows)))
        gate = graph.change(graph.view(gate, inner, rows))
        return self._result(graph.view(graph.change(normalised, gate), inner, rows))

    def _key(self, shape: DeltaNet, convolved: Tensor) -> Tensor:
        """Q or K of length one, repeated where the heads of V are more."""
        graph, rows, width = self.graph, self.batch.num_rows, shape.num_key_heads * shape.head_dim
        unit = graph.op((width, rows), graph.view(convolved, width, rows))
        if not shape.repeats_keys or shape.num_key_heads == shape.num_value_heads:
            return unit
        width = shape.num_value_heads * shape.head_dim
        return graph.view(graph.op((width, rows), graph.view(unit, rows)), width, rows)

    def _short_convolution(self, shape: ShortConvolution, normed: Tensor) -> Tensor:
        graph, rows, hidden = self.graph, self.batch.num_rows, self.hidden
        parts = self._matmul(3 * hidden, graph.view(normed, *normed.shape))
        before, after, values = (graph.view(parts, hidden, rows) for _ in range(3))
        gated = graph.op((hidden, rows), before, values)
        convolved = self._convolve(gated, hidden, shape.kernel)
        return self._result(graph.change(convolved, after))
