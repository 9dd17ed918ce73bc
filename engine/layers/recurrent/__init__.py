"""Recurrent mixers: what they keep of a sequence does not grow with it, one file a kind."""
