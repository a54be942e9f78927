"""What the commands on a finished run do: its bank, its atoms, its scores in other words."""
