"""Functions on tensors, and the tensors a plugin trains; nothing here knows a host library."""
