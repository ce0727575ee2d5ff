"""Decides what goes into each engine step: loop.py is the whole of it, admission.py its arithmetic.

Owns the queue, prefill, decode and the ending of every choice.  Knows nothing of sockets or clocks.
"""
