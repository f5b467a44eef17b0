"""Other libraries' interfaces to attention, on top of attngen's own."""
