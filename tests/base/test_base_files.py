"""Files are whole or absent; state on disk needs no pickle."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memspan.base import BadInput, nearest, optional
from memspan.base.files import (
    CorruptFile,
    atomic_path,
    atomic_write,
    fingerprint,
    load_state,
    save_state,
)
from memspan.base.rng import rng, seed_of, uniform


def test_a_failed_write_leaves_the_earlier_file_whole(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    atomic_write(target, "first")
    with pytest.raises(RuntimeError, match="stop"), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError("stop")
    assert target.read_text() == "first"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_an_existing_file_is_not_overwritten_unless_asked(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    atomic_write(target, "first", overwrite=False)
    with pytest.raises(FileExistsError, match="choose another path"):
        atomic_write(target, "second", overwrite=False)
    assert target.read_text() == "first"


def test_a_file_that_appears_meanwhile_is_not_overwritten_either(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    with pytest.raises(FileExistsError), atomic_path(target, overwrite=False) as temporary:
        temporary.write_text("late")
        target.write_text("early")
    assert target.read_text() == "early"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_a_full_disk_gives_a_clear_error_and_no_loss(tmp_path: Path) -> None:
    """A file-size limit makes the kernel refuse the write, as a full disk does."""
    target = tmp_path / "state.safetensors"
    save_state(target, {"w": torch.zeros(4)}, {"n": 1})
    program = f"""
import resource, signal, torch
from memspan.base.files import save_state, atomic_write
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
big = torch.zeros(100_000)
for write in (
    lambda: save_state({str(target)!r}, {{"w": big}}),
    lambda: atomic_write({str(target)!r}, b"x" * 100_000),
):
    try:
        write()
    except OSError as error:
        print("earlier files are whole" in str(error), "state.safetensors" in str(error))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * 4
    tensors, header = load_state(target)
    assert header == {"n": 1}
    assert torch.equal(tensors["w"], torch.zeros(4))
    assert len(list(tmp_path.iterdir())) == 1


def test_a_kill_while_writing_leaves_the_earlier_file(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    atomic_write(target, b"first")
    program = f"""
import os, signal
from memspan.base.files import atomic_path
with atomic_path({str(target)!r}) as temporary:
    temporary.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == -signal.SIGKILL
    assert target.read_bytes() == b"first"


@pytest.mark.parametrize("keep", [0, 7, 60])
def test_a_truncated_state_is_named_and_refused(tmp_path: Path, keep: int) -> None:
    target = tmp_path / "state.safetensors"
    save_state(target, {"w": torch.randn(10)}, {"task": 1})
    target.write_bytes(target.read_bytes()[:keep])
    with pytest.raises(CorruptFile, match=r"state\.safetensors is truncated"):
        load_state(target)


def test_a_state_of_another_configuration_is_refused_with_both_values(tmp_path: Path) -> None:
    target = tmp_path / "state.safetensors"
    save_state(target, {}, {"epochs": 3})
    with pytest.raises(BadInput, match=r"epochs=3.*4 is expected"):
        load_state(target, expect={"epochs": 4})


def test_a_foreign_safetensors_file_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.ones(1)}, str(tmp_path / "foreign.safetensors"))
    with pytest.raises(CorruptFile):
        load_state(tmp_path / "foreign.safetensors")


@given(
    st.lists(st.tuples(st.sampled_from(["float32", "int64", "uint8", "bool"]), st.integers(0, 5))),
    st.dictionaries(st.text(), st.integers() | st.text() | st.none()),
)
def test_state_round_trips_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[str, int]], header: dict[str, object]
) -> None:
    tensors = {f"t{i}": torch.arange(n).to(getattr(torch, dtype)) for i, (dtype, n) in enumerate(shapes)}
    target = tmp_path_factory.mktemp("state") / "s"
    save_state(target, tensors, header)
    loaded, read = load_state(target)
    assert read == header
    assert loaded.keys() == tensors.keys()
    assert all(
        torch.equal(loaded[name], tensors[name]) and loaded[name].dtype == tensors[name].dtype
        for name in tensors
    )


def test_views_and_shared_storages_are_saved_as_what_they_show(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    save_state(tmp_path / "s", {"base": base, "column": base[:, 1], "same": base})
    loaded, _ = load_state(tmp_path / "s")
    assert torch.equal(loaded["column"], base[:, 1])


def test_a_fingerprint_knows_dtype_and_shape() -> None:
    x = np.arange(6)
    prints = {
        fingerprint(x),
        fingerprint(x.reshape(2, 3)),
        fingerprint(x.astype(np.int32)),
        fingerprint(x.tobytes()),
    }
    assert len(prints) == 4
    assert fingerprint(x) == fingerprint(x.copy())
    with pytest.raises(BadInput):
        fingerprint(object())


def test_fingerprint_of_a_file_is_its_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert fingerprint(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_written_files_have_the_users_default_mode(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    atomic_write(tmp_path / "ours", "")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


@given(st.lists(st.text() | st.integers(-(2**40), 2**40) | st.booleans(), min_size=1))
def test_draws_depend_on_their_keys_alone(keys: list[str | int | bool]) -> None:
    first = uniform(*keys)
    rng("something", "else").random(100)
    assert uniform(*keys) == first
    assert 0 <= first < 1
    assert np.array_equal(rng(*keys).integers(0, 1000, 5), rng(*keys).integers(0, 1000, 5))
    assert uniform(*keys, 0) != first


def test_keyed_draws_are_uniform_and_in_range() -> None:
    draws = np.array([uniform("u", i) for i in range(4000)])
    assert abs(draws.mean() - 0.5) < 4 * (1 / 12 / 4000) ** 0.5
    assert np.histogram(draws, 10, (0, 1))[0].min() > 300
    assert all(0 <= seed_of("s", i) < 2**63 for i in range(100))


def test_a_missing_extra_says_how_to_install_it() -> None:
    with pytest.raises(ImportError, match=r"pip install 'memspan\[peers\]'"):
        optional("a_module_that_is_not_there", extra="peers")


def test_near_names_are_offered_first() -> None:
    assert nearest("ledgr", ["memo", "ledger"]).startswith("did you mean ledger?")
    assert nearest("zzz", ["memo"]) == "Known: memo"
