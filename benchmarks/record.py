"""What a run has measured, in a file that is whole at every moment.

    {"run": "quantized", "provenance": …, "options": …, "of": [every stage that was asked for],
     "stages": {"o": {"state": "started" | "done" | "failed", "error": …, "seconds": …,
                      "result": …}}}

A stage's result is a part of what `merged` puts together: lists are joined, dicts united. Files
from before this form hold the whole in the open.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from benchmarks.provenance import write_json

Result = dict[str, Any]

# What must be the same for a run to go on with what its file holds; and what a person calls it.
SAME = {
    "source_hash": "the sources",
    "versions": "the packages",
    "device": "the device",
    "device_type": "the device",
    "threads": "the number of threads",
    "quick": "--quick",
}
# What a file from before this form holds, by run.
FORMER = {"ops": "ops", "models": "ops", "heats": "cpu-model", "quantized": "quantized"}
FORMER |= {"quality": "quality"}


class Record:
    """The stages of one run.

    Args:
        run: "ops", "cpu-model", "quantized", "quality".
        origin: its provenance.
        options: what else must be the same for the run to go on.
        path: the file; None keeps nothing.
        fresh: what the file holds is measured again.

    Raises:
        ValueError: the file is not this run's, or real and would become one of --quick.
    """

    def __init__(
        self, run: str, origin: Result, options: Result, path: Path | None, fresh: bool = False
    ) -> None:
        self.path = self.place = path
        self.entries: Result = {}
        self.whole: Result = {"run": run, "provenance": origin, "options": options, "of": []}
        self.note = ""  # why what the file holds is not gone on with
        if path is None or not path.exists():
            return
        found = read(path, f"{run}: --json must be new or an earlier result of it")
        if found["run"] != run:
            raise ValueError(
                f"{run}: --json must be new or an earlier result of it, {path} is of {found['run']}"
            )
        if origin["quick"] and not found["provenance"].get("quick"):
            raise ValueError(f"{run}: --quick must not replace real results, {path} holds some")
        changed = [
            name for key, name in SAME.items() if found["provenance"].get(key) != origin[key]
        ]
        if found.get("options") != json.loads(json.dumps(options)):
            changed.append("the options")
        if fresh:
            return
        if "stages" not in found or changed:
            why = " and ".join(dict.fromkeys(changed)) or "the form of the file"
            self.note = f"{path}: {why} changed since, starting over"
            return
        self.entries, self.whole["of"] = found["stages"], found["of"]

    def ask_for(self, names: list[str]) -> None:
        self.whole["of"] += [name for name in names if name not in self.whole["of"]]

    def done(self, name: str) -> bool:
        return self.entries.get(name, {}).get("state") == "done"

    def result(self, name: str) -> Result:
        return self.entries[name]["result"]

    def begin(self, name: str) -> None:
        self.began = time.monotonic()
        self.entries[name] = {"state": "started", "error": None, "result": {}}
        self.write(name)

    def keep(self, name: str, result: Result) -> None:
        self.entries[name]["result"] = result
        self.write(name)

    def end(self, name: str, error: str | None) -> None:
        self.entries[name] |= {"state": "failed" if error else "done", "error": error}
        self.write(name)

    def write(self, name: str) -> None:
        self.entries[name]["seconds"] = round(time.monotonic() - self.began, 1)
        if self.path is not None:
            write_json(self.path, self.whole | {"stages": self.entries})

    def summary(self) -> str:
        """How far it got, for who stopped it."""
        done = sum(self.done(name) for name in self.whole["of"])
        where = f"kept in {self.place}" if self.place else "not kept, for want of --json FILE"
        goes_on = "; the same command goes on" if self.place else ""
        return f"{done} of {len(self.whole['of'])} stages done, {where}{goes_on}"


class FolderRecord(Record):
    """The same with a file for each stage, its result in the open: those of the GPU run."""

    def __init__(self, origin: Result, folder: Path, fresh: bool = False) -> None:
        super().__init__("gpu", origin, {}, None)
        self.folder = self.place = folder
        folder.mkdir(parents=True, exist_ok=True)
        for file in () if fresh else sorted(folder.glob("*.json")):
            found = read(file, "gpu: --out must hold JSON only")
            same = all(found["provenance"].get(key) == origin[key] for key in SAME)
            if "stage" not in found:
                continue
            if same and found.get("error") is None:
                self.entries[found["stage"]] = {"state": "done", "result": found}
            elif not same:
                self.note = f"{folder}: made by other sources or packages, starting over"

    def write(self, name: str) -> None:
        entry = self.entries[name]
        head = {"stage": name, "provenance": self.whole["provenance"]}
        error = "did not end" if entry["state"] == "started" else entry["error"]
        tail = {"error": error, "seconds": round(time.monotonic() - self.began, 1)}
        write_json(self.folder / f"{name}.json", head | entry["result"] | tail)


def read(path: Path, expected: str) -> Result:
    """A result file, its run named.

    Raises:
        ValueError: it is none; `expected` opens the line.
    """
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{expected}, got {path}: not JSON ({error})") from None
    if not isinstance(found, dict) or not isinstance(found.get("provenance"), dict):
        raise ValueError(f"{expected}, got {path}")
    if "run" not in found:
        former = next((run for key, run in FORMER.items() if key in found), "gpu")
        found["run"] = "gpu" if "stage" in found else former
    return found


def merged(found: Result) -> Result:
    """The results of a file's stages as one, whatever its form; beside them, where stages are
    missing, `interrupted`: "3 of 8"."""
    if "stages" not in found:
        return found
    whole: Result = {"provenance": found["provenance"], "run": found["run"]}
    for name in found["of"]:
        for key, part in found["stages"].get(name, {}).get("result", {}).items():
            known = whole.get(key)
            if isinstance(part, list) and isinstance(known or [], list):
                whole[key] = [*(known or ()), *part]
            elif isinstance(part, dict) and isinstance(known or {}, dict):
                whole[key] = (known or {}) | part
            elif known is None:
                whole[key] = part
    done = sum(found["stages"].get(name, {}).get("state") == "done" for name in found["of"])
    if done < len(found["of"]):
        whole["interrupted"] = f"{done} of {len(found['of'])}"
    return whole
