"""What differs between the versions of the libraries that are built on: one function for each name that moves."""
