"""How long the prompts and answers of the workloads are, in tokens."""

import msgspec


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """The published sizes; `scaled` makes smaller ones for smaller machines and windows."""

    short_prompt_tokens: int = 32
    """A first question."""
    single_answer_tokens: int = 64
    """Long enough that a rate over it has a resolution of 2 %."""
    cold_prompt_tokens: int = 1400
    """A page of text with a system prompt; what the published baseline of restarts was taken at."""
    short_answer_tokens: int = 16
    """Where the prompt is the question: a few steps behind the first token."""
    stall_prompt_tokens: int = 1000
    """A prompt that takes seconds to read on a CPU."""
    running_answer_tokens: int = 1024
    """Of the client that decodes meanwhile: longer than the other prompt takes to be read."""
    shared_prompt_tokens: int = 700
    """A system prompt with instructions and examples."""
    question_tokens: int = 24
    agent_system_tokens: int = 500
    """A list of about fifteen tools."""
    tool_result_tokens: int = 60
    """What a tool gives back in each turn."""
    separate_prompt_tokens: int = 128
    separate_answer_tokens: int = 64
    depths: tuple[int, ...] = (512, 1024, 2048, 4096)
    """Tokens in the context when an answer begins."""

    def scaled(self, factor: float) -> "Sizes":
        """Every length times `factor`, and at least 4.

        Example:
            >>> Sizes().scaled(0.5).depths
            (256, 512, 1024, 2048)
        """

        def scale(value: int) -> int:
            return max(4, round(value * factor))

        found = {
            name: [scale(one) for one in value] if isinstance(value, tuple) else scale(value)
            for name, value in msgspec.structs.asdict(self).items()
        }
        return msgspec.convert(found, Sizes)
