"""Attention: softmax over rows that are kept of earlier tokens, one file a kind."""
