import dataclasses
import pathlib

import pytest

from policymix.runs import records


@dataclasses.dataclass(frozen=True)
class Source:
    path: pathlib.Path


@pytest.fixture
def source(tmp_path):
    (tmp_path / "source/meta/v1").mkdir(parents=True)
    return Source(tmp_path / "source")


def _written(tmp_path, *episodes):
    records.write(tmp_path / "out", episodes)
    found = sorted((tmp_path / "out").rglob("*"))
    return {str(p.relative_to(tmp_path / "out")): p.read_text() for p in found if p.is_file()}


def test_rows_follow_their_episodes_and_are_renumbered(source, tmp_path):
    rows = 'video,who\nepisode_000003.mp4,"Ann, left"\nruns/episode_000001.mp4,Bo\nx_0.mp4,Cy\n'
    (source.path / "meta/v1_record.csv").write_text(rows)
    (source.path / "meta/v1/record.csv").write_text("episode_index,grade\n0,7\n1,8\n3,9\n3,10\n")
    assert _written(tmp_path, (source, 1), (source, 3)) == {
        "v1_record.csv": 'video,who\nepisode_000001.mp4,"Ann, left"\nepisode_000000.mp4,Bo\n',
        "v1/record.csv": "episode_index,grade\n0,8\n1,9\n1,10\n",
    }


@pytest.mark.parametrize(
    "text",
    [
        "camera,lens\ntop,8\n",
        "video,who\nepisode_000001.mp4,Bo\nlost,Cy\n",
        "episode_index,who\n1,Bo\n?,Cy\n",
        "episode_index,who\n1,Bo\n1.5,Cy\n",
    ],
)
def test_what_names_no_episodes_is_copied_whole(source, tmp_path, text, capsys):
    (source.path / "meta/record.csv").write_text(text)
    assert _written(tmp_path, (source, 1)) == {"record.csv": text}
    assert "meta/record.csv: a row names no episode, so all are copied" in capsys.readouterr().out


def test_numbers_as_pandas_writes_them(source, tmp_path, capsys):
    (source.path / "meta/record.csv").write_text("episode_index,who\n0.0,Bo\n 2.0,Cy\n1.,Di\n")
    assert _written(tmp_path, (source, 1), (source, 2)) == {
        "record.csv": "episode_index,who\n1,Cy\n0,Di\n"
    }
    assert not capsys.readouterr().out


def test_what_holds_nothing_is_left_out(source, tmp_path):
    (source.path / "meta/record.csv").write_text("\n")
    (source.path / "meta/old_record.csv").mkdir()
    assert _written(tmp_path, (source, 1)) == {}


def test_two_sources_share_a_file(source, tmp_path):
    other = Source(tmp_path / "other")
    (other.path / "meta").mkdir(parents=True)
    (source.path / "meta/record.csv").write_text("video,who\nepisode_000000.mp4,Bo\n")
    (other.path / "meta/record.csv").write_text("video,day\nepisode_000000.mp4,3\n")
    assert _written(tmp_path, (source, 0), (other, 0)) == {
        "record.csv": "video,who,day\nepisode_000000.mp4,Bo,\nepisode_000001.mp4,,3\n"
    }


@pytest.mark.parametrize("text", [b"a,b\n1\n", b'a,b\n"1,2\n', b"a,b\n\xff,2\n"])
def test_no_table(source, text):
    (source.path / "meta/record.csv").write_bytes(text)
    with pytest.raises(ValueError, match=r"meta/record.csv is no table"):
        records.read(source)
