"""What this machine remembers between commands: a folder that may be deleted at any time.

$SMOOTHQUANT_CACHE, else $XDG_CACHE_HOME/smoothquant, else ~/.cache/smoothquant
    families/   verdicts on families (`recipes.trust.verdicts`)
    digests/    SHA-256 of files that have not changed since (`smoothquant.digests`)
"""

from __future__ import annotations

import os
from pathlib import Path


def place(kind: str) -> Path:
    """The folder where one kind of thing is remembered. It need not be there, or be writable."""
    own = os.environ.get("SMOOTHQUANT_CACHE")
    if own:
        return Path(own) / kind
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "smoothquant" / kind
