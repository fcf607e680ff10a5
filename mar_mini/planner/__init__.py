"""What a model takes before anything is started: work, memory, time."""
