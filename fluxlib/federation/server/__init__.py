"""What the server does in a round: the Flower server app, aggregation, and who is believed."""
