"""Bounds on what a client may send, each with its reason; docs/api.md repeats them."""

MAX_BODY_BYTES = 32 * 1024 * 1024
"""Default bound of a request body: millions of tokens of text, and half the largest frame to a
worker (worker.protocol), so that an accepted body always reaches the model."""

LARGE_BODY_BYTES = 1024 * 1024
"""Bodies from here on are decoded on another thread, after a first look: below it decoding takes
less than 50 ms, and handing over would only cost."""

MAX_LARGE_BODIES = 1
"""Decoded at once; the others wait.  Objects take up to ten times the bytes that they came in, and
all threads that decode wait for one lock, so that two at once are no faster than one after the
other and hold twice the memory."""

BODY_WITHIN_S = 120.0
"""For a request body to arrive: the largest at 280 kB/s.  A client that stalls holds a connection
and what it has sent so far."""

MAX_HEADER_BYTES = 64 * 1024
"""Request line and headers: eight times what other servers take, and nothing to hold in memory."""

MAX_HEADERS = 100
"""Browsers and clients send thirty at most, each is an object, and other servers stop here too."""

HEADERS_WITHIN_S = 30.0
"""For request line and headers to arrive; they fit one packet."""

MAX_CONNECTIONS = 1024
"""Open connections at the least: many times the requests that run and queue (16 and 64 by default),
since clients keep idle ones; each costs a file descriptor and at most a body."""

MAX_CHOICES = 8
"""`n`: each choice holds KV of its own for its answer."""

MAX_PROMPTS = 16
"""Prompts of one /v1/completions request; each is admitted on its own."""

MAX_MESSAGES = 10_000
"""Turns of one chat: ten times the longest sessions of agents.  Each template of the tests renders
that many in 0.3 s at most on a small x86 machine; a body could hold a million."""

MAX_PARTS = 1024
"""Pieces of one message's text: clients send one for each file that they quote."""

MAX_TOOL_CALLS = 128
"""Of one turn; as many tools as OpenAI lets a model have."""

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
"""llama.cpp searches the whole vocabulary for each breaker when its settings are met first."""

MAX_DRY_BREAKER_CHARS = 40
"""llama.cpp cuts longer ones off without a word."""

MAX_TOKENS = 2**31 - 1
"""Token counts and ids are 32-bit integers below."""

MAX_VARIABLE_DEPTH = 16
"""Nesting of `chat_template_kwargs`: far above any template's, far below what exhausts a stack."""

MAX_VARIABLES_BYTES = 1024 * 1024
"""JSON of `chat_template_kwargs`: hundreds of times what templates are told.  A number can be twice
as long in a frame to a worker as it is in JSON."""

STRING_END = r"$(?!\n)"
"""Of a pattern: in Python, not in JSON schemas, `$` alone also matches before a last line feed."""
