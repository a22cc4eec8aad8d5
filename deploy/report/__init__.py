"""`rectify report`, and the tables that it shares with `rectify run`."""
