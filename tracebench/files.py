"""Files that are replaced whole or not at all, so that a killed run leaves none half written."""

import json
import os


def write_bytes(file, data):
    """Write a file under another name first, and then give it its own."""
    # (No two processes write under the same name.)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())  # else a power cut could leave the new name without content
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)  # it is still there if the disk was full


def write_json(file, value):
    write_bytes(file, json.dumps(value, indent=1).encode("utf-8"))
