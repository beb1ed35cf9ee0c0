"""Device images: built, checked, provisioned and written at the desk; nothing here runs on a board."""
