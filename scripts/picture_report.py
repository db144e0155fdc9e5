"""Draw docs/images/report.png: the top of a run's report, by headless Chromium.

python scripts/picture_report.py RUN [--browser chromium]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "report.png"
WIDTH, HEIGHT = 1000, 1500  # pixels


def main() -> None:
    """Write the report of a run again and take its picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--browser", default="chromium")
    args = parser.parse_args()
    subprocess.run([sys.executable, "-m", "pretrain", "report", str(args.run)], check=True)
    page = (args.run / "report.html").resolve().as_uri()
    with tempfile.TemporaryDirectory() as profile:
        command = f"{args.browser} --headless --no-sandbox --disable-gpu --hide-scrollbars".split()
        command += ["--disable-background-networking", f"--user-data-dir={profile}"]
        command += [f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={PICTURE}", page]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    print(PICTURE)


if __name__ == "__main__":
    main()
