"""Online class-incremental learning: one pass over a stream, exemplars, and no word on where an experience ends."""
