"""Settings as text: files that cannot be read, and what an override means."""

from __future__ import annotations

import pytest

from fed_dpsat.errors import SettingError
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.settings.flat import check_names, parse_overrides


def test_a_broken_or_missing_file_is_named(tmp_path):
    with pytest.raises(SettingError, match="No such file"):
        RunConfig.load(tmp_path / "nothing.toml")
    (tmp_path / "broken.toml").write_text("lr = = 1")
    with pytest.raises(SettingError, match="valid TOML"):
        RunConfig.load(tmp_path / "broken.toml")


@pytest.mark.parametrize(
    ("text", "value"),
    [("'linear'", "linear"), ("column = 'w'", "column = 'w'"), ("'a' + 'b'", "'a' + 'b'"), ("'", "'"), ("''", "")],
)
def test_an_override_loses_a_pair_of_quotes_around_it_and_no_other(text, value):
    assert parse_overrides([f"model={text}"]) == {"model": value}


def test_a_setting_that_was_renamed_is_refused_with_its_name():
    with pytest.raises(SettingError, match="it is input_columns now"):
        check_names({"image_column": "image"})
