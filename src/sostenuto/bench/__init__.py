"""Methods, models, schedulers and peers side by side in one run: how fast, how good, at which cost in memory."""
