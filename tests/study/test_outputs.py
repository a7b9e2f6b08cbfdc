from fdg_jax.study import outputs


def test_a_file_that_two_processes_write_at_a_time_is_whole(tmp_path):
    """As where --report is asked for while the study writes its own."""
    path = tmp_path / "table.md"

    def first(partial):
        partial.write_text("first")
        outputs._replace(path, lambda partial: partial.write_text("second"))
        assert path.read_text() == "second"

    outputs._replace(path, first)
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]
