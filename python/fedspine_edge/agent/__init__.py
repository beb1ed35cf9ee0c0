"""The device's side of the HTTPS link: an agent that is always there, and a worker that tunes."""
