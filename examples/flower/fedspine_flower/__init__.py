"""The two apps that Flower starts."""
