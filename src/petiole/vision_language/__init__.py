"""A language model that sees: eyes, memory and the frozen language model as one."""
