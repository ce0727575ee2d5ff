"""The one account of bytes: nothing is loaded or admitted that is not an entry here.

`budget` says how much of a machine may be used, `account` grants it to loaded models, `kv` grants a
model's KV pool to requests, `ways` says what would make a refused model fit and `fit` takes the
first of those ways by itself; `correction` counts in what earlier forecasts of a model got wrong.
These are pure: readings come in as values.

Two modules touch files: `book` shares the grants of all brim processes of a machine, `history`
keeps what was planned and what was measured.
"""
