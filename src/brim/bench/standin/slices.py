"""Shorter models of the same layers, and what two of them say about the whole.

A model's time and memory are a fixed part plus a part for each layer, so two slices of different
depth give both.  A slice keeps the first layers, because rules such as "every sixth layer has no
window" count from the first; only the tensors' types come from layers all over the model, since
recipes give the first and last ones more bits.
"""

import re
import struct
from collections import Counter
from collections.abc import Iterator, Sequence

import msgspec

from brim.bench.standin.blueprint import ARRAY, NUMBER_BYTES, Blueprint, Pair, Tensor, count_pair
from brim.core.model import KvLayer
from brim.errors import InvalidRequest, ModelFileError

_LAYER = re.compile(r"blk\.(\d+)\.(.+)")

Structure = tuple[tuple[str, tuple[int, ...]], ...]


def num_layers(blueprint: Blueprint) -> int:
    """Layers of the model, without heads at its end that predict further tokens.

    Raises:
        ModelFileError: It does not say how many.
    """
    blocks = _count(blueprint, "block_count")
    if not blocks:
        raise ModelFileError("the header has no block_count; use a complete GGUF file")
    return blocks - (_count(blueprint, "nextn_predict_layers") or 0)


def sliced(blueprint: Blueprint, depth: int) -> Blueprint:
    """The same model with `depth` layers.

    Raises:
        InvalidRequest: It has not so many layers, or the first ones lack a kind that comes later.
    """
    whole = num_layers(blueprint)
    layers = _layers(blueprint, whole)
    structures = [_structure(layer) for layer in layers]
    # Backends abort on a hybrid without any attention.
    least = max(structures.index(structure) for structure in structures) + 1
    if not least <= depth <= whole:
        raise InvalidRequest(
            f"the model has {whole} layers, the first {least} of which show all kinds; "
            f"choose {least} to {whole}, not {depth}"
        )
    sources = _sources(layers, depth)
    kept: list[Tensor] = []
    for tensor in blueprint.tensors:
        match = _LAYER.fullmatch(tensor.name)
        if match is None:
            kept.append(tensor)
        elif (layer := int(match[1])) < depth:
            kind = layers[sources[layer]][match[2]].type_name
            kept.append(msgspec.structs.replace(tensor, type_name=kind))
    return Blueprint(tuple(_pairs(blueprint, depth)), tuple(kept), blueprint.alignment)


def _layers(blueprint: Blueprint, whole: int) -> list[dict[str, Tensor]]:
    """The tensors of each layer by their names within it."""
    layers: list[dict[str, Tensor]] = [{} for _ in range(whole)]
    for tensor in blueprint.tensors:
        match = _LAYER.fullmatch(tensor.name)
        if match and int(match[1]) < whole:
            layers[int(match[1])][match[2]] = tensor
    return layers


def _structure(layer: dict[str, Tensor]) -> Structure:
    return tuple((name, tensor.shape) for name, tensor in layer.items())


def _sources(layers: Sequence[dict[str, Tensor]], depth: int) -> list[int]:
    """For each kept layer the one whose types it gets: of the same structure, of the right mix.

    Every next one brings the bytes of each type nearest to the whole's share, so that slices of any
    two depths differ by layers of the average mix.
    """
    if depth == len(layers):
        return list(range(depth))
    structures = [_structure(layer) for layer in layers]
    picks: dict[Structure, Iterator[int]] = {}
    for structure in set(structures[:depth]):
        alike = [layer for layer, other in enumerate(structures) if other == structure]
        picks[structure] = _average_first([_bytes_by_type(layers[i]) for i in alike], alike)
    return [next(picks[structure]) for structure in structures[:depth]]


def _average_first(mixes: Sequence[Counter[str]], layers: Sequence[int]) -> Iterator[int]:
    """The layers in an order in which every beginning has about the mix of all."""
    total: Counter[str] = Counter()
    for mix in mixes:
        total.update(mix)
    left, taken = list(range(len(mixes))), Counter[str]()
    while left:
        share = (len(mixes) - len(left) + 1) / len(mixes)

        def distance(index: int, share: float = share) -> float:
            return sum(abs(total[t] * share - taken[t] - mixes[index][t]) for t in total)

        best = min(left, key=distance)
        left.remove(best)
        taken.update(mixes[best])
        yield layers[best]


def _bytes_by_type(layer: dict[str, Tensor]) -> Counter[str]:
    found: Counter[str] = Counter()
    for tensor in layer.values():
        found[tensor.type_name] += tensor.size_bytes
    return found


# --- metadata ----------------------------------------------------------------------------------


def _architecture(blueprint: Blueprint) -> str:
    for pair in blueprint.pairs:
        if pair.key == "general.architecture":
            return pair.payload[8:].decode()
    raise ModelFileError("the header has no general.architecture; use a complete GGUF file")


def _count(blueprint: Blueprint, key: str) -> int | None:
    """A number of the architecture; None where it is not there."""
    name = f"{_architecture(blueprint)}.{key}"
    for pair in blueprint.pairs:
        if pair.key == name and pair.kind != ARRAY:
            return int.from_bytes(pair.payload, "little")
    return None


def _pairs(blueprint: Blueprint, depth: int) -> Iterator[Pair]:
    prefix = _architecture(blueprint) + "."
    blocks = _count(blueprint, "block_count")
    for pair in blueprint.pairs:
        if pair.key == prefix + "block_count":
            yield count_pair(pair.key, depth)
        elif pair.key == prefix + "nextn_predict_layers":
            continue
        elif pair.key.startswith(prefix) and pair.kind == ARRAY:
            yield _shortened(pair, blocks, depth)
        else:
            yield pair


def _shortened(pair: Pair, blocks: int | None, depth: int) -> Pair:
    """An array with a number for each layer loses those of the layers that go."""
    kind, length = struct.unpack_from("<IQ", pair.payload)
    if length != blocks or kind not in NUMBER_BYTES:
        return pair
    items = pair.payload[12 : 12 + depth * NUMBER_BYTES[kind]]
    return Pair(pair.key, pair.kind, struct.pack("<IQ", kind, depth) + items)


# --- which depths, and what they say -----------------------------------------------------------


SHALLOW_PART = 0.25
"""The shallow slice's part of the deep one.  A single layer stays in the processor's caches and has
one layer's mix of types: 16 layers from 1 and 6 came out 10 % too fast, and 5 % too large in
anonymous memory (1.24 B Q4_K_M, 2-core x86-64 VM)."""


class Depths(msgspec.Struct, frozen=True, kw_only=True):
    """Two depths whose difference is made of whole periods of a model's layers."""

    shallow: int
    deep: int
    period: int
    """Layers after which kinds repeat; 1 where all are alike."""


def layer_kinds(blueprint: Blueprint, kv_layers: Sequence[KvLayer]) -> list[object]:
    """What makes layers cost the same: their tensors, and what they keep of a token."""
    whole = num_layers(blueprint)
    structures = [_structure(layer) for layer in _layers(blueprint, whole)]
    kept = [*kv_layers, *[None] * whole][:whole]
    return list(zip(structures, kept, strict=True))


def depths(kinds: Sequence[object], most: int) -> Depths | None:
    """The two depths to measure, the deeper of at most `most` layers; None where there are none.

    The shallow slice has every kind, the layers that occur only at the beginning and the odd rest:
    then what lies between it and the whole is periods only, as is what lies between the two.
    """
    whole = len(kinds)
    lead, period = _periods(kinds)
    shallow = lead + (whole - lead) % period
    least = max(kinds.index(kind) for kind in kinds) + 1
    shallow += -(-max(0, least - shallow) // period) * period
    num_periods = (min(most, whole) - shallow) // period
    if num_periods < 1:
        return None
    deep = shallow + num_periods * period
    shallow += max(0, round(deep * SHALLOW_PART) - shallow) // period * period
    return Depths(shallow=shallow, deep=deep, period=period)


def _periods(kinds: Sequence[object]) -> tuple[int, int]:
    """(layers before kinds repeat, layers in a period), the fewest together."""
    numbers: dict[object, int] = {}
    codes = [numbers.setdefault(kind, len(numbers)) for kind in kinds]
    for total in range(1, len(codes) + 1):
        for period in range(1, total + 1):
            lead = total - period
            if all(codes[i] == codes[i + period] for i in range(lead, len(codes) - period)):
                return lead, period
    return 0, len(codes)


def extrapolated(shallow: float, deep: float, at: Depths, whole: int) -> float:
    """What a whole model takes of what its two slices take: a fixed part and a part a layer.

    Example:
        >>> extrapolated(3.0, 5.0, Depths(shallow=2, deep=6, period=1), 32)
        18.0
    """
    return shallow + (deep - shallow) * (whole - at.shallow) / (at.deep - at.shallow)
