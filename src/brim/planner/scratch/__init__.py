"""Scratch memory of llama.cpp: the graph it computes for a batch, and what lives at once in it.

`compute` answers for a plan.  `architectures` says what a model's layers are, in the words of
`layers`; `graph` and `recurrent` build what they compute; `liveness` places it in memory.
"""
