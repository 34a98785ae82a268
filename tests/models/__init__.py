"""What holds for the networks without torch: sizes, LoRA, the halves of the UNet."""
