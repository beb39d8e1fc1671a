"""What a network consists of and what it costs, found by running it once."""
