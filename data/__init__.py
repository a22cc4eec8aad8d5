"""What a batch is: noise, shards, images, latents, pairs. Imports nothing of ours."""
