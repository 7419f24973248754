"""Short runs that choose the settings of a long one."""
