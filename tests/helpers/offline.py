"""Reads back what real W&B wrote offline: records of protobuf in frames of LevelDB's log format."""

import json
import struct
import time
from pathlib import Path

BLOCK, HEADER = 2**15, 7  # bytes
FULL, LAST = 1, 4


class OfflineRun:
    """One run.

    Attributes:
        history: The rows in order.
        summary: The last value of every name.
        config: By key.
        artifacts: What was logged as such: the name, type, aliases, metadata and file names.
        metrics: What was defined: the options by the metric's name.
        folder: Its files.
    """

    def __init__(self, folder):
        (path,) = Path(folder).rglob("run-*.wandb")
        self.folder = path.parent / "files"
        self.history, self.summary, self.config = [], {}, {}
        self.artifacts, self.metrics, self.run = [], {}, None
        for record in _all_records(path):
            self._see(record)

    def _see(self, record):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            self.history.append(_items(record.history.item))
        elif kind == "summary":
            self.summary |= _items(record.summary.update)
        elif kind == "config":
            self.config |= _items(record.config.update)
        elif kind == "run":
            self.run = record.run
            self.config |= _items(record.run.config.update)
        elif kind == "metric":
            metric = record.metric
            best = {op for op in ("min", "max", "last") if getattr(metric.summary, op)}
            self.metrics[metric.name] = {"step": metric.step_metric, "summary": best}
        elif kind == "artifact":
            self._add(record.artifact)
        elif kind == "request" and record.request.HasField("log_artifact"):
            self._add(record.request.log_artifact.artifact)

    def _add(self, artifact):
        self.artifacts.append(
            {
                "name": artifact.name,
                "type": artifact.type,
                "aliases": list(artifact.aliases),
                "metadata": json.loads(artifact.metadata or "{}"),
                "files": [entry.path for entry in artifact.manifest.contents],
            }
        )

    def tables(self, name):
        """The columns and rows of all tables that were logged by a name."""
        values = [row[name] for row in self.history if name in row]
        found = [json.loads((self.folder / value["path"]).read_text()) for value in values]
        return [(table["columns"], table["data"]) for table in found]

    def images(self, name):
        """The files of all images that were logged by a name."""
        values = [row[name] for row in self.history if name in row]
        return [self.folder / path for value in values for path in value["filenames"]]


def _items(items):
    found = {}
    for item in items:
        name, *rest = [item.key] if item.key else item.nested_key
        if rest:
            found.setdefault(name, {})[".".join(rest)] = json.loads(item.value_json)
        else:
            found[name] = json.loads(item.value_json)
    return found


def _all_records(path):
    """All that a finished run wrote; it says that it is finished before its file is."""
    for _ in range(300):
        records = list(_records(path.read_bytes()))
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        time.sleep(0.1)
    raise TimeoutError(f"{path} has no end")


def _records(data):
    from wandb.proto.wandb_internal_pb2 import Record

    at, parts = HEADER, b""  # behind the file's own header
    while at + HEADER <= len(data):
        room = BLOCK - at % BLOCK
        if room < HEADER:
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        if at + HEADER + length > len(data):
            return  # the rest is being written
        parts += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (FULL, LAST):
            yield Record.FromString(parts)
            parts = b""
