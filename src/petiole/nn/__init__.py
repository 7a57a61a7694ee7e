"""Pure functions on tensors; nothing here knows a host library."""
