"""Token engines behind one contract: base.py says it, factory.py picks one.

Owns tokens, KV and sampling.  Knows nothing of text, requests, fairness or budgets.
"""
