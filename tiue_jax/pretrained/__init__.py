"""Diffusers folders to parameter trees and back: names, safetensors, configs, tokenizer."""
