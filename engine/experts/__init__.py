"""Routed experts: where they are, and who computes them."""
