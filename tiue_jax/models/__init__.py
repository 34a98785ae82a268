"""Pure Flax linen modules: layers, UNet, autoencoder, text encoder, LoRA; published variants."""
