"""What is learned: interpolants, predictions, denoisers, samplers, codecs, networks."""
