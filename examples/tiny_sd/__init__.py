"""The embedded teacher: a small real Stable Diffusion, trained from nothing on drawn scenes."""
