"""Which devices take part, what fits on them, and how long a round would take them."""
