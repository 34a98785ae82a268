"""The embedded teacher: a small real Stable Diffusion, trained here from nothing on drawn scenes."""
