"""Pure Flax linen modules: layers, UNet, autoencoder, text encoder, LoRA trees and the published variants."""
