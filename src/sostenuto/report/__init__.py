"""From results to pictures and a self-contained page."""
