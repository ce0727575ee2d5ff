"""Bounds on what a client may send, each with its reason; docs/api.md repeats them."""

MAX_BODY_BYTES = 32 * 1024 * 1024
"""Default bound of a request body: millions of tokens of text, and half the largest frame to a
worker (worker.protocol), so that an accepted body always reaches the model."""

MAX_CHOICES = 8
"""`n`: each choice holds KV of its own for its answer."""

MAX_PROMPTS = 16
"""Prompts of one /v1/completions request; each is admitted on its own."""

MAX_STOPS = 16
"""OpenAI takes 4.  Matching costs the same for any number; building is bounded by this."""

MAX_STOP_CHARS = 256
"""Text that may begin a stop string is held back, so a long one makes streaming jerk."""

MAX_TOP_LOGPROBS = 20
"""OpenAI's bound; more of them would cost more than the token."""

MAX_LOGIT_BIAS = 1024
"""Entries of `logit_bias`: each is applied at every token."""

MAX_HISTORY_TOKENS = 1024 * 1024
"""How far back penalties may look: backends keep a ring buffer of that size for each sequence."""

MAX_DRY_BREAKERS = 16
"""llama.cpp searches the whole vocabulary for each breaker when a sequence is opened."""

MAX_DRY_BREAKER_CHARS = 40
"""llama.cpp cuts longer ones off without a word."""

MAX_SEED = 2**32 - 2
"""llama.cpp seeds are 32 bits wide, and the last value means "draw one"."""

MAX_TOKENS = 2**31 - 1
"""Token counts and ids are 32-bit integers below."""

MAX_VARIABLE_DEPTH = 16
"""Nesting of `chat_template_kwargs`: far above any template's, far below what exhausts a stack."""
