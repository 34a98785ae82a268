"""Image features and the statistics computed from them, one statistic a file."""
