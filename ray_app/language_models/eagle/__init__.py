"""A drafter that reads the target's last states: its network along whole answers, and what trains it."""
