"""Pure functions of the method: noise schedule, DDIM and its closed form, the one-pass student, the losses."""
