"""What a layer computes: one file a kind, the state it keeps, and the decoder that puts blocks in a row."""
