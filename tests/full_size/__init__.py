"""The real shapes: gigabytes and minutes, so all of it is `slow`."""
