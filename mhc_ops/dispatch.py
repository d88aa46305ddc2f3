"""(tokens, hidden, device) to kernel keys and grids: pure integers, finite, enumerable."""
PARTIAL_WIDTH = 32
