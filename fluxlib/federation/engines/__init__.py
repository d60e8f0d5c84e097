"""What carries the messages: in process, Flower's simulation, SuperLink and SuperNodes."""
