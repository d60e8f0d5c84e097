"""Tables in, numbers and verdicts out."""
