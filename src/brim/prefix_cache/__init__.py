"""KV of prompts on disk: format, files, index, eviction and the store that the scheduler asks.

Owns the directory of segments and every bound on it.  Knows nothing of engines: a block is bytes
that an engine wrote and checks by itself when it takes them back.

Read `store.py` first; docs/formats/prefix-cache.md has the files byte by byte.
"""
