"""A checkpoint's files in the forms in which hubs publish them."""

import json

import safetensors.numpy

PART_ONE, PART_TWO = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))


def in_two_parts(files: dict[str, bytes]) -> dict[str, bytes]:
    """A checkpoint's files with its weights in two parts and their index."""
    arrays = safetensors.numpy.load(files["model.safetensors"])
    names = sorted(arrays)
    parts = {PART_ONE: names[::2], PART_TWO: names[1::2]}
    weight_map = {name: part for part, inside in parts.items() for name in inside}
    saved = {
        part: safetensors.numpy.save({name: arrays[name] for name in inside})
        for part, inside in parts.items()
    }
    index = {"model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode()}
    rest = {name: data for name, data in files.items() if name != "model.safetensors"}
    return {**rest, **index, **saved}
