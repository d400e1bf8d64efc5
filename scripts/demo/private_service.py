"""Start the private reward service for the demo: a fresh key, then `reward-service serve`.

python scripts/demo/private_service.py --port P --key-file FILE --home DIR [--settings FILE]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path


def main() -> None:
    """Write a new API key to `--key-file`, then become the service."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", required=True)
    parser.add_argument("--key-file", type=Path, required=True)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--settings", type=Path, help="settings.toml of the service")
    options = parser.parse_args()
    if options.settings:
        shutil.copy(options.settings, options.home / "settings.toml")
    service = [sys.executable, "-m", "reward_service.cli"]
    environment = {**os.environ, "REWARD_SERVICE_HOME": str(options.home)}
    create = [*service, "keys", "create", "--name", "demo", "--scopes", "score:reward,score:components"]
    key = subprocess.run(create, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    options.key_file.touch(mode=0o600)
    options.key_file.write_text(key)
    serve = [*service, "serve", "--host", "127.0.0.1", "--port", options.port]
    os.execve(sys.executable, serve, environment)


if __name__ == "__main__":
    main()
