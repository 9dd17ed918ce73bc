"""Bytes and numbers: stored weight formats, their matmuls, and the files they come from. Knows no model."""
