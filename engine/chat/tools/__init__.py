"""Calls of tools: one form inside, and the syntaxes in which models write them."""
