"""What a participant does: the Flower client app and what stays on its device."""
