"""Private names of other libraries that this project leans on: one function each, with the version it was read in.

Nothing else in the project reaches into PEFT, transformers, Lightning, torch or jsonargparse; methods of theirs that
our subclasses override are listed in ``overrides``. When one of them moves a name, a test under ``tests/compat`` says
which, and this room is where it is mended.
"""
