"""Training data: noise, shards, images, latents, pairs. Imports nothing from the other rooms."""
