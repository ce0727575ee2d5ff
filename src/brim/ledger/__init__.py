"""The one account of bytes: nothing is loaded or admitted that is not an entry here.

`budget` says how much of a machine may be used, `account` grants it to loaded models, `kv` grants a
model's KV pool to requests.  All three are pure: readings come in as values.
"""
