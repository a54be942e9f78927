"""What every room stands on at run time: processes and shards, a module's parameters, quiet libraries."""
