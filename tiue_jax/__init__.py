"""TiUE in JAX: distil Stable Diffusion into a student that draws an image in one pass.

The method is arXiv 2505.21960 ("One-Way Ticket: Time-Independent Unified Encoder"): the UNet's
encoder runs once, its decoder at K timesteps in parallel, and the image follows in closed form.
"""

__version__ = "0.1.0"
