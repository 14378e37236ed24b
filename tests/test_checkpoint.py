"""Checkpoints: what is read back is compared bit by bit with what was written; files are tampered with."""

import builtins
import io
import json
import os
import pickle
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlimit import training
from jaxlimit.core import locks, storage, writing
from jaxlimit.core.locks import LOCK
from jaxlimit.core.memory import HOST_MEMORY
from jaxlimit.core.storage import Checkpoint
from jaxlimit.spectrum import lanczos
from jaxlimit.spectrum.lanczos_files import LanczosFiles

FINGERPRINT = {"dim": 7, "loss_tolerance": 0.1, "key": [0, 3], "num_probes": None}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "deep" / "run"


def same_bits(x, y):
    x, y = np.asarray(x), np.asarray(y)
    return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


def names_in(folder):
    """What is in a folder beside the lock of the process that works there."""
    return sorted(path.name for path in folder.iterdir() if path.name != LOCK)


@pytest.mark.parametrize(
    "array",
    [
        np.array([0.1, -0.0, np.nan, np.inf, 5e-324, np.nextafter(1, 2)]),
        np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array([], np.float32).reshape(0, 3),
        np.array(3.5),
        np.array([2**62, -1]),
        np.array([True, False]),
    ],
)
def test_arrays_come_back_exactly(array, folder):
    Checkpoint(folder, FINGERPRINT).save_tree("name", array)
    loaded = Checkpoint(str(folder), FINGERPRINT).load_tree("name", 0)
    assert same_bits(loaded, np.ascontiguousarray(array) if array.ndim else array)


def test_half_precision_comes_back_exactly(folder):
    store = Checkpoint(folder, FINGERPRINT)
    tree = {"x": jnp.arange(3, dtype=jnp.bfloat16)}
    store.save_tree("name", tree)
    loaded = store.load_tree("name", tree)["x"]
    assert loaded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(loaded, tree["x"])


def test_a_name_is_overwritten_as_a_whole(folder):
    store = Checkpoint(folder, FINGERPRINT)
    store.save_tree("name", np.arange(1000))
    store.save_tree("name", np.arange(3))
    store.save_tree("other", np.zeros(2))
    assert store.load_tree("name", 0).tolist() == [0, 1, 2]
    assert names_in(folder) == ["name.npz", "other.npz", "problem.json"]


def test_a_write_that_was_interrupted_leaves_the_old_file(folder, monkeypatch):
    store = Checkpoint(folder, FINGERPRINT)
    store.save_tree("name", np.arange(3))

    def killed(file, **arrays):
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", killed)
    with pytest.raises(KeyboardInterrupt):
        store.save_tree("name", np.arange(5))
    assert Checkpoint(folder, FINGERPRINT).load_tree("name", 0).tolist() == [0, 1, 2]


def test_trees(folder):
    store = Checkpoint(folder, FINGERPRINT)
    tree = {"b": [np.arange(3.0), None, (np.float32(2), 5)], "a": {f"{i}": np.full(2, i) for i in range(15)}}
    store.save_tree("tree", tree)
    loaded = store.load_tree("tree", jax.tree.map(lambda x: 0, tree))
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    assert all(same_bits(x, y) for x, y in zip(jax.tree.leaves(loaded), jax.tree.leaves(tree), strict=True))


def test_what_was_not_saved_is_none(folder):
    store = Checkpoint(folder, FINGERPRINT)
    assert store.load_tree("name", 0) is None
    assert store.load_tree("name", [1, 2]) is None


@pytest.mark.parametrize("max_basis", [None, 32, 0])
@pytest.mark.parametrize("steps", [6, 32, 70])
def test_lanczos_goes_on_to_the_same_bits(steps, max_basis, folder, dtype):
    matrix = np.random.default_rng(0).standard_normal((120, 120))
    device = jnp.asarray(matrix + matrix.T, dtype)
    starts = {
        "a": jnp.asarray(np.random.default_rng(1).standard_normal((2, 5, 20)), dtype),
        "b": jnp.ones((2, 20), dtype),
    }

    def product(tree):
        rows = jnp.concatenate([tree["a"].reshape(2, 100), tree["b"]], axis=1) @ device
        return {"a": rows[:, :100].reshape(2, 5, 20), "b": rows[:, 100:]}

    initial = lanczos.init(starts)
    state = lanczos.run(product, initial, steps, max_basis)
    store = Checkpoint(folder, FINGERPRINT)
    assert LanczosFiles(store).load("run", initial) is initial
    LanczosFiles(store).save("run", state)
    loaded = LanczosFiles(Checkpoint(folder, FINGERPRINT)).load("run", initial)
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    assert all(same_bits(x, y) for x, y in zip(jax.tree.leaves(loaded), jax.tree.leaves(state), strict=True))
    assert isinstance(loaded.current["a"], jax.Array)
    assert isinstance(loaded.diagonal, np.ndarray)
    resumed, uninterrupted = (lanczos.run(product, each, 6, max_basis) for each in (loaded, state))
    assert all(
        same_bits(x, y) for x, y in zip(jax.tree.leaves(resumed), jax.tree.leaves(uninterrupted), strict=True)
    )
    assert resumed.diagonal.shape == (2, steps + 6)
    LanczosFiles(store).save("run", resumed)
    again = LanczosFiles(store).load("run", initial)
    assert all(same_bits(x, y) for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(resumed), strict=True))


def test_a_panel_is_written_once_and_missed_when_it_is_gone(folder):
    def product(rows):
        return rows * jnp.arange(1.0, 201.0)

    initial = lanczos.init(jnp.ones((1, 200)))
    files = LanczosFiles(Checkpoint(folder, FINGERPRINT))
    state = lanczos.run(product, initial, 40)
    files.save("run", state)
    panel = folder / "run-panel-0000.npz"
    written = panel.stat().st_mtime_ns
    files.save("run", lanczos.run(product, state, 40))
    assert panel.stat().st_mtime_ns == written
    assert names_in(folder) == ["problem.json", "run-panel-0000.npz", "run-panel-0001.npz", "run.npz"]
    panel.unlink()
    with pytest.raises(ValueError, match=r"run-panel-0000\.npz is missing .* remove run\.npz"):
        files.load("run", initial)


def test_panels_in_host_memory_are_loaded_into_host_memory(folder):
    def product(rows):
        return rows * jnp.arange(1.0, 201.0)

    initial, files = lanczos.init(jnp.ones((1, 200))), LanczosFiles(Checkpoint(folder, FINGERPRINT))
    state = lanczos.run(product, initial, 80, 32, 64)
    files.save("run", state)
    loaded = files.load("run", initial, resident=1)
    for each in (state, loaded):
        on_host = [panel.sharding.memory_kind == HOST_MEMORY for panel in each.basis]
        assert on_host == [False, True, False]
    resumed, uninterrupted = (lanczos.run(product, each, 20, 32, 64) for each in (loaded, state))
    assert all(
        same_bits(x, y) for x, y in zip(jax.tree.leaves(resumed), jax.tree.leaves(uninterrupted), strict=True)
    )


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Checkpoint(None, FINGERPRINT)
    state = lanczos.run(lambda v: 2 * v, lanczos.init(jnp.ones((1, 3))), 1)
    store.save_tree("name", np.ones(3))
    store.save_tree("tree", [np.ones(3)])
    LanczosFiles(store).save("state", state)
    assert store.load_tree("name", 0) is None
    assert store.load_tree("tree", [0]) is None
    assert LanczosFiles(store).load("state", state) is state
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_lets_others_in_when_its_work_ends_in_an_exception(folder):
    def fail(*_):
        raise KeyboardInterrupt

    kept = []  # as a notebook keeps the last exception, and with it all frames
    try:
        training.train(
            lambda w, x: jnp.mean((w - x) ** 2),
            jnp.zeros(()),
            jnp.ones(4),
            jax.random.key(0),
            epochs=2,
            learning_rate=0.1,
            on_epoch=fail,
            checkpoint=folder,
        )
    except KeyboardInterrupt as error:
        kept.append(error)
    assert kept
    assert not (folder / ".lock").exists()


def test_files_of_others_are_not_removed(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "thesis.tmp").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        Checkpoint(folder, FINGERPRINT)
    assert (folder / "thesis.tmp").read_text() == "mine"
    (folder / "thesis.tmp").unlink()
    Checkpoint(folder, FINGERPRINT)
    at_work, idle = folder / "at_work", folder / "idle"
    name = f"run.npz.{'0' * 32}.tmp"
    for part in (at_work, idle):
        part.mkdir()
        (part / name).write_text("half")
    (at_work / ".lock").write_text("process 1")
    Checkpoint(folder, FINGERPRINT)
    assert (at_work / name).exists()
    assert not (idle / name).exists()


# Folders that are refused.


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"dim": 8}, "dim"),
        ({"loss_tolerance": np.nextafter(0.1, 1)}, "loss_tolerance"),
        ({"key": [0, 4], "num_probes": 2}, "key, num_probes"),
        ({"new": 1}, "new"),
    ],
)
def test_another_problem(change, names, folder):
    Checkpoint(folder, FINGERPRINT).save_tree("name", np.ones(2))
    Checkpoint(folder, dict(FINGERPRINT))
    with pytest.raises(ValueError, match=rf"of another problem: {names} differ\. Name another folder"):
        Checkpoint(folder, {**FINGERPRINT, **change})
    with pytest.raises(ValueError, match="of another problem: dim differ"):  # which this one does not have
        Checkpoint(folder, {name: value for name, value in FINGERPRINT.items() if name != "dim"})
    assert json.loads((folder / "problem.json").read_text()) == {"format": 1, **FINGERPRINT}
    assert Checkpoint(folder, FINGERPRINT).load_tree("name", 0).tolist() == [1, 1]


def test_a_folder_with_other_things(folder):
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("Introduction")
    with pytest.raises(ValueError, match="is not empty and holds no checkpoint: name another folder"):
        Checkpoint(folder, FINGERPRINT)
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


def test_a_fingerprint_that_is_not_a_number_is_itself(folder):
    Checkpoint(folder, {"loss": float("nan")})
    Checkpoint(folder, {"loss": float("nan")})
    with pytest.raises(ValueError, match="loss differ"):
        Checkpoint(folder, {"loss": 1.0})


def test_an_empty_folder(folder):
    folder.mkdir(parents=True)
    Checkpoint(folder, FINGERPRINT)
    assert (folder / "problem.json").exists()


def test_a_run_killed_while_it_made_the_folder_can_start_again(folder):
    folder.mkdir(parents=True)
    (folder / "problem.json.0123456789abcdef0123456789abcdef.tmp").write_text('{"dim"')
    (folder / LOCK).write_text("process 1 on another machine")
    store = Checkpoint(folder, FINGERPRINT)
    assert names_in(folder) == ["problem.json"]
    del store
    assert not (folder / LOCK).exists()


def test_a_folder_of_another_version(folder):
    folder.mkdir(parents=True)
    (folder / "problem.json").write_text(json.dumps(FINGERPRINT))
    with pytest.raises(ValueError, match="is not of a checkpoint of this version"):
        Checkpoint(folder, FINGERPRINT)


# Several processes.


def process(folder, code):
    """Another process with the checkpoint of a folder, which says when it has it and waits for a line."""
    code = (
        "from jaxlimit.core.storage import Checkpoint\nimport numpy as np\n"
        f"store = Checkpoint({str(folder)!r}, {FINGERPRINT!r})\n{code}"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


WORK = "print('begun', flush=True); input(); store.save_tree('name', np.arange(3)); print('done', flush=True)"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")
def test_a_second_process_waits_and_goes_on_with_what_the_first_has_done(folder, monkeypatch, caplog):
    first = process(folder, WORK)
    assert first.stdout.readline() == "begun\n"
    with pytest.raises(ValueError, match="another problem"):  # without waiting
        Checkpoint(folder, {**FINGERPRINT, "dim": 8})
    with pytest.raises(ValueError, match=rf"process {first.pid} on .* is at work in .*: wait"):
        storage.claim(folder, storage.CHECKPOINT, FINGERPRINT, wait=False)
    looks = []

    def look(seconds):
        looks.append(seconds)
        if len(looks) == 2:
            first.communicate("\n")

    monkeypatch.setattr(locks.time, "sleep", look)
    assert Checkpoint(folder, FINGERPRINT).load_tree("name", 0).tolist() == [0, 1, 2]
    assert len(looks) == 2
    assert caplog.text.count(f"waiting for process {first.pid}") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")
def test_the_lock_of_a_killed_process_is_taken_over(folder):
    first = process(folder, WORK)
    assert first.stdout.readline() == "begun\n"
    (folder / "name.npz.0123456789abcdef0123456789abcdef.tmp").write_bytes(b"half of it")
    first.kill()
    first.communicate()
    assert (folder / LOCK).exists()
    store = Checkpoint(folder, FINGERPRINT)
    assert names_in(folder) == ["problem.json"]
    assert str(os.getpid()) in (folder / LOCK).read_text()
    Checkpoint(folder, FINGERPRINT)  # this process does not wait for itself
    assert (folder / LOCK).exists()
    del store
    assert not (folder / LOCK).exists()


def test_a_folder_that_was_removed_is_locked_anew(folder):
    first = locks.lock(folder)
    shutil.rmtree(folder)
    assert not first.holds
    with locks.lock(folder) as second:
        assert second.holds
        first.release()
        assert (folder / LOCK).exists()
    assert not (folder / LOCK).exists()


# Files that are damaged.


def with_unknown_compression(data):
    """In the header of the file and in the table at the end: NumPy passes NotImplementedError on."""
    data = bytearray(data)
    for mark, offset in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        at = data.index(mark) + offset
        data[at : at + 2] = (98).to_bytes(2, "little")
    return bytes(data)


DAMAGE = {
    "unknown compression": with_unknown_compression,
    "half": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "no zip": lambda data: b"no zip at all" * 20,
    "a byte less": lambda data: data[:-1],
}


# Whether the file is also closed is the test after this one.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <_io:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_files(damage, folder):
    store = Checkpoint(folder, FINGERPRINT)
    store.save_tree("name", np.arange(200))
    path = folder / "name.npz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"name\.npz is damaged \(.*\): remove it to go on"):
        store.load_tree("name", 0)


def test_damaged_files_are_closed(folder, monkeypatch):
    store = Checkpoint(folder, FINGERPRINT)
    store.save_tree("name", np.arange(200))
    path = folder / "name.npz"
    path.write_bytes(DAMAGE["half"](path.read_bytes()))
    opened, builtin = [], builtins.open

    def recorded(*args, **kwargs):
        opened.append(builtin(*args, **kwargs))
        return opened[-1]

    monkeypatch.setattr(builtins, "open", recorded)
    monkeypatch.setattr(io, "open", recorded)
    with pytest.raises(ValueError, match="is damaged"):
        store.load_tree("name", 0)
    monkeypatch.undo()
    still_open = [file for file in opened if not file.closed]
    for file in still_open:
        file.close()
    assert opened
    assert not still_open


def test_flipped_bits_are_noticed(folder):
    store = Checkpoint(folder, FINGERPRINT)
    store.save_tree("name", np.arange(200))
    path = folder / "name.npz"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="is damaged"):
        store.load_tree("name", 0)


class Trap:
    """Unpickling this would run code."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


def test_pickles_are_not_opened(folder):
    store = Checkpoint(folder, FINGERPRINT)
    np.savez(folder / "name.npz", array=np.array([Trap()], object))
    with pytest.raises(ValueError, match="is damaged"):
        store.load_tree("name", 0)
    (folder / "name.npz").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="is damaged"):
        store.load_tree("name", 0)


def test_a_whole_number_is_the_same_problem_as_its_float(tmp_path):
    Checkpoint(tmp_path / "it", {"budget": 1000, "parts": [1, float("nan")]})
    Checkpoint(tmp_path / "it", {"budget": 1000.0, "parts": [1.0, float("nan")]})
    with pytest.raises(ValueError, match="budget differ"):
        Checkpoint(tmp_path / "it", {"budget": 1000.5, "parts": [1, float("nan")]})


def test_a_damaged_identity(folder):
    Checkpoint(folder, FINGERPRINT)
    (folder / "problem.json").write_text("{")
    with pytest.raises(ValueError, match=r"problem\.json"):
        Checkpoint(folder, FINGERPRINT)


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (np.zeros(4), r"float64 of shape \(3,\), not float64 of shape \(4,\)"),
        (np.zeros((3, 1)), r"float64 of shape \(3,\), not float64 of shape \(3, 1\)"),
        (np.zeros(3, np.float32), "float64 of shape .*, not float32"),
        (jnp.zeros(3, jnp.bfloat16), "float64 of shape .*, not bfloat16"),
        ((np.zeros(3), np.zeros(3)), "1, not 2"),
    ],
)
def test_arrays_of_another_problem_are_refused(like, message, folder):
    store = Checkpoint(folder, FINGERPRINT)
    store.save_tree("name", np.zeros(3))
    with pytest.raises(ValueError, match=rf"name\.npz holds other arrays .* \({message}.*remove it to go on"):
        store.load_tree("name", like)


def test_a_folder_is_removed_as_a_whole(folder, monkeypatch):
    """A process that was killed meanwhile leaves what the next one removes."""
    inner = folder / "inner"
    with Checkpoint(inner, FINGERPRINT) as store:
        store.save_tree("name", np.zeros(3))
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
    writing.remove(inner)
    monkeypatch.undo()
    assert not inner.exists()
    (left,) = folder.iterdir()
    assert writing.is_leftover(left)
    with Checkpoint(folder, FINGERPRINT):
        assert names_in(folder) == ["problem.json"]
    with Checkpoint(inner, FINGERPRINT) as store:
        assert store.load_tree("name", 0) is None
