"""The configuration file: parsed, overridden and checked, with one line for whatever is wrong."""
