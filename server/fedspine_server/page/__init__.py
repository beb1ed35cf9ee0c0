"""The fleet page: what the server or a run's directory knows, for an operator's eyes; it decides nothing."""
