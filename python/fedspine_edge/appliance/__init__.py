"""What an image's own services do on the board: health, slots, Wi-Fi, trying the board out. No torch, no numpy."""
