"""Numbers of public implementations that cannot be installed beside this project, and the scripts that made them."""
