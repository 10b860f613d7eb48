"""The EAGLE-3 draft: one decoder layer over the target's hidden states, its unrolled training step, its folder."""
