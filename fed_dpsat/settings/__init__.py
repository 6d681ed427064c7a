"""What a run is told: each setting with its bounds, and what cannot be set together."""
