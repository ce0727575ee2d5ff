"""The graph that llama.cpp computes for one micro-batch, as sizes alone.

Norms, biases and scales work in place, so architectures that differ in nothing else share one
graph.  `layers` has the widths, `liveness` says how much memory a graph takes.

Source: llama-graph.cpp and src/models of llama.cpp (llama-cpp-python 0.3.36).
"""

from brim.planner.scratch.layers import (
    Attention,
    Batch,
    FeedForward,
    GraphModel,
    Latent,
    Layer,
    OutputCut,
)
from brim.planner.scratch.liveness import Graph, Tensor
from brim.planner.scratch.recurrent import RecurrentLayers

ROTATION_WIDTH = 64
"""The smallest rotation; V always takes it, K the largest power of two that divides a head."""


def build(model: GraphModel, batch: Batch) -> Graph:
    """The graph of one micro-batch."""
    builder = _Builder(model, batch)
    stream = builder.embed()
    for index, layer in enumerate(model.layers):
        stream = builder.layer(layer, stream, is_last=index == len(model.layers) - 1)
    builder.output(stream)
    return builder.graph


class _Builder:
    """Adds layers to one graph."""

    def __init__(self, model: GraphModel, batch: Batch) -> None:
        self.graph = graph = Graph()
        self.model = model
        self.batch = batch
        rows, item = batch.num_rows, 2 if batch.flash_attention else 4
        self.recurrent = RecurrentLayers(graph, batch, model.hidden)
        self.positions = graph.input(rows)
        self.out_ids = graph.input(batch.num_outputs)
        self.k_ids = {windowed: graph.input(rows, item_bytes=8) for windowed in (False, True)}
        # Without flash attention V is stored transposed, value by value.
        per_row = 1 if batch.flash_attention else model.widest_value
        self.v_ids = {
            windowed: graph.input(rows, per_row, item_bytes=8) for windowed in (False, True)
        }
        self.masks = {
            False: graph.input(batch.num_cells, rows, item_bytes=item),
            True: graph.input(batch.num_window_cells, rows, item_bytes=item),
        }
        self.rotations: dict[tuple[bool, bool, int], Tensor] = {}
        self.per_layer: Tensor | None = None

    def embed(self) -> Tensor:
        graph, rows, hidden = self.graph, self.batch.num_rows, self.model.hidden
        found = graph.op((hidden, rows), graph.input(rows))
        graph.expand(found)
        # Embeddings may come from outside too: their input is reserved, and never freed.
        graph.expand(graph.input(hidden, rows, is_written=False))
        if self.model.per_layer_width:
            self.per_layer = self.embed_per_layer(found)
        return found

    def embed_per_layer(self, stream: Tensor) -> Tensor:
        """The rows of each layer's own embeddings, mixed with the stream and sorted by layer."""
        graph, width = self.graph, self.model.per_layer_width * self.model.num_layers
        found = graph.op((width, self.batch.num_rows), graph.input(self.batch.num_rows))
        scaled = graph.change(graph.view(found, *found.shape))
        graph.expand(scaled)
        projected = self.norm(graph.view(graph.change(self.matmul(width, stream)), width))
        total = graph.change(graph.change(projected, scaled))
        return graph.op((width, self.batch.num_rows), graph.view(total, width))

    def layer(self, layer: Layer, stream: Tensor, *, is_last: bool) -> Tensor:
        graph = self.graph
        cut = is_last and self.model.output_cut is OutputCut.LAST_LAYER
        normed = self.norm(stream)
        if layer.attention is not None and layer.recurrent is not None:
            mixed = self.attention(layer.attention, normed)
            mixed = graph.change(mixed, self.recurrent.add(layer.recurrent, self.norm(stream)))
            summed = self.add(mixed, stream)
            summed = self.outputs_of(summed) if cut else summed
        else:
            mixed = self.mix(layer, normed)
            if cut:
                mixed, stream = self.outputs_of(mixed), self.outputs_of(stream)
                normed = self.outputs_of(normed) if layer.is_parallel else normed
            if layer.is_parallel and layer.feed_forward is not None:
                result = self.feed_forward(layer.feed_forward, normed)
                return graph.change(graph.change(result, mixed), stream)
            summed = self.add(mixed, stream)
        if layer.feed_forward is not None:
            summed = self.add(self.feed_forward(layer.feed_forward, self.norm(summed)), summed)
        return self.add_per_layer(summed) if self.per_layer is not None else summed

    def mix(self, layer: Layer, normed: Tensor) -> Tensor:
        """What moves values between rows; a layer that is a feed-forward alone moves none."""
        if layer.attention is not None:
            return self.attention(layer.attention, normed)
        if layer.recurrent is not None:
            return self.recurrent.add(layer.recurrent, normed)
        return normed

    def add_per_layer(self, stream: Tensor) -> Tensor:
        assert self.per_layer is not None
        graph, rows = self.graph, stream.shape[1]
        gate = graph.change(self.matmul(self.model.per_layer_width, stream))
        own = graph.view(self.per_layer, self.model.per_layer_width, rows)
        added = self.norm(self.matmul(self.model.hidden, graph.change(gate, own)))
        return graph.change(stream, added)

    def output(self, stream: Tensor) -> None:
        cut = self.model.output_cut
        if cut is OutputCut.STREAM:
            stream.is_output = True
            stream = self.outputs_of(stream)
        result = self.norm(stream)
        result.is_output = True
        if cut is OutputCut.NORMED:
            result = self.outputs_of(result)
            result.is_output = True
        logits = self.matmul(self.model.vocab, result)
        logits.is_output = True
        self.graph.expand(logits)

    # --- pieces --------------------------------------------------------------------------------

    def norm(self, source: Tensor) -> Tensor:
        return self.graph.change(self.graph.change(source))

    def matmul(self, width: int, source: Tensor) -> Tensor:
        return self.graph.op((width, *source.shape[1:]), source)

    def outputs_of(self, source: Tensor) -> Tensor:
        return self.graph.op((source.shape[0], self.batch.num_outputs), source, self.out_ids)

    def add(self, added: Tensor, stream: Tensor) -> Tensor:
        first, second = (stream, added) if self.model.adds_to_stream else (added, stream)
        return self.graph.change(first, second)

    def rotate(self, source: Tensor, shape: Attention, *, is_key: bool) -> Tensor:
        width = ROTATION_WIDTH
        while is_key and shape.key_dim % (width * 2) == 0:
            width *= 2
        matrix = self.rotations.setdefault(
            (is_key, shape.has_window, width), self.graph.input(width, width)
        )
        num_rows = source.size_bytes // source.item_bytes // width
        flat = self.graph.view(source, width, num_rows)
        return self.graph.view(self.graph.op((width, num_rows), matrix, flat), *source.shape)

    # --- attention -----------------------------------------------------------------------------

    def attention(self, shape: Attention, normed: Tensor) -> Tensor:
        if shape.latent is not None:
            return self.latent_attention(shape, shape.latent, normed)
        graph, batch = self.graph, self.batch
        query, key, value, gate = self.project(shape, normed)
        if shape.has_positions:
            query, key = graph.change(query, self.positions), graph.change(key, self.positions)
        if batch.rotate_k:
            query, key = (self.rotate(t, shape, is_key=True) for t in (query, key))
        if batch.rotate_v:
            value = self.rotate(value, shape, is_key=False)
        graph.expand(query)
        if shape.stores_kv:
            graph.expand(value)
            graph.expand(key)
            self.store(key, self.k_ids[shape.has_window])
            self.store(value, self.v_ids[shape.has_window])
        result = self.attend(shape, query, value_dim=shape.value_dim)
        if batch.rotate_v:
            result = self.rotate(result, shape, is_key=False)
        if gate is not None:
            result = graph.change(result, graph.change(gate))
        return self.matmul(self.model.hidden, result)

    def project(
        self, shape: Attention, normed: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Q, K, V and the gate where there is one."""
        graph, rows = self.graph, self.batch.num_rows
        sizes = (
            (shape.key_dim, shape.num_heads),
            (shape.key_dim, shape.num_kv_heads),
            (shape.value_dim, shape.num_kv_heads),
        )
        gate = None
        if shape.is_fused:
            fused = self.matmul(sum(width * heads for width, heads in sizes), normed)
            query, key, value = (graph.view(fused, width, heads, rows) for width, heads in sizes)
        else:
            both = 2 if shape.is_gated else 1
            first = self.matmul(both * shape.key_dim * shape.num_heads, normed)
            query = graph.view(first, *sizes[0], rows)
            if shape.is_gated:
                gate = graph.op((shape.key_dim * shape.num_heads, rows), graph.view(first, rows))
            key, value = (
                graph.view(self.matmul(width * heads, normed), width, heads, rows)
                for width, heads in sizes[1:]
            )
        return query, key, graph.change(value) if shape.norms_value else value, gate

    def store(self, rows: Tensor, ids: Tensor) -> None:
        """Rows into the cache: the result is a view of the cache, which lies elsewhere."""
        self.graph.expand(self.graph.op((0,), self.graph.view(rows, *rows.shape), ids))

    def attend(self, shape: Attention, query: Tensor, *, value_dim: int) -> Tensor:
        """Scores against the whole cache, and what they pick."""
        graph, rows, heads = self.graph, self.batch.num_rows, shape.num_heads
        cells = self.batch.num_window_cells if shape.has_window else self.batch.num_cells
        mask = self.masks[shape.has_window]
        query = graph.view(query, *query.shape)
        if self.batch.flash_attention:
            found = graph.op((value_dim, heads, rows), query, mask)
            if shape.latent is not None:
                found = self.decompress(shape.latent, heads, graph.view(found, value_dim, heads))
                found = graph.op((shape.latent.value_dim, heads, rows), found)
            result = graph.view(found, found.shape[0] * heads, rows)
        else:
            scores = graph.change(graph.op((cells, rows, heads), query), mask)
            if shape.latent is not None:
                # V is a view of K here, so its transposed copy is made for each step.
                copy = graph.op((cells, value_dim), item_bytes=2)
                found = graph.op((value_dim, rows, heads), copy, scores)
                found = self.decompress(shape.latent, heads, found)
            else:
                found = graph.op((value_dim, rows, heads), scores)
            view = graph.view(found, *found.shape)
            result = graph.op((found.shape[0] * heads, rows), view)
        graph.expand(result)
        return result

    def decompress(self, latent: Latent, heads: int, found: Tensor) -> Tensor:
        return self.graph.op((latent.value_dim, self.batch.num_rows, heads), found)

    def latent_attention(self, shape: Attention, latent: Latent, normed: Tensor) -> Tensor:
        """MLA with K absorbed into the query: one wide KV head, which is also V."""
        graph, rows, heads = self.graph, self.batch.num_rows, shape.num_heads
        width = latent.kv_rank + latent.rope_dim
        compressed = normed
        if latent.query_rank:
            compressed = self.norm(self.matmul(latent.query_rank, normed))
        query = self.matmul(latent.key_dim * heads, compressed)
        query = graph.view(query, latent.key_dim, heads, rows)
        joint = self.matmul(width, normed)
        kv = graph.view(joint, latent.kv_rank, rows)
        key_position = graph.change(graph.view(joint, latent.rope_dim, 1, rows), self.positions)
        kv = self.norm(kv)
        plain = graph.view(query, latent.key_dim - latent.rope_dim, heads, rows)
        turned = graph.change(graph.view(query, latent.rope_dim, heads, rows), self.positions)
        absorbed = graph.op((latent.kv_rank, rows, heads), graph.view(plain, *plain.shape))
        absorbed = graph.view(absorbed, latent.kv_rank, heads, rows)
        query = graph.op((width, heads, rows), absorbed, turned)
        kv = graph.view(kv, latent.kv_rank, 1, rows)
        key = graph.op((width, 1, rows), kv, key_position)
        for tensor in (query, kv, key):
            graph.expand(tensor)
        self.store(key, self.k_ids[shape.has_window])
        result = self.attend(shape, query, value_dim=latent.kv_rank)
        return self.matmul(self.model.hidden, result)

    # --- feed-forward --------------------------------------------------------------------------

    def feed_forward(self, shape: FeedForward, normed: Tensor) -> Tensor:
        if not shape.num_experts:
            return self.dense(shape, shape.width, normed)
        routed = self.experts(shape, normed)
        if not shape.shared_width:
            return routed
        return self.graph.change(routed, self.dense(shape, shape.shared_width, normed))

    def dense(self, shape: FeedForward, width: int, normed: Tensor) -> Tensor:
        graph, rows = self.graph, normed.shape[1]
        if not shape.is_gated:
            product = graph.change(self.matmul(width, normed))
        elif shape.is_fused:
            product = graph.op((width, rows), self.matmul(2 * width, normed))
        else:
            up = self.matmul(width, normed)
            product = graph.op((width, rows), self.matmul(width, normed), up)
        return self.matmul(self.model.hidden, product)

    def experts(self, shape: FeedForward, normed: Tensor) -> Tensor:
        graph, rows, hidden = self.graph, normed.shape[1], self.model.hidden
        used = shape.num_active_experts
        scores = graph.change(self.matmul(shape.num_experts, normed))
        chosen = graph.view(graph.op((shape.num_experts, rows), scores), used, rows)
        weights = graph.op((1, used, rows), graph.view(scores, 1, shape.num_experts, rows), chosen)
        weights = self.expert_weights(shape, weights)
        graph.expand(weights)
        spread = graph.view(normed, hidden, 1, rows)
        up = self.through_experts(shape, shape.width, spread, chosen)
        product = graph.change(up)
        if shape.is_gated:
            gate = self.through_experts(shape, shape.width, spread, chosen)
            product = graph.op((shape.width, used, rows), gate, up)
        results = self.through_experts(shape, hidden, product, chosen)
        results = graph.change(results, weights)
        graph.expand(results)
        return self.sum_experts(results, used, rows)

    def through_experts(
        self, shape: FeedForward, width: int, source: Tensor, chosen: Tensor
    ) -> Tensor:
        size = (width, shape.num_active_experts, source.shape[2])
        result = self.graph.op(size, source, chosen)
        return self.graph.change(result, chosen) if shape.has_bias else result

    def expert_weights(self, shape: FeedForward, weights: Tensor) -> Tensor:
        graph, used, rows = self.graph, weights.shape[1], weights.shape[2]
        flat = graph.view(weights, used, rows)
        total = graph.change(graph.op((1, rows), flat))
        return graph.view(graph.change(flat, total), 1, used, rows)

    def sum_experts(self, results: Tensor, used: int, rows: int) -> Tensor:
        graph = self.graph
        views = [graph.view(results, results.shape[0], rows) for _ in range(used)]
        for view in views:
            graph.expand(view)
        total = views[0]
        for view in views[1:]:
            total = graph.change(total, view)
            graph.expand(total)
        return total if used > 1 else graph.op((results.shape[0], rows), total)
