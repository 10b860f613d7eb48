"""The training loop, the optimizer that DeepSpeed owns, and exact resume."""
