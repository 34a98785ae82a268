"""Pure functions of the method: noise schedule, DDIM and its closed form, student, losses."""
