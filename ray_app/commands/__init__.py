"""The commands of `ray-app`: one folder or file each, read from its `command.py` outwards."""
