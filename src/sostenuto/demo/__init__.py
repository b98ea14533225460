"""The embedded model: its network, pipeline, data and training commands."""
