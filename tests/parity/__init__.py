"""Module by module against torch: diffusers 0.42.1 and transformers 5.23, random weights, fp32."""
