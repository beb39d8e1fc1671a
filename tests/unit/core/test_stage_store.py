import pytest

from sepdeploy.core.stage_store import StageStore, locked, require_usable
from sepdeploy.errors import UsageError


class Bundle:
    """A store with one stage that copies text, and a log of what happened."""

    def __init__(self, folder) -> None:
        self.folder = folder
        self.log = []
        (folder / "work").mkdir(parents=True, exist_ok=True)
        self.store = StageStore(folder, on_change=lambda: self.log.append("change"))

    def run(self, text, *, name="stage", file="result", fails=False) -> bool:
        path = self.folder / file

        def make():
            self.log.append("make")
            if fails:
                raise UsageError("no")
            self.store.before_change()
            path.write_text(text)

        return self.store.run(name, {"text": text}, (path,), make)


def test_same_inputs_run_once_even_in_a_later_process(tmp_path):
    assert Bundle(tmp_path).run("a")
    later = Bundle(tmp_path)
    assert not later.run("a")
    assert later.log == []
    assert later.run("b")
    assert later.log == ["make", "change"]
    assert (tmp_path / "result").read_text() == "b"


@pytest.mark.parametrize("damage", ["edit", "delete"])
def test_changed_or_missing_files_are_made_again(tmp_path, damage):
    Bundle(tmp_path).run("a")
    if damage == "edit":
        (tmp_path / "result").write_text("x")
    else:
        (tmp_path / "result").unlink()
    assert Bundle(tmp_path).run("a")
    assert (tmp_path / "result").read_text() == "a"


def test_a_failed_stage_changes_nothing_and_is_not_remembered(tmp_path):
    Bundle(tmp_path).run("a")
    later = Bundle(tmp_path)
    with pytest.raises(UsageError):
        later.run("b", fails=True)
    assert later.log == ["make"]
    assert (tmp_path / "result").read_text() == "a"
    assert Bundle(tmp_path).run("b")


def test_change_is_announced_once_and_before_the_file_changes(tmp_path):
    bundle = Bundle(tmp_path)
    bundle.run("a")
    bundle.run("b", name="other", file="other")
    assert bundle.log == ["make", "change", "make"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"stage": 3}', b"\xff"])
def test_damaged_records_are_forgotten(tmp_path, content):
    Bundle(tmp_path).run("a")
    (tmp_path / "work" / "stages.json").write_bytes(content)
    assert Bundle(tmp_path).run("a")


def test_usable_folders(tmp_path):
    require_usable(tmp_path / "new")
    require_usable(tmp_path)
    (tmp_path / "work").mkdir()  # all that a run killed at its very start leaves
    require_usable(tmp_path)
    with locked(tmp_path):
        (tmp_path / "model.onnx").touch()
    require_usable(tmp_path)


@pytest.mark.parametrize("name", ["thesis.txt", ".hidden"])
def test_folders_of_other_files_are_not_touched(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match="holds other files"), locked(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_files_are_no_folders(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match=r"cannot write .*choose another --output"), locked(path):
            pass


def test_lock_is_exclusive_and_ends_with_its_block(tmp_path):
    with locked(tmp_path), pytest.raises(UsageError, match="another run is writing to"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_lock_removes_what_killed_runs_left_and_nothing_else(tmp_path):
    with locked(tmp_path):
        pass
    for folder in ("", "original", "work", "work/quality"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / ".model.77.tmp.onnx").touch()
        (tmp_path / folder / "model.tmp.onnx").touch()
    with locked(tmp_path):
        assert not list(tmp_path.rglob(".*"))
        assert len(list(tmp_path.rglob("model.tmp.onnx"))) == 4
