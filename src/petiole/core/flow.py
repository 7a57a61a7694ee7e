"""Facts about the tokens of one forward pass."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Flow:
    """What a plugin may need to know about the tokens it sees; travels as an argument and is returned.

    Args:
        num_prefix: Tokens in front of the patches: class, distillation and register tokens, then prompts.
        grid: Height and width of the patch grid; None once the patches no longer form one (dropped or merged).
        num_prompts: How many of the prefix tokens are prompts of a plugin.
    """

    num_prefix: int
    grid: tuple[int, int] | None
    num_prompts: int = 0
