import numpy as np
import pytest
from etils import epath

from jsurgery.data.latents import batches
from jsurgery.data.shards import Records, array_text, shard_path, text_array, write_shard
from jsurgery.errors import InputError


def record(number):
    rng = np.random.default_rng(number)
    return {
        "latents": rng.normal(size=(2, 3, 3, 4)).astype(np.float16).transpose(1, 0, 2, 3),
        "timestep": np.float32(number),
        "caption": text_array(f"número {number}"),
    }


@pytest.fixture
def folder(tmp_path):
    for shard, numbers in enumerate((range(4), range(4, 7))):
        write_shard(shard_path(tmp_path, shard), (record(n) for n in numbers))
    return epath.Path(tmp_path)


def test_records_are_read_back_in_order(folder):
    records = Records(folder)
    assert len(records) == 7
    for number in range(7):
        found = records[number]
        assert np.array_equal(found["latents"], record(number)["latents"])
        assert found["timestep"].shape == () and found["timestep"] == number
        assert array_text(found["caption"]) == f"número {number}"


def test_an_interrupted_write_leaves_no_shard(folder):
    def failing():
        yield record(0)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_shard(shard_path(folder, 2), failing())
    assert len(Records(folder)) == 7


def test_a_folder_without_shards_is_refused(tmp_path):
    with pytest.raises(InputError, match="found none"):
        Records(tmp_path)


def test_a_batch_depends_on_its_number_and_the_seed_alone(folder):
    first, again = batches(folder, 2, seed=5), batches(folder, 2, seed=5)
    order = [3, 0, 9, 3]
    for index in order:
        assert first[index]["captions"] == again[index]["captions"]
    epoch = [caption for index in range(7) for caption in first[index]["captions"]]
    assert all(epoch.count(f"número {n}") == 2 for n in range(7))
    assert [first[i]["captions"] for i in range(7)] != [batches(folder, 2, seed=6)[i]["captions"] for i in range(7)]
    assert first[0]["latents"].dtype == np.float32 and first[0]["latents"].shape == (2, 3, 2, 3, 4)


def test_rows_of_a_batch_are_those_of_the_whole_batch(folder):
    whole = batches(folder, 4, seed=5)
    parts = [batches(folder, 4, seed=5, rows=rows) for rows in ([0, 3], [1], [2])]
    for index in (0, 5, 2):
        captions, (outer, second, third) = whole[index]["captions"], (part[index]["captions"] for part in parts)
        assert [outer[0], *second, *third, outer[1]] == captions
    assert len(set(whole[0]["captions"])) == 4
