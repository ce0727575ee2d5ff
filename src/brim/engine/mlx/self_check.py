"""What a model class can do, tried out when it is loaded instead of taken from anyone's word.

A class may do more with keys, masks or positions than hand them on to attention, it may compute one
token otherwise than several, and caches of a kind that cannot be batched may be in it.
"""

import mlx.core as mx

from brim.engine.mlx.batch import Form
from brim.engine.mlx.caches import CacheMaker
from brim.engine.mlx.decode import Decoder

_PROMPTS = ((1, 2, 3, 4, 5), (6, 7))
"""Of different lengths, so that a mixed-up row shows."""

_NEXT = (8, 9)

_TOLERANCE = 0.05
"""Of the logits' own spread.  On Metal other kernels serve one row and two; a row that reads
another's cache is off by all of it."""


def check(decoder: Decoder, caches: CacheMaker) -> bool:
    """Find the form in which two sequences in one pass give what each gives alone, and set it.

    Returns:
        Whether results are the same to the bit, alone and together, in pieces and whole.
    """
    rows = range(len(_PROMPTS))
    alone = mx.concatenate([_alone(decoder, caches, row) for row in rows])
    in_pieces = mx.concatenate([_alone(decoder, caches, row, num_first=1) for row in rows])
    is_exact = bool(mx.array_equal(alone, in_pieces))
    spread = mx.std(alone.astype(mx.float32))
    for form in Form:
        decoder.form = form
        together = _together(decoder, caches)
        if together is None:
            continue
        worst = mx.abs((together - alone).astype(mx.float32)).max()
        if worst <= _TOLERANCE * spread:
            return is_exact and float(worst) == 0.0
    decoder.form = None
    return is_exact


def _alone(
    decoder: Decoder, caches: CacheMaker, row: int, num_first: int | None = None
) -> mx.array:
    sequence, prompt = caches.new(None), _PROMPTS[row]
    for piece in (prompt[:num_first], prompt[num_first:] if num_first else ()):
        if piece:
            decoder.read(sequence, piece)
    logits: mx.array = decoder.decode([sequence], _NEXT[row : row + 1])
    decoder.wait()
    return logits


def _together(decoder: Decoder, caches: CacheMaker) -> mx.array | None:
    """Logits of both in one pass; None where the model cannot."""
    sequences = [caches.new(None) for _ in _PROMPTS]
    try:
        for sequence, prompt in zip(sequences, _PROMPTS, strict=True):
            decoder.read(sequence, prompt)
        logits: mx.array = decoder.decode(sequences, _NEXT)
        mx.eval(logits)
        return logits
    except Exception:
        # Whatever a model class makes of views in the place of arrays: it takes them one by one.
        return None
    finally:
        decoder.reset()
