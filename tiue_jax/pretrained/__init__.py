"""Diffusers folders to parameter trees and back: names, safetensors, configs, tokenizer."""

import os

# On import, transformers advises to install torch. Nothing here needs it.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
