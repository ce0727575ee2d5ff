"""The text <-> tokens contract: chat templates on the way in, a text stream on the way out.

Neither half knows of HTTP, scheduling or engines; both stand on the `core.tokenizer` protocol.
"""
