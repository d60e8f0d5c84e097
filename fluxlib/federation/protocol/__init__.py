"""What travels between server and participants, in which form, and what protects it."""
