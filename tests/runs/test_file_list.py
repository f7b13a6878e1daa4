import os

from raptor_hf.runs.file_list import FileList


def listed(folder):
    return FileList.of_files([str(file) for file in sorted(folder.iterdir())], folder)


def test_a_list_is_paths_sizes_and_times(tmp_path):
    for name in ("a", "b\nc", "ü\udcff"):
        (tmp_path / name).write_text("content")
    before = listed(tmp_path)
    assert listed(tmp_path).digest == before.digest
    os.utime(tmp_path / "a", ns=(1, 1))
    touched = listed(tmp_path)
    assert touched.digest != before.digest
    assert touched.content_digest == before.content_digest
    assert touched.first_difference(before) == "a changed (3 files before, 3 now)"
    (tmp_path / "a").write_text("more content")
    assert listed(tmp_path).content_digest != before.content_digest


def test_a_list_is_read_back(tmp_path):
    (tmp_path / "files").mkdir()
    for name in ("a", "b\nc", "ü\udcff"):
        (tmp_path / "files" / name).touch()
    before = listed(tmp_path / "files")
    before.save(tmp_path / "images.files.gz")
    (tmp_path / "files" / "d").touch()
    again = FileList.load(tmp_path / "images.files.gz")
    assert again.digest == before.digest and again.lines == before.lines
    assert "d is new" in listed(tmp_path / "files").first_difference(again)


def test_what_is_missing_or_no_file_is_listed_too(tmp_path):
    missing = FileList.of_files([str(tmp_path / "x")], tmp_path)
    assert missing.lines == ["-1\t0\tx"]
    assert FileList(fingerprint="abc").digest == FileList(fingerprint="abc").content_digest == "abc"
