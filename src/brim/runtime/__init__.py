"""The gateway's composition root: api.py is what it offers, gateway.py puts it together.

Owns the workers' lives, admission and what answers are owed.  Knows nothing of HTTP; engines live
in the workers and are never imported here.
"""
