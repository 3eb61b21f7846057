"""What `quantize_checkpoint` leaves beside its target: all that was there, whatever happens."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import warnings
from contextlib import nullcontext
from pathlib import Path

import hypothesis
import pytest
import safetensors
import torch
from checkpoints import write_checkpoint, write_tokenizer
from hypothesis import strategies as st

import glm4
from glm4 import hub, quantize, working_folder
from glm4.cli import main
from glm4.quantize import quantize_checkpoint
from glm4.working_folder import MARK, WorkingFolder, rename_new


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_tokenizer(write_checkpoint(tmp_path_factory.mktemp("sources") / "glm4"))


def small(source, target):
    """The quickest there is."""
    return quantize_checkpoint(source, target, 8, None, device="cpu", progress=False)


def everything(root: Path) -> dict[str, tuple[int, bytes | str | None]]:
    """Each path under `root`: its kind and mode, its bytes or where it links to."""
    found = {}
    for path in sorted(root.rglob("*")):
        mode = path.lstat().st_mode
        content: bytes | str | None = None
        if stat.S_ISLNK(mode):
            content = os.readlink(path)
        elif stat.S_ISREG(mode):
            content = path.read_bytes()
        found[str(path.relative_to(root))] = mode, content
    return found


OTHERS = ("thesis.txt", ".tmpnlO8eN")  # nobody's, and safetensors' for a file that is being made


def marked(folder: Path, *names: str) -> Path:
    """A folder with the mark of a run, as one leaves it that was killed, and files of `names`."""
    folder.mkdir(exist_ok=True)
    inode = folder.stat().st_ino
    lines = [f"glm4 quantize works in {folder.name}, inode {inode}", "99.safetensors 0"]
    for name in names:
        (folder / name).write_text(name)
        if name not in OTHERS:
            lines += [f"{name} 0", f"{name} {(folder / name).stat().st_ino}"]
    (folder / MARK).write_text("".join(f"{line}\n" for line in lines))
    return folder


LEFT = "target.partial-0123abcd"
LEFT_NAMES = (LEFT, *(f"target.partial-{digit * 8}" for digit in "02468acef"))
NAMES = (
    *("target.partial", ".target.partial", "target.partial.lock", "target.partial-"),
    *("target.partial-89abcdef0", "target.tmp", "target~", ".target", MARK, ".tmpAbC123"),
    *("0.safetensors", "model.safetensors", "config.json", "tokenizer.json", *LEFT_NAMES),
)


def make_neighbour(path: Path, kind: str, source: Path) -> None:
    """Something of the user's at `path`."""
    root = path.parent
    if kind == "file":
        path.write_text("mine")
    elif kind == "hard link":
        os.link(root / "mine" / "thesis.txt", path)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "link to left folder":
        path.symlink_to(marked(root / "elsewhere" / path.name, "0.safetensors"))
    elif kind.startswith("link to "):
        goal = {"file": "mine/thesis.txt", "folder": "mine", "source": source, "nothing": "gone"}
        path.symlink_to(goal[kind.removeprefix("link to ")])
    elif kind == "folder":
        path.mkdir(mode=0o750)
    elif kind == "checkpoint":
        shutil.copytree(source, path)
    elif kind == "copy of a left folder":  # with the mark of another inode
        shutil.copytree(marked(root / "elsewhere" / path.name, "0.safetensors"), path)
    elif kind == "mark alone":
        path.mkdir()
        (path / MARK).write_text("")
    elif kind == "link as mark":
        marked(path, "0.safetensors")
        (path / MARK).rename(root / "elsewhere" / path.name)
        (path / MARK).symlink_to(root / "elsewhere" / path.name)
    elif kind == "left folder with thesis":
        marked(path, "0.safetensors", "thesis.txt")
    elif kind == "left folder with link":
        marked(path, "config.json")
        (path / "model.safetensors").symlink_to(root / "mine" / "thesis.txt")
    elif kind == "left folder with folder":
        marked(path, "config.json")
        (path / "model.safetensors").mkdir()


LEFT_KINDS = (
    *("copy of a left folder", "mark alone", "link as mark", "link to left folder"),
    *("left folder with thesis", "left folder with link", "left folder with folder"),
)
KINDS = (
    *("file", "hard link", "fifo", "link to file", "link to folder", "link to source"),
    *("link to nothing", "folder", "checkpoint", *LEFT_KINDS),
)
ENDS = ("success", "refused", "made meanwhile", "full disk", "interrupted")


@hypothesis.settings(
    max_examples=40,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    neighbours=st.dictionaries(st.sampled_from(NAMES), st.sampled_from(KINDS), max_size=4),
    left=st.dictionaries(
        st.sampled_from(LEFT_NAMES), st.sampled_from(LEFT_KINDS), min_size=1, max_size=3
    ),
    place=st.sampled_from(("model", *NAMES)),
    is_marked=st.booleans(),
    end=st.sampled_from(ENDS),
)
def test_neighbours_stay(source, neighbours, left, place, is_marked, end):
    """Every byte that is not of the run, with each mode and link, is after it as it was before."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "mine").mkdir()
        (root / "elsewhere").mkdir()
        (root / "mine" / "thesis.txt").write_text("years of work")
        given = shutil.copytree(source, root / place)
        if is_marked:  # a run whose source was left by another
            marked(given)
        target = root / "target"
        for name, kind in (neighbours | left).items():
            if name != place:
                make_neighbour(root / name, kind, given)
        if end == "refused":
            make_neighbour(target, "link to folder", given)
        before = everything(root)

        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is left as it is
            expected = sabotage(patch, end, target)
            with expected:
                small(given, target)
        after = everything(root)
        if end == "made meanwhile":
            assert after.pop("target")[1] == b"of another"
            kept = {name for name in after if name not in before}
            assert len({name.partition("/")[0] for name in kept}) == 1
            assert {Path(name).name for name in kept} >= {"model.safetensors", "config.json"}
            after = {name: after[name] for name in before}
        if end == "success":
            made = {name for name in after if name.partition("/")[0] == "target"}
            assert {Path(name).name for name in made} == {
                *("target", "model.safetensors", "config.json", "tokenizer.json")
            }
            after = {name: after[name] for name in after if name not in made}
        assert after == before


def sabotage(patch, end, target):
    """Brings about that a run to `target` ends so; what to expect of it."""

    def meanwhile(*_):
        target.write_text("of another")
        return {}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    def interrupted(*_):
        raise KeyboardInterrupt

    if end == "success":
        return nullcontext()
    if end == "made meanwhile":
        patch.setattr(quantize, "write_quantization", meanwhile)
        return pytest.raises(glm4.CheckpointError, match=r"meanwhile; the finished .* is kept in")
    if end == "full disk":
        patch.setattr(quantize, "save_file", full)
        return pytest.raises(glm4.CheckpointError, match=r"0\.safetensors: cannot be written \(No")
    if end == "interrupted":
        patch.setattr(quantize.Shards, "close", interrupted)
        return pytest.raises(KeyboardInterrupt)
    return pytest.raises(glm4.CheckpointError, match="must not exist yet")


def test_left_folders_are_cleared(source, tmp_path):
    """All of them, with all kinds of files that a run makes; those of other targets are not."""
    files = [MARK, ".tmpnlO8eN", "0.safetensors", "12.safetensors", "model.safetensors"]
    files += ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"]
    files += hub.COMPANIONS
    marked(tmp_path / LEFT, *files[1:])
    marked(tmp_path / "target.partial-00000000")
    others = [marked(tmp_path / f"{name}.partial-0123abcd") for name in ("target2", "atarget")]
    small(source, tmp_path / "target")
    assert set(tmp_path.iterdir()) == {tmp_path / "target", *others}


def test_left_folder_with_a_file_of_the_users(source, tmp_path):
    left = marked(tmp_path / LEFT, "0.safetensors", "thesis.txt")
    before = everything(left)
    with pytest.warns(UserWarning, match=r"0123abcd: .* is left as it is, since thesis\.txt in it"):
        small(source, tmp_path / "target")
    assert everything(left) == before


@pytest.mark.parametrize("name", ["LICENSE", "0.safetensors"])
def test_left_folder_with_a_file_of_the_users_under_a_name_of_ours(name, source, tmp_path):
    """Never made by the run, or put in the place of what it made."""
    left = marked(tmp_path / LEFT, "0.safetensors")
    (left / "mine").write_text("mine")
    (left / "mine").rename(left / name)
    before = everything(left)
    with pytest.warns(UserWarning, match=f"0123abcd: .* is left as it is, since {name} in it"):
        small(source, tmp_path / "target")
    assert everything(left) == before


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("", "'': must end in the name of a new folder"),
        (".", "must end in the name of a new folder"),
        ("/", "'/': must end in the name of a new folder"),
        ("..", "must end in the name of a new folder"),
        ("new/..", "'new/..': must end in the name of a new folder"),
        ("new/../target", "new does not exist"),
        ("file/target", "file must be a folder"),
        ("dangling/target", "dangling must be a folder"),
        ("dangling", "must not exist yet"),
        ("nul\0", "must end in the name of a new folder"),
        ("nul\0/target", "must end in the name of a new folder"),
        ("n" * 250, r"cannot be made \(File name too long\)"),
        ("new/" + "n" * 250, r"cannot be made \(File name too long\)"),
        ("model/int4", "int4: must not lie in .*model, which is read"),
        ("model/new/int4", "int4: must not lie in .*model, which is read"),
        ("link/int4", "int4: must not lie in .*model, which is read"),
        ("~nobody-of-this-name/target", "~nobody-of-this-name/target: there is no such user"),
    ],
)
def test_places_that_cannot_be(target, message, source, tmp_path, monkeypatch):
    """Found before any work; and no folder is left."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(source, "model")
    Path("link").symlink_to("model")
    Path("file").write_text("")
    Path("dangling").symlink_to("gone")
    before = everything(tmp_path)
    monkeypatch.setattr(quantize, "preparer", lambda *_: lambda *_: pytest.fail("worked"))
    with pytest.raises(glm4.CheckpointError, match=message):
        small("model", target)
    assert everything(tmp_path) == before


def test_place_that_may_not_be_written(source, tmp_path, monkeypatch):
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, _: real(path, os.F_OK) and path != tmp_path)
    with pytest.raises(glm4.CheckpointError, match=r"target: .* that you may write into"):
        small(source, tmp_path / "target")
    if os.path.isdir("/proc/self"):  # nor may root, whom `access` lets write everywhere
        with pytest.raises(glm4.CheckpointError, match="cannot be made"):
            small(source, "/proc/target")
    with pytest.raises(TypeError, match="target must be a path, got 3"):
        small(source, 3)


def test_a_trailing_slash_and_missing_parents(source, tmp_path):
    small(source, f"{tmp_path}/new/folders/target/")
    assert (tmp_path / "new" / "folders" / "target" / "config.json").is_file()


def test_failure_leaves_nothing(source, tmp_path, monkeypatch):
    broken = shutil.copytree(source, tmp_path / "source")
    write_checkpoint(broken, tensors={"lm_head.weight": torch.full((320, 64), torch.nan)})
    with pytest.raises(glm4.CheckpointError, match=r"lm_head\.weight must be finite"):
        small(broken, tmp_path / "new" / "folders" / "target")

    def interrupted(*_):
        raise KeyboardInterrupt

    for owner, name in ((quantize, "copy_companions"), (WorkingFolder, "publish")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                small(source, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("kind", ["file", "folder", "link to nothing", "checkpoint"])
def test_target_made_meanwhile(kind, source, tmp_path, monkeypatch):
    """An empty folder, too, which a plain rename would replace."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    target = tmp_path / "target"
    write = quantize.write_quantization
    made = []

    def meanwhile(schemes):
        make_neighbour(target, kind, source)
        made.append(everything(tmp_path / "mine") | everything(target))
        return write(schemes)

    monkeypatch.setattr(quantize, "write_quantization", meanwhile)
    with pytest.raises(glm4.CheckpointError) as caught:
        small(source, target)
    assert made == [everything(tmp_path / "mine") | everything(target)]
    [kept] = tmp_path.glob("target.partial-*")
    assert (
        f"target: was made by another meanwhile; the finished checkpoint is kept in {kept}"
        in str(caught.value)
    )
    monkeypatch.undo()
    assert not (kept / MARK).exists() and glm4.load(kept, "cpu", progress=False).config.layers == 2
    # It is the user's now.
    target.rename(tmp_path / "other")
    small(source, target)
    for path in target.iterdir():
        assert path.read_bytes() == (kept / path.name).read_bytes()


@pytest.mark.parametrize("can", [True, False])
def test_rename_new(can, tmp_path, monkeypatch):
    """Where the system can and where it cannot rename to a new name alone."""
    if not can:
        monkeypatch.setattr(working_folder.ctypes, "CDLL", lambda *_, **__: object())
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    (source / "x").write_text("x")
    for make in (target.mkdir, target.touch, lambda: target.symlink_to("gone")):
        make()
        with pytest.raises(FileExistsError):
            rename_new(source, target)
        assert (source / "x").is_file() and os.path.lexists(target)
        target.rename(tmp_path / "away")
        shutil.rmtree(tmp_path / "away", ignore_errors=True)
        (tmp_path / "away").unlink(missing_ok=True)
    rename_new(source, target)
    assert not source.exists() and (target / "x").read_text() == "x"
    with pytest.raises(FileNotFoundError):
        rename_new(source, tmp_path / "c")


def test_folder_moved_away(source, tmp_path, monkeypatch):
    """A run whose folder was replaced writes and deletes nothing in what stands there now."""
    add = quantize.Shards.add

    def replace(self, name, tensor):
        if name == "lm_head.weight_packed":
            self.folder.path.rename(tmp_path / "moved")
            self.folder.path.mkdir()
            (self.folder.path / "0.safetensors").write_text("mine")
        add(self, name, tensor)

    monkeypatch.setattr(quantize.Shards, "add", replace)
    with pytest.raises(glm4.CheckpointError, match=r"cannot be written \(somebody changed"):
        small(source, tmp_path / "target")
    [stands] = tmp_path.glob("target.partial-*")
    assert everything(stands)["0.safetensors"][1] == b"mine"
    assert (tmp_path / "moved" / "tokenizer.json").is_file()


HANGS = """
import sys, time
from glm4 import quantize
quantize.SHARD_SIZE = 50_000
flush = quantize.Shards.flush
def hang(self):
    flush(self)
    if len(self.files) == 2:
        print("two shards", flush=True)
        time.sleep(600)
quantize.Shards.flush = hang
quantize.quantize_checkpoint(sys.argv[1], sys.argv[2], 8, None)
"""


def test_killed_run(source, tmp_path):
    """-9 in the middle: nothing looks finished, no second run meddles, the next one is whole."""
    target = tmp_path / "target"
    command = [sys.executable, "-c", HANGS, source, target]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"two shards\n"
    [partial] = tmp_path.iterdir()
    assert re.fullmatch(r"target\.partial-[0-9a-f]{8}", partial.name)
    with pytest.raises(glm4.CheckpointError, match=f"{partial.name}: another run is writing"):
        small(source, target)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = sorted(path.name for path in partial.iterdir())
    assert left == [MARK, "0.safetensors", "1.safetensors", "tokenizer.json"]
    assert not target.exists()
    with pytest.raises(glm4.CheckpointError, match=r"config\.json: no such file"):
        glm4.load(partial)

    small(source, target)
    assert not partial.exists() and not (target / "1.safetensors").exists()
    clean = small(source, tmp_path / "clean")
    for path in clean.iterdir():
        assert path.read_bytes() == (target / path.name).read_bytes()


# Forks a run for each moment, which dies at it, and another that starts over. A moment is the Nth
# system call since the first folder was made, or the Nth byte of a file.
KILLS = """
import json, os, pathlib, resource, signal, sys
from glm4 import quantize
quantize.SHARD_SIZE = 150_000
source, root, step = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3])

def run(target, arm=lambda n: None, n=0):
    arm(n)
    quantize.quantize_checkpoint(source, target, 8, None, device="cpu", progress=False)

def call(n):
    calls = []
    def hook(event, args):
        family = event.partition(".")[0]
        if event == "os.mkdir" or calls and family in ("os", "open", "fcntl", "ctypes"):
            calls.append(event)
            if len(calls) == n:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

def byte(n):
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, n))

def forked(*args):
    pid = os.fork()
    if not pid:
        try:
            run(*args)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1]

for arm, following in ((call, lambda n: n + step), (byte, lambda n: n * 7)):
    n, status = 1, -1
    while status:
        target = root / f"{arm.__name__}-{n}" / "target"
        target.parent.mkdir()
        status = forked(target, arm, n)
        left = [path.name for path in target.parent.rglob("*")]
        again = 0 if target.exists() else forked(target)
        print(json.dumps([str(target), status, left, again]), flush=True)
        n = following(n)
"""


@pytest.mark.parametrize(
    "step", [5, pytest.param(1, marks=pytest.mark.exhaustive, id="every call")]
)
def test_killed_at_any_moment(step, source, tmp_path, monkeypatch):
    """The next run needs no help, what it writes is what any run would, and it clears up."""
    monkeypatch.setattr(quantize, "SHARD_SIZE", 150_000)
    clean = everything(small(source, tmp_path / "clean"))
    command = [sys.executable, "-c", KILLS, source, tmp_path, str(step)]
    lines = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.splitlines()
    seen = set()
    for line in lines:
        target, status, left, again = json.loads(line)
        seen.update(left)
        assert again == 0 and status in (0, signal.SIGKILL, signal.SIGXFSZ, 1 << 8), line
        found = everything(Path(target))
        found.pop(MARK, None)  # killed after the rename
        assert found == clean, line
        for beside in set(Path(target).parent.iterdir()) - {Path(target)}:
            # Without a whole mark nobody knows whose it is, but there is nothing else in it either.
            rest = everything(beside)
            mark = f"glm4 quantize works in {beside.name}, inode {beside.stat().st_ino}\n".encode()
            assert rest.keys() <= {MARK} and all(mark != text for _, text in rest.values()), line
    assert len(lines) > 12 and seen >= {"target", MARK, "0.safetensors", "config.json"}
    if safetensors.__version__ >= "0.8":  # a file under a name of its own first
        assert any(re.fullmatch(working_folder.TEMPORARY, name) for name in seen)


@pytest.mark.parametrize(
    ("n_bytes", "name", "reason"),
    [
        (10, r"target\.partial-\w+", "No space left on device"),  # the mark, of which a part fits
        (500, r"tokenizer\.json", "File too large"),
        (30_000, r"0\.safetensors", "Error while serializing: I/O error: File too large.*"),
    ],
)
def test_full_disk_is_one_line(n_bytes, name, reason, source, tmp_path, capsys):
    """A limit on the size of files stands in for the disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        code = main(["quantize", str(source), str(tmp_path / "new" / "target"), "--bits", "8"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    line = rf"glm4: .*{name}: cannot be written \({reason}\)\n"
    assert code == 1 and re.fullmatch(line, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []
