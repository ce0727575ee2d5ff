"""The process around one loaded model: protocol.py is its language, __main__.py its start.

Owns the socket to the gateway, the thread that reads it and the thread that steps the engine.
Fairness is the scheduler's business, admission the gateway's.
"""
