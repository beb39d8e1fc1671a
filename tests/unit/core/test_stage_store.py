import pytest

from sepdeploy.core.files import write_text
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
            write_text(path, text)  # as every stage does: what was set aside may be the same file

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


def test_a_forgotten_stage_runs_once_more_and_keeps_its_file_until_then(tmp_path):
    bundle = Bundle(tmp_path)
    bundle.run("a")
    bundle.store.forget("stage")
    assert (tmp_path / "result").read_text() == "a"
    with pytest.raises(UsageError):
        bundle.run("a", fails=True)
    assert (tmp_path / "result").read_text() == "a"
    assert bundle.run("a")


def test_what_was_set_aside_comes_back_with_its_record(tmp_path):
    bundle = Bundle(tmp_path)
    bundle.run("a")
    bundle.run("same", name="other", file="work/other")
    bundle.store.set_aside()
    bundle.run("b")
    bundle.run("new", name="later", file="later")
    bundle.store.bring_back()
    assert (tmp_path / "result").read_text() == "a"
    assert not Bundle(tmp_path).run("a")
    assert not Bundle(tmp_path).run("same", name="other", file="work/other")
    assert Bundle(tmp_path).run("new", name="later", file="later"), "its record is gone, so it is made anew"
    bundle.store.forget_aside()
    assert not (tmp_path / "work" / "aside").exists()


def test_a_record_that_points_out_of_the_bundle_is_not_followed(tmp_path):
    bundle = Bundle(tmp_path / "bundle")
    (tmp_path / "outside").write_text("theirs")
    bundle.store._records["bad"] = {"key": "", "files": {"../outside": "", str(tmp_path / "outside"): ""}}
    bundle.store.set_aside()
    (tmp_path / "bundle" / "work" / "outside").write_text("ours")
    bundle.store.bring_back()
    assert (tmp_path / "outside").read_text() == "theirs"


@pytest.mark.parametrize("damage", ["records", "file"])
def test_what_was_set_aside_and_lost_is_made_anew(tmp_path, damage):
    bundle = Bundle(tmp_path)
    bundle.run("a")
    bundle.store.set_aside()
    bundle.run("b")
    (tmp_path / "work" / "aside" / ("stages.json" if damage == "records" else "result")).unlink()
    bundle.store.bring_back()
    assert Bundle(tmp_path).run("a")
    assert (tmp_path / "result").read_text() == "a"


def test_without_links_files_are_copied(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError("no links here")

    monkeypatch.setattr("pathlib.Path.hardlink_to", no_links)
    bundle = Bundle(tmp_path)
    bundle.run("a")
    bundle.store.set_aside()
    bundle.run("b")
    bundle.store.bring_back()
    assert not Bundle(tmp_path).run("a")
