"""What `benches/run` is made of: a module per comparison, and what they share."""
