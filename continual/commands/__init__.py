"""What the commands on a finished run do: its bank, its atoms, its scores under reworded prompts."""
