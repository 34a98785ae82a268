"""Recorded numbers of the authors' implementation, and the replay that holds ours against them."""
