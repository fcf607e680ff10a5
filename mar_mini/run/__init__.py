"""Running it big: one way to train, states that survive, pictures and latents on disk, the Hub."""
