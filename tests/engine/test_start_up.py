"""What a run imports is collected once: the garbage collector is as it was before, but for what is there for good."""

import gc
import sys

import pytest

import continual.engine
from continual.commands.run import import_engine


def test_the_collector_leaves_imports_alone_and_works_on(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = __import__("continual.engine.stage_loop", fromlist=["StageLoop"])
    monkeypatch.setattr(continual.engine, "stage_loop", loop)  # put back with the module itself
    monkeypatch.delitem(sys.modules, "continual.engine.stage_loop")
    gc.unfreeze()  # what the tests themselves have frozen
    before = gc.get_freeze_count()
    try:
        import_engine()
        assert gc.isenabled()
        assert (frozen := gc.get_freeze_count()) > before
        kept = [{} for _ in range(100)]
        import_engine()  # another run of the same process: what it leaves behind has to be collected
        assert kept and gc.get_freeze_count() == frozen
    finally:
        gc.unfreeze()
        gc.freeze()  # as it was: later tests need not look at all of it
