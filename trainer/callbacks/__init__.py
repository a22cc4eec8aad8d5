"""Lightning callbacks: checkpoints, averages of weights, the log, metrics and failure handling."""
