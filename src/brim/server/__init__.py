"""HTTP: an ASGI app over `runtime.api.Runtime`, and the server that carries it.

Owns schemas, validation, shapes of answers and errors, and what happens when a client leaves.
Knows nothing of workers, memory or tokens; `wire/` is what crosses the network, `routes/` what is
asked, `app.py` puts them together, `serve.py` listens.
"""
